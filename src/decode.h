// The model in its own words: decoding with a key/value cache. A prompt passes through the model once, then each new
// token alone; several sequences go on together, whatever their lengths, and drop out where they end.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "src/trainer.h"

namespace orpo {

using Tokens = std::vector<int32_t>;

// What decoding takes memory for.
struct DecodingLimits {
  int64_t sequences = 0;    // that go on at once; 0: no decoding
  int64_t positions = 0;    // of a sequence, prompt and new tokens
  int64_t prompt_rows = 0;  // prompts pass through the model together up to so many rows; no prompt is longer
};

// Sequences on their way. Its memory is the model's scratch: gone with this object.
class Decoder {
 public:
  Decoder(DeviceModel& model, const DecodingLimits& limits);

  // Starts sequences 0, 1, ... with these prompts, of at least one token each. Logits [prompts, vocab] A of the tokens
  // after them, valid until the next call.
  Tensor start(std::span<const Tokens> prompts);
  // Appends tokens[i] to sequence sequences[i], each sequence at most once. Logits [tokens, vocab] A of the tokens
  // after them, valid until the next call. MachineError where a sequence has no position left.
  Tensor step(std::span<const int32_t> sequences, std::span<const int32_t> tokens);

 private:
  void pass(const Batch& batch, const Tokens& sequences, bool continues, int64_t first_logits);
  Tensor logits(int64_t rows);

  DeviceModel& model_;
  Arena::Scope scope_;
  DecodingLimits limits_;
  KeyValueCache cache_;
  Tensor hidden_;   // [sequences, width] T: what the logits are made of
  Tensor logits_;   // [sequences, vocab] A
  Tokens lengths_;  // [sequences] positions that the cache holds
};

// Chooses a sequence's next token by its logits [vocab]; sequence: its index among the prompts.
using NextToken = std::function<int32_t(std::span<const float> logits, int64_t sequence)>;
// The largest logit; of equal ones the smallest id. MachineError where no logit is a number.
int32_t most_probable(std::span<const float> logits, int64_t sequence);

// Memory for decode() of these prompts.
DecodingLimits decoding_limits(const Config& config, std::span<const Tokens> prompts, int64_t max_tokens);

// A continuation of each prompt, token by token as `next` chooses: up to and without one of `stops`, of at most
// max_tokens tokens, as far as the model has positions. UserError for a prompt of no token or of more than the model
// has positions for.
std::vector<Tokens> decode(DeviceModel& model, std::span<const Tokens> prompts, const Tokens& stops,
                           int64_t max_tokens, const NextToken& next = most_probable);

}  // namespace orpo
