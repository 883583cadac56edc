// Preference rows as tokens: JSON Lines in, a memory-mapped set of pairs out.
//
// A pair is trunk | chosen | rejected. The prompt, prompt + chosen and prompt + rejected are tokenised; the trunk is
// the longest common prefix of the three, so never past the prompt; the branches are what follows, all of it scored; a
// branch is never empty. Pre-tokenised rows are used as they are: trunk = prompt_ids. Rows of plain text and of prompt
// + completion (objective sft) have no rejected branch; the trunk of plain text is the begin-of-sequence token where
// the tokenizer adds one, else empty. Layouts of rows: rows.h.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tokenizer/template.h"
#include "tokenizer/tokenizer.h"

namespace orpo {

// One kept row; the spans point into the set's memory.
struct TokenPair {
  std::span<const int32_t> trunk, chosen, rejected;
  int64_t row = 0;  // 1-based line in its file
  int32_t file = 0;  // index into the files the set was made from
};

enum class OnLong { drop, truncate };
enum class OnBadRow { error, skip };

struct DataSettings {
  int64_t max_length = 2048;         // tokens of trunk + a branch
  int64_t max_prompt_length = 2048;  // tokens of the trunk
  OnLong on_long = OnLong::drop;
  OnBadRow on_bad_row = OnBadRow::error;
  bool single_answers = false;       // text and prompt + completion rows are welcome (objective sft)
  int64_t vocabulary = 0;            // ids must be below it; 0: any
  int threads = 0;                   // 0: all the machine has
  bool use_cache = true;
};

// What became of the rows of the files, for the log.
struct DataReport {
  int64_t rows = 0, kept = 0, bad = 0;  // rows = kept + bad + dropped; blank lines are no rows
  int64_t dropped = 0;          // passed the limits, or were made equal by truncation
  int64_t truncated = 0;        // kept, cut to the limits
  int64_t prompts_merged = 0;   // kept, and the prompt's end joined the answer's first token: longer than the trunk
  int64_t tokens = 0;           // kept: trunk + chosen + rejected
  int64_t longest_sequence = 0, longest_prompt = 0;
  int64_t largest_pair_rows = 0;  // most stream rows that one kept pair takes
  bool from_cache = false;
  std::string note;             // what the user should know of the token cache ("" mostly)
  std::vector<std::string> first_bad;  // up to 5 messages "file:line: field: reason"
  std::vector<std::pair<std::string, int64_t>> bad_reasons;  // "field: reason" and how many rows, most frequent first
};

class PairSet {
 public:
  virtual ~PairSet() = default;
  virtual int64_t size() const = 0;
  virtual TokenPair operator[](int64_t index) const = 0;
  const DataReport& report() const { return report_; }

  // Checks, tokenises and caches the rows of the files on all threads. tokenizer and chat_template may be null where
  // every row is pre-tokenised; a row of text is then an error that says so. Throws UserError naming file, line, field
  // and reason at the first bad row (in file order, whatever the number of threads), or counts it (OnBadRow::skip);
  // throws when a file holds no row or no row is left.
  static std::unique_ptr<PairSet> load(const std::vector<std::filesystem::path>& files, const Tokenizer* tokenizer,
                                       const ChatTemplate* chat_template, const DataSettings& settings);

 protected:
  DataReport report_;
};

// What the length rules make of a pair. Dropping: a trunk longer than max_prompt_length or a sequence longer than
// max_length. Truncating:
//   the prompt keeps its end, at most max_prompt_length tokens, and gives way until the answers have room: room for the
//   longer answer or for an eighth of max_length, whichever is less (so that an answer after a prompt that fills the
//   limit still gets its loss); then the answers keep their start, and lose their end-of-sequence token where cut.
// A begin-of-sequence token is cut with the rest of a long prompt's start, as TRL does. A pair whose branches are equal
// once cut, or that has nothing left to score, is dropped.
enum class Fit { whole, truncated, dropped };
Fit fit_to_limits(TokenPair& pair, const DataSettings& settings);

}  // namespace orpo
