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

// Answers to one turn of all prompts, a batch after the other.
std::vector<std::string> answer(const std::vector<Tokens>& prompts, const Language& language,
                                const ModelDescription& description, const Options& options, int64_t number) {
  DecodingLimits limits = decoding_limits(description.config, prompts, options.max_new_tokens);
  limits.sequences = std::min(limits.sequences, options.batch_prompts);
  LoadedModel loaded(options, description, limits);  // anew for each turn, whose lengths are known now
  const SamplingSettings settings{options.temperature, options.top_p, options.repetition_penalty, options.seed};
  std::vector<std::string> answers;
  while (answers.size() < prompts.size()) {
    if (stop_requested())
      fail_machine(stop_reason(), ": stopped after ", answers.size(), " of ", prompts.size(),
                   " prompts; nothing was written");
    const size_t count = std::min<size_t>(options.batch_prompts, prompts.size() - answers.size());
    const std::span<const Tokens> batch(prompts.data() + answers.size(), count);
    Sampler sampler(settings, batch, number + static_cast<int64_t>(answers.size()));
    for (const Tokens& ids : decode(loaded.model(), batch, language.stops, options.max_new_tokens, std::ref(sampler)))
      answers.push_back(language.tokenizer->decode(ids, true));
    console().progress(concat("prompt ", answers.size(), "/", prompts.size()), answers.size() == prompts.size());
  }
  return answers;
}

// Answers to all turns of all prompts. Turn by turn: those that have one more go on together.
std::vector<std::vector<std::string>> answer_all(const std::vector<Prompt>& prompts, const Language& language,
                                                 const Options& options) {
  const ModelDescription description = read_model_config(options.model);
  const int64_t positions = description.config.max_positions;
  std::vector<std::vector<std::string>> answers(prompts.size());
  std::vector<std::vector<Message>> conversations;
  for (const Prompt& prompt : prompts) conversations.push_back(prompt.messages);
  for (size_t turn = 0;; ++turn) {
    std::vector<size_t> going;
    std::vector<Tokens> tokens;
    bool more = false;
    for (size_t i = 0; i < prompts.size(); ++i) {
      if (turn > prompts[i].more.size()) continue;
      more = true;
      if (turn > 0) conversations[i].push_back({"user", prompts[i].more[turn - 1]});
      Tokens ids = language.encode(conversations[i]);
      const auto length = static_cast<int64_t>(ids.size());
      const std::string room = concat("prompt ", i + 1, " has ", length, " tokens; the model's ", positions,
                                      " positions leave none for an answer");
      if (length < positions) {
        going.push_back(i), tokens.push_back(std::move(ids));
      } else if (turn == 0) {  // nothing is lost yet
        fail(options.prompts.empty() ? "--prompt: " : "--prompts: ", room);
      } else {
        console().say("turn ", turn + 1, ": ", room, ": it stays empty");
        answers[i].emplace_back();
      }
    }
    if (!more) return answers;
    if (going.empty()) continue;
    const auto number = static_cast<int64_t>(turn * prompts.size());
    const std::vector<std::string> texts = answer(tokens, language, description, options, number);
    for (size_t k = 0; k < going.size(); ++k) {
      answers[going[k]].push_back(texts[k]);
      conversations[going[k]].push_back({"assistant", texts[k]});
    }
  }
}

int generate(const Options& options) {
  const Language language = open_language(options);
  PromptFile file;
  if (options.prompts.empty())
    file.prompts.push_back({Json{{"prompt", options.prompt}}, {{"user", options.prompt}}, {}});
  else
    file = read_prompts(options.prompts);
  catch_stop_signals();
  const std::vector<std::vector<std::string>> answers = answer_all(file.prompts, language, options);

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
