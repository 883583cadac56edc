// Chat templates by name: messages to the text a model was trained on. Each one is verified against its Jinja original
// (tests/template.cpp).
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace orpo {

struct Message {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

// A dialogue in the pieces that preference training needs. The pieces are concatenations of each other's text: prompt +
// chosen is what the template renders for the whole chosen conversation, cut after the end-of-turn token. Contents are
// trimmed where the Jinja original trims them.
class ChatTemplate {
 public:
  virtual ~ChatTemplate() = default;
  virtual std::string name() const = 0;
  // The conversation so far, ready for an answer (the template's generation prompt at its end). The begin-of-sequence
  // text is included where the template writes it: a caller adds the token only where the encoded text does not open
  // with it. Throws UserError where the template refuses the roles (for example a system message it has no place for).
  virtual std::string prompt(const std::vector<Message>& messages) const = 0;
  // The answer as it follows that prompt, up to and including the end-of-turn token's text.
  virtual std::string response(const std::vector<Message>& messages, std::string_view answer) const = 0;
};

// The names, best known first: chatml, zephyr (the official ORPO code's default), llama-2, llama-3, mistral, plain (the
// texts on lines, answers ended), none (the texts as they stand, nothing between or after them).
const std::vector<std::string>& template_names();

// Texts of the model's special tokens, which templates write.
struct SpecialTexts {
  std::string begin, end;  // bos_token, eos_token; empty where the tokenizer has none
};
SpecialTexts special_texts(const std::filesystem::path& folder);

// The Jinja text of the folder's own template: chat_template.jinja, else chat_template of tokenizer_config.json (of a
// list the one named "default"). Nothing where it has none.
std::optional<std::string> own_template(const std::filesystem::path& folder);

// By name. Throws UserError: no such name (the message lists them), or it needs a special token that `texts` lacks.
std::unique_ptr<ChatTemplate> make_template(const std::string& name, const SpecialTexts& texts);
// The named template that renders as this Jinja text does, in the variant that it is (default system message, spacing):
// both are run on probing conversations. Null where it is none of them.
std::unique_ptr<ChatTemplate> recognise_template(const std::string& jinja, const SpecialTexts& texts);

// The template for a model folder: `name`, or the folder's own where `name` is empty. A name that the folder's own
// template goes by too means the folder's variant. Null where `name` is empty and the folder has no template. Throws
// UserError: no such name, or the folder's own is none of the named ones (both messages list the names).
std::unique_ptr<ChatTemplate> choose_template(const std::string& name, const std::filesystem::path& folder);

}  // namespace orpo
