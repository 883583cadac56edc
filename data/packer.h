// Pairs to packed micro-batches (src/batch.h), and the counts that the loss is divided by.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "data/pairs.h"
#include "src/batch.h"

namespace orpo {

// Stream rows that a pair takes: every token but the last of each branch, the trunk once.
int64_t pair_rows(const TokenPair& pair);
// Head targets of a pair; with the prompt's where they are scored.
int64_t pair_targets(const TokenPair& pair, bool score_prompt);
// Visible (query, key) pairs of a pair's rows under the causal mask (for useful FLOPs).
int64_t pair_visible(const TokenPair& pair);

// Splits the pairs of a step, in order, into micro-batches of at most micro_tokens rows; a pair that is longer than
// that stands alone.
std::vector<std::vector<int64_t>> micro_batches(const PairSet& set, std::span<const int64_t> pairs,
                                                int64_t micro_tokens);

// The same with the pairs dealt so that there are few micro-batches, of about equal rows: matrix products run best on
// many rows, and a step's order changes nothing but rounding. Within a micro-batch pairs keep their order; the result
// depends on the lengths alone. Best fit decreasing for their number, then longest first to the emptiest (Graham 1969).
std::vector<std::vector<int64_t>> balanced_micro_batches(const PairSet& set, std::span<const int64_t> pairs,
                                                         int64_t micro_tokens);

// One micro-batch. score_prompt: --nll-scope full.
Batch pack(const PairSet& set, std::span<const int64_t> pairs, bool score_prompt);

// Of all pairs of a step.
Normalisers count_normalisers(const PairSet& set, std::span<const int64_t> pairs, bool score_prompt);

}  // namespace orpo
