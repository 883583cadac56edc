// The benchmark's page in its quick form: what it says is complete and adds up. No speed is asserted.
#include <set>

#include "tests/check.h"
#include "tests/programs.h"

namespace orpo::test {
namespace {

TEST_CASE("orpo_bench --quick: every part, shares that add up, no negative time") {
  const TemporaryFolder folder;
  const fs::path file = folder.path() / "bench.json";
  const Outcome outcome = run("orpo_bench", {"--quick", "--threads", "2", "--json", file}, folder.path());
  REQUIRE_MESSAGE(outcome.status == 0, outcome.err);
  const Json page = parse_json(text_of(file), "bench.json");

  const Json& machine = page.at("machine");
  CHECK(machine.at("threads") == 2);
  for (const char* rate : {"bandwidth", "read_bandwidth"}) CHECK(machine.at(rate).get<double>() > 0);
  for (const char* dtype : {"bf16", "fp32"}) CHECK(machine.at("gemm_rate").at(dtype).get<double>() > 0);

  REQUIRE(page.at("models").size() == 2);
  for (const Json& model : page.at("models")) {
    CAPTURE(model.at("dtype").get<std::string>());
    double share = 0;
    for (const Json& operation : model.at("operations")) {
      CHECK(operation.at("seconds").get<double>() >= 0);
      share += operation.at("share").get<double>();
    }
    CHECK(share == doctest::Approx(1));
    for (const char* figure : {"tokens_per_second", "pairs_per_second", "mfu", "useful_flops"})
      CHECK(model.at(figure).get<double>() > 0);
    const Json& products = model.at("products_alone");
    for (const char* figure : {"share_of_gemm_rate", "step_keeps"}) CHECK(products.at(figure).get<double>() > 0);
    double operations = 0, listed = 0;
    for (const Json& operation : model.at("operations"))
      if (operation.at("name").get<std::string>().starts_with("products"))
        operations += operation.at("flops").get<double>();
    for (const char* part : {"layers", "head"}) listed += products.at(part).at("flops").get<double>();
    CHECK(listed == doctest::Approx(operations));

    int64_t planned = 0;
    for (const Json& line : model.at("memory")) planned += line.at("bytes").get<int64_t>();
    CHECK(planned > 0);
    CHECK(model.at("peak_memory_bytes").get<int64_t>() > planned);
  }

  REQUIRE(page.at("layouts").size() == 6);
  for (size_t i = 0; i < 6; i += 3) {  // shared, unshared, padded
    const auto rows = [&](size_t j) { return page.at("layouts").at(i + j).at("rows").get<double>(); };
    CHECK(rows(0) < rows(1));
    CHECK(rows(1) < rows(2));
  }
  REQUIRE(page.at("lengths").size() == 4);
  CHECK(page.at("lengths").at(1).at("activations").get<double>() ==
        doctest::Approx(4 * page.at("lengths").at(0).at("activations").get<double>()).epsilon(0.05));
  CHECK(page.at("threads").at(1).at("speedup").get<double>() > 0);
  CHECK(page.at("checkpoint").at("start_seconds").get<double>() > 0);
  CHECK(page.at("checkpoint").at("checkpoint_seconds").get<double>() > 0);
  CHECK(page.at("decoding").at(2).at("tokens_per_second").get<double>() > 0);
}

TEST_CASE("orpo_bench refuses what it does not know") {
  const TemporaryFolder folder;
  const Outcome part = run("orpo_bench", {"--only", "layouts", "speed"}, folder.path());
  CHECK(part.status == 2);
  CHECK(part.last_error_line() ==
        "orpo_bench: error: --only: 'speed' is not one of models, layouts, lengths, threads, checkpoint, decoding, "
        "operations");
  CHECK(run("orpo_bench", {"--data", "rows.jsonl"}, folder.path()).status == 2);
}

TEST_CASE("orpo_bench --only operations: each operation of a step once, in both dtypes") {
  const TemporaryFolder folder;
  const fs::path file = folder.path() / "operations.json";
  const Outcome outcome =
      run("orpo_bench", {"--only", "operations", "--shape", "tiny", "--quick", "--json", file}, folder.path());
  REQUIRE_MESSAGE(outcome.status == 0, outcome.err);
  const Json page = parse_json(text_of(file), "operations.json");
  REQUIRE(page.at("operations").size() == 2);
  for (const Json& measured : page.at("operations")) {
    std::set<std::string> names;
    for (const Json& operation : measured.at("operations")) {
      CHECK(operation.at("seconds").get<double>() > 0);
      names.insert(operation.at("name").get<std::string>());
    }
    CHECK(names.size() == measured.at("operations").size());
    for (const char* operation : {"embedding", "norm", "rope", "attention", "activation", "head"})
      for (const char* pass : {"_forward", "_backward"}) CHECK(names.count(std::string(operation) + pass) == 1);
    for (const char* operation : {"gather", "scatter_add", "preference", "zero", "sums_of_squares", "adamw",
                                  "down, forward", "down, input's gradient", "down, weight's gradient"})
      CHECK(names.count(operation) == 1);
  }
  CHECK(run("orpo_bench", {"--only", "operations", "--shape", "huge"}, folder.path()).status == 2);
}

}  // namespace
}  // namespace orpo::test
