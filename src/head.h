// The head: hidden rows -> logits -> log-probabilities -> the objective -> gradient of the logits -> gradient of the
// hidden rows. Here the preference enters the backward pass. Logits exist for a bounded number of rows at a time,
// whatever the batch.
#pragma once

#include <cstdint>
#include <vector>

#include "src/backend.h"
#include "src/model.h"

namespace orpo {

struct HeadSettings {
  Objective objective = Objective::orpo;
  double lambda = 0.1;
  bool nll_includes_prompt = true;            // --nll-scope full
  int64_t logits_bytes = int64_t{128} << 20;  // most memory that logits may take at a time
};

// Rows of logits held at a time for a batch of at most max_targets targets.
int64_t head_chunk_rows(const Config& config, const HeadSettings& settings, int64_t max_targets, DType dtype);

// results [pairs, 13] fp64 = the batch's PairResults; with gradients also dhidden [rows, width] T = and
// gradients.output +=. hidden: Activations::hidden. gradients and dhidden null: evaluation, no backward work. logp_out
// (optional): log-probability of every target, in the batch's order; only with it does this wait for the device.
void head(const Config& config, const Weights& weights, const Weights* gradients, const Tensor* dhidden,
          const Tensor& results, const Tensor& hidden, const DeviceBatch& batch, const Normalisers& normalisers,
          const HeadSettings& settings, Backend& backend, Arena& scratch, std::vector<double>* logp_out = nullptr);

}  // namespace orpo
