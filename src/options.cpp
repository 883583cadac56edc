#include "src/options.h"

#include <charconv>
#include <limits>

#include "src/console.h"
#include "src/fail.h"

namespace orpo {
namespace {

constexpr unsigned train = 1, eval = 2, data = 4, bench = 8, generate = 16,
                   all = train | eval | data;
constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr int64_t most = int64_t{1} << 53;

template <class Number>
Number parse_number(const std::string& text, const char* kind) {
  Number value{};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || stop != end || text.empty()) fail("'", text, "' is not ", kind);
  return value;
}

using O = Options;

Option named(const char* name, std::string value) {
  Option o;
  o.name = name;
  o.value = std::move(value);
  return o;
}

// The table's entries are built by one function a kind of value; each binds a member of Options.
template <class Integer>
Option integer(const char* name, Integer O::*member, int64_t least, int64_t greatest = most, const char* value = "N") {
  Option o = named(name, value);
  o.set = [=](O& options, const std::string& text) {
    const int64_t value = parse_number<int64_t>(text, "a whole number");
    if (value < least) fail(value, " is too small; the least is ", least);
    if (value > greatest) fail(value, " is too large; the most is ", greatest);
    options.*member = static_cast<Integer>(value);
  };
  o.get = [=](const O& options) { return std::to_string(options.*member); };
  return o;
}

// least <= value < bound.
Option number(const char* name, double O::*member, double least, double bound = infinity) {
  Option o = named(name, "X");
  o.set = [=](O& options, const std::string& text) {
    const double value = parse_number<double>(text, "a number");
    if (!(value >= least)) fail(text, " is out of range; the least is ", least);
    if (!(value < bound))
      fail(text, " is out of range; it must be ", bound == infinity ? "finite" : concat("below ", bound));
    options.*member = value;
  };
  o.get = [=](const O& options) { return number_text(options.*member); };
  return o;
}

Option text(const char* name, const char* value, std::string O::*member) {
  Option o = named(name, value);
  o.set = [=](O& options, const std::string& given) {
    if (given.empty()) fail("the value is empty");
    options.*member = given;
  };
  o.get = [=](const O& options) { return options.*member; };
  return o;
}

Option list(const char* name, const char* value, std::vector<std::string> O::*member) {
  Option o = named(name, value);
  o.list = true;
  o.set = [=](O& options, const std::string& entry) {
    if (entry.empty()) fail("a value is empty");
    (options.*member).push_back(entry);
  };
  o.get = [=](const O& options) {
    std::string joined;
    for (const std::string& entry : options.*member) joined += (joined.empty() ? "" : "\n") + entry;
    return joined;
  };
  o.clear = [=](O& options) { (options.*member).clear(); };
  return o;
}

Option flag(const char* name, bool O::*member) {
  Option o = named(name, "");
  o.implied = "true";
  o.set = [=](O& options, const std::string& value) {
    if (value != "true" && value != "false") fail("'", value, "' is neither true nor false");
    options.*member = value == "true";
  };
  o.get = [=](const O& options) { return options.*member ? "true" : "false"; };
  return o;
}

template <class Enum>
Option choice(const char* name, Enum O::*member, std::initializer_list<std::pair<const char*, Enum>> list) {
  const std::vector<std::pair<std::string, Enum>> choices(list.begin(), list.end());
  Option o = named(name, "");
  for (const auto& [word, value] : choices) o.value += (o.value.empty() ? "" : "|") + word;
  o.set = [=, words = o.value](O& options, const std::string& text) {
    for (const auto& [word, value] : choices)
      if (text == word) {
        options.*member = value;
        return;
      }
    fail("'", text, "' is not one of ", words);
  };
  o.get = [=](const O& options) {
    for (const auto& [word, value] : choices)
      if (options.*member == value) return word;
    fail_machine("an option of this table holds a value without a name");
  };
  return o;
}

Option size(const char* name, int64_t O::*member) {
  Option o = named(name, "SIZE");
  o.set = [=](O& options, const std::string& text) { options.*member = parse_size(text); };
  o.get = [=](const O& options) { return std::to_string(options.*member); };
  return o;
}

std::vector<Option> build_table() {
  std::vector<Option> table;
  const char* group = "";
  const auto add = [&](unsigned programs, Option option, const char* help) -> Option& {
    option.programs = programs;
    option.group = group;
    option.help = help;
    return table.emplace_back(std::move(option));
  };

  group = "Model";
  add(all | bench | generate, text("model", "DIR", &O::model),
      "Hugging Face model folder: config.json, safetensors, tokenizer files")
      .alias("model-name-or-path");
  add(train, choice<Init>("init", &O::init, {{"model", Init::model}, {"random", Init::random}}),
      "random: config.json and tokenizer of --model, weights drawn anew from --seed");
  add(all | generate, text("template", "NAME", &O::chat_template), "chat template; none joins strings as they stand")
      .shown_as("the model folder's own")
      .insists();

  group = "Data";
  add(all | bench, list("data", "FILE...", &O::data), "preference rows, JSON Lines, .gz too");
  add(train, list("eval-data", "FILE...", &O::eval_data),
      "held-out rows, measured before, as --eval-every says, and at the end");
  add(all | bench, integer("max-length", &O::max_length, 2, most, "TOKENS"), "longest prompt + response")
      .shown_as("2048, or the model's positions if fewer")
      .insists();
  add(all, integer("max-prompt-length", &O::max_prompt_length, 1, most, "TOKENS"), "longest prompt")
      .shown_as("--max-length")
      .insists();
  add(all, choice<OnLong>("on-long", &O::on_long, {{"drop", OnLong::drop}, {"truncate", OnLong::truncate}}),
      "what happens to longer rows")
      .insists();
  add(all, choice<OnBadRow>("on-bad-row", &O::on_bad_row, {{"error", OnBadRow::error}, {"skip", OnBadRow::skip}}),
      "what happens at a row that is no preference")
      .insists();
  add(train, flag("shuffle", &O::shuffle),
      "a new order every epoch, fixed by --seed; --no-shuffle keeps the files' order")
      .insists();
  add(train | bench | generate, integer("seed", &O::seed, 0),
      "fixes the order of the pairs, random weights, what is drawn")
      .insists();

  group = "Generation";
  add(generate, text("prompt", "TEXT", &O::prompt), "one user's turn; the answer goes to stdout").asks();
  add(generate, text("prompts", "FILE", &O::prompts),
      "JSON Lines or a JSON array with prompt, instruction (AlpacaEval) or turns (MT-Bench)")
      .asks();
  add(generate, integer("max-new-tokens", &O::max_new_tokens, 1, 1 << 30, "TOKENS"), "longest answer");
  add(generate, number("temperature", &O::temperature, 0), "0: greedy, the most probable token; else drawn");
  add(generate, number("top-p", &O::top_p, 1e-9), "drawn from the fewest tokens with so much probability");
  add(generate, number("repetition-penalty", &O::repetition_penalty, 1e-9),
      "above 1: tokens that occurred are less likely");
  add(generate, integer("batch-prompts", &O::batch_prompts, 1, 1 << 16), "prompts answered at a time");
  add(generate, text("model-id", "NAME", &O::model_id), "what the answers are signed with")
      .shown_as("the folder's name");

  group = "Objective";
  add(all,
      choice<Objective>("objective", &O::objective,
                        {{"orpo", Objective::orpo}, {"sft", Objective::sft}, {"ratio", Objective::ratio}}),
      "orpo: odds ratio; sft: chosen answers only; ratio: probability ratio (ablation)")
      .insists();
  add(train | eval, number("lambda", &O::lambda, 0), "weight of the preference term")
      .alias("orpo-alpha")
      .alias("pref-beta")
      .alias("beta");
  add(train | eval,
      choice<NllScope>("nll-scope", &O::nll_scope, {{"full", NllScope::full}, {"response", NllScope::response}}),
      "tokens in the supervised loss: prompt and chosen answer, or the answer alone");

  group = "Optimiser";
  add(train, number("learning-rate", &O::learning_rate, 0), "peak learning rate of AdamW");
  add(train,
      choice<LrSchedule>("lr-schedule", &O::lr_schedule,
                         {{"constant", LrSchedule::constant},
                          {"linear", LrSchedule::linear},
                          {"cosine", LrSchedule::cosine},
                          {"inverse-sqrt", LrSchedule::inverse_sqrt}}),
      "what follows the warm-up");
  add(train, integer("warmup-steps", &O::warmup_steps, 0), "steps from learning rate 0 to the peak");
  add(train, number("weight-decay", &O::weight_decay, 0), "decoupled; norms and biases never decay");
  add(train, number("adam-beta1", &O::adam_beta1, 0, 1), "decay of the first moment");
  add(train, number("adam-beta2", &O::adam_beta2, 0, 1), "decay of the second moment");
  add(train, number("adam-eps", &O::adam_eps, 1e-30), "added to the root of the second moment").alias("adam-epsilon");
  add(train, number("max-grad-norm", &O::max_grad_norm, 0), "clip the gradient's global norm to this; 0: do not");

  group = "Run";
  add(train, number("epochs", &O::epochs, 1e-9, 1e9), "passes over the data").alias("num-train-epochs");
  add(train, integer("max-steps", &O::max_steps, 1), "steps in all, in place of --epochs").shown_as("as --epochs says");
  add(train | bench, integer("batch-pairs", &O::batch_pairs, 1, 1 << 24),
      "pairs of a whole step, on all devices together")
      .insists();
  add(train, integer("eval-every", &O::eval_every, 1, most, "STEPS"), "evaluate this often")
      .shown_as("before and after only");
  add(train, integer("save-every", &O::save_every, 1, most, "STEPS"), "write a checkpoint this often")
      .shown_as("when stopped only");
  add(train, integer("keep", &O::keep, 1, 1 << 20), "checkpoints kept");
  Option& resume = add(
      train, text("resume", "[CHECKPOINT]", &O::resume),
      "go on from the newest whole checkpoint in --output, or from this one, with its options where none are given");
  resume.alias("resume-from-checkpoint").asks();
  resume.implied = "newest";
  add(train, integer("stop-after-seconds", &O::stop_after_seconds, 1), "then checkpoint and exit 75, as at SIGTERM")
      .shown_as("never")
      .asks();
  add(train, integer("max-bad-steps", &O::max_bad_steps, 1),
      "stop at so many steps in a row without a finite loss and gradient");

  group = "Machine";
  add(train | eval | bench, integer("micro-tokens", &O::micro_tokens, 1, 1 << 30, "ROWS"),
      "token rows computed at a time: memory and speed, not results")
      .shown_as("auto");
  add(train, flag("recompute", &O::recompute),
      "keep each layer's input alone and compute the rest again: less memory, a tenth more time, the same results");
  add(train | eval | bench | generate,
      choice<DTypeChoice>("dtype", &O::dtype,
                          {{"auto", DTypeChoice::automatic}, {"bf16", DTypeChoice::bf16}, {"fp32", DTypeChoice::fp32}}),
      "weights and activations; auto: bf16 where the machine computes in it")
      .insists();
  add(train | eval | generate | bench,
      choice<DeviceChoice>("device", &O::device,
                           {{"auto", DeviceChoice::automatic},
                            {"cpu", DeviceChoice::cpu},
                            {"cuda", DeviceChoice::cuda},
                            {"cuda-emulated", DeviceChoice::cuda_emulated}}),
      "where to compute; auto: a GPU where there is one; cuda-emulated: its kernels on the CPU, slowly")
      .asks();
  add(all | bench | generate, integer("threads", &O::threads, 1, 4096), "CPU threads").shown_as("all").asks();
  add(train, size("device-memory", &O::device_memory), "memory the run may take, such as 80G")
      .shown_as("what the device has free")
      .asks();
  add(train, flag("plan", &O::plan), "print the memory the run takes and stop; works from config.json alone").asks();
  add(train, flag("profile", &O::profile), "time by operation of the fastest step: printed, and in profile.json")
      .asks();

  group = "Results";
  add(train, text("output", "DIR", &O::output), "becomes a Hugging Face folder; metrics and checkpoints inside")
      .alias("output-dir")
      .asks();
  add(train, flag("overwrite", &O::overwrite), "replace a run that --output holds").asks();
  add(train,
      choice<SaveDType>("save-dtype", &O::save_dtype,
                        {{"auto", SaveDType::as_input},
                         {"bf16", SaveDType::bf16},
                         {"fp16", SaveDType::fp16},
                         {"fp32", SaveDType::fp32}}),
      "dtype of the saved weights; auto: as in --model");
  add(train, text("metrics", "FILE", &O::metrics), "one JSON object a step")
      .shown_as("metrics.jsonl in --output");
  add(train, text("save-gradients", "FILE", &O::save_gradients),
      "write the first step's gradients (fp32, before clipping) and stop")
      .asks();
  add(generate, text("output", "FILE", &O::answers), "the answers, in the form that belongs to the prompts")
      .shown_as("stdout")
      .asks();
  add(eval, text("per-pair", "FILE", &O::per_pair), "one JSON line a row").asks();
  add(data, text("write", "FILE", &O::write), "the rows, tokenised").asks();
  add(data, integer("show", &O::show, 0), "pairs printed token by token").asks();
  add(bench, text("json", "FILE", &O::json), "the page's figures").asks();
  add(bench, list("only", "PART...", &O::only), "models, layouts, lengths, threads, checkpoint, decoding; operations")
      .shown_as("all of them but operations")
      .asks();
  add(bench, text("shape", "mistral-7b|phi-2|gpt2|tiny", &O::shape), "whose operations --only operations times").asks();
  add(bench, flag("quick", &O::quick), "the demonstration's model alone, few steps: shows that it works").asks();
  return table;
}

}  // namespace

const std::vector<Option>& option_table() {
  static const std::vector<Option> table = build_table();
  return table;
}

const char* program_name(Program program) {
  return program == Program::train  ? "orpo_train"
         : program == Program::eval ? "orpo_eval"
         : program == Program::data  ? "orpo_data"
         : program == Program::bench ? "orpo_bench"
                                     : "orpo_generate";
}

int64_t parse_size(const std::string& text) {
  double value = 0;
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  std::string unit(stop, text.data() + text.size());
  for (const char* suffix : {"iB", "B"})
    if (unit.size() > 1 && unit.ends_with(suffix)) unit.resize(unit.size() - std::string(suffix).size());
  const size_t power = unit.empty() || unit == "B" ? 0 : std::string("KMGT").find(unit) + 1;
  if (error != std::errc() || !(value > 0) || unit.size() > 1 || (power == 0 && !unit.empty() && unit != "B"))
    fail("'", text, "' is not a size such as 512M or 80G");
  const double bytes = value * static_cast<double>(int64_t{1} << (10 * power));
  if (bytes < 1 || bytes > 9e18) fail("'", text, "' is out of range");
  return static_cast<int64_t>(bytes);
}

}  // namespace orpo
