#include "src/metrics.h"


#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>

#include "data/packer.h"
#include "src/arena.h"
#include "src/console.h"
#include "src/fail.h"
#include "src/files.h"

namespace orpo {

double metric(const MetricList& metrics, const std::string& name) {
  for (const auto& [key, value] : metrics)
    if (key == name) return value;
  return std::numeric_limits<double>::quiet_NaN();
}

void PairSums::add(const PairResult& r, bool nll_includes_prompt) {
  nll -= r.chosen_logp_sum + (nll_includes_prompt ? r.prompt_logp_sum : 0);
  nll_tokens += r.chosen_tokens + (nll_includes_prompt ? r.prompt_tokens : 0);
  const double lw = r.chosen_logp_sum / std::max(1.0, r.chosen_tokens);
  rows += 1;
  chosen += lw;
  if (r.rejected_tokens == 0) return;
  const double ll = r.rejected_logp_sum / r.rejected_tokens;
  pairs += 1;
  rejected += ll;
  margin += lw - ll;
  wins += lw > ll;
  log_odds += r.preference.log_odds;
  preference += r.preference.loss;
  delta += r.preference.delta;
  h_chosen += r.preference.h_chosen;
  h_rejected += r.preference.h_rejected;
}

double loss_of(const PairSums& s, const HeadSettings& settings) {
  const double preference = s.pairs > 0 ? s.preference / s.pairs : 0;
  return s.nll / std::max(1.0, s.nll_tokens) + preference_weight(settings.objective, settings.lambda) * preference;
}

MetricList preference_metrics(const PairSums& s, const HeadSettings& settings, const std::string& prefix) {
  MetricList metrics;
  const auto add = [&](const char* name, double value) { metrics.emplace_back(prefix + name, value); };
  add("loss", loss_of(s, settings));
  add("nll_loss", s.nll / std::max(1.0, s.nll_tokens));
  const double lw = s.chosen / std::max(1.0, s.rows), pairs = s.pairs;
  if (pairs > 0) {
    add("log_odds_ratio", -s.preference / pairs);
    add("log_odds_chosen", s.log_odds / pairs);
  }
  add("rewards/chosen", settings.lambda * lw);
  if (pairs > 0) {
    add("rewards/rejected", settings.lambda * s.rejected / pairs);
    add("rewards/accuracies", s.wins / pairs);
    add("rewards/margins", settings.lambda * s.margin / pairs);
  }
  add("logps/chosen", lw);
  if (pairs > 0) {
    add("logps/rejected", s.rejected / pairs);
    add("delta", s.delta / pairs);
    add("h_chosen", s.h_chosen / pairs);
    add("h_rejected", s.h_rejected / pairs);
  }
  return metrics;
}

void Work::add(const TokenPair& pair, bool score_prompt) {
  const bool named_twice = !pair.trunk.empty() && !pair.rejected.empty();
  tokens += static_cast<double>(pair.trunk.size() + pair.chosen.size() + pair.rejected.size());
  rows += static_cast<double>(pair_rows(pair));
  targets += static_cast<double>(pair_targets(pair, score_prompt) - named_twice);
  visible += static_cast<double>(pair_visible(pair));
  pairs += 1;
}

double Work::training_flops(const Config& c) const {
  const auto count = [](int64_t n) { return static_cast<double>(n); };
  return 6 * (count(c.matrix_weights()) * rows + count(c.head_weights()) * targets) +
         12 * c.layers * count(c.attention_width()) * visible;
}

double measure_gemm_rate(Backend& backend, DType dtype) {
  constexpr int64_t n = 2048;
  Arena memory("product rate", backend, 3 * n * n * dtype_bytes(dtype));
  Tensor out = memory.allocate("product", dtype, {n, n}), in = memory.allocate("product", dtype, {n, n}),
         weight = memory.allocate("product", dtype, {n, n});
  backend.zero(in), backend.zero(weight);
  double best = 0, spent = 0;
  for (int i = 0; i < 3 && spent < 0.3; ++i) {
    const auto start = std::chrono::steady_clock::now();
    backend.linear_forward(out, in, weight, {});
    backend.synchronize();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, 2.0 * n * n * n / seconds);
    spent += seconds;
  }
  return best;
}

std::string json_line(const MetricList& metrics) {
  std::string line = "{";
  for (const auto& [name, value] : metrics) {
    line += (line.size() > 1 ? ", \"" : "\"") + name + "\": ";
    if (!std::isfinite(value))
      line += "null";
    else if (value == std::floor(value) && std::abs(value) < 0x1p53)
      line += std::to_string(static_cast<int64_t>(value));
    else
      line += number_text(value);
  }
  return line + "}";
}

namespace {

// Keeps the lines up to and including step `done`; a half-written last line goes.
void cut_after(const std::filesystem::path& file, int64_t done) {
  std::ifstream in(file, std::ios::binary);
  std::string kept, line;
  while (std::getline(in, line) && !in.eof()) {
    int64_t step = -1;
    if (std::sscanf(line.c_str(), "{\"step\": %ld", &step) != 1 || step > done) break;
    kept += line + "\n";
  }
  in.close();
  write_file_atomically(file, kept);
}

}  // namespace

MetricsLog::MetricsLog(const std::filesystem::path& file, const std::filesystem::path& events_folder,
                       std::optional<int64_t> resumed_at)
    : path_(file), events_(events_folder, resumed_at.value_or(0) + 1) {
  if (resumed_at && std::filesystem::is_regular_file(file)) cut_after(file, *resumed_at);
  file_ = std::fopen(file.c_str(), resumed_at ? "ab" : "wb");
  if (!file_) fail_machine(file.string(), ": cannot be written: ", std::strerror(errno));
}

MetricsLog::~MetricsLog() {
  if (file_) std::fclose(file_);
}

void MetricsLog::write(int64_t step, const MetricList& metrics) {
  const std::string line = json_line(metrics) + "\n";
  if (std::fwrite(line.data(), 1, line.size(), file_) != line.size() || std::fflush(file_) != 0)
    fail_machine(path_.string(), ": cannot be written: ", std::strerror(errno));
  MetricList shown(metrics);
  std::erase_if(shown, [](const auto& entry) { return entry.first == "step"; });
  events_.scalars(step, shown);
}

}  // namespace orpo
