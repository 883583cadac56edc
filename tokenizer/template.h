// Chat templates by name: messages to the text a model was trained on. Each one is verified against its Jinja original (tests/template.cpp).
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace orpo {

struct Message {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

// A dialogue in the three pieces that preference training needs. The pieces are concatenations of each other's text: prompt + chosen is
// what the template renders for the whole chosen conversation, cut after the end-of-turn token.
class ChatTemplate {
 public:
  virtual ~ChatTemplate() = default;
  virtual std::string name() const = 0;
  // The conversation so far, ready for an answer (the template's generation prompt at its end). Begin-of-sequence text included where the template writes it.
  // Throws UserError where the template refuses the roles (for example a system message it has no place for).
  virtual std::string prompt(const std::vector<Message>& messages) const = 0;
  // The answer as it follows that prompt, up to and including the end-of-turn token's text.
  virtual std::string response(const std::vector<Message>& messages, std::string_view answer) const = 0;
};

}  // namespace orpo
