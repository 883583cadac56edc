#include "data/tokenise.h"

#include <algorithm>
#include <string>

#include "src/fail.h"

namespace orpo {

std::vector<int32_t> encode_sequence(const Tokenizer& tokenizer, const std::string& text) {
  std::vector<int32_t> ids = tokenizer.encode(text);
  const auto begin = tokenizer.begin_of_sequence;
  if (tokenizer.adds_begin_of_sequence && begin && (ids.empty() || ids.front() != *begin))
    ids.insert(ids.begin(), *begin);
  return ids;
}

namespace {

void append_end(const Tokenizer& tokenizer, std::vector<int32_t>& ids) {
  if (!tokenizer.end_of_sequence)
    fail("the tokenizer names no end-of-sequence token, which a text must end with; set eos_token in "
         "tokenizer_config.json");
  if (ids.empty() || ids.back() != *tokenizer.end_of_sequence) ids.push_back(*tokenizer.end_of_sequence);
}

size_t common_prefix(const std::vector<int32_t>& a, const std::vector<int32_t>& b, size_t most) {
  most = std::min({most, a.size(), b.size()});
  return std::mismatch(a.begin(), a.begin() + most, b.begin()).first - a.begin();
}

PairTokens tokenise_dialogue(const Row& row, const Tokenizer& tokenizer, const ChatTemplate& chat_template) {
  std::string prompt, chosen, rejected;
  try {
    prompt = chat_template.prompt(row.prompt);
    chosen = prompt + chat_template.response(row.prompt, row.chosen);
    if (!row.single) rejected = prompt + chat_template.response(row.prompt, row.rejected);
  } catch (const UserError& refusal) {
    throw BadRow{"prompt", "refused by the template " + chat_template.name(), refusal.what()};
  }
  const std::vector<int32_t> alone = encode_sequence(tokenizer, prompt);
  std::vector<int32_t> w = encode_sequence(tokenizer, chosen), l;
  if (!row.single) l = encode_sequence(tokenizer, rejected);
  if (chat_template.name() == "none") {
    append_end(tokenizer, w);
    if (!row.single) append_end(tokenizer, l);
  }
  if (w.empty()) throw BadRow{row.single ? "completion" : "chosen", "empty", "as tokens"};
  if (!row.single && l.empty()) throw BadRow{"rejected", "empty", "as tokens"};
  if (w == l) throw BadRow{"rejected", "equal to chosen", "as tokens"};
  // A branch keeps at least its last token.
  size_t trunk = common_prefix(alone, w, w.size() - 1);
  if (!row.single) trunk = common_prefix(alone, l, std::min(trunk, l.size() - 1));
  PairTokens tokens;
  tokens.trunk.assign(w.begin(), w.begin() + trunk);
  tokens.chosen.assign(w.begin() + trunk, w.end());
  if (!row.single) tokens.rejected.assign(l.begin() + trunk, l.end());
  tokens.prompt_merged = trunk < alone.size();
  return tokens;
}

PairTokens tokenise_text(const Row& row, const Tokenizer& tokenizer) {
  PairTokens tokens;
  tokens.chosen = encode_sequence(tokenizer, row.chosen);
  append_end(tokenizer, tokens.chosen);
  if (tokenizer.adds_begin_of_sequence && tokens.chosen.front() == tokenizer.begin_of_sequence) {
    tokens.trunk.push_back(tokens.chosen.front());
    tokens.chosen.erase(tokens.chosen.begin());
  }
  return tokens;
}

// With no trunk a branch's first token is context, so it takes two to score one.
void check_scored(const PairTokens& tokens, const std::vector<int32_t>& branch, const char* field) {
  if (tokens.trunk.size() + branch.size() < 2) throw BadRow{field, "nothing to score", "one token and no prompt"};
}

}  // namespace

PairTokens tokenise(Row&& row, const Tokenizer* tokenizer, const ChatTemplate* chat_template) {
  if (row.kind == Row::Kind::ids) 
    return {std::move(row.prompt_ids), std::move(row.chosen_ids), std::move(row.rejected_ids), false};
  const char* first = row.kind == Row::Kind::text ? "text" : row.single ? "completion" : "chosen";
  if (!tokenizer) throw BadRow{first, text_without_tokenizer, "the model folder has none; token ids need none"};
  if (row.kind == Row::Kind::dialogue && !chat_template)
    throw BadRow{first, dialogue_without_template,
                 "choose one with --template; none joins the texts as they stand"};
  PairTokens tokens = row.kind == Row::Kind::text ? tokenise_text(row, *tokenizer)
                                                  : tokenise_dialogue(row, *tokenizer, *chat_template);
  check_scored(tokens, tokens.chosen, first);
  if (!row.single) check_scored(tokens, tokens.rejected, "rejected");
  return tokens;
}

}  // namespace orpo
