// THE OBJECTIVE. Everything that is preference about this trainer stands on this page: two mean log-probabilities in, a
// loss and its two derivatives out, in double, for host and device. ORPO is arXiv 2403.07691.
//
// For a prompt x with a chosen answer w and a rejected answer l (end of sequence included):
//
//   lw = 1/|w| sum_t log p(w_t | x, w_<t),  ll likewise              mean log-probability of a response token
//   p = exp(l)      odds = p / (1 - p)                               eq. (3), (4)
//   D = log odds_w - log odds_l = (lw - ll) - (log1mexp(lw) - log1mexp(ll))      eq. (7): log of the odds ratio
//   L = NLL(chosen) + lambda * mean over pairs of softplus(-D)       eq. (6); softplus(-D) = -log sigmoid(D)
//
// and its gradient, eq. (8)-(10), with delta = sigmoid(-D) = how far from aligned the pair still is and h = 1 / (1 - p)
// = the weight of a side:
//
//   d softplus(-D) / d lw = -delta * h_w        d softplus(-D) / d ll = +delta * h_l
//
// because d log odds / d l = 1 + p / (1 - p) = 1 / (1 - p).
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define ORPO_HOST_DEVICE __host__ __device__
#else
#define ORPO_HOST_DEVICE
#endif

namespace orpo {

enum class Objective : int {
  orpo,   // odds ratio, as above
  sft,    // supervised loss only; the preference term is measured and weighs nothing
  ratio,  // probability ratio in place of the odds ratio: D = lw - ll (the paper's ablation, section 7.1)
};

// What one pair says. Means over response tokens; natural logarithms, at most 0.
struct PairPreference {
  double log_odds;    // D
  double loss;        // softplus(-D), before lambda; finite for every input
  double delta;       // sigmoid(-D)
  double h_chosen;    // 1 / (1 - p_w); 1 for the probability ratio
  double h_rejected;  // 1 / (1 - p_l)
  double d_chosen;    // d loss / d lw = -delta * h_chosen
  double d_rejected;  // d loss / d ll = +delta * h_rejected
};

// log(1 - exp(l)) for l < 0, without cancellation on either side (Maechler, "Accurately computing log(1 - exp(-|a|))").
ORPO_HOST_DEVICE inline double log1mexp(double l) { return l > -0.6931471805599453 ? log(-expm1(l)) : log1p(-exp(l)); }

// log(1 + exp(x)) without overflow.
ORPO_HOST_DEVICE inline double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

ORPO_HOST_DEVICE inline double sigmoid(double x) { return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }

// p -> 1 leaves no odds: a mean log-probability counts as at most -2^-24 (a probability one fp32 step below 1), as low
// as -1e300 (p = 0).
ORPO_HOST_DEVICE inline double clamp_logp(double l) { return l > -0x1p-24 ? -0x1p-24 : l < -1e300 ? -1e300 : l; }

// orpo, and sft which logs the same numbers with no weight.
ORPO_HOST_DEVICE inline PairPreference odds_ratio(double lw, double ll) {
  lw = clamp_logp(lw), ll = clamp_logp(ll);
  PairPreference pair;
  pair.log_odds = (lw - ll) - (log1mexp(lw) - log1mexp(ll));
  pair.loss = softplus(-pair.log_odds);
  pair.delta = sigmoid(-pair.log_odds);
  pair.h_chosen = 1 / -expm1(lw);
  pair.h_rejected = 1 / -expm1(ll);
  pair.d_chosen = -pair.delta * pair.h_chosen;
  pair.d_rejected = pair.delta * pair.h_rejected;
  return pair;
}

// ratio: the same page with h = 1.
ORPO_HOST_DEVICE inline PairPreference probability_ratio(double lw, double ll) {
  lw = clamp_logp(lw), ll = clamp_logp(ll);
  const double d = lw - ll, delta = sigmoid(-d);
  return {d, softplus(-d), delta, 1, 1, -delta, delta};
}

ORPO_HOST_DEVICE inline PairPreference preference(Objective objective, double lw, double ll) {
  return objective == Objective::ratio ? probability_ratio(lw, ll) : odds_ratio(lw, ll);
}

// The weight of the preference term in L.
ORPO_HOST_DEVICE inline double preference_weight(Objective objective, double lambda) {
  return objective == Objective::sft ? 0 : lambda;
}

}  // namespace orpo
