// How the next token is chosen from a model's logits: greedy, or drawn; transformers' generate() under the same names.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_set>
#include <vector>

#include "src/decode.h"

namespace orpo {

struct SamplingSettings {
  double temperature = 0;         // logits are divided by it; 0: greedy, the most probable token
  double top_p = 1;               // drawn from the fewest tokens that hold this much probability (Holtzman et al. 2019)
  double repetition_penalty = 1;  // of tokens that prompt or answer hold: positive logits over it, negative times it
                                  // (Keskar et al. 2019, CTRL)
  uint64_t seed = 42;
};

// A choice of each sequence's next token, given to decode(). What a sequence draws depends on the seed, its number and
// its tokens so far alone, not on what is decoded beside it.
class Sampler {
 public:
  // first: number of the first prompt; the others follow.
  Sampler(const SamplingSettings& settings, std::span<const Tokens> prompts, int64_t first);
  // decode() appends what this returns. MachineError where no logit is a number.
  int32_t operator()(std::span<const float> logits, int64_t sequence);

 private:
  int32_t draw(std::span<const float> logits, int64_t sequence);

  SamplingSettings settings_;
  int64_t first_;
  std::vector<std::unordered_set<int32_t>> seen_;  // of each sequence, where there is a penalty
  std::vector<uint64_t> drawn_;                    // tokens so far
  std::vector<float> penalised_;
};

}  // namespace orpo
