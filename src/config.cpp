#include "src/config.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>

#include "src/fail.h"
#include "src/options.h"
#include "src/toml.h"

namespace orpo {
namespace {

// Names of other trainers that nearly mean an option of ours, and the option to use.
const std::map<std::string, const char*>& near_misses() {
  static const std::map<std::string, const char*> names = {
      {"per-device-train-batch-size",
       "a step's pairs on all devices together are --batch-pairs; rows computed at a time are --micro-tokens"},
      {"gradient-accumulation-steps",
       "a step's pairs are --batch-pairs; accumulation over micro-batches of --micro-tokens rows follows by itself"},
      {"per-device-eval-batch-size", "evaluation computes --micro-tokens rows at a time"},
      {"eval-batch-size", "evaluation computes --micro-tokens rows at a time"},
      {"train-batch-size", "use --batch-pairs: pairs of a whole step"},
      {"batch-size", "use --batch-pairs: pairs of a whole step"},
      {"auto-find-batch-size", "--micro-tokens auto is the default; memory is planned before the run (--plan)"},
      {"bf16", "use --dtype bf16"},
      {"fp16", "use --dtype bf16 or --dtype fp32; half precision with loss scaling is not offered"},
      {"tf32", "use --dtype bf16 or --dtype fp32"},
      {"load-in-8bit", "quantised training is not offered; use --dtype bf16"},
      {"load-in-4bit", "quantised training is not offered; use --dtype bf16"},
      {"report-to", "metrics always go to metrics.jsonl and TensorBoard events in --output; nothing is sent anywhere"},
      {"logging-steps", "every step is logged, to metrics.jsonl in --output"},
      {"logging-dir", "use --metrics FILE; TensorBoard events lie in --output"},
      {"lr", "use --learning-rate"},
      {"lr-scheduler-type",
       "use --lr-schedule constant, linear, cosine or inverse-sqrt; --warmup-steps works with each"},
      {"warmup-ratio", "use --warmup-steps"},
      {"optim", "the optimiser is AdamW; see --adam-beta1 and the options after it"},
      {"eval-strategy", "use --eval-every STEPS"},
      {"evaluation-strategy", "use --eval-every STEPS"},
      {"eval-steps", "use --eval-every STEPS"},
      {"save-strategy", "use --save-every STEPS"},
      {"save-steps", "use --save-every STEPS"},
      {"save-total-limit", "use --keep"},
      {"overwrite-output-dir", "use --overwrite, which replaces the run in --output"},
      {"dataset-name", "use --data with JSON Lines files"},
      {"train-file", "use --data"},
      {"validation-file", "use --eval-data"},
      {"max-seq-length", "use --max-length: prompt and response together"},
      {"max-completion-length", "use --max-length: prompt and response together"},
      {"max-target-length", "use --max-length: prompt and response together"},
      {"truncation-mode", "use --on-long truncate: a prompt keeps its end, a response its start"},
      {"chat-template", "use --template"},
      {"loss-type", "use --objective"},
      {"use-cpu", "use --device cpu"},
      {"no-cuda", "use --device cpu"},
      {"dpo-beta", "the objectives are orpo, sft and ratio (--objective); dpo is not offered"},
      {"zero", "one process on one machine trains; there is nothing to shard over"},
      {"ranks", "one process on one machine trains, with --threads"},
      {"max-restarts", "one process trains; start it again with --resume"},
      {"lora-rank", "every weight is trained; low-rank adapters are not offered"},
      {"use-peft", "every weight is trained; low-rank adapters are not offered"},
      {"gradient-checkpointing", "use --recompute"},
      {"stream", "rows are read, checked and cached before the first step; files may be larger than memory"},
      {"dataloader-num-workers", "use --threads"},
      {"num-threads", "use --threads"},
  };
  return names;
}

std::string dashes(std::string name) {
  std::replace(name.begin(), name.end(), '_', '-');
  return name;
}

// Levenshtein distance.
size_t distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row.back();
}

const Option* find_option(Program program, const std::string& name) {
  for (const Option& o : option_table())
    if (o.concerns(program) &&
        (o.name == name || std::find(o.aliases.begin(), o.aliases.end(), name) != o.aliases.end()))
      return &o;
  return nullptr;
}

[[noreturn]] void unknown(Program program, const std::string& where, const std::string& name) {
  if (const auto near = near_misses().find(name); near != near_misses().end()) fail(where, ": ", near->second);
  for (const Program other : all_programs)
    if (find_option(other, name))
      fail(where, ": an option of ", program_name(other), ", not of ", program_name(program));
  std::string nearest = "config";
  for (const Option& o : option_table())
    if (o.concerns(program) && distance(name, o.name) < distance(name, nearest)) nearest = o.name;
  fail(where, ": unknown option; the nearest is --", nearest, " (--help lists all)");
}

// One option's values, from wherever they came.
void assign(Options& options, const Option& option, const std::string& where, const std::vector<std::string>& values) {
  if (option.list && !options.given.count(option.name)) option.clear(options);
  options.given.insert(option.name);
  for (const std::string& value : values) {
    try {
      option.set(options, value);
    } catch (const UserError& e) {
      fail(where, ": ", e.what());
    }
  }
}

struct Given {
  const Option* option;
  std::string where;  // as the user wrote the name
  std::vector<std::string> values;
};

struct CommandLine {
  std::vector<Given> options;
  std::string config;
  bool help = false;
};

// --name VALUE, --name=VALUE, --flag, --no-flag, --list A B C.
CommandLine read_command_line(Program program, int argc, const char* const* argv) {
  CommandLine line;
  for (int i = 1; i < argc;) {
    const std::string word = argv[i++];
    if (word == "-h" || word == "--help") {
      line.help = true;
      continue;
    }
    if (word.size() < 3 || word.compare(0, 2, "--") != 0)
      fail("'", word, "': an option was expected here, such as --", program == Program::train ? "data" : "model");
    const size_t equals = word.find('=');
    const std::string where = word.substr(0, equals);
    std::string name = dashes(where.substr(2));
    std::vector<std::string> values;
    if (equals != std::string::npos) values.push_back(word.substr(equals + 1));

    const Option* option = name == "config" ? nullptr : find_option(program, name);
    if (!option && name.rfind("no-", 0) == 0 && values.empty()) {
      option = find_option(program, name.substr(3));
      if (option && !option->is_flag()) option = nullptr;
      if (option) values.push_back("false");
    }
    if (!option && name != "config") unknown(program, where, name);
    const bool list = option && option->list;
    const bool wants_value = !option || !option->is_flag();
    while (wants_value && i < argc && std::string(argv[i]).compare(0, 2, "--") != 0 && (values.empty() || list))
      values.push_back(argv[i++]);
    if (values.empty() && option && !option->implied.empty()) values.push_back(option->implied);
    if (values.empty()) fail(where, ": needs a value (", option ? option->value : "FILE", ")");
    if (option)
      line.options.push_back({option, where, values});
    else
      line.config = values.front();
  }
  return line;
}

void read_config_file(Program program, const std::string& file, Options& options) {
  for (const TomlEntry& entry : read_toml(file)) {
    const std::string where = concat(file, ":", entry.line, ": ", entry.key), name = dashes(entry.key);
    const Option* option = find_option(program, name);
    if (!option) {
      // A recipe serves every program: what concerns another one is left to it.
      if (std::any_of(std::begin(all_programs), std::end(all_programs),
                      [&](Program other) { return find_option(other, name); }))
        continue;
      unknown(program, where, name);
    }
    if (entry.is_array && !option->list) fail(where, ": one value, not an array");
    assign(options, *option, where, entry.values);
  }
}

// What is computed for hours is not lost to a folder that is not there.
void check_place(const char* option, const std::string& file) {
  if (file.empty()) return;
  const std::filesystem::path path(file), folder = path.has_parent_path() ? path.parent_path() : ".";
  if (!std::filesystem::is_directory(folder))
    fail(option, ": ", file, " cannot be written; there is no folder ", folder.string());
  if (std::filesystem::is_directory(path)) fail(option, ": ", file, " is a folder; name a file");
}

// What no single option can tell.
void check_together(Program program, const Options& o) {
  if (program == Program::bench) {
    if (o.model.empty() && !o.data.empty())
      fail("--model: which model reads these rows? Give a Hugging Face folder, or leave out --data");
  } else if (program == Program::generate) {
    if (o.model.empty()) fail("--model: which model? Give a Hugging Face folder");
    if (o.prompt.empty() == o.prompts.empty()) fail("--prompt: give either one text, or a file of them with --prompts");
    if (o.top_p > 1) fail("--top-p: ", o.top_p, " is more than 1, the probability of all tokens");
    check_place("--output", o.answers);
  } else if (program != Program::train) {
    if (o.model.empty()) fail("--model: which model? Give a Hugging Face folder");
    if (o.data.empty()) fail("--data: which rows? Give JSON Lines files");
  } else if (o.resume.empty()) {
    if (o.model.empty() && !o.data.empty())
      fail("--model: which model? Give a Hugging Face folder, or neither --model nor --data for the demonstration");
    if (!o.model.empty() && o.data.empty() && !o.plan) fail("--data: which rows? Give JSON Lines files");
    if (o.model.empty() && o.init == Init::random) fail("--init: random needs --model (a folder with a config.json)");
  }
  if (o.model.empty() && o.plan) fail("--plan: needs --model (a folder with a config.json)");
  if (o.overwrite && !o.resume.empty())
    fail("--resume: goes on with the run that --overwrite would replace; give one of them");
  if (!o.save_gradients.empty() && !o.resume.empty())
    fail("--save-gradients: shows the first step of a fresh run; leave out --resume");
  if (o.model.empty() && o.resume.empty() && !o.save_gradients.empty())
    fail("--save-gradients: needs --model and --data");
  check_place("--metrics", o.metrics);
  check_place("--save-gradients", o.save_gradients);
  check_place("--per-pair", o.per_pair);
  check_place("--write", o.write);
  check_place("--json", o.json);
  if (program == Program::train && !o.plan && std::filesystem::exists(o.output) &&
      !std::filesystem::is_directory(o.output))
    fail("--output: ", o.output, " is a file; name a folder");
  if (o.max_length && o.max_prompt_length > o.max_length)
    fail("--max-prompt-length: ", o.max_prompt_length, " is more than --max-length ", o.max_length);
}

}  // namespace

Options parse_options(Program program, int argc, const char* const* argv) {
  const CommandLine line = read_command_line(program, argc, argv);
  if (line.help) {
    std::fputs(help_text(program).c_str(), stdout);
    std::exit(exit_finished);
  }
  Options options;
  if (!line.config.empty()) read_config_file(program, line.config, options);
  const std::set<std::string> from_file =
      std::exchange(options.given, {});  // so that a list given here replaces the file's
  for (const Given& given : line.options) assign(options, *given.option, given.where, given.values);
  options.given.insert(from_file.begin(), from_file.end());
  check_together(program, options);
  return options;
}

std::string help_text(Program program) {
  constexpr size_t column = 34;
  const Options defaults;
  std::string text = concat("usage: ", program_name(program), " [options]\n");
  if (program == Program::train) text += "Without --model and --data: the shipped demonstration.\n";
  const auto line = [&](std::string left, const std::string& right) {
    left = "  " + left;
    text += left +
            (left.size() + 1 < column ? std::string(column - left.size(), ' ') : "\n" + std::string(column, ' ')) +
            right + "\n";
  };
  std::string group;
  for (const Option& o : option_table()) {
    if (!o.concerns(program)) continue;
    if (group != o.group) text += concat("\n", group = o.group, "\n");
    const std::string value = o.default_text.empty() ? o.get(defaults) : o.default_text;
    const bool says_default = !value.empty() && value != "false";
    line("--" + o.name + (o.is_flag() ? "" : " " + o.value),
         o.help + (says_default ? " (default: " + (value == "true" ? "on" : value) + ")" : ""));
  }
  text += "\nEvery program\n";
  line("--config FILE", "options from a TOML file, under the same names; the command line wins");
  line("--help", "this text");
  return text;
}

std::vector<std::pair<std::string, std::string>> option_values(Program program, const Options& options) {
  std::vector<std::pair<std::string, std::string>> values;
  for (const Option& o : option_table())
    if (o.concerns(program)) values.emplace_back(o.name, o.get(options));
  return values;
}

std::string toml_text(const std::vector<std::pair<std::string, std::string>>& values) {
  const auto quoted = [](const std::string& text) {
    std::string out = "\"";
    for (const char c : text)
      out += c == '"' || c == '\\' ? std::string("\\") + c : c == '\n' ? "\", \"" : std::string(1, c);
    return out + "\"";
  };
  std::string text;
  for (const auto& [name, value] : values) {
    const Option* option = find_option(Program::train, name);
    if (value.empty() || !option || option->resume == Option::Resume::asks) continue;
    if (!option->default_text.empty() && value == option->get(Options{})) continue;  // "0" there stands for "by itself"
    const bool bare = value == "true" || value == "false" || option->value == "N" || option->value == "X" ||
                      option->value == "TOKENS" || option->value == "STEPS" || option->value == "ROWS";
    text += concat(name, " = ", bare ? value : option->list ? "[" + quoted(value) + "]" : quoted(value), "\n");
  }
  return text;
}

void adopt_options(Options& options, const std::vector<std::pair<std::string, std::string>>& saved) {
  const Options defaults;
  for (const auto& [name, value] : saved) {
    const Option* found = find_option(Program::train, name);
    if (!found) fail("the checkpoint was written with --", name, ", an option that this build does not have");
    const Option& option = *found;
    if (option.resume == Option::Resume::asks) continue;
    if (options.given.count(name)) {
      if (option.resume == Option::Resume::insists && option.get(options) != value)
        fail("--", name, ": this run was started with '", value, "', and its checkpoint means nothing with '",
             option.get(options), "'; leave the option out, or start afresh");
      continue;
    }
    if (value == option.get(defaults)) continue;
    std::vector<std::string> values;
    for (size_t begin = 0; begin <= value.size();) {
      const size_t end = option.list ? std::min(value.find('\n', begin), value.size()) : value.size();
      values.push_back(value.substr(begin, end - begin));
      begin = end + 1;
    }
    assign(options, option, "checkpoint's --" + name, values);
    options.given.erase(name);
  }
}

}  // namespace orpo
