// Preference rows as tokens: JSON Lines in, a memory-mapped set of pairs out.
//
// A pair is trunk | chosen | rejected. The prompt, prompt + chosen and prompt + rejected are tokenised; the trunk is the longest common prefix of
// the three, so never past the prompt; the branches are what follows, all of it scored; a branch is never empty. Pre-tokenised rows are
// used as they are: trunk = prompt_ids. Rows of plain text and of prompt + completion (objective sft) have no rejected branch.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "tokenizer/template.h"
#include "tokenizer/tokenizer.h"

namespace orpo {

// One kept row; the spans point into the set's memory.
struct TokenPair {
  std::span<const int32_t> trunk, chosen, rejected;
  int64_t row = 0;  // 1-based line in its file
  int32_t file = 0; // index into the files the set was made from
};

enum class OnLong { drop, truncate };
enum class OnBadRow { error, skip };

struct DataSettings {
  int64_t max_length = 2048;         // tokens of trunk + a branch
  int64_t max_prompt_length = 2048;  // tokens of the trunk
  OnLong on_long = OnLong::drop;
  OnBadRow on_bad_row = OnBadRow::error;
  bool single_answers = false;       // text and prompt + completion rows are welcome (objective sft)
  int64_t vocabulary = 0;            // ids must be below it
  int threads = 0;
  bool use_cache = true;
};

// What became of the rows of the files, for the log.
struct DataReport {
  int64_t rows = 0, kept = 0, bad = 0, dropped = 0, truncated = 0;  // dropped: longer than the limits
  int64_t tokens = 0;          // kept: trunk + chosen + rejected
  int64_t longest_sequence = 0, longest_prompt = 0;
  int64_t largest_pair_rows = 0;  // most stream rows that one kept pair takes
  bool from_cache = false;
  std::vector<std::string> first_bad;  // up to 5 messages "file:line: field: reason"
};

class PairSet {
 public:
  virtual ~PairSet() = default;
  virtual int64_t size() const = 0;
  virtual TokenPair operator[](int64_t index) const = 0;
  const DataReport& report() const { return report_; }

  // Checks, tokenises and caches the rows of the files on all threads. tokenizer and chat_template may be null where every row is pre-tokenised; a
  // row of text is then an error that says so. Throws UserError naming file, line, field and reason at the first bad row (in file order,
  // whatever the number of threads), or counts it (OnBadRow::skip); throws when no row is left.
  static std::unique_ptr<PairSet> load(const std::vector<std::filesystem::path>& files, const Tokenizer* tokenizer,
                                       const ChatTemplate* chat_template, const DataSettings& settings);

 protected:
  DataReport report_;
};

}  // namespace orpo
