#include "tokenizer/template.h"

#include <algorithm>

#include "src/fail.h"
#include "tokenizer/jinja.h"

namespace orpo {
namespace {

// Turns that look alike: opening, content, closing. The closing's first part is the end-of-turn token.
class TurnTemplate : public ChatTemplate {
 public:
  enum Form { chatml, zephyr, llama3 };
  TurnTemplate(Form form, SpecialTexts texts, std::string default_system = "")
      : form_(form), texts_(std::move(texts)), default_system_(std::move(default_system)) {}

  std::string name() const override { return form_ == chatml ? "chatml" : form_ == zephyr ? "zephyr" : "llama-3"; }

  std::string prompt(const std::vector<Message>& messages) const override {
    std::string out;
    if (form_ == llama3 && !messages.empty()) out = texts_.begin;
    if (!default_system_.empty() && !messages.empty() && messages[0].role != "system")
      out += turn({"system", default_system_});
    for (const Message& m : messages) out += turn(m);
    return out + open("assistant");
  }

  std::string response(const std::vector<Message>&, std::string_view answer) const override {
    return content(answer) + end();
  }

 private:
  std::string open(const std::string& role) const {
    if (form_ == chatml) return "<|im_start|>" + role + "\n";
    if (form_ == zephyr) return "<|" + role + "|>\n";
    return "<|start_header_id|>" + role + "<|end_header_id|>\n\n";
  }
  std::string end() const { return form_ == chatml ? "<|im_end|>" : form_ == zephyr ? texts_.end : "<|eot_id|>"; }
  std::string content(std::string_view text) const { return std::string(form_ == llama3 ? jinja::strip(text) : text); }
  std::string turn(const Message& m) const {
    return open(m.role) + content(m.content) + end() + (form_ == llama3 ? "" : "\n");
  }

  Form form_;
  SpecialTexts texts_;
  std::string default_system_;
};

// How the templates with [INST] differ from each other.
struct InstForm {
  enum System { sys_tags, refused, before_first };  // where a system message goes
  std::string name;
  System system;
  bool begin_each;  // begin-of-sequence before every user turn, not only the first
  bool strip_user;  // contents are stripped, by role
  bool strip_answer;
  std::string close;   // after the user's text
  std::string before;  // before and after the answer; what follows the end-of-sequence token
  std::string after;
  std::string between;
};

class InstTemplate : public ChatTemplate {
 public:
  InstTemplate(InstForm form, SpecialTexts texts) : form_(std::move(form)), texts_(std::move(texts)) {}

  std::string name() const override { return form_.name; }

  std::string prompt(const std::vector<Message>& messages) const override {
    const bool has_system = !messages.empty() && messages[0].role == "system";
    if (has_system && form_.system == InstForm::refused) fail("the template has no place for a system message");
    const size_t first = has_system, last = messages.size() - 1;
    if (first >= messages.size() || messages[last].role != "user")
      fail("the last message before an answer must be the user's");
    std::string out = form_.begin_each ? "" : texts_.begin;
    for (size_t i = first; i <= last; ++i) {
      const Message& m = messages[i];
      if (m.role != ((i - first) % 2 ? "assistant" : "user"))
        fail("roles must alternate user, assistant, user, and so on; message ", i + 1, " is of \"", m.role, "\"");
      if (m.role == "assistant") {
        out += response({}, m.content) + form_.between;
        continue;
      }
      std::string text = m.content;
      if (has_system && form_.system == InstForm::sys_tags && i == first)
        text = "<<SYS>>\n" + messages[0].content + "\n<</SYS>>\n\n" + text;
      if (has_system && form_.system == InstForm::before_first && i == first)
        text = messages[0].content + "\n\n" + text;
      out += (form_.begin_each ? texts_.begin : "") + "[INST] " + content(text, form_.strip_user) + form_.close;
    }
    return out;
  }

  std::string response(const std::vector<Message>&, std::string_view answer) const override {
    return form_.before + content(answer, form_.strip_answer) + form_.after + texts_.end;
  }

 private:
  static std::string content(std::string_view text, bool strip) {
    return std::string(strip ? jinja::strip(text) : text);
  }

  InstForm form_;
  SpecialTexts texts_;
};

// The texts, each on a line (answers ended), or as they stand.
class TextTemplate : public ChatTemplate {
 public:
  TextTemplate(bool lines, SpecialTexts texts) : lines_(lines), texts_(std::move(texts)) {}
  std::string name() const override { return lines_ ? "plain" : "none"; }
  std::string prompt(const std::vector<Message>& messages) const override {
    std::string out;
    for (const Message& m : messages)
      out += m.content + (lines_ ? (m.role == "assistant" ? texts_.end : "") + "\n" : "");
    return out;
  }
  std::string response(const std::vector<Message>&, std::string_view answer) const override {
    return std::string(answer) + (lines_ ? texts_.end : "");
  }

 private:
  bool lines_;
  SpecialTexts texts_;
};

std::string list_of_names() {
  std::string out;
  for (const std::string& name : template_names()) out += (out.empty() ? "" : ", ") + name;
  return out;
}

InstForm llama2_form() { return {"llama-2", InstForm::sys_tags, true, true, true, " [/INST]", " ", " ", ""}; }

// Mistral's, by its spaces: before [/INST], before the answer, between turns; and whether the answer is stripped.
InstForm mistral_form(InstForm::System system, bool close, bool before, bool between, bool strip) {
  return {"mistral",         system, false, false, strip, close ? " [/INST]" : "[/INST]", before ? " " : "", "",
          between ? " " : ""};
}

using Template = std::unique_ptr<ChatTemplate>;

// What a template makes of a conversation; nothing where it refuses it.
template <class Render>
std::optional<std::string> rendered(Render&& render) {
  try {
    return render();
  } catch (const UserError&) {
    return std::nullopt;
  }
}

// Every form that a Jinja text is compared with.
std::vector<Template> forms(const jinja::Program& program, const SpecialTexts& texts) {
  std::vector<Template> out;
  // What a chatml template puts before a conversation that has no system message.
  constexpr std::string_view open = "<|im_start|>system\n", close = "<|im_end|>\n";
  std::string system;
  const auto text = rendered([&] { return program.render({{"user", "?"}}, texts.begin, texts.end, false); });
  const size_t end = text ? text->find(close) : std::string::npos;
  if (end != std::string::npos && text->starts_with(open)) system = text->substr(open.size(), end - open.size());
  out.push_back(std::make_unique<TurnTemplate>(TurnTemplate::chatml, texts, system));
  out.push_back(std::make_unique<TurnTemplate>(TurnTemplate::zephyr, texts));
  out.push_back(std::make_unique<TurnTemplate>(TurnTemplate::llama3, texts));
  out.push_back(std::make_unique<InstTemplate>(llama2_form(), texts));
  for (const auto place : {InstForm::refused, InstForm::before_first})
    for (int bits = 0; bits < 16; ++bits)
      out.push_back(std::make_unique<InstTemplate>(mistral_form(place, bits & 1, bits & 2, bits & 4, bits & 8), texts));
  out.push_back(std::make_unique<TextTemplate>(true, texts));
  return out;
}

// Conversations that end with a user's turn; together they show every rule that the forms differ in.
const std::vector<std::vector<Message>>& probes() {
  static const std::vector<std::vector<Message>> all = {
      {{"user", "How are you?"}},
      {{"user", "One."}, {"assistant", "Two."}, {"user", "Three."}},
      {{"system", "Be kind."}, {"user", "Hello"}},
      {{"system", "S"}, {"user", "A"}, {"assistant", "B"}, {"user", "C"}, {"assistant", "D"}, {"user", "E"}},
      {{"user", " \n padded \t\n"}, {"assistant", "\n padded too  "}, {"user", "  x"}},
      {{"system", "  padded "}, {"user", "<b>{{ 'x' }}</b> \"quoted\" 'so' \\n caf\u00e9"}},
  };
  return all;
}

// Whether both render every probe alike, prompt and answer, and refuse the same ones. A Jinja text that renders a
// conversation otherwise once it is answered (some Mistral ones drop the system message then) counts as refusing it:
// training and generation would differ.
bool renders_alike(const ChatTemplate& ours, const jinja::Program& program, const SpecialTexts& texts) {
  const std::string answer = " Fine, \n thanks. ";
  bool compared = false;
  for (const auto& messages : probes()) {
    auto whole = messages;
    whole.push_back({"assistant", answer});
    auto theirs = rendered([&] { return program.render(messages, texts.begin, texts.end, true); });
    const auto answered = rendered([&] { return program.render(whole, texts.begin, texts.end, false); });
    if (theirs && !(answered && answered->starts_with(*theirs))) theirs.reset();
    const auto prompt = rendered([&] { return ours.prompt(messages); });
    if (prompt != theirs) return false;
    if (!prompt) continue;
    if (!answered->starts_with(*prompt + ours.response(messages, answer))) return false;
    compared = true;
  }
  return compared;
}

}  // namespace

const std::vector<std::string>& template_names() {
  static const std::vector<std::string> names = {"chatml", "zephyr", "llama-2", "llama-3", "mistral", "plain", "none"};
  return names;
}

std::unique_ptr<ChatTemplate> make_template(const std::string& name, const SpecialTexts& texts) {
  const auto needs_end = [&] {
    if (texts.end.empty())
      fail("--template ", name,
           " ends answers with the end-of-sequence token, and the model's tokenizer names none; set eos_token in "
           "tokenizer_config.json or choose another of ",
           list_of_names());
  };
  if (name == "chatml") return std::make_unique<TurnTemplate>(TurnTemplate::chatml, texts);
  if (name == "llama-3") return std::make_unique<TurnTemplate>(TurnTemplate::llama3, texts);
  if (name == "none") return std::make_unique<TextTemplate>(false, texts);
  if (name == "zephyr" || name == "llama-2" || name == "mistral" || name == "plain") needs_end();
  if (name == "zephyr") return std::make_unique<TurnTemplate>(TurnTemplate::zephyr, texts);
  if (name == "llama-2") return std::make_unique<InstTemplate>(llama2_form(), texts);
  if (name == "mistral")
    return std::make_unique<InstTemplate>(mistral_form(InstForm::refused, true, false, false, false), texts);
  if (name == "plain") return std::make_unique<TextTemplate>(true, texts);
  fail("--template ", name, ": no such template; choose one of ", list_of_names());
}

std::unique_ptr<ChatTemplate> recognise_template(const std::string& text, const SpecialTexts& texts) {
  try {
    const jinja::Program program(text);
    for (Template& form : forms(program, texts))
      if (renders_alike(*form, program, texts)) return std::move(form);
  } catch (const UserError&) {
    // Jinja beyond what the named templates are written in: none of them.
  }
  return nullptr;
}

std::unique_ptr<ChatTemplate> choose_template(const std::string& name, const std::filesystem::path& folder) {
  const SpecialTexts texts = special_texts(folder);
  const auto own = own_template(folder);
  auto recognised = own ? recognise_template(*own, texts) : nullptr;
  if (!name.empty()) {
    if (recognised && recognised->name() == name) return recognised;
    return make_template(name, texts);
  }
  if (own && !recognised)
    fail("model folder ", folder.string(),
         ": its chat template is none that is known here; choose the one that fits with --template: ", list_of_names());
  return recognised;
}

}  // namespace orpo
