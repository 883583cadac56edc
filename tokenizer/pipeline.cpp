#include "tokenizer/pipeline.h"

#include <algorithm>

#include "src/fail.h"
#include "tokenizer/unicode.h"

namespace orpo {
namespace {

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  if (text.find(from) == std::string::npos) return;
  std::string out;
  size_t at = 0;
  for (size_t found; (found = text.find(from, at)) != std::string::npos; at = found + from.size())
    out.append(text, at, found - at).append(to);
  text = out.append(text, at);
}

class PipelineTokenizer : public Tokenizer {
 public:
  PipelineTokenizer(Pipeline pipeline, std::unique_ptr<WordModel> model, const std::string& where)
      : pipeline_(std::move(pipeline)), byte_level_(pipeline_.model.byte_level) {
    const TextToId& vocabulary = pipeline_.model.vocabulary;
    for (const auto& [text, id] : vocabulary) spell(id, text);
    number_added_tokens(vocabulary);
    added_.finish([this](std::string_view text) { return normalize(text); });
    for (const AddedToken& token : added_.all()) spell(token.id, token.content);
    if (model) {
      ids_ = std::move(pipeline_.model.vocabulary);
      model_ = std::move(model);
    } else {
      auto bpe = std::make_unique<Bpe>(std::move(pipeline_.model), where);
      bpe_ = bpe.get();
      model_ = std::move(bpe);
    }
  }

  std::vector<int32_t> encode(std::string_view text) const override {
    std::vector<int32_t> ids;
    ids.reserve(text.size() / 3);
    std::vector<Stretch> raw, inner;
    added_.split(text, false, raw);
    for (const Stretch& stretch : raw) {
      if (stretch.token) {
        ids.push_back(stretch.token->id);
        continue;
      }
      const bool starts = stretch.text.data() == text.data();
      std::string normalized;
      std::string_view body = stretch.text;
      if (!pipeline_.normalizer.empty()) body = normalized = normalize(stretch.text);
      if (!added_.has_normalized()) {
        encode_plain(body, starts, ids);
        continue;
      }
      inner.clear();
      added_.split(body, true, inner);
      for (const Stretch& part : inner) {
        if (part.token) ids.push_back(part.token->id);
        else encode_plain(part.text, starts && part.text.data() == body.data(), ids);
      }
    }
    return ids;
  }

  std::string decode(std::span<const int32_t> ids, bool skip_special) const override {
    std::string out, bytes;  // bytes: of a run of <0x..> tokens
    const auto flush = [&] {
      if (bytes.empty()) return;
      // A run that is not whole characters gives one U+FFFD a byte, as the library's decoder does.
      const std::string lossy = unicode::replace_invalid(bytes);
      if (lossy == bytes) out += bytes;
      else
        for (size_t i = 0; i < bytes.size(); ++i) unicode::append(out, 0xFFFD);
      bytes.clear();
    };
    for (const int32_t id : ids) {
      if (id < 0 || id >= vocabulary_size()) continue;
      const AddedToken* added = added_.find(id);
      if (skip_special && added && added->special) continue;
      const std::string& text = added ? added->pattern : texts_[id];
      if (byte_level_) {
        out += byte_level_bytes(text).value_or(text);
        continue;
      }
      unsigned value;
      if (text.size() == 6 && std::sscanf(text.c_str(), "<0x%2X>", &value) == 1) {
        bytes += static_cast<char>(value);
        continue;
      }
      flush();
      out += text;
    }
    if (byte_level_) return unicode::replace_invalid(out);
    flush();
    replace_all(out, "\u2581", " ");
    return prefixes() && out.starts_with(' ') ? out.substr(1) : out;
  }

  std::optional<int32_t> token_id(std::string_view token) const override {
    if (const AddedToken* added = added_.find(token)) return added->id;
    const TextToId& vocabulary = bpe_ ? bpe_->vocabulary() : ids_;
    const auto found = vocabulary.find(token);
    return found == vocabulary.end() ? std::nullopt : std::optional(found->second);
  }

  std::string token_text(int32_t id) const override {
    return id >= 0 && id < vocabulary_size() ? texts_[id] : concat("<no token ", id, ">");
  }

  int32_t vocabulary_size() const override { return static_cast<int32_t>(texts_.size()); }

 private:
  void spell(int32_t id, const std::string& text) {
    if (id >= vocabulary_size()) texts_.resize(id + 1);
    texts_[id] = text;
  }

  // An added token that the vocabulary lacks gets the next free id, whatever its file says (add_tokens of the library).
  void number_added_tokens(const TextToId& vocabulary) {
    int32_t next = static_cast<int32_t>(vocabulary.size());
    for (AddedToken& token : pipeline_.added) {
      const auto known = vocabulary.find(token.content);
      if (const AddedToken* before = added_.find(token.content)) token.id = before->id;
      else token.id = known != vocabulary.end() ? known->second : next;
      next = std::max(next, token.id + 1);
      added_.set(token);
    }
  }

  std::string normalize(std::string_view text) const {
    std::string out(text);
    for (const NormalizerStep& step : pipeline_.normalizer) {
      if (const auto* prepend = std::get_if<PrependText>(&step)) {
        if (!out.empty()) out.insert(0, prepend->text);
      } else if (const auto* replace = std::get_if<ReplaceText>(&step)) {
        replace_all(out, replace->from, replace->to);
      } else {
        out = unicode::compose(out);
      }
    }
    return out;
  }

  bool prefixes() const {
    if (pipeline_.metaspace) return pipeline_.metaspace->prefix != PrefixSpace::never;
    return std::any_of(pipeline_.normalizer.begin(), pipeline_.normalizer.end(),
                       [](const NormalizerStep& s) { return std::holds_alternative<PrependText>(s); });
  }

  // Text without added tokens, normalised. starts: it begins the whole string.
  void encode_plain(std::string_view text, bool starts, std::vector<int32_t>& ids) const {
    if (text.empty()) return;
    if (pipeline_.metaspace) {
      const Metaspace& m = *pipeline_.metaspace;
      std::string marked(text);
      replace_all(marked, " ", m.mark);
      const bool wanted = m.prefix == PrefixSpace::always || (m.prefix == PrefixSpace::first && starts);
      if (wanted && !marked.starts_with(m.mark)) marked.insert(0, m.mark);
      return encode_marked(marked, m.split, ids);
    }
    std::vector<std::string_view> words{text}, cut;
    std::vector<std::string> spaced;  // texts of words that got a space
    for (size_t i = 0; i <= pipeline_.splitters.size(); ++i) {
      if (pipeline_.space_before == i) put_spaces(words, spaced);
      if (i == pipeline_.splitters.size()) break;
      cut.clear();
      for (const std::string_view word : words) pipeline_.splitters[i]->split(word, cut);
      std::swap(words, cut);
    }
    for (const std::string_view word : words) {
      if (bpe_ && bpe_->cuts_at_spaces()) encode_marked(word, false, ids);
      else model_->encode(word, ids);
    }
  }

  static void put_spaces(std::vector<std::string_view>& words, std::vector<std::string>& spaced) {
    spaced.reserve(words.size());
    for (std::string_view& word : words)
      if (word.front() != ' ') word = spaced.emplace_back(concat(" ", word));
  }

  // Words that begin at space marks: at each (every), or where the model allows it at those that follow another
  // character.
  void encode_marked(std::string_view text, bool every, std::vector<int32_t>& ids) const {
    constexpr std::string_view mark = "\u2581";
    if (!every && !(bpe_ && bpe_->cuts_at_spaces())) return model_->encode(text, ids);
    size_t begin = 0;
    for (size_t at = text.find(mark, 1); at != std::string_view::npos; at = text.find(mark, at + 1)) {
      const bool follows_mark = at >= mark.size() && text.substr(at - mark.size(), mark.size()) == mark;
      if (!every && follows_mark) continue;
      model_->encode(text.substr(begin, at - begin), ids);
      begin = at;
    }
    model_->encode(text.substr(begin), ids);
  }

  Pipeline pipeline_;
  bool byte_level_;
  AddedTokens added_;
  std::vector<std::string> texts_;  // by id, as spelled
  TextToId ids_;                    // where the model is not a Bpe
  std::unique_ptr<WordModel> model_;
  const Bpe* bpe_ = nullptr;
};

}  // namespace

std::unique_ptr<Tokenizer> make_tokenizer(Pipeline pipeline, std::unique_ptr<WordModel> model,
                                          const std::string& where) {
  return std::make_unique<PipelineTokenizer>(std::move(pipeline), std::move(model), where);
}

}  // namespace orpo
