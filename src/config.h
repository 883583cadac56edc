// The options of every program: one table (options.cpp) generates the parser, --help, the run's log and the
// checkpoint's copy.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "data/pairs.h"
#include "src/objective.h"
#include "src/schedule.h"
#include "src/tensor.h"

namespace orpo {

enum class Program : unsigned { train = 1, eval = 2, data = 4, bench = 8, generate = 16 };
inline constexpr Program all_programs[] = {Program::train, Program::eval, Program::data, Program::bench,
                                            Program::generate};
enum class NllScope { full, response };
enum class Init { model, random };
enum class DTypeChoice { automatic, bf16, fp32 };
enum class DeviceChoice { automatic, cpu, cuda, cuda_emulated };
enum class SaveDType { as_input, bf16, fp16, fp32 };

struct Options {
  // model
  std::string model;          // Hugging Face folder; empty: the demonstration (orpo_train)
  Init init = Init::model;    // random: config.json and tokenizer of the folder, weights drawn anew
  std::string chat_template;  // --template; empty: the model folder's own
  // data
  std::vector<std::string> data, eval_data;
  int64_t max_length = 0;         // 0: 2048, or the model's positions if fewer
  int64_t max_prompt_length = 0;  // 0: max_length
  OnLong on_long = OnLong::drop;
  OnBadRow on_bad_row = OnBadRow::error;
  bool shuffle = true;
  uint64_t seed = 42;
  // objective
  Objective objective = Objective::orpo;
  double lambda = 0.1;
  NllScope nll_scope = NllScope::full;
  // optimiser
  double learning_rate = 5e-6;
  LrSchedule lr_schedule = LrSchedule::constant;
  int64_t warmup_steps = 0;
  double weight_decay = 0, adam_beta1 = 0.9, adam_beta2 = 0.999, adam_eps = 1e-8;
  double max_grad_norm = 1;  // 0: no clipping
  double epochs = 1;
  int64_t max_steps = 0;     // 0: as epochs says
  int64_t batch_pairs = 16;  // of a whole step
  int64_t max_bad_steps = 5;
  // machine
  int64_t micro_tokens = 0;  // rows computed at a time; 0: chosen by plan.h
  DTypeChoice dtype = DTypeChoice::automatic;
  DeviceChoice device = DeviceChoice::automatic;
  int threads = 0;            // 0: all the machine has
  int64_t device_memory = 0;  // bytes; 0: the machine's
  bool plan = false;
  bool recompute = false;
  bool profile = false;
  // run
  std::string output = "out";
  bool overwrite = false;
  std::string resume;                      // "newest" or a checkpoint folder; empty: a fresh run
  int64_t eval_every = 0, save_every = 0;  // steps; 0: at the end only
  int64_t keep = 2;
  SaveDType save_dtype = SaveDType::as_input;
  std::string metrics;             // file; empty: OUT/metrics.jsonl
  int64_t stop_after_seconds = 0;  // 0: never
  std::string save_gradients;
  // orpo_eval, orpo_data
  std::string per_pair;  // JSON Lines, one a kept row
  std::string write;     // pre-tokenised rows
  int64_t show = 2;      // pairs printed token by token
  // orpo_generate
  std::string prompt, prompts;  // one text, or a file of them
  std::string answers;          // --output; empty: stdout
  std::string model_id;         // what answers are signed with; empty: the folder's name
  int64_t max_new_tokens = 512;
  int64_t batch_prompts = 8;
  double temperature = 0, top_p = 1, repetition_penalty = 1;
  // orpo_bench
  bool quick = false;
  std::vector<std::string> only;  // parts of the page; empty: all
  std::string json;               // file; empty: none
  std::string shape = "mistral-7b";  // of --only operations

  std::set<std::string> given;  // names set by the command line or --config, not by default
};

// Reads the command line (and the TOML file that --config names; the command line wins). Throws UserError: unknown
// option (with the nearest name, or the option to use where a name of other trainers nearly means the same), missing or
// malformed value, value out of range, options that exclude each other. --help prints the program's options on stdout
// and exits 0.
Options parse_options(Program program, int argc, const char* const* argv);

// The help text of a program, options grouped, defaults stated.
std::string help_text(Program program);

// Every option of the program with its value, in the table's order: the run's log and the checkpoint's copy. Values are
// written as the parser reads them; lists joined by newlines.
std::vector<std::pair<std::string, std::string>> option_values(Program program, const Options& options);

// The same as a recipe for --config: options that hold no value are left out.
std::string toml_text(const std::vector<std::pair<std::string, std::string>>& values);

// Takes from a checkpoint's copy every option that was not given. Options that a resumed run must share (what fixes the
// order of the pairs) and that were given differently: UserError.
void adopt_options(Options& options, const std::vector<std::pair<std::string, std::string>>& saved);

// "512M", "80G", "80GiB", plain bytes; powers of 1024. Throws UserError.
int64_t parse_size(const std::string& text);

}  // namespace orpo
