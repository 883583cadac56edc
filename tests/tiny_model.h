// A small random model and rows that are awkward to pack: what the tests of the whole model share.
#pragma once

#include <array>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "data/packer.h"
#include "src/arena.h"
#include "src/backend.h"
#include "src/head.h"
#include "src/model.h"
#include "src/trainer.h"
#include "tests/check.h"
#include "tests/memory_pairs.h"

namespace orpo::test {

inline Config odd_config() {
  Config c;
  c.family = "llama";
  c.vocab = 37, c.width = 12, c.intermediate = 17, c.layers = 2, c.heads = 3, c.kv_heads = 1, c.head_dim = 6;
  c.max_positions = 64, c.norm_epsilon = 1e-5;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = true;
  return c;
}

// Everything else: learned positions, layer norms, no gate, tied embeddings.
inline Config odd_gpt2_config() {
  Config c;
  c.family = "gpt2";
  c.vocab = 37, c.width = 15, c.intermediate = 17, c.layers = 2, c.heads = c.kv_heads = 3, c.head_dim = 5;
  c.max_positions = 33, c.norm_epsilon = 1e-5;
  c.norm = Norm::layer, c.position = Position::learned, c.activation = Activation::gelu_tanh;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = c.tied_embeddings = c.scaled_residual_init = true;
  return c;
}

// One norm for two blocks, part of a head rotated, key and value heads shared, a bias on the logits.
inline Config odd_phi_config() {
  Config c = odd_gpt2_config();
  c.family = "phi";
  c.block = Block::parallel, c.position = Position::rotary, c.activation = Activation::gelu;
  c.width = 20, c.heads = 2, c.kv_heads = 1, c.head_dim = 10, c.rotary_dim = 4;
  c.max_positions = 64, c.output_bias = true, c.tied_embeddings = false;
  return c;
}

// Norms behind the blocks, token vectors of their own width, two rows before position 0.
inline Config odd_opt_config() {
  Config c = odd_gpt2_config();
  c.family = "opt";
  c.block = Block::post_norm, c.layers = 3, c.embedding_width = 9, c.position_offset = 2;
  return c;
}

// Windows of some layers, frequencies scaled.
inline Config odd_qwen2_config() {
  Config c = odd_config();
  c.family = "qwen2";
  c.windows = {0, 4}, c.attention_output_bias = c.mlp_bias = false;
  c.rope_theta = 50, c.rope_scaling = {RopeScaling::llama3, 4, 0.5, 3, 30};
  return c;
}

inline std::vector<Config> odd_family_configs() {
  return {odd_config(), odd_gpt2_config(), odd_phi_config(), odd_opt_config(), odd_qwen2_config()};
}

inline std::vector<int32_t> random_tokens(std::mt19937& random, int count, int vocab) {
  std::vector<int32_t> ids(count);
  for (int32_t& id : ids) id = std::uniform_int_distribution<int32_t>(0, vocab - 1)(random);
  return ids;
}

// Shapes that go wrong first: no prompt, one-token answers, a long branch beside a short one, a prompt of one token.
inline std::vector<Row> awkward_rows(int vocab, unsigned seed = 7) {
  std::mt19937 random(seed);
  std::vector<Row> rows;
  for (auto [t, c, r] : {std::array{5, 3, 4}, {0, 4, 3}, {1, 1, 1}, {7, 1, 19}, {2, 13, 1}, {11, 2, 2}})
    rows.push_back({random_tokens(random, t, vocab), random_tokens(random, c, vocab), random_tokens(random, r, vocab)});
  return rows;
}

// Weights, gradients and everything a step needs, on one backend.
class TinyModel {
 public:
  struct Outcome {
    double loss = 0, nll = 0, preference = 0;
    std::vector<PairResult> pairs;
    std::vector<double> logps;     // of every target, micro-batches one after the other
    std::vector<double> gradient;  // all parameters, flat
    int64_t micro_batches = 0;
  };

  // scale: standard deviation of the output matrix; about 1 puts mean log-probabilities where the odds term matters.
  TinyModel(const Config& config, DType dtype, std::unique_ptr<Backend> on, unsigned seed = 1, double scale = 0.7)
      : config(config), dtype(dtype), backend(std::move(on)), memory("tiny model", *backend, int64_t{64} << 20) {
    weights = Weights::allocate(config, dtype, memory);
    gradients = Weights::allocate(config, accumulation_dtype(dtype), memory);
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (const Parameter& p : parameters(config, weights)) {
      std::vector<double> values(p.tensor.elements());
      const bool norm = p.name.ends_with("norm");
      const double columns = static_cast<double>(p.tensor.columns());
      const double sigma = p.tensor.rank == 1 ? 0.2 : p.name == "output" ? scale : scale / std::sqrt(columns) * 2;
      for (double& v : values) v = sigma * normal(random) + (norm ? 1 : 0);
      set(p.tensor, values);
    }
  }

  std::vector<double> get(const Tensor& t) const {
    std::vector<double> values;
    with_type(t.dtype, [&](auto zero) {
      std::vector<decltype(zero)> typed(t.elements());
      backend->download(typed.data(), t);
      values = untyped(typed);
    });
    return values;
  }
  void set(const Tensor& t, const std::vector<double>& values) const {
    with_type(t.dtype, [&](auto zero) { backend->upload(t, typed<decltype(zero)>(values).data()); });
  }

  // Forward, head, backward over all micro-batches. Without gradients: an evaluation.
  Outcome run(const std::vector<Batch>& batches, const Normalisers& normalisers, const HeadSettings& settings,
              bool with_gradients = true) {
    Outcome outcome;
    for (const Parameter& p : parameters(config, gradients)) backend->zero(p.tensor);
    for (const Batch& batch : batches) {
      const Arena::Scope scope(memory);
      const DeviceBatch device = to_device(batch, *backend, memory);
      const Keep kept = with_gradients ? keep : Keep::nothing;
      const Activations activations = Activations::allocate(config, dtype, batch.rows(), kept, memory);
      forward(config, weights, activations, device, *backend, memory);
      const Tensor dhidden = memory.allocate("d hidden", dtype, {batch.rows(), config.table_width()});
      std::vector<double> logps;
      const Weights* to_weights = with_gradients ? &gradients : nullptr;
      const Tensor* to_hidden = with_gradients ? &dhidden : nullptr;
      const Tensor results = memory.allocate("results", DType::f64, {batch.pairs(), pair_result_numbers});
      head(config, weights, to_weights, to_hidden, results, activations.hidden, device, normalisers, settings, *backend,
           memory, &logps);
      std::vector<PairResult> pairs(batch.pairs());
      backend->download(pairs.data(), results);
      for (const PairResult& r : pairs) {
        const double prompt = settings.nll_includes_prompt ? r.prompt_logp_sum : 0;
        outcome.nll -= (r.chosen_logp_sum + prompt) / normalisers.nll_tokens;
        if (r.rejected_tokens) outcome.preference += r.preference.loss / normalisers.pairs;
        outcome.pairs.push_back(r);
      }
      outcome.logps.insert(outcome.logps.end(), logps.begin(), logps.end());
      if (with_gradients) backward(config, weights, gradients, activations, dhidden, device, *backend, memory);
      outcome.micro_batches += 1;
    }
    outcome.loss = outcome.nll + preference_weight(settings.objective, settings.lambda) * outcome.preference;
    if (with_gradients)
      for (const Parameter& p : parameters(config, gradients)) {
        const std::vector<double> values = get(p.tensor);
        outcome.gradient.insert(outcome.gradient.end(), values.begin(), values.end());
      }
    return outcome;
  }

  Outcome run(const PairSet& set, int64_t micro_tokens, const HeadSettings& settings, bool with_gradients = true) {
    std::vector<int64_t> all(set.size());
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
    std::vector<Batch> batches;
    for (const std::vector<int64_t>& part : micro_batches(set, all, micro_tokens))
      batches.push_back(pack(set, part, settings.nll_includes_prompt));
    return run(batches, count_normalisers(set, all, settings.nll_includes_prompt), settings, with_gradients);
  }

  Config config;
  DType dtype;
  Keep keep = Keep::all;
  std::unique_ptr<Backend> backend;
  Arena memory;
  Weights weights, gradients;
};

}  // namespace orpo::test
