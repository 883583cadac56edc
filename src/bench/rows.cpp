#include "src/bench/rows.h"

#include <algorithm>
#include <cmath>

#include "src/fail.h"
#include "src/files.h"
#include "src/rng.h"

namespace orpo::bench {
namespace {

constexpr double ninetieth_of_normal = 1.2815515655446004;

// Random numbers in order.
class Draws {
 public:
  explicit Draws(uint64_t seed) : random_(seed, RandomStream::benchmark) {}
  int64_t length(const Length& l) {
    const double sigma = std::log(l.ninetieth / l.median) / ninetieth_of_normal;
    return std::max<int64_t>(2, std::llround(l.median * std::exp(sigma * random_.normal(next_++))));
  }
  std::vector<int32_t> tokens(int64_t count, int64_t vocab) {
    std::vector<int32_t> ids(static_cast<size_t>(count));
    for (int32_t& id : ids) id = static_cast<int32_t>(random_.below(static_cast<uint64_t>(vocab), next_++));
    return ids;
  }

 private:
  Random random_;
  uint64_t next_ = 0;
};

std::string list_text(const std::vector<int32_t>& ids) {
  std::string text = "[";
  for (const int32_t id : ids) text += (text.size() > 1 ? ", " : "") + std::to_string(id);
  return text + "]";
}

std::vector<int32_t> joined(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  std::vector<int32_t> both = a;
  both.insert(both.end(), b.begin(), b.end());
  return both;
}

}  // namespace

const RowLengths alpaca_lengths = {"AlpacaEval", {53, 105}, {248, 567}, {153, 474}};
const RowLengths hh_lengths = {"HH-RLHF", {121, 297}, {28, 90}, {37, 108}};

std::vector<Row> draw_rows(const RowLengths& lengths, int64_t count, int64_t vocab, int64_t max_length, uint64_t seed) {
  Draws draws(seed);
  std::vector<Row> rows;
  while (static_cast<int64_t>(rows.size()) < count) {
    const int64_t prompt = draws.length(lengths.prompt), chosen = draws.length(lengths.chosen),
                  rejected = draws.length(lengths.rejected);
    if (prompt + std::max(chosen, rejected) > max_length) continue;
    rows.push_back({draws.tokens(prompt, vocab), draws.tokens(chosen, vocab), draws.tokens(rejected, vocab)});
  }
  return rows;
}

std::vector<Row> equal_rows(int64_t prompt, int64_t answer, int64_t count, int64_t vocab, uint64_t seed) {
  Draws draws(seed);
  std::vector<Row> rows(static_cast<size_t>(count));
  for (Row& row : rows)
    row = {draws.tokens(prompt, vocab), draws.tokens(answer, vocab), draws.tokens(answer, vocab)};
  return rows;
}

std::vector<Row> laid_out(const std::vector<Row>& rows, Layout layout, size_t micro_pairs) {
  if (layout == Layout::shared) return rows;
  std::vector<Row> result;
  for (const Row& row : rows) result.push_back({{}, joined(row.prompt, row.chosen), joined(row.prompt, row.rejected)});
  if (layout == Layout::unshared) return result;
  for (size_t begin = 0; begin < result.size(); begin += micro_pairs) {
    const size_t end = std::min(begin + micro_pairs, result.size());
    size_t longest = 0;
    for (size_t i = begin; i < end; ++i)
      longest = std::max({longest, result[i].chosen.size(), result[i].rejected.size()});
    for (size_t i = begin; i < end; ++i) result[i].chosen.resize(longest), result[i].rejected.resize(longest);
  }
  return result;
}

void write_rows(const std::filesystem::path& file, const std::vector<Row>& rows) {
  std::string text;
  for (const Row& row : rows)
    text += concat("{\"prompt_ids\": ", list_text(row.prompt), ", \"chosen_ids\": ", list_text(row.chosen),
                   ", \"rejected_ids\": ", list_text(row.rejected), "}\n");
  write_file(file, text);
}

}  // namespace orpo::bench
