#include "src/prompts.h"

#include <chrono>
#include <cstdio>

#include "src/fail.h"
#include "src/files.h"

namespace orpo {
namespace {

using OrderedJson = nlohmann::ordered_json;

const std::string& text_field(const Json& value, const std::string& where, const char* field) {
  if (!value.is_string() || value.get_ref<const std::string&>().empty()) fail(where, ": ", field, " is no text");
  return value.get_ref<const std::string&>();
}

std::vector<Message> messages_of(const Json& list, const std::string& where) {
  std::vector<Message> messages;
  for (const Json& m : list) {
    const auto text = [&](const char* key) {
      if (!m.is_object() || !m.contains(key) || !m[key].is_string())
        fail(where, ": prompt: a message is no object with role and content");
      return m[key].get<std::string>();
    };
    messages.push_back({text("role"), text("content")});
  }
  if (messages.empty() || messages.back().role != "user") fail(where, ": prompt: the last message is not the user's");
  return messages;
}

PromptForm form_of(const Json& object, const std::string& where) {
  if (!object.is_object()) fail(where, ": is no JSON object");
  if (object.contains("turns")) return PromptForm::mt_bench;
  if (object.contains("instruction")) return PromptForm::alpaca_eval;
  if (object.contains("prompt")) return PromptForm::prompt;
  fail(where, ": has no prompt (a string or messages), instruction (AlpacaEval) or turns (MT-Bench)");
}

Prompt prompt_of(const Json& object, PromptForm form, const std::string& where) {
  Prompt p{object, {}, {}};
  if (form == PromptForm::prompt && object["prompt"].is_array()) {
    p.messages = messages_of(object["prompt"], where);
  } else if (form == PromptForm::prompt) {
    p.messages = {{"user", text_field(object["prompt"], where, "prompt")}};
  } else if (form == PromptForm::alpaca_eval) {
    p.messages = {{"user", text_field(object["instruction"], where, "instruction")}};
  } else {
    if (!object.contains("question_id")) fail(where, ": question_id is missing");
    const Json& turns = object["turns"];
    if (!turns.is_array() || turns.empty()) fail(where, ": turns is no list of texts");
    p.messages = {{"user", text_field(turns[0], where, "turns")}};
    for (size_t i = 1; i < turns.size(); ++i) p.more.push_back(text_field(turns[i], where, "turns"));
  }
  return p;
}

void add(PromptFile& file, const Json& object, const std::string& where) {
  const PromptForm form = form_of(object, where);
  if (file.prompts.empty()) file.form = form;
  if (form != file.form) fail(where, ": is of another form than the first prompt");
  file.prompts.push_back(prompt_of(object, form, where));
}

}  // namespace

PromptFile read_prompts(const std::filesystem::path& path) {
  const std::string text = read_file(path);
  PromptFile file;
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin != text.npos && text[begin] == '[') {
    const Json list = parse_json(text, path.string());
    for (size_t i = 0; i < list.size(); ++i) add(file, list[i], concat(path.string(), ": entry ", i + 1));
  } else {
    int64_t number = 0;
    for (size_t at = 0; at < text.size();) {
      const size_t end = std::min(text.find('\n', at), text.size());
      const std::string_view line = std::string_view(text).substr(at, end - at);
      at = end + 1, ++number;
      if (line.find_first_not_of(" \t\r") == line.npos) continue;
      const std::string where = concat(path.string(), ":", number);
      add(file, parse_json(line, where), where);
    }
  }
  if (file.prompts.empty()) fail(path.string(), ": holds no prompts");
  return file;
}

std::string answers_text(const PromptFile& file, const std::vector<std::vector<std::string>>& answers,
                         const std::string& model) {
  std::string lines;
  OrderedJson list = OrderedJson::array();
  const double now = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  for (size_t i = 0; i < file.prompts.size(); ++i) {
    const Json& given = file.prompts[i].given;
    OrderedJson out;
    switch (file.form) {
      case PromptForm::prompt:
        out["prompt"] = given["prompt"], out["response"] = answers[i][0];
        break;
      case PromptForm::alpaca_eval:
        out["instruction"] = given["instruction"], out["output"] = answers[i][0], out["generator"] = model;
        if (given.contains("dataset")) out["dataset"] = given["dataset"];
        break;
      case PromptForm::mt_bench:
        out["question_id"] = given["question_id"];
        out["answer_id"] = concat(model, "-", given["question_id"].dump());
        out["model_id"] = model;
        out["choices"] = OrderedJson::array({{{"index", 0}, {"turns", answers[i]}}});
        out["tstamp"] = now;
        break;
    }
    if (file.form == PromptForm::alpaca_eval)
      list.push_back(out);
    else
      lines += out.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  }
  return file.form == PromptForm::alpaca_eval ? list.dump(2, ' ', false, Json::error_handler_t::replace) + "\n" : lines;
}

}  // namespace orpo
