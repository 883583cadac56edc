#include "src/run.h"

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "src/console.h"
#include "src/fail.h"
#include "src/json.h"
#include "src/setup.h"
#include "src/signals.h"
#include "src/timed_backend.h"

namespace orpo {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// What an earlier run leaves in its output folder.
std::vector<fs::path> remains_of_a_run(const fs::path& out) {
  std::vector<fs::path> remains;
  if (!fs::is_directory(out)) return remains;
  for (const fs::directory_entry& entry : fs::directory_iterator(out)) {
    const std::string name = entry.path().filename();
    if (name == "metrics.jsonl" || name == "options.toml" || name == "profile.json" ||
        name.starts_with("events.out.tfevents.") || name.starts_with("checkpoint-") || is_weights_file(name))
      remains.push_back(entry.path());
  }
  return remains;
}

StoredDType saved_dtype(SaveDType choice, StoredDType input) {
  return choice == SaveDType::bf16   ? StoredDType::bf16
         : choice == SaveDType::fp16 ? StoredDType::f16
         : choice == SaveDType::fp32 ? StoredDType::f32
                                     : input;
}

// What the rows are, as tokens in their order: a resumed run needs the same ones, wherever their files lie now.
int64_t fingerprint(const PairSet& set) {
  Hasher hasher;
  for (int64_t i = 0; i < set.size(); ++i) {
    const TokenPair pair = set[i];
    for (const auto part : {pair.trunk, pair.chosen, pair.rejected}) {
      const uint64_t length = part.size();
      hasher.add(std::as_bytes(std::span(&length, 1)));
      hasher.add(std::as_bytes(part));
    }
  }
  return static_cast<int64_t>(hasher.value() >> 1);
}

// "loss 1.234  nll 1.200  chosen -0.500  rejected -0.900  accuracy 0.750": what people look at.
std::string headline(const MetricList& metrics, const std::string& prefix = "") {
  std::string text;
  for (const auto& [label, name] :
       {std::pair{"loss", "loss"}, std::pair{"nll", "nll_loss"}, std::pair{"chosen", "logps/chosen"},
        std::pair{"rejected", "logps/rejected"}, std::pair{"accuracy", "rewards/accuracies"}})
    if (const double value = metric(metrics, prefix + name); !std::isnan(value))
      text += concat("  ", label, " ", number_text(value, 3));
  return text;
}

}  // namespace

Run::Run(const Options& given) : options_(given), start_(Clock::now()) {
  const bool writes = given.save_gradients.empty();
  if (!given.resume.empty())
    open_checkpoint(given);
  else if (writes && !given.overwrite && !remains_of_a_run(given.output).empty())
    fail("--output: ", given.output,
         " holds a run; go on with it by --resume, replace it by --overwrite, or name another folder");

  if (std::error_code none; writes && fs::equivalent(options_.model, options_.output, none))
    fail("--output: ", options_.output,
         " is the --model folder itself; name another, so that the model you have stays");

  source_.folder = options_.model;
  source_.description = read_model_config(options_.model);
  for (const std::string& note : source_.description.notes) console().say("model: ", note);
  source_.dtype = saved_dtype(options_.save_dtype, stored_dtype(options_.model, source_.description));
  resolve_lengths(options_, source_.description.config);

  data_ = load_rows(options_, options_.data, source_.description.config, "data");
  if (!options_.eval_data.empty())
    eval_data_ = load_rows(options_, options_.eval_data, source_.description.config, "evaluation data");
  sampler_.emplace(data_->size(), options_.batch_pairs, options_.seed, options_.shuffle);
  total_steps = options_.max_steps > 0 ? options_.max_steps : sampler_->steps(options_.epochs);

  open_memory();
  load_state();
  if (writes) open_output();
  say_what_runs();
  start_seconds_ = seconds_since(start_);
  begin_step();
}

// --resume: the newest whole checkpoint of --output, or the folder named. A run that was stopped before its first
// checkpoint starts again.
void Run::open_checkpoint(const Options& given) {
  if (given.resume != "newest") {
    const fs::path folder = fs::weakly_canonical(given.resume);
    if (!given.given.count("output")) options_.output = folder.parent_path().string();
    if (fs::weakly_canonical(options_.output) != folder.parent_path() && !remains_of_a_run(options_.output).empty())
      fail("--output: ", options_.output, " holds another run than ", given.resume, "; name another folder");
    if (fs::is_directory(options_.output)) lock_.emplace(options_.output);
    checkpoint_ = orpo::open_checkpoint(folder);
  } else if (fs::is_directory(given.output)) {
    lock_.emplace(given.output);
    checkpoint_ = find_resumable(given.output, [](const std::string& line) { console().say(line); });
  }
  if (!checkpoint_) {
    for (const fs::path& left : remains_of_a_run(options_.output)) {
      const std::string name = left.filename();
      if (name.starts_with("checkpoint-"))
        fail("--resume: ", given.output,
             " has no whole checkpoint; --overwrite starts anew and removes the broken ones");
      if (name.starts_with("model"))
        fail("--resume: ", given.output, " holds a finished run without a checkpoint; --overwrite replaces it");
    }
    if (given.model.empty() || given.data.empty())
      fail("--resume: ", given.output, " has no whole checkpoint; give --model and --data to start the run");
    console().say("no checkpoint in ", given.output, " yet: starting from the beginning");
    return;
  }
  adopt_options(options_, checkpoint_->state.options);
  if (!fs::is_directory(options_.model))
    fail("--model: the folder ", options_.model, " that this run started from is gone; say where it is now");
}

void Run::open_memory() {
  const Config& config = source_.description.config;
  PlanRequest request = plan_request(options_, config);
  request.largest_pair_rows =
      std::max(data_->report().largest_pair_rows, eval_data_ ? eval_data_->report().largest_pair_rows : 0);
  request.step_pairs = std::min(options_.batch_pairs, data_->size());
  request.eval_pairs = eval_data_ ? eval_data_->size() : 0;
  backend_ = open_backend(options_);
  plan_ = make_plan(request, memory_for(options_, *backend_));

  if (options_.profile) backend_ = make_timed_backend(std::move(backend_), config.layers, profile_);
  gemm_rate_ = backend_->published_rate(request.dtype);
  rate_is_published_ = gemm_rate_ > 0;
  if (!rate_is_published_) gemm_rate_ = measure_gemm_rate(*backend_, request.dtype);
  backend_->reserve_workspace(plan_.workspace_bytes);
  state_.emplace("state", *backend_, plan_.state_bytes);
  scratch_.emplace("scratch", *backend_, plan_.scratch_bytes);
  model_.emplace(DeviceModel{config, request.dtype, TrainingTensors::allocate(config, request.dtype, *state_),
                             request.head, *backend_, *scratch_, request.recompute});
  if (state_->used() != plan_.state_bytes)
    fail_machine("memory: planned ", plan_.state_bytes, " bytes for weights, gradients and moments, took ",
                 state_->used());
}

void Run::load_state() {
  const TrainingTensors& t = model_->tensors;
  if (!checkpoint_) {
    // Memory that is zero already is not touched before the first update needs it: the kernel may take seconds over it.
    const bool zeros = backend_->allocates_zeros();
    if (options_.init == Init::random)
      draw_weights(*model_, options_.seed);
    else
      load_weights(options_.model, model_->config, t.masters(), *backend_, zeros);
    if (!zeros) start_optimizer(*model_);
    return;
  }
  const TrainingState& state = checkpoint_->state;
  load_checkpoint(*checkpoint_, model_->config, {t.masters(), t.first, t.second}, *backend_);
  const auto counter = [&](const char* name) {
    const auto found = state.counters.find(name);
    return found == state.counters.end() ? int64_t{0} : found->second;
  };
  if (counter("data_pairs") != data_->size())
    fail("--data: the run was started on ", counter("data_pairs"), " pairs, and now there are ", data_->size(),
         "; a resumed run needs the same rows");
  if (state.counters.contains("data_fingerprint") && counter("data_fingerprint") != data_fingerprint())
    fail("--data: the rows are not those that the run was started on (as tokens, in their order); a resumed run needs "
         "the same rows");
  done = done_at_start_ = state.step;
  skipped = counter("skipped_steps");
  skipped_in_a_row = counter("skipped_in_a_row");
  history_ = state.log_history;
  if (!history_.empty() && history_.back().find("\"eval_loss\"") != std::string::npos)
    evaluated_ = parse_json(history_.back(), "log_history").value("step", int64_t{-1});
  saved_ = done;
  if (done > total_steps)
    fail(options_.max_steps > 0 ? "--max-steps" : "--epochs", ": the run would end at step ", total_steps,
         ", and its checkpoint is of step ", done, "; give more, or resume from an earlier checkpoint");
}

// A run that cannot be written at its end is not begun: the model, and where checkpoints are asked for one more than
// is kept, with fp32 masters and moments.
void Run::check_free_space(const fs::path& out) const {
  const int64_t parameters = model_->config.parameters(), model = parameters * stored_dtype_bytes(source_.dtype);
  const int64_t needed = model + (options_.save_every > 0 ? (options_.keep + 1) * (model + parameters * 12) : 0);
  std::error_code unknown;
  const fs::space_info space = fs::space(out, unknown);
  if (!unknown && space.available < static_cast<uint64_t>(needed))
    fail_machine("--output: ", out.string(), " is on a device with ", bytes_text(static_cast<int64_t>(space.available)),
                 " free; this run writes up to ", bytes_text(needed));
}

// From here on the output folder is this run's.
void Run::open_output() {
  const fs::path out = options_.output;
  make_folder(out);
  check_free_space(out);
  if (!lock_) lock_.emplace(out);
  if (!checkpoint_)
    for (const fs::path& old : remains_of_a_run(out)) remove_tree(old);
  sweep_leftovers(out);
  std::string recipe = "# The options of this run: orpo_train --config options.toml repeats it.\n";
  write_file_atomically(out / "options.toml", recipe + toml_text(option_values(Program::train, options_)));
  log_.emplace(options_.metrics.empty() ? out / "metrics.jsonl" : fs::path(options_.metrics), out,
               checkpoint_ ? std::optional(done) : std::nullopt);
}

void Run::say_what_runs() const {
  const Options& o = options_;
  const Config& c = model_->config;
  console().say("model: ", c.family, ", ", number_text(static_cast<double>(c.parameters()) / 1e6, 1),
                " million parameters, ", o.init == Init::random ? "drawn anew, " : "", dtype_name(model_->dtype),
                " on ", backend_->name(), "; ", rate_is_published_ ? "" : "2048^3 ", "products at ",
                number_text(gemm_rate_ / 1e9, 0), " GFLOP/s (", rate_is_published_ ? "published" : "measured",
                "; mfu is against it)");
  console().say("loss: ", loss_text(o));
  console().say("run: ", total_steps - done, " steps of ", std::min(o.batch_pairs, data_->size()), " pairs, ",
                number_text(sampler_->epoch_at(total_steps), 2), " epochs",
                done ? concat(", resumed at step ", done) : "", "; learning rate ", o.learning_rate, "; memory ",
                bytes_text(plan_.total()), ", micro-batches of ", plan_.micro_tokens, " rows (--plan shows more)");
}

// mfu is against the best rate of the run: on a machine that was busy at the start that is a later one. Costs less than
// a tenth of a second.
void Run::measure_rate() {
  if (!rate_is_published_) gemm_rate_ = std::max(gemm_rate_, measure_gemm_rate(*backend_, model_->dtype));
}

AdamW Run::next_update() const {
  const Options& o = options_;
  const double factor = schedule_factor(o.lr_schedule, done, o.warmup_steps, total_steps);
  return {o.learning_rate * factor, o.adam_beta1, o.adam_beta2, o.adam_eps, o.weight_decay, done - skipped + 1, 1.0};
}

void Run::check_gradients(const GradientNorm& gradients) {
  if (!gradients_checked_) check_first_gradients(*model_, gradients);
  gradients_checked_ = true;
}

void Run::check_moments(double learning_rate) {
  if (moments_checked_ || learning_rate == 0) return;
  check_first_moments(*model_);
  moments_checked_ = true;
}

MetricList Run::base_metrics() const {
  return {{"step", static_cast<double>(done)}, {"epoch", sampler_->epoch_at(done)}};
}

void Run::write_metrics(const MetricList& metrics) {
  if (log_) log_->write(done, metrics);
  history_.push_back(json_line(metrics));
}

// A step's time runs from the end of what came before it.
void Run::begin_step() {
  step_end_ = Clock::now();
  profile_.begin_step();
}

void Run::log(const StepResult& r) {
  const double seconds = seconds_since(step_end_), flops = r.work.training_flops(model_->config);
  profile_.end_step(r.work.tokens, r.work.pairs, flops);
  if (flops / seconds > gemm_rate_) measure_rate();  // no part of any step
  begin_step();
  MetricList m = base_metrics();
  for (const auto& entry : preference_metrics(r.sums, model_->head)) m.push_back(entry);
  for (const auto& [name, value] : MetricList{{"grad_norm", r.gradients.norm},
                                              {"learning_rate", r.learning_rate},
                                              {"tokens_per_second", r.work.tokens / seconds},
                                              {"pairs_per_second", r.work.pairs / seconds},
                                              {"mfu", flops / seconds / gemm_rate_},
                                              {"peak_memory_bytes", static_cast<double>(backend_->peak_memory())},
                                              {"micro_batches", static_cast<double>(r.micro_batches)},
                                              {"skipped_steps", static_cast<double>(skipped)}})
    m.emplace_back(name, value);
  write_metrics(m);
  show_progress(m, seconds);
  collect_checkpoint(false);
  if (!r.finite) report_skipped(r);
}

void Run::show_progress(const MetricList& m, double seconds) {
  std::string text = concat("step ", done, "/", total_steps, headline(m), "  ",
                            number_text(metric(m, "tokens_per_second"), 0), " tokens/s");
  // The first step builds what the later ones find ready: it says nothing about them.
  const int64_t timed = done - done_at_start_ - 1;
  if (timed > 0) {
    stepping_seconds_ += seconds;
    text += concat(
        "  ", seconds_text(stepping_seconds_ / static_cast<double>(timed) * static_cast<double>(total_steps - done)),
        " left");
  }
  console().progress(text, done == total_steps);
}

void Run::report_skipped(const StepResult& r) {
  console().say("step ", done, ": the ", std::isfinite(loss_of(r.sums, model_->head)) ? "gradient" : "loss",
                " is not finite; step skipped");
  if (skipped_in_a_row >= options_.max_bad_steps)
    fail("step ", done, ": loss or gradient was not finite in ", skipped_in_a_row,
         " steps in a row; the weights still are what they were after step ", done - skipped_in_a_row,
         "; try a lower --learning-rate, --warmup-steps, or --dtype fp32");
}

bool Run::evaluate() {
  if (!eval_data_ || evaluated_ == done) return true;
  const std::optional<PairSums> sums = orpo::evaluate(*model_, *eval_data_, plan_.micro_tokens);
  if (!sums) return false;
  MetricList m = base_metrics();
  for (const auto& entry : preference_metrics(*sums, model_->head, "eval_")) m.push_back(entry);
  write_metrics(m);
  evaluated_ = done;
  measure_rate();
  console().say("evaluation at step ", done, ":", headline(m, "eval_"));
  begin_step();
  return true;
}

int64_t Run::data_fingerprint() {
  if (!data_fingerprint_) data_fingerprint_ = fingerprint(*data_);
  return *data_fingerprint_;
}

void Run::save() {
  if (saved_ == done) return;
  collect_checkpoint(true);
  const Options& o = options_;
  TrainingState state;
  state.step = done;
  state.epoch = sampler_->epoch_at(done);
  state.max_steps = total_steps;
  state.epochs = o.epochs;
  state.batch_pairs = o.batch_pairs, state.eval_every = o.eval_every, state.save_every = o.save_every;
  state.seed = o.seed;
  state.counters = {{"data_pairs", data_->size()},
                    {"data_fingerprint", data_fingerprint()},
                    {"skipped_steps", skipped},
                    {"skipped_in_a_row", skipped_in_a_row}};
  state.options = option_values(Program::train, o);
  state.log_history = history_;
  const TrainingTensors& t = model_->tensors;
  writer_.start([this, state, masters = t.masters(), first = t.first, second = t.second](const auto& tensors_read) {
    const Clock::time_point start = Clock::now();
    const fs::path folder = save_checkpoint(options_.output, state, source_, {masters, first, second}, options_.keep,
                                            *backend_, tensors_read);
    saving_seconds_ = seconds_since(start);
    return folder;
  });
  saved_ = done;
}

void Run::collect_checkpoint(bool wait) {
  if (const std::optional<fs::path> folder = writer_.collect(wait)) console().say("saved ", folder->string());
}

void Run::before_update() { writer_.wait_until_read(); }

int Run::stop() {
  console().say(stop_reason(), ": stopping after step ", done);
  try {
    collect_checkpoint(true);
  } catch (const std::exception& e) {  // an earlier one failed; this one has the newest steps and may yet succeed
    console().say(e.what());
    saved_ = -1;
  }
  save();
  collect_checkpoint(true);
  if (options_.profile && profile_.steps() > 0) write_profile();
  console().say("stopped; --resume --output ", options_.output, " goes on");
  return exit_stopped;
}

// --profile: the fastest step's table on stdout; in OUT/profile.json with what the run took besides.
void Run::write_profile() {
  measure_rate();
  const StepProfile& step = profile_.fastest();
  std::fputs(profile_table(step, gemm_rate_).c_str(), stdout);
  Json json = profile_json(step), memory = Json::array();
  for (const MemoryPlan::Line& line : plan_.lines) memory.push_back({{"what", line.what}, {"bytes", line.bytes}});
  json["dtype"] = dtype_name(model_->dtype);
  json["gemm_rate"] = gemm_rate_;
  json["micro_tokens"] = plan_.micro_tokens;
  json["memory"] = memory;
  json["peak_memory_bytes"] = backend_->peak_memory();
  json["start_seconds"] = start_seconds_;
  json["checkpoint_seconds"] = saving_seconds_;
  write_file_atomically(fs::path(options_.output) / "profile.json", json.dump(1) + "\n");
}

int Run::finish() {
  collect_checkpoint(true);
  if (options_.profile && profile_.steps() > 0) write_profile();
  if (done > 0 && skipped == done)
    fail("loss or gradient was not finite in any of ", done,
         " steps, so nothing was learned and no model is written; look at the weights of ", options_.model);
  save_model(options_.output, source_, model_->tensors.masters(), *backend_);
  console().say("finished ", total_steps, " steps in ", seconds_text(seconds_since(start_)),
                skipped ? concat(", ", skipped, " of them skipped") : "", "; the model is in ", options_.output);
  return exit_finished;
}

}  // namespace orpo
