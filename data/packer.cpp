#include "data/packer.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <queue>
#include <set>
#include <utility>

#include "src/fail.h"

namespace orpo {
namespace {

// Rows and targets of one branch. Its last token has no row. Its first token is predicted by the trunk's last row;
// where there is no trunk it is context only.
int64_t branch_rows(std::span<const int32_t> branch) {
  return branch.empty() ? 0 : static_cast<int64_t>(branch.size()) - 1;
}
int64_t branch_targets(std::span<const int32_t> branch, bool has_trunk) {
  return has_trunk ? static_cast<int64_t>(branch.size()) : branch_rows(branch);
}
int64_t prompt_targets(const TokenPair& pair, bool score_prompt) {
  return score_prompt && !pair.trunk.empty() ? static_cast<int64_t>(pair.trunk.size()) - 1 : 0;
}

// Rows begin ... begin + count - 1 see begin + 1 ... begin + count tokens each.
int64_t visible(int64_t begin, int64_t count) { return count * begin + count * (count + 1) / 2; }

void append_rows(Batch& batch, std::span<const int32_t> tokens, int64_t count, int64_t position) {
  for (int64_t i = 0; i < count; ++i) {
    batch.tokens.push_back(tokens[i]);
    batch.positions.push_back(static_cast<int32_t>(position + i));
  }
}

// The targets of a branch whose rows start at `row`; trunk_row predicts its first token, -1 where there is none.
void append_targets(Batch& batch, std::span<const int32_t> branch, int64_t trunk_row, int64_t row) {
  for (size_t i = 0; i < branch.size(); ++i) {
    const int64_t predictor = i == 0 ? trunk_row : row + static_cast<int64_t>(i) - 1;
    if (predictor < 0) continue;
    batch.target_rows.push_back(static_cast<int32_t>(predictor));
    batch.target_tokens.push_back(branch[i]);
  }
}

void append_pair(Batch& batch, const TokenPair& pair) {
  const bool has_trunk = !pair.trunk.empty();
  const int64_t begin = batch.rows(), trunk = static_cast<int64_t>(pair.trunk.size());
  const int64_t chosen = branch_rows(pair.chosen), rejected = branch_rows(pair.rejected);
  append_rows(batch, pair.trunk, trunk, 0);
  append_rows(batch, pair.chosen, chosen, trunk);
  append_rows(batch, pair.rejected, rejected, trunk);
  batch.segments.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(trunk), static_cast<int32_t>(chosen),
                            static_cast<int32_t>(rejected)});

  const int64_t prompt = prompt_targets(pair, batch.score_prompt), trunk_row = has_trunk ? begin + trunk - 1 : -1;
  batch.pair_targets.push_back({static_cast<int32_t>(batch.targets()), static_cast<int32_t>(prompt),
                                static_cast<int32_t>(branch_targets(pair.chosen, has_trunk)),
                                static_cast<int32_t>(branch_targets(pair.rejected, has_trunk))});
  if (prompt > 0) append_targets(batch, pair.trunk, -1, begin);
  append_targets(batch, pair.chosen, trunk_row, begin + trunk);
  append_targets(batch, pair.rejected, trunk_row, begin + trunk + chosen);
}

// Where each pair goes, and what its micro-batch then holds. Both functions take the pairs longest first.
struct Deal {
  std::vector<size_t> bin;    // [pairs]
  std::vector<int64_t> rows;  // [bins]
};

// Each pair into the fullest bin that has room for it, or a new one.
Deal best_fit(const std::vector<int64_t>& lengths, std::span<const size_t> longest_first, int64_t limit) {
  Deal deal{std::vector<size_t>(lengths.size()), {}};
  std::set<std::pair<int64_t, size_t>> room;  // what is left in a bin
  for (const size_t i : longest_first) {
    const auto found = room.lower_bound({lengths[i], 0});
    const size_t bin = found == room.end() ? deal.rows.size() : found->second;
    if (found == room.end())
      deal.rows.push_back(0);
    else
      room.erase(found);
    deal.bin[i] = bin;
    deal.rows[bin] += lengths[i];
    room.insert({std::max<int64_t>(0, limit - deal.rows[bin]), bin});
  }
  return deal;
}

// Each pair into the emptiest of `bins`.
Deal spread(const std::vector<int64_t>& lengths, std::span<const size_t> longest_first, size_t bins) {
  Deal deal{std::vector<size_t>(lengths.size()), std::vector<int64_t>(bins)};
  using Fill = std::pair<int64_t, size_t>;
  std::priority_queue<Fill, std::vector<Fill>, std::greater<>> emptiest;
  for (size_t b = 0; b < bins; ++b) emptiest.push({0, b});
  for (const size_t i : longest_first) {
    const size_t bin = emptiest.top().second;
    emptiest.pop();
    deal.bin[i] = bin;
    deal.rows[bin] += lengths[i];
    emptiest.push({deal.rows[bin], bin});
  }
  return deal;
}

}  // namespace

int64_t pair_rows(const TokenPair& pair) {
  return static_cast<int64_t>(pair.trunk.size()) + branch_rows(pair.chosen) + branch_rows(pair.rejected);
}

int64_t pair_targets(const TokenPair& pair, bool score_prompt) {
  const bool has_trunk = !pair.trunk.empty();
  return prompt_targets(pair, score_prompt) + branch_targets(pair.chosen, has_trunk) +
         branch_targets(pair.rejected, has_trunk);
}

int64_t pair_visible(const TokenPair& pair) {
  const int64_t trunk = static_cast<int64_t>(pair.trunk.size());
  return visible(0, trunk) + visible(trunk, branch_rows(pair.chosen)) + visible(trunk, branch_rows(pair.rejected));
}

std::vector<std::vector<int64_t>> micro_batches(const PairSet& set, std::span<const int64_t> pairs,
                                                int64_t micro_tokens) {
  std::vector<std::vector<int64_t>> result;
  int64_t filled = 0;
  for (const int64_t index : pairs) {
    const int64_t rows = pair_rows(set[index]);
    if (result.empty() || filled + rows > micro_tokens) {
      result.emplace_back();
      filled = 0;
    }
    result.back().push_back(index);
    filled += rows;
  }
  return result;
}

std::vector<std::vector<int64_t>> balanced_micro_batches(const PairSet& set, std::span<const int64_t> pairs,
                                                         int64_t micro_tokens) {
  std::vector<int64_t> lengths;
  for (const int64_t index : pairs) lengths.push_back(pair_rows(set[index]));
  std::vector<size_t> longest_first(pairs.size());
  std::iota(longest_first.begin(), longest_first.end(), size_t{0});
  std::stable_sort(longest_first.begin(), longest_first.end(),
                   [&](size_t a, size_t b) { return lengths[a] > lengths[b]; });
  const auto parts = [&](const Deal& d) {
    std::vector<std::vector<int64_t>> result(d.rows.size());
    for (size_t i = 0; i < pairs.size(); ++i) result[d.bin[i]].push_back(pairs[i]);
    return result;
  };
  const Deal full = best_fit(lengths, longest_first, micro_tokens),
             even = spread(lengths, longest_first, full.rows.size());
  const std::vector<std::vector<int64_t>> balanced = parts(even);
  for (size_t b = 0; b < balanced.size(); ++b)
    if (balanced[b].size() > 1 && even.rows[b] > micro_tokens) return parts(full);
  return balanced;
}

Batch pack(const PairSet& set, std::span<const int64_t> pairs, bool score_prompt) {
  Batch batch;
  batch.score_prompt = score_prompt;
  int64_t rows = 0, targets = 0;
  for (const int64_t index : pairs) {
    rows += pair_rows(set[index]);
    targets += pair_targets(set[index], score_prompt);
  }
  if (std::max(rows, targets) > std::numeric_limits<int32_t>::max())
    fail_machine("pack: a micro-batch of ", rows, " rows; at most 2^31 - 1 can be numbered");
  batch.tokens.reserve(rows), batch.positions.reserve(rows);
  batch.target_rows.reserve(targets), batch.target_tokens.reserve(targets);
  for (const int64_t index : pairs) {
    append_pair(batch, set[index]);
    batch.pair_ids.push_back(index);
  }
  return batch;
}

Normalisers count_normalisers(const PairSet& set, std::span<const int64_t> pairs, bool score_prompt) {
  Normalisers sum;
  for (const int64_t index : pairs) {
    const TokenPair pair = set[index];
    sum.nll_tokens += static_cast<double>(prompt_targets(pair, score_prompt) +
                                          branch_targets(pair.chosen, !pair.trunk.empty()));
    sum.pairs += pair.rejected.empty() ? 0 : 1;
  }
  return sum;
}

}  // namespace orpo
