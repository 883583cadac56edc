// What ./orpo_data finds out about a preference file: lengths, limits, what the shared prompt saves, and the mistakes
// that spoil a run silently.
#pragma once

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "data/pairs.h"

namespace orpo {

// Tokens of one part of all rows, untruncated.
struct Lengths {
  std::vector<int64_t> sorted;
  // The smallest length that at least the share q of the rows does not exceed (nearest rank); 0 of no rows.
  int64_t quantile(double q) const;
};

struct Inspection {
  Lengths prompt, chosen, rejected;
  int64_t pairs = 0;                     // rows with both sides
  int64_t chosen_longer = 0, same_length = 0;
  int64_t kept = 0, dropped = 0, truncated = 0;  // under the limits
  // Token rows that the kept rows make a model compute: packed with the prompt once; both sequences on their own; both
  // sequences padded to the longest of each `padding_pairs` pairs in file order, as trainers without packing do.
  int64_t packed_rows = 0, separate_rows = 0, padded_rows = 0;
};
inline constexpr int64_t padding_pairs = 8;

// set: rows at their full length (loaded without limits). limits: max_length, max_prompt_length and on_long count.
Inspection inspect(const PairSet& set, const DataSettings& limits);

// Rows with a mistake, and where the first one is.
struct Finding {
  int64_t rows = 0;
  TokenPair first;
  void add(const TokenPair& pair) {
    if (rows++ == 0) first = pair;
  }
};

struct Mistakes {
  Finding doubled_begin;  // two begin-of-sequence tokens at the start
  Finding unscored_end;   // an answer whose last token is none that ends a sequence
  Finding inner_end;      // an answer with such a token before its last: generation stops there
};

// begin: the begin-of-sequence token, -1 where there is none. ends: tokens that end a sequence; with none known no end
// is looked for.
Mistakes find_mistakes(const PairSet& set, int32_t begin, const std::set<int32_t>& ends);

// Tokens that end a sequence for this model folder: the tokenizer's end of sequence, what config.json and
// generation_config.json name, and the template's end-of-turn token where that is a single token. tokenizer and
// chat_template may be null.
std::set<int32_t> ending_tokens(const std::filesystem::path& folder, const Tokenizer* tokenizer,
                                const ChatTemplate* chat_template);

// The rows that the limits keep, pre-tokenised, as JSON Lines: prompt_ids with chosen_ids and rejected_ids, or with
// completion_ids. Written beside and renamed. Returns the number of rows. Throws MachineError naming path and reason.
int64_t write_token_rows(const PairSet& set, const DataSettings& limits, const std::filesystem::path& file);

}  // namespace orpo
