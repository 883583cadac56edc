// Against the outside: what transformers and TRL computed on the same models and rows
// (tools/make_reference_fixtures.py, tools/make_real_golden.py).
#include <doctest/doctest.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "data/packer.h"
#include "data/pairs.h"
#include "src/model_folder.h"
#include "src/safetensors.h"
#include "src/trainer.h"
#include "tests/temporary_folder.h"

using namespace orpo;
using nlohmann::json;
namespace fs = std::filesystem;

namespace {

json read_json(const fs::path& file) {
  std::ifstream in(file);
  REQUIRE_MESSAGE(in.good(), file.string());
  return json::parse(in);
}

// A model folder in fp32 with its rows, as the programs load them.
struct Loaded {
  explicit Loaded(const fs::path& folder, const fs::path& rows)
      : description(read_model_config(folder)),
        backend(make_cpu_backend(2)),
        memory("tensors", *backend, description.config.parameters() * 4 * 6 + (1 << 20)),
        scratch("scratch", *backend, int64_t{3} << (description.config.parameters() > 1'000'000 ? 30 : 25)),
        model{description.config,
              DType::f32,
              TrainingTensors::allocate(description.config, DType::f32, memory),
              {},
              *backend,
              scratch} {
    load_weights(folder, model.config, model.tensors.masters(), *backend);
    start_optimizer(model);
    DataSettings settings;
    settings.vocabulary = model.config.vocab;
    settings.use_cache = false;
    pairs = PairSet::load({rows}, nullptr, nullptr, settings);
  }

  std::vector<int64_t> all() const {
    std::vector<int64_t> indices(pairs->size());
    std::iota(indices.begin(), indices.end(), 0);
    return indices;
  }

  // One pass over all rows; gradients left in the model.
  double loss_and_gradients(std::vector<PairResult>* results = nullptr, bool with_gradients = true) {
    const Normalisers n = count_normalisers(*pairs, all(), model.head.nll_includes_prompt);
    zero_gradients(model);
    double loss = 0;
    StepNumbers numbers(model, pairs->size());
    for (const auto& part : micro_batches(*pairs, all(), 512)) {
      const Batch batch = pack(*pairs, part, model.head.nll_includes_prompt);
      MicroBatch micro(model, batch);
      micro.forward();
      micro.head(n, numbers.next(batch.pairs()));
      if (with_gradients) micro.backward();
    }
    numbers.read();
    for (const PairResult& r : numbers.pairs) {
      loss -= (r.chosen_logp_sum + (model.head.nll_includes_prompt ? r.prompt_logp_sum : 0)) / n.nll_tokens;
      loss += model.head.lambda * r.preference.loss / n.pairs;
    }
    norm = numbers.gradients.norm;
    if (results) *results = numbers.pairs;
    return loss;
  }

  double norm = 0;  // of the gradients that the last pass left
  ModelDescription description;
  std::unique_ptr<Backend> backend;
  Arena memory, scratch;
  DeviceModel model;
  std::unique_ptr<PairSet> pairs;
};

std::span<const float> floats(const StoredTensor* t) {
  REQUIRE(t != nullptr);
  REQUIRE(t->dtype == StoredDType::f32);
  return {reinterpret_cast<const float*>(t->data.data()), t->data.size() / 4};
}

double norm_of(std::span<const float> values) {
  double squares = 0;
  for (const float v : values) squares += static_cast<double>(v) * v;
  return std::sqrt(squares);
}

// Every tensor's norm and its sampled entries; tolerance relative to the tensor's root mean square for an entry.
void check_digest(const json& expected, const StoredWeights& found, double tolerance) {
  CHECK(found.tensors().size() == expected.size());
  for (const auto& [name, digest] : expected.items()) {
    CAPTURE(name);
    const std::span<const float> values = floats(found.find(name));
    const double norm = digest.at("norm"), entry = tolerance * norm / std::sqrt(static_cast<double>(values.size()));
    CHECK(std::abs(norm_of(values) - norm) <= tolerance * norm);
    if (!digest.contains("entries")) continue;
    for (const json& sample : digest.at("entries")) {
      const double value = sample[1];
      CHECK(std::abs(values[sample[0].get<size_t>()] - value) <= entry + tolerance * std::abs(value));
    }
  }
}

void check_complete(const fs::path& file, const StoredWeights& found, double tolerance) {
  const StoredWeights expected = StoredWeights::of_file(file);
  REQUIRE(expected.tensors().size() == found.tensors().size());
  for (const StoredTensor& t : expected.tensors()) {
    CAPTURE(t.name);
    const std::span<const float> a = floats(&t), b = floats(found.find(t.name));
    REQUIRE(found.find(t.name)->shape == t.shape);
    double difference = 0;
    for (size_t i = 0; i < a.size(); ++i) difference += (a[i] - b[i]) * (a[i] - b[i]);
    CHECK(std::sqrt(difference) <= tolerance * norm_of(a));
  }
}

void check_pairs(const json& expected, const std::vector<PairResult>& found, double lambda, bool with_prompt,
                 double tolerance) {
  REQUIRE(found.size() == expected.size());
  for (size_t i = 0; i < found.size(); ++i) {
    CAPTURE(i);
    const PairResult& r = found[i];
    const double nll_tokens = r.chosen_tokens + (with_prompt ? r.prompt_tokens : 0);
    const double nll = -(r.chosen_logp_sum + (with_prompt ? r.prompt_logp_sum : 0)) / nll_tokens;
    const double lw = r.chosen_logp_sum / r.chosen_tokens, ll = r.rejected_logp_sum / r.rejected_tokens;
    CHECK(std::abs(lw - expected[i].at("logps/chosen").get<double>()) <= tolerance);
    CHECK(std::abs(ll - expected[i].at("logps/rejected").get<double>()) <= tolerance);
    CHECK(std::abs(nll - expected[i].at("nll").get<double>()) <= tolerance);
    const double log_odds = expected[i].at("log_odds");
    CHECK(std::abs(r.preference.log_odds - log_odds) <= tolerance * (2 + std::abs(log_odds)));
    CHECK(std::abs(nll + lambda * r.preference.loss - expected[i].at("loss").get<double>()) <= tolerance * 2);
  }
}

// A few AdamW steps on all rows: each step's loss and gradient norm.
void check_steps(Loaded& loaded, const json& training, double loss_tolerance, double norm_tolerance) {
  loaded.model.head.nll_includes_prompt = true;
  for (int64_t step = 1; step <= training.at("steps").get<int64_t>(); ++step) {
    CAPTURE(step);
    const double loss = loaded.loss_and_gradients();
    CHECK(std::abs(loss - training.at("losses")[step - 1].get<double>()) <= loss_tolerance);
    CHECK(loaded.norm == doctest::Approx(training.at("grad_norms")[step - 1].get<double>()).epsilon(norm_tolerance));
    update_weights(loaded.model, {training.at("learning_rate"), 0.9, 0.999, 1e-8, training.at("weight_decay"), step,
                                  clip_factor(loaded.norm, training.at("max_grad_norm"))});
  }
}

// What one tensor's gradient, or its change over the steps, must be: norm and sampled entries.
void check_tensor(const json& expected, const char* norm, const char* samples, std::span<const float> values,
                  double norm_tolerance, double entry_tolerance) {
  CHECK(norm_of(values) == doctest::Approx(expected.at(norm).get<double>()).epsilon(norm_tolerance));
  for (size_t i = 0; i < expected.at("entries").size(); ++i) {
    const double sample = expected.at(samples)[i];
    CHECK(std::abs(values[expected.at("entries")[i].get<size_t>()] - sample) <= entry_tolerance * std::abs(sample));
  }
}

// The whole comparison for one folder. tolerances: absolute for log-probabilities, relative for gradients, and for the
// change of weights.
void compare(const fs::path& model_folder, const fs::path& rows, const json& expected, const fs::path& complete,
             double logp_tolerance, double gradient_tolerance) {
  const TemporaryFolder temporary;
  Loaded loaded(model_folder, rows);
  loaded.model.head.lambda = expected.at("lambda");
  for (const bool with_prompt : {true, false}) {
    const std::string scope = with_prompt ? "full" : "response";
    if (!expected.contains(scope)) continue;
    CAPTURE(scope);
    const json& e = expected.at(scope);
    loaded.model.head.nll_includes_prompt = with_prompt;
    std::vector<PairResult> results;
    const double loss = loaded.loss_and_gradients(&results);
    CHECK(std::abs(loss - e.at("loss").get<double>()) <= logp_tolerance);
    check_pairs(e.at("per_pair"), results, loaded.model.head.lambda, with_prompt, logp_tolerance);
    const fs::path file = temporary.path() / "gradients.safetensors";
    save_gradients(file, loaded.model.config, loaded.model.tensors.gradients, *loaded.backend);
    check_digest(e.at("gradients"), StoredWeights::of_file(file), gradient_tolerance);
    if (with_prompt && fs::exists(complete / "gradients.safetensors"))
      check_complete(complete / "gradients.safetensors", StoredWeights::of_file(file), gradient_tolerance);
  }

  const json& training = expected.at("training");
  check_steps(loaded, training, logp_tolerance, gradient_tolerance);
  save_weights(temporary.path(), loaded.model.config, loaded.model.tensors.masters(), StoredDType::f32,
               *loaded.backend);
  const StoredWeights trained = StoredWeights::of_folder(temporary.path());
  check_digest(training.at("weights"), trained, gradient_tolerance / 10);
  if (fs::exists(complete / "trained.safetensors"))
    check_complete(complete / "trained.safetensors", trained, gradient_tolerance / 10);
}

}  // namespace

// One or two of every family.
std::vector<fs::path> reference_folders() {
  std::vector<fs::path> folders;
  for (const fs::directory_entry& entry : fs::directory_iterator("tests/fixtures"))
    if (entry.path().filename().string().starts_with("reference_")) folders.push_back(entry.path());
  std::sort(folders.begin(), folders.end());
  REQUIRE(folders.size() == 12);
  return folders;
}

TEST_CASE("reference: tiny models score, differentiate and train as in transformers and TRL") {
  for (const fs::path& folder : reference_folders()) {
    CAPTURE(folder.string());
    compare(folder, folder / "rows.jsonl", read_json(folder / "expected.json"), folder, 2e-5, 5e-4);
  }
}

TEST_CASE("reference: logits of the tiny models") {
  for (const fs::path& folder : reference_folders()) {
    CAPTURE(folder.string());
    const json expected = read_json(folder / "expected.json").at("logits");
    Loaded loaded(folder, folder / "rows.jsonl");
    const DeviceModel& m = loaded.model;
    const Arena::Scope scope(loaded.scratch);
    Batch batch;
    batch.tokens = expected.at("ids").get<std::vector<int32_t>>();
    batch.positions.resize(batch.tokens.size());
    std::iota(batch.positions.begin(), batch.positions.end(), 0);
    batch.segments = {{0, static_cast<int32_t>(batch.tokens.size()), 0, 0}};
    const Activations a = Activations::allocate(m.config, m.dtype, batch.rows(), Keep::nothing, loaded.scratch);
    forward(m.config, m.tensors.weights, a, to_device(batch, *loaded.backend, loaded.scratch), *loaded.backend,
            loaded.scratch);
    const Tensor logits = loaded.scratch.allocate("logits", DType::f32, {batch.rows(), m.config.vocab});
    loaded.backend->linear_forward(logits, a.hidden, m.tensors.weights.output, m.tensors.weights.output_bias);
    std::vector<float> values(logits.elements());
    loaded.backend->download(values.data(), logits);
    double worst = 0;
    for (int64_t row = 0; row < batch.rows(); ++row)
      for (int64_t v = 0; v < m.config.vocab; ++v)
        worst =
            std::max(worst, std::abs(values[row * m.config.vocab + v] - expected.at("values")[row][v].get<double>()));
    CHECK(worst < 1e-4);
  }
}

TEST_SUITE_BEGIN("real");

TEST_CASE("real: SmolLM2-135M-Instruct scores, differentiates and trains as in TRL" *
          doctest::skip(std::getenv("ORPO_REAL_MODEL") == nullptr)) {
  const json expected = read_json("tests/fixtures/real_smollm2.json");
  const TemporaryFolder temporary;
  const fs::path folder = std::getenv("ORPO_REAL_MODEL");
  Loaded loaded(folder, "tests/fixtures/real_smollm2_rows.jsonl");
  DeviceModel& model = loaded.model;
  model.head.lambda = expected.at("lambda");
  const auto saved_weights = [&](const char* name) {
    fs::create_directory(temporary.path() / name);
    save_weights(temporary.path() / name, model.config, model.tensors.masters(), StoredDType::f32, *loaded.backend);
    return StoredWeights::of_folder(temporary.path() / name);
  };
  const StoredWeights start = saved_weights("start");

  std::vector<PairResult> results;
  const double loss = loaded.loss_and_gradients(&results);
  CHECK(std::abs(loss - expected.at("loss").get<double>()) <= 2e-4);
  check_pairs(expected.at("per_pair"), results, model.head.lambda, true, 2e-4);
  const fs::path file = temporary.path() / "gradients.safetensors";
  save_gradients(file, model.config, model.tensors.gradients, *loaded.backend);
  const StoredWeights gradients = StoredWeights::of_file(file);
  CHECK(gradients.tensors().size() == expected.at("tensors").size());
  for (const auto& [name, tensor] : expected.at("tensors").items()) {
    CAPTURE(name);
    check_tensor(tensor, "gradient_norm", "gradients", floats(gradients.find(name)), 2e-3, 2e-3);
  }

  check_steps(loaded, expected.at("training"), 2e-4, 2e-3);
  const StoredWeights end = saved_weights("end");
  for (const auto& [name, tensor] : expected.at("tensors").items()) {
    CAPTURE(name);
    const std::span<const float> before = floats(start.find(name)), after = floats(end.find(name));
    std::vector<float> change(before.size());
    for (size_t i = 0; i < change.size(); ++i) change[i] = after[i] - before[i];
    // Adam divides a gradient by its own size: the rounding of a tiny entry becomes part of a step.
    check_tensor(tensor, "change_norm", "changes", change, 2e-3, 3e-2);
  }
}

TEST_SUITE_END();
