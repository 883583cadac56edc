// From a pair's log-probabilities to a coefficient a target: where the preference enters the backward pass. Scalars,
// for host and device; objective.h says what the preference is.
//
//   coefficient = -dL/dlogp of a target
//     prompt target      1 / N_nll                                          (--nll-scope full, else 0)
//     chosen target      1 / N_nll + lambda / N_pairs * -(dL_OR/dlw) / |w|  = ... + lambda / N_pairs * delta h_w / |w|
//     rejected target                lambda / N_pairs * -(dL_OR/dll) / |l|  =     - lambda / N_pairs * delta h_l / |l|
#pragma once

#include "src/batch.h"
#include "src/objective.h"

namespace orpo {

// What one pair's targets came to: thirteen numbers, a row of a [pairs, pair_result_numbers] fp64 tensor. Sums, never
// means, so that micro-batches and ranks add up.
struct PairResult {
  double chosen_logp_sum, rejected_logp_sum, prompt_logp_sum;
  double chosen_tokens, rejected_tokens, prompt_tokens;
  PairPreference preference;  // zero where the pair has no rejected branch
};
inline constexpr int64_t pair_result_numbers = sizeof(PairResult) / sizeof(double);

// What is the same for all pairs of a step.
struct PreferenceWeights {
  Objective objective;
  double prompt, chosen;  // weight of a prompt's and of a chosen token in the supervised loss
  double pair;            // of a pair's preference
};
inline PreferenceWeights preference_weights(Objective objective, double lambda, const Normalisers& n,
                                            bool nll_includes_prompt) {
  const double nll = n.nll_tokens > 0 ? 1 / n.nll_tokens : 0;
  const double pair = n.pairs > 0 ? preference_weight(objective, lambda) / n.pairs : 0;
  return {objective, nll_includes_prompt ? nll : 0, nll, pair};
}

// Of a pair with these targets and sums of their log-probabilities.
ORPO_HOST_DEVICE inline PairResult pair_result(const PreferenceWeights& weights, const PairTargets& targets,
                                               double prompt_sum, double chosen_sum, double rejected_sum) {
  PairResult r{chosen_sum,
               rejected_sum,
               prompt_sum,
               static_cast<double>(targets.chosen),
               static_cast<double>(targets.rejected),
               static_cast<double>(targets.prompt),
               PairPreference{}};
  if (targets.chosen > 0 && targets.rejected > 0)
    r.preference = preference(weights.objective, chosen_sum / r.chosen_tokens, rejected_sum / r.rejected_tokens);
  return r;
}

// Of each of the pair's targets.
struct PairCoefficients {
  double prompt, chosen, rejected;
};
ORPO_HOST_DEVICE inline PairCoefficients pair_coefficients(const PreferenceWeights& weights, const PairResult& r) {
  const bool both = r.chosen_tokens > 0 && r.rejected_tokens > 0;
  return {weights.prompt, weights.chosen + (both ? weights.pair * -r.preference.d_chosen / r.chosen_tokens : 0),
          both ? weights.pair * -r.preference.d_rejected / r.rejected_tokens : 0};
}

}  // namespace orpo
