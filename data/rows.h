// Rows of preference data as texts or token ids: one JSON object to one Row, or to the reason why it cannot be used.
//
//   strings         prompt, chosen, rejected                    one user turn and one assistant turn
//   messages        chosen, rejected lists of {role, content}, prompt a list (TRL, conversational)
//                   ... without prompt: the leading messages that both share are the prompt
//                   ... prompt a string that is repeated inside the lists (UltraFeedback, binarized)
//   token ids       prompt_ids, chosen_ids, rejected_ids        responses without the prompt; used as they are
//   single answers  text; prompt and completion (strings or messages); prompt_ids and completion_ids
//
// null counts as absent; other fields are ignored.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/template.h"

namespace orpo {

struct Row {
  enum class Kind { dialogue, text, ids };
  Kind kind = Kind::dialogue;
  bool single = false;                 // no rejected side
  std::vector<Message> prompt;         // dialogue: the turns before the answer
  std::string chosen, rejected;        // dialogue: the answers' texts; text: chosen is all of it
  std::vector<int32_t> prompt_ids, chosen_ids, rejected_ids;
};

// Why a row cannot be used. `reason` is one of few phrases, so that rows can be counted by it; `detail` says what is
// particular.
struct BadRow {
  std::string field;  // empty: the row as a whole
  std::string reason, detail;
  std::string kind() const { return (field.empty() ? "" : field + ": ") + reason; }
  std::string text() const { return kind() + (detail.empty() ? "" : " (" + detail + ")"); }
};

// What a parser accepts beside the layouts.
struct RowRules {
  bool single_answers = false;  // text, prompt + completion
  int64_t vocabulary = 0;       // token ids must be below it; 0: any
};

// One for each thread: keeps the JSON parser's memory.
class RowParser {
 public:
  explicit RowParser(RowRules rules);
  ~RowParser();
  RowParser(RowParser&&) noexcept;

  // line: one JSON object, with at least 64 readable bytes after its end. Throws BadRow.
  Row parse(std::string_view line);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace orpo
