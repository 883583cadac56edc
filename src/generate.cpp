// ./orpo_generate: a model's answers to prompts, in the forms that benchmarks read (prompts.h).
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "data/tokenise.h"
#include "src/config.h"
#include "src/console.h"
#include "src/fail.h"
#include "src/files.h"
#include "src/json.h"
#include "src/loaded_model.h"
#include "src/prompts.h"
#include "src/sampling.h"
#include "src/signals.h"
#include "src/waiting.h"
#include "tokenizer/template.h"
#include "tokenizer/tokenizer.h"

namespace orpo {
namespace {

namespace fs = std::filesystem;

// How texts become tokens, and what ends an answer.
struct Language {
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;
  Tokens stops;

  Tokens encode(const std::vector<Message>& messages) const {
    return encode_sequence(*tokenizer, chat_template->prompt(messages));
  }
};

// What transformers' generate() stops at (eos_token_id of generation_config.json), the tokenizer's end of sequence, and
// the token that ends the template's turns.
Tokens stop_tokens(const fs::path& folder, const Tokenizer& tokenizer, const ChatTemplate& chat_template) {
  std::set<int32_t> stops;
  const fs::path generation = folder / "generation_config.json";
  if (fs::exists(generation)) {
    const Json json = parse_json(read_file(generation), generation.string());
    const Json ids = json.is_object() ? json.value("eos_token_id", Json()) : Json();
    for (const Json& id : ids.is_array() ? ids : ids.is_null() ? Json::array() : Json::array({ids})) {
      if (!id.is_number_integer()) fail(generation.string(), ": eos_token_id ", brief(ids), " is no token");
      stops.insert(id.get<int32_t>());
    }
  }
  if (tokenizer.end_of_sequence) stops.insert(*tokenizer.end_of_sequence);
  if (chat_template.name() != "none") {
    const std::vector<Message> question = {{"user", "a"}};
    const Tokens whole = tokenizer.encode(chat_template.prompt(question) + chat_template.response(question, "b"));
    const int32_t last = whole.back();
    if (tokenizer.decode({&last, 1}, true).empty()) stops.insert(last);  // a special token
  }
  return {stops.begin(), stops.end()};
}

Language open_language(const Options& options) {
  Language language;
  language.tokenizer = Tokenizer::load(options.model);
  language.chat_template = choose_template(options.chat_template, options.model);
  if (!language.chat_template)
    fail("--template: ", options.model, " has no chat template; name one, or none for prompts as they stand");
  language.stops = stop_tokens(options.model, *language.tokenizer, *language.chat_template);
  return language;
}

// The longest sequence that any prompt may come to, later turns and all answers included.
int64_t longest_sequence(const Language& language, const std::vector<Prompt>& prompts, const Options& options) {
  int64_t longest = 0;
  for (const Prompt& prompt : prompts) {
    std::vector<Message> messages = prompt.messages;
    for (const std::string& turn : prompt.more)
      messages.push_back({"assistant", "a"}), messages.push_back({"user", turn});
    const auto turns = static_cast<int64_t>(prompt.more.size()) + 1;
    // An answer's text may take more tokens, read again, than it was made of: room for a tenth more.
    longest = std::max(longest, static_cast<int64_t>(language.encode(messages).size()) +
                                    turns * options.max_new_tokens * (turns > 1 ? 11 : 10) / 10);
  }
  return longest;
}

// Answers to one turn of all prompts, a batch after the other.
std::vector<std::string> answer(const std::vector<Tokens>& prompts, const Language& language, DeviceModel& model,
                                const Options& options, int64_t number) {
  const SamplingSettings settings{options.temperature, options.top_p, options.repetition_penalty, options.seed};
  std::vector<std::string> answers;
  while (answers.size() < prompts.size()) {
    if (stop_requested())
      fail_machine(stop_reason(), ": stopped after ", answers.size(), " of ", prompts.size(),
                   " prompts; nothing was written");
    const size_t count = std::min<size_t>(options.batch_prompts, prompts.size() - answers.size());
    const std::span<const Tokens> batch(prompts.data() + answers.size(), count);
    Sampler sampler(settings, batch, number + static_cast<int64_t>(answers.size()));
    for (const Tokens& ids : decode(model, batch, language.stops, options.max_new_tokens, std::ref(sampler)))
      answers.push_back(language.tokenizer->decode(ids, true));
    console().progress(concat("prompt ", answers.size(), "/", prompts.size()), answers.size() == prompts.size());
  }
  return answers;
}

// Whose positions are too few is said before anything is computed.
void check_lengths(const std::vector<Tokens>& prompts, const Config& config) {
  for (size_t i = 0; i < prompts.size(); ++i)
    if (static_cast<int64_t>(prompts[i].size()) >= config.max_positions)
      fail("--prompts: prompt ", i + 1, " has ", prompts[i].size(), " tokens; the model's ", config.max_positions,
           " positions leave none for an answer");
}

int generate(const Options& options) {
  const ModelDescription description = read_model_config(options.model);
  const Language language = open_language(options);
  PromptFile file;
  if (options.prompts.empty())
    file.prompts.push_back({Json{{"prompt", options.prompt}}, {{"user", options.prompt}}, {}});
  else
    file = read_prompts(options.prompts);
  std::vector<std::vector<Message>> conversations;
  std::vector<Tokens> first;
  for (const Prompt& prompt : file.prompts) {
    conversations.push_back(prompt.messages);
    first.push_back(language.encode(prompt.messages));
  }
  check_lengths(first, description.config);

  const int64_t positions =
      std::min(longest_sequence(language, file.prompts, options), description.config.max_positions);
  const auto together = std::min<int64_t>(options.batch_prompts, static_cast<int64_t>(first.size()));
  LoadedModel loaded(options, description, {together, positions, positions});
  catch_stop_signals();
  std::vector<std::vector<std::string>> answers(file.prompts.size());
  // Turn by turn: those that have one more go on together.
  for (size_t turn = 0;; ++turn) {
    std::vector<size_t> going;
    std::vector<Tokens> prompts;
    for (size_t i = 0; i < file.prompts.size(); ++i) {
      if (turn > file.prompts[i].more.size()) continue;
      if (turn > 0) conversations[i].push_back({"user", file.prompts[i].more[turn - 1]});
      going.push_back(i), prompts.push_back(turn == 0 ? first[i] : language.encode(conversations[i]));
    }
    if (going.empty()) break;
    check_lengths(prompts, description.config);
    const auto number = static_cast<int64_t>(turn * file.prompts.size());
    const std::vector<std::string> texts = answer(prompts, language, loaded.model(), options, number);
    for (size_t k = 0; k < going.size(); ++k) {
      answers[going[k]].push_back(texts[k]);
      conversations[going[k]].push_back({"assistant", texts[k]});
    }
  }

  std::string name = options.model_id;
  if (name.empty()) name = fs::weakly_canonical(options.model).filename().string();
  const std::string text = options.prompts.empty() ? answers[0][0] + "\n" : answers_text(file, answers, name);
  if (options.answers.empty())
    std::fputs(text.c_str(), stdout);
  else
    write_file_atomically(options.answers, text);
  return exit_finished;
}

}  // namespace
}  // namespace orpo

int main(int argc, char** argv) {
  using namespace orpo;
  spin_briefly(argv);
  return run_program("orpo_generate", [&] { return generate(parse_options(Program::generate, argc, argv)); });
}
