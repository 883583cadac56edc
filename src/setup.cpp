#include "src/setup.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "data/tokenise.h"
#include "src/console.h"
#include "src/cpu/bf16.h"
#include "src/device.h"
#include "src/fail.h"
#include "tokenizer/template.h"
#include "tokenizer/tokenizer.h"

namespace orpo {

DType resolve_dtype(const Options& options) {
  const DTypeChoice choice = options.dtype;
  if (choice != DTypeChoice::automatic) return choice == DTypeChoice::bf16 ? DType::bf16 : DType::f32;
  if (Device::open(options.device).is_gpu()) return DType::bf16;
  const bool fast = cpu::multiplies_bf16();
  console().say("dtype: ", fast ? "bf16, which this CPU computes in (avx512_bf16)"
                                : "fp32; oneDNN does not compute in bf16 here (no avx512_bf16)");
  return fast ? DType::bf16 : DType::f32;
}

std::unique_ptr<Backend> open_backend(const Options& options) {
  return Device::open(options.device).make_backend(options.threads);
}

int64_t memory_for(const Options& options, const Backend& backend) {
  return options.device_memory ? options.device_memory : backend.free_memory();
}

HeadSettings head_settings(const Options& options) {
  HeadSettings settings;
  settings.objective = options.objective;
  settings.lambda = options.lambda;
  settings.nll_includes_prompt = options.nll_scope == NllScope::full;
  return settings;
}

std::string loss_text(const Options& options) {
  const std::string nll = options.nll_scope == NllScope::full ? "NLL(prompt + chosen)" : "NLL(chosen)";
  if (options.objective == Objective::sft) return nll + "; the rejected answers are measured and weigh nothing";
  return concat(nll, " + ", options.lambda, " * mean softplus(-log ",
                options.objective == Objective::orpo ? "odds" : "probability", " ratio)");
}

void resolve_lengths(Options& options, const Config& config) {
  if (options.max_length > config.max_positions)
    fail("--max-length: ", options.max_length, " is more than the ", config.max_positions, " positions of ",
         options.model);
  if (options.max_length == 0) options.max_length = std::min<int64_t>(2048, config.max_positions);
  if (options.max_prompt_length > options.max_length)
    fail("--max-prompt-length: ", options.max_prompt_length, " is more than the longest sequence, ",
         options.max_length);
  if (options.max_prompt_length == 0) options.max_prompt_length = options.max_length;
}

std::unique_ptr<PairSet> load_rows(const Options& options, const std::vector<std::string>& files, const Config& config,
                                   const char* what) {
  const std::filesystem::path folder = options.model;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;
  std::string without;  // why there is no tokenizer or template; pre-tokenised rows do without
  try {
    tokenizer = Tokenizer::load(folder);
    chat_template = choose_template(options.chat_template, folder);
  } catch (const UserError& e) {
    if (options.given.count("template")) throw;
    without = concat(" (", e.what(), ")");
  }
  DataSettings settings;
  settings.max_length = options.max_length;
  settings.max_prompt_length = options.max_prompt_length;
  settings.on_long = options.on_long;
  settings.on_bad_row = options.on_bad_row;
  settings.single_answers = options.objective == Objective::sft;
  settings.vocabulary = config.vocab;
  settings.threads = options.threads;
  std::unique_ptr<PairSet> set;
  try {
    set = PairSet::load({files.begin(), files.end()}, tokenizer.get(), chat_template.get(), settings);
  } catch (const UserError& e) {
    const std::string_view reason = e.what();
    const bool needs_them = reason.find(text_without_tokenizer) != reason.npos ||
                            reason.find(dialogue_without_template) != reason.npos;
    fail(reason, needs_them ? without : "");
  }

  if (!what) return set;
  const DataReport& r = set->report();
  console().say(what, ": ", r.kept, " of ", r.rows, " rows",
                r.dropped ? concat(", ", r.dropped, " dropped by --max-length ", options.max_length) : "",
                r.truncated ? concat(", ", r.truncated, " truncated to --max-length ", options.max_length) : "",
                r.bad ? concat(", ", r.bad, " bad ones skipped") : "", "; ", r.tokens, " tokens, longest sequence ",
                r.longest_sequence);
  for (const std::string& bad : r.first_bad) console().say("  skipped ", bad);
  if (!r.note.empty()) console().say(what, ": ", r.note);
  return set;
}

PlanRequest plan_request(const Options& options, const Config& config) {
  PlanRequest request;
  request.config = config;
  request.dtype = resolve_dtype(options);
  request.rehearsal = [&device = Device::open(options.device)] { return device.make_rehearsal_backend(); };
  request.head = head_settings(options);
  request.micro_tokens = options.micro_tokens;
  request.recompute = options.recompute;
  return request;
}

void print_plan(Options options) {
  const ModelDescription description = read_model_config(options.model);
  PlanRequest request = plan_request(options, description.config);
  request.step_pairs = options.batch_pairs;
  resolve_lengths(options, request.config);
  request.largest_pair_rows = largest_pair(options.max_length);
  for (const auto* files : {&options.data, &options.eval_data}) {
    if (files->empty()) continue;
    const auto set = load_rows(options, *files, request.config, files == &options.data ? "data" : "evaluation data");
    const int64_t rows = set->report().largest_pair_rows;
    request.largest_pair_rows = files == &options.data ? rows : std::max(request.largest_pair_rows, rows);
    if (files == &options.eval_data) request.eval_pairs = set->size();
  }
  const int64_t memory = options.device_memory ? options.device_memory : open_backend(options)->free_memory();
  const MemoryPlan plan = make_plan(request, memory);
  std::fputs(plan_table(plan, request, memory).c_str(), stdout);
}

}  // namespace orpo
