// The model in its own words: greedy decoding.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/trainer.h"

namespace orpo {

// The most probable continuation of a prompt, token by token, up to and without `stop`, of at most max_tokens tokens.
// Each token runs the whole sequence through the model again. Equal logits: the smallest id. The prompt has at least
// one token.
std::vector<int32_t> decode_greedily(DeviceModel& model, std::span<const int32_t> prompt, int32_t stop,
                                     int64_t max_tokens);

}  // namespace orpo
