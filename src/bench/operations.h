// Every operation of a training step alone, on any backend, at the shapes of a model's layer, head and update: what
// tools/gpu_check.py holds against the time that a GPU's memory and tensor cores allow.
#pragma once

#include <string>

#include "src/backend.h"
#include "src/json.h"

namespace orpo::bench {

// A micro-batch of pairs and the sizes of a model.
struct OperationShape {
  int64_t pairs, prompt, chosen, rejected;
  int64_t width, heads, kv_heads, head_dim, rotary_dim, intermediate, vocab, chunk;  // chunk: rows of logits at a time
  bool gated, layer_norm, biases, learned_positions;
  int64_t rows() const { return pairs * (prompt + chosen + rejected); }
};

// mistral-7b, phi-2, gpt2, tiny; UserError for another.
OperationShape operation_shape(const std::string& name);

// {"shape": {...}, "operations": [{"name", "seconds", "calls"}, ...]}: seconds of one call, the best of three rounds
// that take about `enough` seconds each; 0: each is called once (on an emulator). A round's calls are asked for
// together and waited for once, so that the time between two of them is the device's.
Json measure_operations(Backend& backend, DType dtype, const OperationShape& shape, double enough);
std::string operations_text(const Json& measured);

}  // namespace orpo::bench
