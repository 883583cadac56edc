// build/release/orpo_bench (make bench): what the machine can do, where a training step's time and memory go, and what
// the program's choices give, on one page and as JSON. Trials are runs of ./orpo_train on models and rows drawn by
// seed.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "src/bench/comparisons.h"
#include "src/bench/operations.h"
#include "src/bench/steps.h"
#include "src/console.h"
#include "src/demonstration.h"
#include "src/fail.h"
#include "src/files.h"
#include "src/setup.h"
#include "src/waiting.h"

namespace orpo::bench {
namespace {

std::vector<DType> dtypes(const Options& options) {
  if (options.dtype == DTypeChoice::automatic) return {DType::bf16, DType::f32};
  return {resolve_dtype(options)};
}

int64_t longest_sequence(const Options& options, const BenchModel& model) {
  return std::min(options.max_length ? options.max_length : 1024, model.positions);
}

std::vector<std::string> drawn(const Bench& bench, const BenchModel& model, const RowLengths& lengths, int64_t pairs,
                               int64_t steps) {
  const int64_t longest = longest_sequence(bench.options, model);
  return bench.on_rows(draw_rows(lengths, pairs, model.vocab, longest, bench.options.seed), steps);
}

// --data FILE, else rows of the lengths of AlpacaEval's and HH-RLHF's.
void measure_model(Bench& bench, const BenchModel& model, Json& list) {
  const Options& o = bench.options;
  const int64_t pairs = o.given.count("batch-pairs") ? o.batch_pairs : 8;
  for (const DType dtype : dtypes(o)) {
    const int64_t steps = dtype == DType::bf16 ? 3 : 2;
    if (!o.data.empty()) {
      std::vector<std::string> rows{"--batch-pairs", std::to_string(pairs), "--max-steps",       std::to_string(steps),
                                    "--max-length",  std::to_string(longest_sequence(o, model)), "--data"};
      rows.insert(rows.end(), o.data.begin(), o.data.end());
      list.push_back(measure_steps(bench, model, dtype, o.data.front(), rows));
      continue;
    }
    list.push_back(measure_steps(bench, model, dtype, "AlpacaEval's lengths",
                                 drawn(bench, model, alpaca_lengths, pairs, steps)));
    if (model.name.starts_with("SmolLM2") && dtype == DType::bf16)
      list.push_back(measure_steps(bench, model, dtype, "HH-RLHF's lengths",
                                   drawn(bench, model, hh_lengths, 2 * pairs, steps)));
  }
}

void measure_demonstration(Bench& bench, Json& list) {
  const BenchModel model = demonstration_model();
  const std::string rows = (demonstration_data() / "train.jsonl").string();
  const std::string steps = bench.options.quick ? "5" : "100";
  for (const DType dtype : dtypes(bench.options))
    list.push_back(measure_steps(bench, model, dtype, "its own rows",
                                 {"--data", rows, "--batch-pairs", "16", "--max-steps", steps}));
}

// --only operations: each alone, on any device.
int bench_operations(const Options& options) {
  const std::unique_ptr<Backend> backend = open_backend(options);
  Json list = Json::array();
  for (const DType dtype : dtypes(options)) {
    list.push_back(measure_operations(*backend, dtype, operation_shape(options.shape), options.quick ? 0 : 0.2));
    std::printf("%s", operations_text(list.back()).c_str());
  }
  if (!options.json.empty())
    write_file_atomically(options.json, Json{{"device", backend->name()}, {"operations", list}}.dump(1) + "\n");
  return exit_finished;
}

int run_bench(const Options& options) {
  static const std::vector<std::string> parts = {"models",     "layouts",  "lengths",   "threads",
                                                 "checkpoint", "decoding", "operations"};
  for (const std::string& part : options.only)
    if (std::find(parts.begin(), parts.end(), part) == parts.end())
      fail("--only: '", part, "' is not one of models, layouts, lengths, threads, checkpoint, decoding, operations");
  const auto wanted = [&](const char* part) {
    return options.only.empty() || std::find(options.only.begin(), options.only.end(), part) != options.only.end();
  };

  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a page is read while it grows
  if (!options.only.empty() && wanted("operations")) {
    if (options.only.size() > 1) fail("--only operations stands alone: it takes no model");
    return bench_operations(options);
  }
  const Workplace work;
  const std::unique_ptr<Backend> backend = make_cpu_backend(options.threads);
  Machine machine = measure_machine(*backend, options.threads, options.quick);
  Bench bench{options, work, *backend, machine};
  std::printf("%s\n", machine_text(machine).c_str());

  const bool one = !options.model.empty();
  const BenchModel main_model = with_weights(bench, one             ? real_model(options.model)
                                                    : options.quick ? demonstration_model()
                                                                    : smollm2_shape(work.path() / "smollm2"));
  Json page;
  if (wanted("models")) {
    Json& list = page["models"] = Json::array();
    if (!one) measure_demonstration(bench, list);
    if (one || !options.quick) measure_model(bench, main_model, list);
    if (!one && !options.quick) measure_model(bench, with_weights(bench, gpt2_shape(work.path() / "gpt2")), list);
  }
  if (wanted("layouts")) page["layouts"] = compare_layouts(bench, main_model);
  if (wanted("lengths")) page["lengths"] = compare_lengths(bench, main_model);
  if (wanted("threads")) page["threads"] = compare_threads(bench, main_model);
  if (wanted("checkpoint")) page["checkpoint"] = measure_start_and_checkpoint(bench, main_model);
  if (wanted("decoding")) page["decoding"] = measure_decoding(bench, main_model);
  page["machine"] = machine_json(machine);
  if (!options.json.empty()) write_file_atomically(options.json, page.dump(1) + "\n");
  return exit_finished;
}

}  // namespace
}  // namespace orpo::bench

int main(int argc, char** argv) {
  using namespace orpo;
  spin_briefly(argv);
  return run_program("orpo_bench", [&] { return bench::run_bench(parse_options(Program::bench, argc, argv)); });
}
