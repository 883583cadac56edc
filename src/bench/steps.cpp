#include "src/bench/steps.h"

#include <algorithm>
#include <cstdio>

#include "src/console.h"

namespace orpo::bench {
namespace {

std::string ratio(double value) { return number_text(value, 2); }

// The products of the layers and of the head, alone at their shapes and in the step.
Json measure_products(Bench& bench, DType dtype, const Json& products) {
  Json json;
  ProductsAlone all;
  for (const bool of_head : {false, true}) {
    const ProductsAlone part = products_alone(bench.backend, dtype, products, of_head);
    all.add(part);
    json[of_head ? "head" : "layers"] = {{"flops", part.flops}, {"alone", part.alone}, {"in_step", part.in_step}};
  }
  const double rate = bench.machine.gemm_rate(dtype);
  const auto share_alone = [&](const char* part) {
    return json[part].at("flops").get<double>() / json[part].at("alone").get<double>() / rate;
  };
  json["share_of_gemm_rate"] = all.flops / all.alone / rate;
  json["step_keeps"] = all.alone / all.in_step;
  std::printf("products alone at their shapes: %s of the 2048^3 rate (layers %s, head %s); the step keeps %s of that\n",
              ratio(all.flops / all.alone / rate).c_str(), ratio(share_alone("layers")).c_str(),
              ratio(share_alone("head")).c_str(), ratio(all.alone / all.in_step).c_str());
  return json;
}

void print_memory(const Json& memory, int64_t peak) {
  int64_t planned = 0;
  std::string text;
  for (const Json& line : memory) {
    const int64_t bytes = line.at("bytes").get<int64_t>();
    planned += bytes;
    text += concat(text.empty() ? "" : ", ", line.at("what").get<std::string>(), " ", bytes_text(bytes));
  }
  std::printf("memory: %s; planned %s, peak resident %s\n\n", text.c_str(), bytes_text(planned).c_str(),
              bytes_text(peak).c_str());
}

}  // namespace

std::vector<std::string> Bench::arguments(const BenchModel& model, DType dtype) const {
  std::vector<std::string> words{"--model", model.folder.string(), "--dtype", dtype_name(dtype)};
  const auto add = [&](const char* name, const std::string& value) { words.insert(words.end(), {name, value}); };
  add("--init", model.has_weights ? "model" : "random");
  add("--threads", std::to_string(machine.threads));
  if (options.given.count("micro-tokens")) add("--micro-tokens", std::to_string(options.micro_tokens));
  return words;
}

std::vector<std::string> Bench::on_rows(const std::vector<Row>& rows, int64_t steps) const {
  const std::string file = (work.path() / "rows.jsonl").string();
  write_rows(file, rows);
  return {"--data", file, "--no-shuffle", "--batch-pairs", std::to_string(rows.size()), "--max-steps",
          std::to_string(steps)};
}

Trial Bench::trial(std::vector<std::string> arguments, const std::vector<std::string>& more) const {
  arguments.insert(arguments.end(), more.begin(), more.end());
  return run_trial(work, std::move(arguments));
}

BenchModel with_weights(Bench& bench, const BenchModel& model) {
  if (model.has_weights) return model;
  console().progress(concat("bench: weights of ", model.name));
  bench.trial(bench.arguments(model, DType::f32), bench.on_rows(equal_rows(8, 8, 2, model.vocab, 1), 1));
  BenchModel written = model;
  written.folder = bench.work.path() / (model.name + " with weights"), written.has_weights = true;
  std::filesystem::rename(bench.work.path() / "out", written.folder);
  return written;
}

Json measure_steps(Bench& bench, const BenchModel& model, DType dtype, const std::string& rows_name,
                   const std::vector<std::string>& rows) {
  console().progress(concat("bench: ", model.name, " ", dtype_name(dtype), ", ", rows_name));
  const Trial trial = bench.trial(bench.arguments(model, dtype), rows);
  double& rate = dtype == DType::bf16 ? bench.machine.bf16_rate : bench.machine.fp32_rate;
  rate = std::max(rate, trial.profile.at("gemm_rate").get<double>());
  Json json = trial.profile;
  json["model"] = model.name, json["rows"] = rows_name;
  json["tokens_per_second"] = trial.tokens_per_second(), json["pairs_per_second"] = trial.pairs_per_second();
  json["mfu"] = trial.flops_per_second() / rate;
  json["peak_memory_bytes"] = trial.peak_bytes;
  console().finish();
  std::printf("%s, %s, %s: %.0f tokens/s, %.2f pairs/s, useful MFU %s (%.0f pairs a step)\n%s", model.name.c_str(),
              dtype_name(dtype), rows_name.c_str(), trial.tokens_per_second(), trial.pairs_per_second(),
              number_text(trial.flops_per_second() / rate, 3).c_str(), json.at("pairs").get<double>(),
              trial.table.c_str());
  json["products_alone"] = measure_products(bench, dtype, trial.profile.at("products"));
  print_memory(json.at("memory"), trial.peak_bytes);
  return json;
}

}  // namespace orpo::bench
