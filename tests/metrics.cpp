// Metrics on pairs made by hand, the files they are written to, and the work that mfu counts.
#include "src/metrics.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <fstream>

#include "src/console.h"
#include "tests/programs.h"
#include "tests/tiny_model.h"

namespace orpo {
namespace {

using test::lines_of;
using test::text_of;

// lw = -0.5 over 4 tokens, ll = -1.5 over 2; prompt -6 over 3.
PairResult first_pair() { return {-2.0, -3.0, -6.0, 4, 2, 3, odds_ratio(-0.5, -1.5)}; }
// lw = -2 over 1, ll = -1 over 1; no prompt.
PairResult second_pair() { return {-2.0, -1.0, 0.0, 1, 1, 0, odds_ratio(-2.0, -1.0)}; }

double log_odds(double l) { return std::log(std::exp(l) / (1 - std::exp(l))); }

TEST_CASE("metrics of two pairs") {
  PairSums sums;
  HeadSettings settings;
  settings.lambda = 0.25;
  for (const PairResult& pair : {first_pair(), second_pair()}) sums.add(pair, true);
  const MetricList m = preference_metrics(sums, settings);
  const double d1 = log_odds(-0.5) - log_odds(-1.5), d2 = log_odds(-2.0) - log_odds(-1.0);
  const double penalty = (std::log(1 + std::exp(-d1)) + std::log(1 + std::exp(-d2))) / 2,
               nll = (2.0 + 6.0 + 2.0) / (4 + 3 + 1);
  const auto check = [&](const char* name, double value) {
    CHECK_MESSAGE(metric(m, name) == doctest::Approx(value).epsilon(1e-12), name);
  };
  check("loss", nll + 0.25 * penalty);
  check("nll_loss", nll);
  check("log_odds_ratio", -penalty);
  check("log_odds_chosen", (d1 + d2) / 2);
  check("logps/chosen", -1.25);
  check("logps/rejected", -1.25);
  check("rewards/chosen", -0.3125);
  check("rewards/rejected", -0.3125);
  check("rewards/accuracies", 0.5);
  check("rewards/margins", 0.0);
  check("delta", (1 / (1 + std::exp(d1)) + 1 / (1 + std::exp(d2))) / 2);
  check("h_chosen", (1 / (1 - std::exp(-0.5)) + 1 / (1 - std::exp(-2.0))) / 2);
  check("h_rejected", (1 / (1 - std::exp(-1.5)) + 1 / (1 - std::exp(-1.0))) / 2);
}

TEST_CASE("the supervised scope and the objective are in the loss; the other numbers stay") {
  PairSums full, response;
  full.add(first_pair(), true), response.add(first_pair(), false);
  HeadSettings settings;
  CHECK(metric(preference_metrics(response, settings), "nll_loss") == doctest::Approx(0.5));
  CHECK(metric(preference_metrics(full, settings), "nll_loss") == doctest::Approx(8.0 / 7));
  settings.objective = Objective::sft;
  const MetricList m = preference_metrics(full, settings, "eval_");
  CHECK(metric(m, "eval_loss") == metric(m, "eval_nll_loss"));
  CHECK(metric(m, "eval_rewards/margins") == doctest::Approx(0.1));
  CHECK(metric(m, "eval_log_odds_ratio") < 0);
}

TEST_CASE("rows without a rejected answer have no preference") {
  PairSums sums;
  PairResult single = first_pair();
  single.rejected_tokens = 0, single.rejected_logp_sum = 0, single.preference = {};
  sums.add(single, true);
  const MetricList m = preference_metrics(sums, {});
  CHECK(metric(m, "loss") == doctest::Approx(8.0 / 7));
  CHECK(metric(m, "logps/chosen") == doctest::Approx(-0.5));
  CHECK(std::isnan(metric(m, "logps/rejected")));
  CHECK(std::isnan(metric(m, "rewards/accuracies")));
}

TEST_CASE("sums are plain numbers that ranks add up") {
  PairSums a, b, both;
  a.add(first_pair(), true), b.add(second_pair(), true);
  both.add(first_pair(), true), both.add(second_pair(), true);
  for (size_t i = 0; i < a.values().size(); ++i) CHECK(a.values()[i] + b.values()[i] == both.values()[i]);
  CHECK(a.values().size() == 13);
}

TEST_CASE("useful work counts a shared prompt once") {
  const test::MemoryPairs pairs({{{1, 2, 3}, {4, 5}, {6, 7, 8}}});
  const Config config = test::odd_config();
  Work work;
  work.add(pairs[0], true);
  CHECK(work.tokens == 8);
  CHECK(work.rows == 6);     // 3 + 1 + 2
  CHECK(work.targets == 6);  // 2 of the prompt, 2 and 3 of the answers; the last prompt row once
  CHECK(work.visible == 6 + 4 + 9);
  const double layer = 12.0 * (30 + 18 + 3 * 17);  // qkv, attention output, gate, up, down
  CHECK(work.training_flops(config) == doctest::Approx(6 * (2 * layer * 6 + 37 * 12 * 6.0) + 12 * 2 * 18 * 19.0));
}

TEST_CASE("json lines are exact, in order, and hold no NaN") {
  CHECK(json_line({{"step", 3}, {"a/b", 0.1}, {"c", std::nan("")}, {"d", -2.5e-7}, {"e", 1.0 / 3}}) ==
        "{\"step\": 3, \"a/b\": 0.1, \"c\": null, \"d\": -2.5e-07, \"e\": 0.3333333333333333}");
}

TEST_CASE("a resumed run cuts what it will make again") {
  const TemporaryFolder folder;
  const auto file = folder.path() / "metrics.jsonl";
  {
    MetricsLog log(file, folder.path(), std::nullopt);
    log.write(0, {{"step", 0}, {"eval_loss", 2}});
    for (int step = 1; step <= 4; ++step) log.write(step, {{"step", step}, {"loss", 1.0 / step}});
  }
  std::ofstream(file, std::ios::app) << "{\"step\": 5, \"lo";  // killed while writing
  { MetricsLog log(file, folder.path(), 2); }
  const std::string first = "{\"step\": 0, \"eval_loss\": 2}\n";
  CHECK(text_of(file) == first + "{\"step\": 1, \"loss\": 1}\n{\"step\": 2, \"loss\": 0.5}\n");
  { MetricsLog log(file, folder.path(), 0); }
  CHECK(text_of(file) == first);  // an evaluation before the first step is not made again
  { MetricsLog log(file, folder.path(), std::nullopt); }
  CHECK(text_of(file).empty());
}

TEST_CASE("events are TFRecords with masked CRC-32C") {
  CHECK(crc32c("123456789") == 0xe3069283u);
  CHECK(crc32c(std::string(32, '\0')) == 0x8a9136aau);  // RFC 3720, B.4
  const TemporaryFolder folder;
  { EventsFile(folder.path(), 1).scalars(7, {{"loss", 0.5}, {"bad", std::nan("")}}); }
  std::string bytes;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) bytes = text_of(entry.path());
  int records = 0;
  for (size_t at = 0; at < bytes.size(); ++records) {
    const auto masked = [](uint32_t crc) { return (crc >> 15 | crc << 17) + 0xa282ead8u; };
    uint64_t length = 0;
    uint32_t length_crc = 0, data_crc = 0;
    std::memcpy(&length, &bytes[at], 8), std::memcpy(&length_crc, &bytes[at + 8], 4);
    REQUIRE(at + 16 + length <= bytes.size());
    CHECK(length_crc == masked(crc32c(std::string_view(bytes).substr(at, 8))));
    const std::string data = bytes.substr(at + 12, length);
    std::memcpy(&data_crc, &bytes[at + 12 + length], 4);
    CHECK(data_crc == masked(crc32c(data)));
    CHECK((data.find(records == 0 ? "brain.Event:2" : "loss") != std::string::npos));
    CHECK(data.find("bad") == std::string::npos);
    at += 16 + length;
  }
  CHECK(records == 2);
}

TEST_CASE("numbers for people") {
  CHECK(seconds_text(4.25) == "4.2 s");
  CHECK(seconds_text(187) == "3:07");
  CHECK(seconds_text(7805) == "2:10:05");
  CHECK(bytes_text(512) == "512 B");
  CHECK(bytes_text(int64_t{3} << 29) == "1.50 GiB");
}

}  // namespace
}  // namespace orpo
