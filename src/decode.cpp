#include "src/decode.h"

#include <algorithm>
#include <numeric>

#include "src/fail.h"

namespace orpo {
namespace {

// A sequence without targets: the head has nothing to do.
Batch sequence(const std::vector<int32_t>& tokens) {
  Batch batch;
  batch.tokens = tokens;
  batch.positions.resize(tokens.size());
  std::iota(batch.positions.begin(), batch.positions.end(), 0);
  batch.segments.push_back({0, static_cast<int32_t>(tokens.size()), 0, 0});
  batch.pair_targets.push_back({0, 0, 0, 0});
  return batch;
}

}  // namespace

std::vector<int32_t> decode_greedily(DeviceModel& model, std::span<const int32_t> prompt, int32_t stop,
                                     int64_t max_tokens) {
  if (prompt.empty()) fail_machine("decode: a prompt has at least one token");
  std::vector<int32_t> tokens(prompt.begin(), prompt.end());
  std::vector<float> scores(model.config.vocab);
  const int64_t room = model.config.max_positions - static_cast<int64_t>(tokens.size());
  for (int64_t i = 0; i < std::min(max_tokens, room); ++i) {
    const Batch batch = sequence(tokens);
    MicroBatch micro(model, batch);
    micro.forward();
    const Arena::Scope scope(model.scratch);
    const Tensor logits = model.scratch.allocate("logits", accumulation_dtype(model.dtype), {1, model.config.vocab});
    model.backend.linear_forward(logits, micro.hidden().slice(batch.rows() - 1, 1), model.tensors.weights.output, {});
    model.backend.download(scores.data(), logits);
    const auto best = static_cast<int32_t>(std::max_element(scores.begin(), scores.end()) - scores.begin());
    if (best == stop) break;
    tokens.push_back(best);
  }
  return {tokens.begin() + static_cast<int64_t>(prompt.size()), tokens.end()};
}

}  // namespace orpo
