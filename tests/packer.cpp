#include "data/packer.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>

#include "src/rng.h"
#include "tests/memory_pairs.h"

using namespace orpo;
using namespace orpo::test;
using Ids = std::vector<int32_t>;

namespace {

std::vector<int64_t> all_of(const PairSet& set) {
  std::vector<int64_t> indices(set.size());
  std::iota(indices.begin(), indices.end(), int64_t{0});
  return indices;
}

// Pairs of every kind: no trunk, one-token branches, no rejected branch, long branches.
MemoryPairs random_pairs(uint64_t seed, int count) {
  const Random random(seed, RandomStream::test);
  uint64_t counter = 0;
  const auto ids = [&](uint64_t least, uint64_t most) {
    Ids list(least + random.below(most - least + 1, counter++));
    for (int32_t& id : list) id = static_cast<int32_t>(random.below(1000, counter++));
    return list;
  };
  std::vector<Row> rows;
  for (int i = 0; i < count; ++i) {
    const Ids trunk = random.below(3, counter++) == 0 ? Ids{} : ids(1, 9);
    const uint64_t least = trunk.empty() ? 2 : 1;
    const bool single = random.below(5, counter++) == 0;
    rows.push_back({trunk, ids(least, 12), single ? Ids{} : ids(least, 12)});
  }
  return MemoryPairs(rows);
}

}  // namespace

TEST_CASE("a pair by hand: the trunk once, its last row named twice, no row for a branch's last token") {
  const MemoryPairs set({{{1, 2, 3}, {10, 11, 12}, {20, 21}}, {{}, {30, 31, 32}, {40, 41}}, {{5}, {50}, {60}}});
  const Batch batch = pack(set, all_of(set), true);
  CHECK(batch.tokens == Ids{1, 2, 3, 10, 11, 20, 30, 31, 40, 5});
  CHECK(batch.positions == Ids{0, 1, 2, 3, 4, 3, 0, 1, 0, 0});
  CHECK(batch.target_rows == Ids{0, 1, 2, 3, 4, 2, 5, 6, 7, 8, 9, 9});
  CHECK(batch.target_tokens == Ids{2, 3, 10, 11, 12, 20, 21, 31, 32, 41, 50, 60});
  CHECK(batch.pair_ids == std::vector<int64_t>{0, 1, 2});
  const auto segment = [&](int i) {
    const Segment& s = batch.segments[i];
    return Ids{s.begin, s.trunk, s.chosen, s.rejected};
  };
  CHECK(segment(0) == Ids{0, 3, 2, 1});
  CHECK(segment(1) == Ids{6, 0, 2, 1});
  CHECK(segment(2) == Ids{9, 1, 0, 0});
  const auto targets = [&](int i) {
    const PairTargets& t = batch.pair_targets[i];
    return Ids{t.begin, t.prompt, t.chosen, t.rejected};
  };
  CHECK(targets(0) == Ids{0, 2, 3, 2});
  CHECK(targets(1) == Ids{7, 0, 2, 1});
  CHECK(targets(2) == Ids{10, 0, 1, 1});
  const Normalisers full = count_normalisers(set, all_of(set), true);
  CHECK(full.nll_tokens == 8);
  CHECK(full.pairs == 3);
  CHECK(count_normalisers(set, all_of(set), false).nll_tokens == 6);
}

TEST_CASE("the branches' first tokens are both predicted by the trunk's last row") {
  const MemoryPairs set = random_pairs(1, 200);
  const Batch batch = pack(set, all_of(set), false);
  int named_twice = 0;
  for (int64_t i = 0; i < set.size(); ++i) {
    const PairTargets& t = batch.pair_targets[i];
    const Segment& s = batch.segments[i];
    if (s.trunk == 0 || t.rejected == 0) continue;
    CHECK(batch.target_rows[t.begin] == s.begin + s.trunk - 1);
    CHECK(batch.target_rows[t.begin + t.prompt + t.chosen] == s.begin + s.trunk - 1);
    ++named_twice;
  }
  CHECK(named_twice > 50);
}

TEST_CASE("both sequences can be read back from the batch, and every target from the row that predicts it") {
  const MemoryPairs set = random_pairs(2, 300);
  for (const bool score_prompt : {true, false}) {
    const Batch batch = pack(set, all_of(set), score_prompt);
    Normalisers counted;
    int64_t rows = 0, targets = 0;
    for (int64_t i = 0; i < set.size(); ++i) {
      const TokenPair pair = set[i];
      const Segment& s = batch.segments[i];
      const PairTargets& t = batch.pair_targets[i];
      CHECK(s.begin == rows);
      CHECK(t.begin == targets);
      rows += pair_rows(pair), targets += pair_targets(pair, score_prompt);
      CHECK(s.end() == rows);
      CHECK(t.end() == targets);
      // The scored tokens of trunk + branch, each with the place in the sequence of the row that predicts it.
      const auto check_branch = [&](std::span<const int32_t> branch, int begin_row, int begin_target, int count) {
        Ids sequence(pair.trunk.begin(), pair.trunk.end());
        sequence.insert(sequence.end(), branch.begin(), branch.end());
        const auto row_at = [&](int place) { return place < s.trunk ? s.begin + place : begin_row + place - s.trunk; };
        for (size_t place = 0; place + 1 < sequence.size(); ++place) {
          CHECK(batch.tokens[row_at(place)] == sequence[place]);
          CHECK(batch.positions[row_at(place)] == static_cast<int>(place));
        }
        const int first = static_cast<int>(sequence.size()) - count;
        for (int k = 0; k < count; ++k) {
          CHECK(batch.target_tokens[begin_target + k] == sequence[first + k]);
          CHECK(batch.target_rows[begin_target + k] == row_at(first + k - 1));
        }
      };
      check_branch(pair.chosen, s.begin + s.trunk, t.begin + t.prompt, t.chosen);
      if (!pair.rejected.empty())
        check_branch(pair.rejected, s.begin + s.trunk + s.chosen, t.begin + t.prompt + t.chosen, t.rejected);
      check_branch({}, 0, t.begin, t.prompt);
      CHECK(t.prompt == (score_prompt && !pair.trunk.empty() ? static_cast<int>(pair.trunk.size()) - 1 : 0));
      counted.nll_tokens += t.prompt + t.chosen;
      counted.pairs += pair.rejected.empty() ? 0 : 1;
    }
    CHECK(batch.rows() == rows);
    CHECK(batch.targets() == targets);
    const Normalisers all = count_normalisers(set, all_of(set), score_prompt);
    CHECK(all.nll_tokens == counted.nll_tokens);
    CHECK(all.pairs == counted.pairs);
  }
}

TEST_CASE("visible pairs are those of the causal mask") {
  const MemoryPairs set = random_pairs(3, 50);
  for (int64_t i = 0; i < set.size(); ++i) {
    const Batch batch = pack(set, std::vector<int64_t>{i}, true);
    int64_t visible = 0;  // a row sees as many tokens of its own sequence as its position says, and itself
    for (const int32_t position : batch.positions) visible += position + 1;
    CHECK(pair_visible(set[i]) == visible);
  }
}

TEST_CASE("micro-batches keep the order and the limit; a long pair stands alone") {
  const MemoryPairs set = random_pairs(4, 100);
  const std::vector<int64_t> pairs = all_of(set);
  const int64_t limit = 20;
  const auto batches = micro_batches(set, pairs, limit);
  CHECK(batches.size() > 10);
  std::vector<int64_t> joined;
  bool long_pair = false;
  for (size_t b = 0; b < batches.size(); ++b) {
    int64_t rows = 0;
    for (const int64_t i : batches[b]) rows += pair_rows(set[i]);
    CHECK((rows <= limit || batches[b].size() == 1));
    long_pair |= rows > limit;
    if (b + 1 < batches.size()) CHECK(rows + pair_rows(set[batches[b + 1].front()]) > limit);
    joined.insert(joined.end(), batches[b].begin(), batches[b].end());
  }
  CHECK(long_pair);
  CHECK(joined == pairs);
  CHECK(micro_batches(set, {}, limit).empty());
}

TEST_CASE("balanced micro-batches hold every pair once, in order within each; few, full, and about equal") {
  const MemoryPairs set = random_pairs(5, 200);
  const std::vector<int64_t> pairs = all_of(set);
  const auto rows_of = [&](const std::vector<int64_t>& part) {
    return std::accumulate(part.begin(), part.end(), int64_t{0},
                           [&](int64_t sum, int64_t i) { return sum + pair_rows(set[i]); });
  };
  int64_t longest = 0;
  for (const int64_t i : pairs) longest = std::max(longest, pair_rows(set[i]));
  for (const int64_t limit : {longest / 2, longest, int64_t{40}, int64_t{100}, int64_t{1000000}}) {
    CAPTURE(limit);
    const auto batches = balanced_micro_batches(set, pairs, limit);
    std::vector<int64_t> joined, rows;
    for (const auto& part : batches) {
      REQUIRE(!part.empty());
      CHECK(std::is_sorted(part.begin(), part.end()));
      rows.push_back(rows_of(part));
      CHECK((rows.back() <= limit || part.size() == 1));
      joined.insert(joined.end(), part.begin(), part.end());
    }
    std::sort(joined.begin(), joined.end());
    CHECK(joined == pairs);
    // Best fit decreasing takes at most 11/9 of the least number, and one more (Johnson 1973).
    if (limit >= longest)
      CHECK(static_cast<double>(batches.size()) <= 11.0 / 9 * (rows_of(pairs) / limit + 1) + 1);
    if (limit >= 2 * longest)
      CHECK(*std::max_element(rows.begin(), rows.end()) - *std::min_element(rows.begin(), rows.end()) <= longest);
  }
  CHECK(balanced_micro_batches(set, pairs, 40).size() < micro_batches(set, pairs, 40).size());
  CHECK(balanced_micro_batches(set, {}, 40).empty());
}
