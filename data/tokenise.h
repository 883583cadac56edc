// A row's texts to the token ids of trunk, chosen and rejected, through the chat template.
#pragma once

#include <cstdint>
#include <vector>

#include "data/rows.h"
#include "tokenizer/template.h"
#include "tokenizer/tokenizer.h"

namespace orpo {

struct PairTokens {
  std::vector<int32_t> trunk, chosen, rejected;
  bool prompt_merged = false;  // the prompt's end joined the answers' first token: it is longer than the trunk
};

// The two kinds of BadRow that the model folder is to blame for.
inline constexpr const char* text_without_tokenizer = "text without a tokenizer";
inline constexpr const char* dialogue_without_template = "dialogue without a chat template";

// Ids of a whole text, after a begin-of-sequence token where the tokenizer adds one and the text does not open with it.
std::vector<int32_t> encode_sequence(const Tokenizer& tokenizer, const std::string& text);

// Thread-safe. Throws BadRow: no tokenizer or template for a row of text, roles that the template refuses, answers that
// are equal as tokens, nothing to score. Throws UserError where a text needs an end-of-sequence token and the tokenizer
// has none.
PairTokens tokenise(Row&& row, const Tokenizer* tokenizer, const ChatTemplate* chat_template);

}  // namespace orpo
