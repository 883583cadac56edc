// The packed micro-batch: one stream of token rows made of whole pairs, no padding; a pair's shared prompt (the trunk)
// stands there once.
//
//   stream   | trunk 0 | chosen 0 | rejected 0 | trunk 1 | chosen 1 | rejected 1 | ...
//
// A branch's rows continue the trunk's positions and attend to trunk and own branch only, so each row computes exactly
// what it would in the separate sequence trunk + branch. The last token of a branch is predicted but predicts nothing,
// so it has no row. Plain text rows and prompt + completion rows (objective sft) are pairs whose rejected branch is
// empty.
#pragma once

#include <cstdint>
#include <vector>

#include "src/tensor.h"

namespace orpo {

// Rows of one pair: trunk at begin, then chosen, then rejected. Four int32: an [pairs, 4] int32 tensor for the
// operations.
struct Segment {
  int32_t begin, trunk, chosen, rejected;
  int32_t rows() const { return trunk + chosen + rejected; }
  int32_t end() const { return begin + rows(); }
};

// Targets of one pair in the head's row list, contiguous from begin: prompt tokens (predicted within the trunk),
// chosen, rejected. The last trunk row predicts the first chosen and the first rejected token, so the row list names it
// twice.
struct PairTargets {
  int32_t begin, prompt, chosen, rejected;
  int32_t end() const { return begin + prompt + chosen + rejected; }
};

struct Batch {
  std::vector<int32_t> tokens;         // [rows]
  std::vector<int32_t> positions;      // [rows] position within the row's own sequence
  std::vector<Segment> segments;       // [segments] one a pair as packed here; attention looks at nothing else
  std::vector<int32_t> target_rows;    // [targets] stream row whose hidden state predicts the target
  std::vector<int32_t> target_tokens;  // [targets]
  std::vector<PairTargets> pair_targets;  // [pairs]
  std::vector<int64_t> pair_ids;       // [pairs] index of the pair in its data set
  bool score_prompt = true;            // whether prompt targets are listed at all (--nll-scope full)

  int64_t rows() const { return static_cast<int64_t>(tokens.size()); }
  int64_t targets() const { return static_cast<int64_t>(target_rows.size()); }
  int64_t pairs() const { return static_cast<int64_t>(pair_targets.size()); }
};

// Token counts over the whole optimiser step, all micro-batches and ranks: what the loss is divided by. Known before a
// kernel runs.
struct Normalisers {
  double nll_tokens = 0;  // tokens in the supervised loss: prompt (scope full) and chosen targets
  double pairs = 0;       // pairs with a rejected branch
};

// The same batch where the device can read it.
struct DeviceBatch {
  Tensor tokens;         // [rows] int32
  Tensor positions;      // [rows] int32
  Tensor segments;       // [segments, 4] int32
  Tensor target_rows;    // [targets] int32
  Tensor target_tokens;  // [targets] int32
  Tensor pair_targets;   // [pairs, 4] int32
  const Batch* host = nullptr;
};

}  // namespace orpo
