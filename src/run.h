// A run: everything it opens and checks before its first step (device, model, rows, memory, output folder, checkpoint),
// and what it writes on the way (metrics, checkpoints, the model).
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/sampler.h"
#include "src/checkpoint.h"
#include "src/checkpoint_writer.h"
#include "src/communicator.h"
#include "src/config.h"
#include "src/files.h"
#include "src/metrics.h"
#include "src/model_folder.h"
#include "src/plan.h"
#include "src/profile.h"
#include "src/trainer.h"

namespace orpo {

// What one step computed and what came out.
struct StepResult {
  PairSums sums;
  GradientNorm gradients;
  Work work;
  int64_t micro_batches = 0;
  double learning_rate = 0;
  bool finite = true;  // false: the step was skipped
};

class Run {
 public:
  // Reads, checks and allocates everything; nothing is written before all of it stands. Throws UserError.
  explicit Run(const Options& given);

  int64_t done = 0;     // steps, skipped ones among them
  int64_t skipped = 0;  // steps whose loss or gradient was not finite
  int64_t skipped_in_a_row = 0;
  int64_t total_steps = 0;

  const Options& options() const { return options_; }
  const PairSet& data() const { return *data_; }
  Sampler& sampler() { return *sampler_; }
  DeviceModel& model() { return *model_; }
  Communicator& communicator() { return *communicator_; }
  int64_t micro_tokens() const { return plan_.micro_tokens; }
  AdamW next_update() const;  // settings of the coming update: the schedule's learning rate, no clipping yet
  bool due(int64_t every) const { return every > 0 && done > 0 && done % every == 0; }

  // Checks of the first step that trains (trainer.h); afterwards nothing.
  void check_gradients(const GradientNorm& gradients);
  void check_moments(double learning_rate);

  void log(const StepResult& result);  // metrics.jsonl, events, the progress line. Throws UserError after
                                       // --max-bad-steps skipped ones in a row
  bool evaluate();                     // --eval-data, once a step at most; false: stopped on the way
  void save();                         // OUT/checkpoint-N, beside the next step; what went wrong is thrown later
  void before_update();                // returns when no checkpoint reads the weights and moments any more
  int stop();                          // saves; exit status 75
  int finish();                        // OUT becomes a model folder; exit status 0

 private:
  void open_checkpoint(const Options& given);
  void open_memory();
  void load_state();
  void open_output();
  void begin_step();
  void measure_rate();
  void check_free_space(const std::filesystem::path& out) const;
  void say_what_runs() const;
  MetricList base_metrics() const;  // step, epoch
  void write_metrics(const MetricList& metrics);
  void show_progress(const MetricList& metrics, double seconds);
  void report_skipped(const StepResult& result);
  int64_t data_fingerprint();  // of all rows, which do not change: computed once
  void collect_checkpoint(bool wait);  // says that it was saved
  void write_profile();

  Options options_;
  std::optional<FolderLock> lock_;
  std::optional<Checkpoint> checkpoint_;
  ModelSource source_;
  std::unique_ptr<PairSet> data_, eval_data_;
  std::optional<Sampler> sampler_;
  Profile profile_;  // filled with --profile; outlives the backend that fills it
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Communicator> communicator_ = make_single_communicator();
  MemoryPlan plan_;
  double gemm_rate_ = 0;  // FLOP/s
  bool rate_is_published_ = false;
  std::optional<Arena> state_, scratch_;
  std::optional<DeviceModel> model_;
  std::optional<MetricsLog> log_;
  std::vector<std::string> history_;
  std::optional<int64_t> data_fingerprint_;
  bool gradients_checked_ = false, moments_checked_ = false;
  int64_t evaluated_ = -1, saved_ = -1;  // step of the last evaluation, of the last checkpoint
  int64_t done_at_start_ = 0;
  double stepping_seconds_ = 0;  // in steps after the first
  double start_seconds_ = 0, saving_seconds_ = 0;  // before the first step; in the last checkpoint
  std::chrono::steady_clock::time_point start_, step_end_;
  CheckpointWriter writer_;  // last: its thread uses what stands above
};

}  // namespace orpo
