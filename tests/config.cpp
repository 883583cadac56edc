// The options table and its parser: every option, the recipe file, the checkpoint's copy, and the exact line of each
// mistake.
#include "src/config.h"

#include <doctest/doctest.h>

#include <fstream>
#include <map>

#include "src/fail.h"
#include "src/options.h"
#include "src/toml.h"
#include "tests/temporary_folder.h"

namespace orpo {
namespace {

using Words = std::vector<std::string>;

Options parse(Words words, Program program = Program::train) {
  std::vector<const char*> argv{"program"};
  for (const std::string& word : words) argv.push_back(word.c_str());
  return parse_options(program, static_cast<int>(argv.size()), argv.data());
}

std::string error_of(const Words& words, Program program = Program::train) {
  try {
    parse(words, program);
  } catch (const UserError& e) {
    return e.what();
  }
  return "no error";
}

Words with_model(Words words) {
  words.insert(words.begin(), {"--model", "M", "--data", "D"});
  return words;
}

// What a program cannot do without.
Words with_input(Words words, Program program) {
  const bool generates = program == Program::generate;
  words.insert(words.begin(), {"--model", "M", generates ? "--prompts" : "--data", "D"});
  return words;
}

// A value for each option that is not its default.
std::string other_value(const Option& o) {
  static const std::map<std::string, std::string> special = {
      {"init", "random"},        {"on-long", "truncate"},         {"on-bad-row", "skip"}, {"objective", "sft"},
      {"nll-scope", "response"}, {"lr-schedule", "inverse-sqrt"}, {"dtype", "fp32"},      {"device", "cpu"},
      {"save-dtype", "fp16"},    {"device-memory", "80G"},        {"adam-beta1", "0.5"},  {"adam-beta2", "0.75"},
      {"max-length", "900"},     {"max-prompt-length", "700"}};
  if (const auto found = special.find(o.name); found != special.end()) return found->second;
  if (o.is_flag()) return o.get(Options{}) == "true" ? "false" : "true";
  return o.value == "X"                                                                     ? "0.375"
         : o.value == "N" || o.value == "STEPS" || o.value == "ROWS" || o.value == "TOKENS" ? "7"
                                                                                            : "text";
}

TEST_CASE("every option is set by its name, by each alias, with - and _, and by a recipe") {
  const TemporaryFolder folder;
  const Options defaults;
  for (const Option& o : option_table())
    for (const Program program : all_programs) {
      if (!o.concerns(program)) continue;
      CAPTURE(o.name);
      const std::string value = other_value(o), stored = o.name == "device-memory" ? "85899345920" : value;
      CHECK(o.get(defaults) != stored);
      Words names = o.aliases;
      names.push_back(o.name);
      for (std::string name : names)
        for (const char separator : {'-', '_'}) {
          std::replace(name.begin(), name.end(), '-', separator);
          Options options;
          if (o.name == "model" || o.name == "data" || o.name.starts_with("prompt")) continue;
          const Words base = with_input({"--" + name + "=" + value}, program);
          CHECK(o.get(parse(base, program)) == stored);
          CHECK(parse(base, program).given.count(o.name) == 1);
        }
      const std::filesystem::path recipe = folder.path() / "recipe.toml";
      const bool asks = o.resume == Option::Resume::asks || !o.concerns(Program::train);  // in no run's recipe
      std::ofstream(recipe) << toml_text({{o.name, value}})
                            << (asks ? o.name + " = \"" + value + "\"\n" : "");
      if ((!o.is_flag() || !asks) && o.name != "prompt")
        CHECK(o.get(parse(with_input({"--config", recipe}, program), program)) != o.get(defaults));
    }
}

TEST_CASE("defaults are the documented ones") {
  const Options o = parse(with_model({}));
  CHECK(o.lambda == 0.1);
  CHECK(o.nll_scope == NllScope::full);
  CHECK(o.learning_rate == 5e-6);
  CHECK(o.lr_schedule == LrSchedule::constant);
  CHECK(o.warmup_steps == 0);
  CHECK(o.adam_beta1 == 0.9);
  CHECK(o.adam_beta2 == 0.999);
  CHECK(o.adam_eps == 1e-8);
  CHECK(o.weight_decay == 0);
  CHECK(o.max_grad_norm == 1);
  CHECK(o.epochs == 1);
  CHECK(o.batch_pairs == 16);
  CHECK(o.output == "out");
  CHECK(o.objective == Objective::orpo);
}

TEST_CASE("lists, flags and optional values") {
  CHECK(parse({"--model", "M", "--data", "a", "b", "--data", "c"}).data == Words{"a", "b", "c"});
  CHECK_FALSE(parse(with_model({"--no-shuffle"})).shuffle);
  CHECK(parse(with_model({"--shuffle"})).shuffle);
  CHECK(parse({"--resume"}).resume == "newest");
  CHECK(parse({"--resume", "out/checkpoint-3"}).resume == "out/checkpoint-3");
  CHECK(parse({"--resume-from-checkpoint", "x"}).resume == "x");
  CHECK(parse({}).model.empty());  // the demonstration
  CHECK(parse_size("512M") == int64_t{512} << 20);
  CHECK(parse_size("80GiB") == int64_t{80} << 30);
  CHECK(parse_size("1.5K") == 1536);
  CHECK(parse_size("4096") == 4096);
}

TEST_CASE("each mistake is one line that says what to do") {
  const std::vector<std::pair<Words, std::string>> cases = {
      {{"--learning-rat", "1"}, "--learning-rat: unknown option; the nearest is --learning-rate (--help lists all)"},
      {{"--seed", "1", "foo"}, "'foo': an option was expected here, such as --data"},
      {{"--learning-rate"}, "--learning-rate: needs a value (X)"},
      {{"--learning-rate", "fast"}, "--learning-rate: 'fast' is not a number"},
      {{"--learning-rate", "-1"}, "--learning-rate: -1 is out of range; the least is 0"},
      {{"--learning-rate", "nan"}, "--learning-rate: nan is out of range; the least is 0"},
      {{"--learning-rate", "inf"}, "--learning-rate: inf is out of range; it must be finite"},
      {{"--adam-beta1", "1"}, "--adam-beta1: 1 is out of range; it must be below 1"},
      {{"--batch-pairs", "0"}, "--batch-pairs: 0 is too small; the least is 1"},
      {{"--batch_pairs", "2.5"}, "--batch_pairs: '2.5' is not a whole number"},
      {{"--objective", "dpo"}, "--objective: 'dpo' is not one of orpo|sft|ratio"},
      {{"--shuffle=maybe"}, "--shuffle: 'maybe' is neither true nor false"},
      {{"--device-memory", "80X"}, "--device-memory: '80X' is not a size such as 512M or 80G"},
      {{"--device", "tpu"}, "--device: 'tpu' is not one of auto|cpu|cuda|cuda-emulated"},
      {{"--max-length", "10", "--max-prompt-length", "11"}, "--max-prompt-length: 11 is more than --max-length 10"},
      {{"--resume", "--overwrite"}, "--resume: goes on with the run that --overwrite would replace; give one of them"},
      {{"--write", "x"}, "--write: an option of orpo_data, not of orpo_train"},
      {{"--bf16"}, "--bf16: use --dtype bf16"},
      {{"--per_device_train_batch_size", "4"},
       "--per_device_train_batch_size: a step's pairs on all devices together are --batch-pairs; rows computed at a "
       "time are --micro-tokens"},
      {{"--save-total-limit", "1"}, "--save-total-limit: use --keep"},
  };
  for (const auto& [words, line] : cases) CHECK(error_of(with_model(words)) == line);
  CHECK(error_of({"--model", "M"}) == "--data: which rows? Give JSON Lines files");
  CHECK(error_of({"--data", "D"}) ==
        "--model: which model? Give a Hugging Face folder, or neither --model nor --data for the demonstration");
  CHECK(error_of({"--plan"}) == "--plan: needs --model (a folder with a config.json)");
  CHECK(error_of({"--data", "D"}, Program::eval) == "--model: which model? Give a Hugging Face folder");
  for (const char* near : {"gradient-accumulation-steps", "fp16", "report-to", "logging-steps", "warmup-ratio",
                           "lr-scheduler-type", "eval-steps", "save-steps", "max-completion-length", "optim"})
    CHECK(error_of(with_model({std::string("--") + near, "1"})).find("unknown") == std::string::npos);
}

TEST_CASE("a recipe names file and line; the command line wins over it") {
  const TemporaryFolder folder;
  const std::filesystem::path recipe = folder.path() / "r.toml";
  const auto with = [&](const std::string& text, Words more = {}) {
    std::ofstream(recipe) << text;
    more.insert(more.begin(), {"--config", recipe});
    return more;
  };
  const std::string text =
      "# a run\nmodel = \"M\"  # here\ndata = [\"a\", 'b',\n  \"c\"]\nlearning_rate = 1e-5\nmax-steps = 1_000\nshuffle "
      "= false\nper-pair = \"x\"\n";
  const Options o = parse(with(text, {"--learning-rate", "2e-5", "--data", "z"}));
  CHECK(o.model == "M");
  CHECK(o.data == Words{"z"});
  CHECK(o.learning_rate == 2e-5);
  CHECK(o.max_steps == 1000);
  CHECK_FALSE(o.shuffle);
  CHECK(parse(with(text)).data == Words{"a", "b", "c"});

  const std::string at = recipe.string();
  CHECK(error_of(with("model = \"M\"\nlearning-rte = 1\n")) ==
        at + ":2: learning-rte: unknown option; the nearest is --learning-rate (--help lists all)");
  CHECK(error_of(with("learning-rate = fast\n")) == at + ":1: Error while parsing boolean: expected 'false', saw 'fas'");
  CHECK(error_of(with("[optimizer]\n")) ==
        at + ":1: tables such as [optimizer] are not used here; write the options one below the other");
  CHECK(error_of(with("seed = 1\nseed = 2\n")) == at + ":2: Error while parsing key-value pair: cannot redefine existing integer 'seed'");
  CHECK(error_of(with("seed = [1, 2]\n")) == at + ":1: seed: one value, not an array");
  CHECK(error_of(with("model = \"M\n")).find(at + ":1: Error while parsing string") == 0);
  CHECK(error_of(with("seed 1\n")) == at + ":1: Error while parsing key-value pair: expected '=', saw '1'");
  CHECK(error_of(with("seed = 1 2\n")) == at + ":1: Error while parsing key-value pair: expected a comment or whitespace, saw '2'");
  CHECK(error_of({"--config", "nowhere.toml"}) == "nowhere.toml: cannot be read as an options file (--config)");
}

TEST_CASE("the checkpoint's copy: what was not given is taken, what fixes the data is insisted on") {
  const Options run = parse({"--model", "M", "--data", "a", "b", "--learning-rate", "1e-3", "--batch-pairs", "4",
                             "--output", "o", "--no-shuffle"});
  const auto saved = option_values(Program::train, run);
  Options resumed = parse({"--resume", "--learning-rate", "2e-3", "--batch-pairs", "4"});
  adopt_options(resumed, saved);
  CHECK(resumed.model == "M");
  CHECK(resumed.data == Words{"a", "b"});
  CHECK(resumed.learning_rate == 2e-3);
  CHECK_FALSE(resumed.shuffle);
  CHECK(resumed.output == "out");
  CHECK(resumed.resume == "newest");
  Options other = parse({"--resume", "--seed", "7"});
  CHECK_THROWS_WITH_AS(adopt_options(other, saved),
                       "--seed: this run was started with '42', and its checkpoint means nothing with '7'; leave the "
                       "option out, or start afresh",
                       UserError);
}

TEST_CASE("--help names every option of a program and no other") {
  for (const Program program : all_programs) {
    const std::string help = help_text(program);
    for (const Option& o : option_table())
      CHECK((help.find("  --" + o.name + (o.is_flag() ? " " : " " + o.value)) != std::string::npos) ==
            o.concerns(program));
  }
}

}  // namespace
}  // namespace orpo
