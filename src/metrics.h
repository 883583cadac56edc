// What a step or an evaluation says about itself. Definitions: sums travel (through micro-batches and ranks), and are
// divided once.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "data/pairs.h"
#include "src/backend.h"
#include "src/events.h"
#include "src/head.h"

namespace orpo {

// Name and value, in the order they are written. Names are TRL's ORPOTrainer's where it has the quantity.
using MetricList = std::vector<std::pair<std::string, double>>;

double metric(const MetricList& metrics, const std::string& name);  // NaN where absent

// Sums over rows of data. lw, ll: mean log-probability of a response token; D, delta, h: objective.h.
struct PairSums {
  double nll = 0;  // -sum of log p over the tokens of the supervised loss (the prompt's too with --nll-scope full)
  double nll_tokens = 0;
  double rows = 0;        // rows, with or without a rejected branch
  double chosen = 0;      // sum of lw over rows
  double pairs = 0;       // rows with a rejected branch; what follows is summed over these
  double rejected = 0;    // ll
  double margin = 0;      // lw - ll
  double wins = 0;        // lw > ll
  double log_odds = 0;    // D
  double preference = 0;  // softplus(-D)
  double delta = 0, h_chosen = 0, h_rejected = 0;

  void add(const PairResult& result, bool nll_includes_prompt);
  std::span<double> values() { return {&nll, sizeof *this / sizeof(double)}; }  // for Communicator::all_reduce
};

// L = NLL + lambda * mean softplus(-D), the loss that the step descended.
double loss_of(const PairSums& sums, const HeadSettings& settings);

// loss nll_loss log_odds_ratio log_odds_chosen rewards/* logps/* delta h_*, each name after `prefix` ("eval_" for
// evaluations). Means over pairs: log_odds_ratio of log sigmoid(D), log_odds_chosen of D, rewards/chosen of lambda *
// lw, rewards/accuracies of lw > ll. The names that need a rejected branch are left out where no row has one.
MetricList preference_metrics(const PairSums& sums, const HeadSettings& settings, const std::string& prefix = "");

// The work in some rows of data, shared prompts counted once.
struct Work {
  double tokens = 0, rows = 0, targets = 0, visible = 0, pairs = 0;
  // targets here: rows with a target (the last trunk row, which predicts two tokens, once); visible: (query, key) pairs
  // under the causal mask.
  void add(const TokenPair& pair, bool score_prompt);
  // 6 x matrix weights x rows (the head's only for rows with a target) + 12 x layers x heads * head_dim x visible
  // pairs.
  double training_flops(const Config& config) const;
};

// The machine's matrix product rate in a dtype, FLOP/s: the best of a few 2048^3 products. Takes a fraction of a second
// and frees its memory.
double measure_gemm_rate(Backend& backend, DType dtype);

// One JSON object, keys in order; numbers that are not finite become null.
std::string json_line(const MetricList& metrics);

// OUT/metrics.jsonl (or --metrics FILE) and the TensorBoard events beside it.
class MetricsLog {
 public:
  // resumed_at: the checkpoint's step, in a resumed run; lines of later steps, which it makes again, are cut off.
  // Throws MachineError where a file cannot be written.
  MetricsLog(const std::filesystem::path& file, const std::filesystem::path& events_folder,
             std::optional<int64_t> resumed_at);
  ~MetricsLog();
  MetricsLog(const MetricsLog&) = delete;
  MetricsLog& operator=(const MetricsLog&) = delete;

  void write(int64_t step, const MetricList& metrics);  // metrics holds "step" first

 private:
  std::filesystem::path path_;
  std::FILE* file_ = nullptr;
  EventsFile events_;
};

}  // namespace orpo
