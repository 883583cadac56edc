// Rows for the benchmarks: pairs of random tokens, drawn by seed, with the lengths of real data; and the same pairs
// laid out as other trainers compute them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace orpo::bench {

// Median and 90th percentile of a log-normal length, in tokens.
struct Length {
  double median, ninetieth;
};

// Lengths of a data set's prompts and answers (orpo_data prints them).
struct RowLengths {
  const char* name;
  Length prompt, chosen, rejected;
};
// AlpacaEval's pairs and HH-RLHF's harmless dialogues, in SmolLM2's tokens.
extern const RowLengths alpaca_lengths, hh_lengths;

struct Row {
  std::vector<int32_t> prompt, chosen, rejected;
};

// Sequences longer than max_length are drawn again, as --max-length would drop them.
std::vector<Row> draw_rows(const RowLengths& lengths, int64_t count, int64_t vocab, int64_t max_length, uint64_t seed);
// Every row of exactly these lengths.
std::vector<Row> equal_rows(int64_t prompt, int64_t answer, int64_t count, int64_t vocab, uint64_t seed);

// shared: the prompt once. unshared: two whole sequences a pair. padded: the same, every sequence as long as the
// longest of its micro-batch of micro_pairs pairs, as trainers do that batch by padding.
enum class Layout { shared, unshared, padded };
std::vector<Row> laid_out(const std::vector<Row>& rows, Layout layout, size_t micro_pairs);

// As pre-tokenised JSON Lines.
void write_rows(const std::filesystem::path& file, const std::vector<Row>& rows);

}  // namespace orpo::bench
