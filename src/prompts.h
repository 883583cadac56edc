// What ./orpo_generate answers, and the files its answers go to, in the forms that benchmarks read:
//
//   given                                              becomes
//   prompt (a string or messages)                      JSON Lines of prompt and response: IFEval's response file
//   instruction (AlpacaEval)                           a JSON array of instruction, output, generator and dataset
//   question_id, turns (MT-Bench's question.jsonl)     JSON Lines of MT-Bench's answers, a turn after the other
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "src/json.h"
#include "tokenizer/template.h"

namespace orpo {

enum class PromptForm { prompt, alpaca_eval, mt_bench };

struct Prompt {
  Json given;                     // the object as it came
  std::vector<Message> messages;  // the conversation so far, the user's turn last
  std::vector<std::string> more;  // the user's turns that follow the answers
};

struct PromptFile {
  PromptForm form = PromptForm::prompt;
  std::vector<Prompt> prompts;
};

// JSON Lines, or a JSON array of objects, all of one form. Throws UserError naming file, line or entry, field and
// reason.
PromptFile read_prompts(const std::filesystem::path& file);

// answers[i]: one for each turn of prompt i. model: what the benchmark calls it.
std::string answers_text(const PromptFile& prompts, const std::vector<std::vector<std::string>>& answers,
                         const std::string& model);

}  // namespace orpo
