#include "src/demonstration.h"

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <vector>

#include "src/console.h"
#include "src/decode.h"
#include "src/fail.h"
#include "src/family.h"
#include "src/files.h"
#include "src/json.h"
#include "src/loaded_model.h"
#include "src/setup.h"
#include "tokenizer/tokenizer.h"

namespace orpo {
namespace {

namespace fs = std::filesystem;

// The acts' settings. Options given on the command line win in act two.
constexpr int64_t base_steps = 600, preference_steps = 200, batch_pairs = 16;
constexpr double base_learning_rate = 1e-3, preference_learning_rate = 2e-4;
constexpr int64_t answer_tokens = 40;
constexpr const char* default_output = "out/demonstration";
constexpr const char* marker = "demonstration.txt";  // says that a folder is the demonstration's own

Options base_act(const Options& given, const fs::path& data, const fs::path& base) {
  Options act;
  act.model = (data / "model").string();
  act.init = Init::random;
  act.data = {(data / "base.jsonl").string()};
  act.objective = Objective::sft;
  act.learning_rate = base_learning_rate;
  act.max_steps = given.given.count("max-steps") ? std::min(given.max_steps, base_steps) : base_steps;
  act.batch_pairs = batch_pairs;
  act.output = base.string();
  act.overwrite = true;
  act.seed = given.seed, act.threads = given.threads, act.device = given.device;
  act.dtype =
      given.given.count("dtype") ? given.dtype : DTypeChoice::fp32;  // a model this small gains nothing from bf16
  return act;
}

Options preference_act(const Options& given, const fs::path& data, const fs::path& base, const fs::path& out) {
  const auto chosen = [&](const char* name) { return given.given.count(name) > 0; };
  Options act = given;
  act.model = base.string();
  act.data = {(data / "train.jsonl").string()};
  act.eval_data = {(data / "eval.jsonl").string()};
  if (!chosen("learning-rate")) act.learning_rate = preference_learning_rate;
  if (!chosen("max-steps") && !chosen("epochs")) act.max_steps = preference_steps;
  if (!chosen("batch-pairs")) act.batch_pairs = batch_pairs;
  if (!chosen("dtype")) act.dtype = DTypeChoice::fp32;
  act.output = out.string();
  act.overwrite = given.overwrite || fs::exists(out / marker);
  return act;
}

// What a model makes of the held-out pairs, and says itself.
struct Impression {
  PairSums sums;
  std::vector<std::string> answers;
};

Impression impression(Options options, const fs::path& model, const std::vector<int64_t>& asked) {
  options.model = model.string();
  const ModelDescription description = read_model_config(model);
  resolve_lengths(options, description.config);
  const auto tokenizer = Tokenizer::load(model);
  const auto set = load_rows(options, options.eval_data, description.config, nullptr);
  std::vector<std::vector<int32_t>> prompts;
  for (const int64_t row : asked) prompts.emplace_back((*set)[row].trunk.begin(), (*set)[row].trunk.end());
  LoadedModel loaded(options, description, *set, decoding_limits(description.config, prompts, answer_tokens));
  Impression result;
  const std::optional<PairSums> sums = evaluate(loaded.model(), *set, loaded.micro_tokens());
  if (!sums) fail_machine("stopped before the comparison; both models are in ", options.output);
  result.sums = *sums;
  Tokens stops;
  if (tokenizer->end_of_sequence) stops.push_back(*tokenizer->end_of_sequence);
  for (const Tokens& ids : decode(loaded.model(), prompts, stops, answer_tokens)) {
    std::string text = tokenizer->decode(ids, true);
    for (char& c : text)
      if (c == '\n') c = ' ';
    result.answers.push_back(text);
  }
  return result;
}

std::vector<std::string> questions(const fs::path& file, const std::vector<int64_t>& rows) {
  std::vector<std::string> lines, asked;
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  for (const int64_t row : rows)
    asked.push_back(parse_json(lines.at(row), file.string()).at("prompt").get<std::string>());
  return asked;
}

std::string result_text(const Impression& before, const Impression& after, const std::vector<std::string>& asked,
                        const Options& act) {
  std::string text;
  const auto line = [&](const char* what, double a, double b) {
    char buffer[120];
    std::snprintf(buffer, sizeof buffer, "  %-36s %8.3f %8.3f\n", what, a, b);
    text += buffer;
  };
  const auto mean = [](double sum, const PairSums& s) { return sum / s.pairs; };
  const PairSums &b = before.sums, &a = after.sums;
  text +=
      concat("\n", static_cast<int64_t>(a.pairs), " held-out pairs, about subjects that no training pair mentions\n");
  text += concat("  ", std::string(39, ' '), "before    after\n");
  line("mean log-probability, chosen", mean(b.chosen, b), mean(a.chosen, a));
  line("mean log-probability, rejected", mean(b.rejected, b), mean(a.rejected, a));
  line("margin", mean(b.margin, b), mean(a.margin, a));
  line("accuracy (chosen above rejected)", mean(b.wins, b), mean(a.wins, a));
  text += "\nIn its own words\n";
  for (size_t i = 0; i < asked.size(); ++i)
    text += concat("  ", asked[i], "\n    before  ", before.answers[i], "\n    after   ", after.answers[i], "\n");
  text += "\nTry next\n";
  if (act.objective == Objective::sft)
    text += "  ./orpo_train                        the same with the odds ratio: the rejected answers fall\n";
  else
    text +=
        "  ./orpo_train --objective sft        supervised training alone: the rejected answers rise with the chosen "
        "ones\n";
  text += concat(
      "  ./orpo_train --lambda 1             a stronger preference\n"
      "  ./orpo_train --model DIR --data FILE.jsonl --output OUT      your model (a Hugging Face folder) and your "
      "pairs\n"
      "  the trained model is in ",
      act.output, ", its curves in ", act.output, "/metrics.jsonl\n");
  return text;
}

}  // namespace

fs::path demonstration_data() {
  std::error_code unknown;  // where /proc is not mounted
  for (fs::path folder : {fs::current_path(), fs::read_symlink("/proc/self/exe", unknown).parent_path()})
    for (; !folder.empty(); folder = folder.parent_path()) {
      if (fs::exists(folder / "data/demonstration/train.jsonl")) return folder / "data/demonstration";
      if (folder == folder.parent_path()) break;
    }
  fail("data/demonstration is neither in this folder or above it nor beside the program; run the demonstration from "
       "the repository, or give --model and --data");
}

int demonstrate(const Options& given, int (*train)(const Options&)) {
  const fs::path data = demonstration_data(),
                 out = given.given.count("output") ? fs::path(given.output) : fs::path(default_output),
                 base = out / "base";
  const Options first = base_act(given, data, base), second = preference_act(given, data, base, out);
  if (!second.overwrite && fs::exists(out) && !fs::is_empty(out))
    fail("--output: ", out.string(),
         " holds something that is not the demonstration's; name another folder, or give --overwrite");
  make_folder(out);
  write_file(out / marker, "");

  console().line(console().styled(
      "Act one: a base model learns plain text in which friendly and grumpy sentences both occur.", Style::bold));
  if (const int status = train(first); status != exit_finished) return status;
  console().line(console().styled("Act two: the same model learns from pairs of answers.", Style::bold));
  if (const int status = train(second); status != exit_finished) return status;

  const std::vector<int64_t> asked = {3, 1, 37};  // rows of eval.jsonl, about three subjects
  const std::string text = result_text(impression(second, base, asked), impression(second, out, asked),
                                       questions(data / "eval.jsonl", asked), second);
  std::fputs(text.c_str(), stdout);
  write_file(out / marker, text);
  return exit_finished;
}

}  // namespace orpo
