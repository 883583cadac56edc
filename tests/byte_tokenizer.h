// A tokenizer and a chat template small enough to follow by hand: a byte is a token, <s> and </s> are 256 and 257, and
// "ab" is one token, 258, so that a prompt's end can join the answer's start.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/fail.h"
#include "tokenizer/template.h"
#include "tokenizer/tokenizer.h"

namespace orpo {

struct ByteTokenizer : Tokenizer {
  explicit ByteTokenizer(bool adds_begin = false) {
    begin_of_sequence = 256, end_of_sequence = 257;
    adds_begin_of_sequence = adds_begin;
    fingerprint = 17;
  }
  std::vector<int32_t> encode(std::string_view text) const override {
    static constexpr std::pair<std::string_view, int32_t> words[] = {{"<s>", 256}, {"</s>", 257}, {"ab", 258}};
    std::vector<int32_t> ids;
    while (!text.empty()) {
      size_t length = 1;
      int32_t id = static_cast<unsigned char>(text[0]);
      for (const auto& [word, word_id] : words)
        if (text.starts_with(word)) length = word.size(), id = word_id;
      ids.push_back(id);
      text.remove_prefix(length);
    }
    return ids;
  }
  std::string decode(std::span<const int32_t> ids, bool = false) const override {
    std::string text;
    for (const int32_t id : ids) text += token_text(id);
    return text;
  }
  std::optional<int32_t> token_id(std::string_view token) const override {
    const auto ids = encode(token);
    return ids.size() == 1 ? std::optional(ids[0]) : std::nullopt;
  }
  std::string token_text(int32_t id) const override {
    return id == 256 ? "<s>" : id == 257 ? "</s>" : id == 258 ? "ab" : std::string(1, static_cast<char>(id));
  }
  int32_t vocabulary_size() const override { return 259; }
};

// "U:hi\nA:" then "yes</s>"; roles must alternate, no system message.
struct LetterTemplate : ChatTemplate {
  std::string name() const override { return "letter"; }
  std::string prompt(const std::vector<Message>& messages) const override {
    std::string text;
    for (size_t i = 0; i < messages.size(); ++i) {
      if (messages[i].role != (i % 2 ? "assistant" : "user")) fail("roles must alternate, user first");
      text += (i % 2 ? "A:" : "U:") + messages[i].content + "\n";
    }
    return text + "A:";
  }
  std::string response(const std::vector<Message>&, std::string_view answer) const override {
    return std::string(answer) + "</s>";
  }
};

// Texts as they stand.
struct BareTemplate : ChatTemplate {
  std::string name() const override { return "none"; }
  std::string prompt(const std::vector<Message>& messages) const override {
    std::string text;
    for (const Message& message : messages) text += message.content;
    return text;
  }
  std::string response(const std::vector<Message>&, std::string_view answer) const override {
    return std::string(answer);
  }
};

}  // namespace orpo
