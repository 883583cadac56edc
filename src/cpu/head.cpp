// The head's rows: gather, log-probabilities, preference, gradient of the logits.
#include <algorithm>

#include "src/cpu/backend.h"
#include "src/cpu/rows.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

void CpuBackend::gather(const Tensor& out, const Tensor& in, const Tensor& target_rows) {
  shapes::row_list("gather", out, in, target_rows);
  require_below("gather", "target row", target_rows, in.rows());
  copy_rows(out, in, target_rows);
}

void CpuBackend::scatter_add(const Tensor& dout, const Tensor& din, const Tensor& target_rows) {
  shapes::row_list("scatter_add", din, dout, target_rows);
  require_below("scatter_add", "target row", target_rows, dout.rows());
  with_dtype("scatter_add", din.dtype,
             [&](auto zero) { add_rows<decltype(zero), decltype(zero)>(dout, din, target_rows); });
}

namespace {

template <class A> A maximum_of(const A* row, int64_t count) {
  const A lowest = -std::numeric_limits<A>::infinity();
  Vector<A> most = splat(lowest);
  int64_t i = 0;
  for (; i + lanes<A> <= count; i += lanes<A>) {
    const Vector<A> x = load(row + i);
    most = x > most || x != x ? x : most;  // NaN stays
  }
  A m = maximum_of_lanes<A>(most);
  for (int l = 0; l < lanes<A>; ++l)
    if (most[l] != most[l]) m = most[l];
  for (; i < count; ++i) m = row[i] > m || row[i] != row[i] ? row[i] : m;
  return m;
}

// sum of exp(row[i] - most): vectors of partial sums over blocks, blocks in double, so that a vocabulary's worth of
// terms keeps its digits.
template <class A> double sum_of_exponentials(const A* row, int64_t count, A most) {
  constexpr int64_t block = 2048;
  double total = 0;
  int64_t i = 0;
  while (i + lanes<A> <= count) {
    Vector<A> partial{};
    const int64_t end = std::min(count, i + block);
    for (; i + lanes<A> <= end; i += lanes<A>) partial += exponential(load(row + i) - most);
    for (int l = 0; l < lanes<A>; ++l) total += static_cast<double>(partial[l]);
  }
  for (; i < count; ++i) total += std::exp(static_cast<double>(row[i]) - static_cast<double>(most));
  return total;
}

// With m the largest logit and r = sum over j != target of exp(l_j - m):
//   lse = m + log(r + exp(l_target - m));  logp = l_target - lse, as -log1p(r) where the target is the largest: p -> 1
//   keeps its digits.
template <class A> void log_probability(A* logp, A* lse, const A* logits, int64_t vocab, int64_t target) {
  const A most = maximum_of(logits, vocab);
  const double rest =
      sum_of_exponentials(logits, target, most) + sum_of_exponentials(logits + target + 1, vocab - target - 1, most);
  const double distance = static_cast<double>(logits[target]) - static_cast<double>(most);
  const double log_total = std::log(rest + std::exp(distance));
  *lse = static_cast<A>(static_cast<double>(most) + log_total);
  *logp = static_cast<A>(distance == 0 ? -std::log1p(rest) : distance - log_total);
}

}  // namespace

void CpuBackend::head_forward(const Tensor& logp, const Tensor& lse, const Tensor& logits,
                              const Tensor& target_tokens) {
  shapes::head_forward("head_forward", logp, lse, logits, target_tokens);
  require_below("head_forward", "target token", target_tokens, logits.columns());
  with_dtype("head_forward", logits.dtype, [&](auto zero) {
    using A = Accumulator<decltype(zero)>;
    for_rows(logits.rows(), [&](int64_t row) {
      log_probability(logp.as<A>() + row, lse.as<A>() + row, logits.as<const A>() + row * logits.pitch(),
                      logits.columns(), target_tokens.as<const int32_t>()[row]);
    });
  });
}

namespace {

template <class A> double sum_range(const A* values, int64_t begin, int64_t count) {
  double sum = 0;
  for (int64_t i = begin; i < begin + count; ++i) sum += static_cast<double>(values[i]);
  return sum;
}

// Sums of a pair's log-probabilities -> its preference -> coefficients of its targets.
template <class A>
PairResult prefer(A* coefficient, const A* logp, const PairTargets& at, const PreferenceWeights& weights) {
  const int64_t chosen = at.begin + at.prompt, rejected = chosen + at.chosen;
  const PairResult result = pair_result(weights, at, sum_range(logp, at.begin, at.prompt),
                                        sum_range(logp, chosen, at.chosen), sum_range(logp, rejected, at.rejected));
  const PairCoefficients c = pair_coefficients(weights, result);
  std::fill(coefficient + at.begin, coefficient + chosen, static_cast<A>(c.prompt));
  std::fill(coefficient + chosen, coefficient + rejected, static_cast<A>(c.chosen));
  std::fill(coefficient + rejected, coefficient + at.end(), static_cast<A>(c.rejected));
  return result;
}

}  // namespace

void CpuBackend::preference(const Tensor& results, const Tensor& coefficient, const Tensor& logp,
                            const Tensor& pair_targets, Objective objective, double lambda,
                            const Normalisers& normalisers, bool nll_includes_prompt) {
  shapes::preference(results, coefficient, logp, pair_targets);
  static_assert(sizeof(PairTargets) == 4 * sizeof(int32_t));
  const auto* pairs = reinterpret_cast<const PairTargets*>(pair_targets.as<const int32_t>());
  auto* found = reinterpret_cast<PairResult*>(results.as<double>());
  const PreferenceWeights weights = preference_weights(objective, lambda, normalisers, nll_includes_prompt);
  with_dtype("preference", logp.dtype, [&](auto zero) {
    using A = Accumulator<decltype(zero)>;
    for (int64_t i = 0; i < pair_targets.rows(); ++i) {
      const PairTargets& at = pairs[i];
      REQUIRE_SHAPE(
          "preference",
          at.begin >= 0 && at.prompt >= 0 && at.chosen >= 0 && at.rejected >= 0 && at.end() <= logp.elements(), "pair ",
          i, " has targets [", at.begin, ", ", at.end(), ") of ", logp.elements());
      found[i] = prefer(coefficient.as<A>(), logp.as<const A>(), at, weights);
    }
  });
}

namespace {

// Ascending, each vector read before its place is written: T is never wider than A, so writing dlogits over its own
// row's logits is safe.
template <class T>
void softmax_gradient(T* dlogits, const Accumulator<T>* logits, Accumulator<T> lse, Accumulator<T> logp,
                      Accumulator<T> c, int64_t vocab, int64_t target) {
  using A = Accumulator<T>;
  for_vectors<A>(vocab, [&](int64_t i, auto n) { store(dlogits + i, exponential(load(logits + i, n) - lse) * c, n); });
  dlogits[target] = T(static_cast<A>(static_cast<double>(c) * std::expm1(static_cast<double>(logp))));
}

}  // namespace

void CpuBackend::head_backward(const Tensor& dlogits, const Tensor& logits, const Tensor& lse, const Tensor& logp,
                               const Tensor& coefficient, const Tensor& target_tokens) {
  shapes::head_backward(dlogits, logits, lse, logp, coefficient, target_tokens);
  require_below("head_backward", "target token", target_tokens, logits.columns());
  with_dtype("head_backward", dlogits.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    for_rows(logits.rows(), [&](int64_t row) {
      softmax_gradient(dlogits.as<T>() + row * dlogits.pitch(), logits.as<const A>() + row * logits.pitch(),
                       lse.as<const A>()[row], logp.as<const A>()[row], coefficient.as<const A>()[row],
                       logits.columns(), target_tokens.as<const int32_t>()[row]);
    });
  });
}

}  // namespace orpo
