// Memory, known before a run starts: the largest micro-batch that --micro-tokens and the lengths allow passes once
// through the same code as in training, on arenas that only count. The run then takes exactly that, once.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "src/decode.h"
#include "src/head.h"
#include "src/model.h"

namespace orpo {

// The largest micro-batch: no micro-batch of the run has more of anything.
struct MicroLimits {
  int64_t rows, targets, pairs;
};

struct PlanRequest {
  Config config;
  DType dtype = DType::f32;
  HeadSettings head;
  int64_t micro_tokens = 0;       // 0: choose
  int64_t largest_pair_rows = 0;  // most stream rows of one pair: the data's, or what the lengths allow
  int64_t step_pairs = 0;         // most pairs of a training step: --batch-pairs
  int64_t eval_pairs = 0;         // rows of an evaluation
  bool trains = true;
  bool recompute = false;
  DecodingLimits decoding;  // what the model also decodes, between micro-batches
  std::function<std::unique_ptr<Backend>()> rehearsal = make_rehearsal_backend;  // the device's, which counts more
};

struct MemoryPlan {
  struct Line {
    std::string what;
    int64_t bytes;
  };
  int64_t micro_tokens = 0;
  MicroLimits limits{};
  int64_t state_bytes = 0;    // weights, corrections, moments, gradients
  int64_t scratch_bytes = 0;  // high-water mark of a micro-batch, or of decoding
  int64_t workspace_bytes = 0;  // what the device's operations take besides their tensors
  std::vector<Line> lines;    // parts; the head and the backward pass use the same memory one after the other
  int64_t total() const { return state_bytes + scratch_bytes + workspace_bytes; }
};

// Most stream rows that a pair of sequences of at most max_length tokens can take: no shared prompt at all.
int64_t largest_pair(int64_t max_length);

// The plan at micro_tokens, or at the best size that fits (about 1,500 rows, no fewer than the largest pair). memory:
// bytes there are. Throws UserError where it does not fit, naming the largest --micro-tokens that does.
MemoryPlan make_plan(const PlanRequest& request, int64_t memory);

// A batch that reaches every limit: what the rehearsal runs.
Batch largest_batch(const MicroLimits& limits, bool score_prompt);

// What, bytes, high-water mark.
std::string plan_table(const MemoryPlan& plan, const PlanRequest& request, int64_t memory);

}  // namespace orpo
