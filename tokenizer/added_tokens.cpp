#include "tokenizer/added_tokens.h"

#include <algorithm>

#include "tokenizer/unicode.h"

namespace orpo {
namespace {

bool has_class(std::string_view text, size_t at, unicode::Class wanted) {
  return unicode::class_of(unicode::decode(text, at).code) & wanted;
}

bool word_before(std::string_view text, size_t end) {
  return end > 0 && has_class(text, unicode::previous(text, end), unicode::word);
}

bool word_after(std::string_view text, size_t begin) {
  return begin < text.size() && has_class(text, begin, unicode::word);
}

size_t skip_space_left(std::string_view text, size_t end) {
  while (end > 0) {
    const size_t begin = unicode::previous(text, end);
    if (!has_class(text, begin, unicode::space)) break;
    end = begin;
  }
  return end;
}

size_t skip_space_right(std::string_view text, size_t begin) {
  while (begin < text.size() && has_class(text, begin, unicode::space)) begin += unicode::decode(text, begin).size;
  return begin;
}

}  // namespace

void PatternSet::add(std::string_view pattern, int32_t value) {
  uint32_t node = 0;
  for (const char c : pattern) {
    const auto [place, fresh] = nodes_[node].next.try_emplace(static_cast<unsigned char>(c), nodes_.size());
    node = place->second;
    if (fresh) nodes_.emplace_back();
  }
  nodes_[node].value = value;
  starts_[static_cast<unsigned char>(pattern.front())] = true;
}

std::optional<PatternSet::Match> PatternSet::find(std::string_view text, size_t from) const {
  for (size_t begin = from; begin < text.size(); ++begin) {
    if (!starts_[static_cast<unsigned char>(text[begin])]) continue;
    std::optional<Match> longest;
    uint32_t node = 0;
    for (size_t i = begin; i < text.size(); ++i) {
      const auto step = nodes_[node].next.find(static_cast<unsigned char>(text[i]));
      if (step == nodes_[node].next.end()) break;
      node = step->second;
      if (nodes_[node].value >= 0) longest = Match{begin, i + 1, nodes_[node].value};
    }
    if (longest) return longest;
  }
  return std::nullopt;
}

void AddedTokens::set(AddedToken token) {
  if (token.content.empty()) return;
  const auto [place, fresh] = by_content_.try_emplace(token.content, tokens_.size());
  by_id_[token.id] = place->second;
  if (fresh) tokens_.push_back(std::move(token));
  else tokens_[place->second] = std::move(token);
}

void AddedTokens::finish(const std::function<std::string(std::string_view)>& normalize) {
  raw_ = normalized_ = PatternSet();
  for (size_t i = 0; i < tokens_.size(); ++i) {
    AddedToken& token = tokens_[i];
    token.pattern = token.normalized ? normalize(token.content) : token.content;
    if (!token.pattern.empty()) (token.normalized ? normalized_ : raw_).add(token.pattern, static_cast<int32_t>(i));
  }
}

const AddedToken* AddedTokens::find(std::string_view content) const {
  const auto found = by_content_.find(std::string(content));
  return found == by_content_.end() ? nullptr : &tokens_[found->second];
}

const AddedToken* AddedTokens::find(int32_t id) const {
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : &tokens_[found->second];
}

void AddedTokens::split(std::string_view text, bool normalized, std::vector<Stretch>& out) const {
  const PatternSet& patterns = normalized ? normalized_ : raw_;
  size_t done = 0, from = 0;  // text before `done` is handed out; the search goes on at `from`
  while (const auto match = patterns.empty() ? std::nullopt : patterns.find(text, from)) {
    const AddedToken& token = tokens_[match->value];
    size_t begin = match->begin, end = match->end;
    from = end;
    if (token.single_word && (word_before(text, begin) || word_after(text, end))) continue;
    if (token.lstrip) begin = std::max(skip_space_left(text, begin), done);
    if (token.rstrip) end = skip_space_right(text, end);
    if (done < begin) out.push_back({text.substr(done, begin - done), nullptr});
    out.push_back({text.substr(begin, end - begin), &token});
    done = end;
  }
  if (done < text.size()) out.push_back({text.substr(done), nullptr});
}

}  // namespace orpo
