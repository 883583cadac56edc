// The head's rows: gather, log-probabilities, preference, gradient of the logits.
#include "cuda/gpu.cuh"
#include "cuda/rows.cuh"

namespace orpo {

void CudaBackend::gather(const Tensor& out, const Tensor& in, const Tensor& target_rows) {
  shapes::row_list("gather", out, in, target_rows);
  with_gpu_dtype("gather", out.dtype, [&](auto zero) {
    copy_rows<decltype(zero)>(compute_, out, in, target_rows, Refused::gather, {}, {}, Refused::nothing, refused_);
  });
}

void CudaBackend::scatter_add(const Tensor& dout, const Tensor& din, const Tensor& target_rows) {
  shapes::row_list("scatter_add", din, dout, target_rows);
  with_gpu_dtype("scatter_add", din.dtype, [&](auto zero) {
    using T = decltype(zero);
    add_rows<T, T>(compute_, dout, din, target_rows, -1, scratch<int32_t>(2 * din.rows()), refused_,
                   Refused::scatter_add);
  });
}

namespace {

constexpr int threads = 256, N = 4;  // logits that a thread takes at a time

bool four_at_once(const Tensor& x) { return x.pitch() % 4 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0; }

// One pass over a row of logits: with m the largest of those that a thread saw and s = sum of exp(l - m) of those that
// are not the target's, s is rescaled where m rises (Milakov & Gimelshein 2018). NaN stays. For the row then, with m
// the largest and r the sum over all but the target:
//   lse = m + log(r + exp(l_target - m));  logp = l_target - lse, as -log1p(r) where the target is the largest: p -> 1
//   keeps its digits.
template <bool aligned> __global__ void __launch_bounds__(threads)
    log_probability_kernel(float* logp, float* lse, const float* logits, int64_t pitch, int64_t vocab,
                           const int32_t* targets, Refused* refused) {
  const int64_t row = blockIdx.x;
  const int64_t target = targets[row];
  const float* l = logits + row * pitch;
  const bool bad = target < 0 || target >= vocab;
  if (bad && threadIdx.x == 0) refuse(refused, Refused::head_forward, {row, target, vocab});
  float most = -INFINITY, sum = 0;
  for (int64_t i = threadIdx.x * N; i < vocab; i += threads * N) {
    float x[N];
    load<aligned>(x, l + i, vocab - i);
    float highest = most;
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (i + e < vocab) highest = x[e] > highest ? x[e] : highest;
    if (highest > most) sum *= expf(most - highest), most = highest;
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (i + e < vocab && i + e != target && x[e] != -INFINITY) sum += expf(x[e] - most);
  }
  const float largest = block_max<threads>(most);
  const float share = most == -INFINITY ? sum : sum * expf(most - largest);
  const double rest = block_sum<threads>(static_cast<double>(share));
  if (threadIdx.x == 0 && !bad) {
    const double distance = static_cast<double>(l[target]) - static_cast<double>(largest);
    const double log_total = log(rest + exp(distance));
    lse[row] = static_cast<float>(static_cast<double>(largest) + log_total);
    logp[row] = static_cast<float>(distance == 0 ? -log1p(rest) : distance - log_total);
  }
}

}  // namespace

void CudaBackend::head_forward(const Tensor& logp, const Tensor& lse, const Tensor& logits,
                               const Tensor& target_tokens) {
  shapes::head_forward("head_forward", logp, lse, logits, target_tokens);
  if (logits.rows() == 0) return;
  launch(four_at_once(logits) ? log_probability_kernel<true> : log_probability_kernel<false>,
         blocks_for(logits.rows()), threads, 0, compute_, logp.as<float>(), lse.as<float>(),
         logits.as<const float>(), logits.pitch(), logits.columns(), target_tokens.as<const int32_t>(), refused_);
}

namespace {

// The lanes of a warp add every 32nd value, then each other's sums.
__device__ double sum_range(const float* values, int64_t begin, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += 32) sum += static_cast<double>(values[begin + i]);
  return warp_sum(sum);
}

__device__ void fill_range(float* values, int64_t begin, int64_t count, double value) {
  for (int64_t i = threadIdx.x; i < count; i += 32) values[begin + i] = static_cast<float>(value);
}

// Sums of a pair's log-probabilities -> its preference -> coefficients of its targets; a warp a pair.
__global__ void preference_kernel(PairResult* results, float* coefficient, const float* logp, const PairTargets* pairs,
                                  int64_t targets, PreferenceWeights weights, Refused* refused) {
  const PairTargets at = pairs[blockIdx.x];
  const int64_t chosen = int64_t{at.begin} + at.prompt, rejected = chosen + at.chosen, end = rejected + at.rejected;
  if (at.begin < 0 || at.prompt < 0 || at.chosen < 0 || at.rejected < 0 || end > targets) {
    if (threadIdx.x == 0) refuse(refused, Refused::preference, {blockIdx.x, at.begin, end, targets});
    return;  // the whole block
  }
  const double prompt_sum = sum_range(logp, at.begin, at.prompt), chosen_sum = sum_range(logp, chosen, at.chosen),
               rejected_sum = sum_range(logp, rejected, at.rejected);
  const PairResult result = pair_result(weights, at, prompt_sum, chosen_sum, rejected_sum);
  const PairCoefficients c = pair_coefficients(weights, result);
  fill_range(coefficient, at.begin, at.prompt, c.prompt);
  fill_range(coefficient, chosen, at.chosen, c.chosen);
  fill_range(coefficient, rejected, at.rejected, c.rejected);
  if (threadIdx.x == 0) results[blockIdx.x] = result;
}

}  // namespace

void CudaBackend::preference(const Tensor& results, const Tensor& coefficient, const Tensor& logp,
                             const Tensor& pair_targets, Objective objective, double lambda,
                             const Normalisers& normalisers, bool nll_includes_prompt) {
  shapes::preference(results, coefficient, logp, pair_targets);
  static_assert(sizeof(PairTargets) == 4 * sizeof(int32_t));
  if (pair_targets.rows() == 0) return;
  launch(preference_kernel, blocks_for(pair_targets.rows()), 32, 0, compute_,
         reinterpret_cast<PairResult*>(results.as<double>()), coefficient.as<float>(), logp.as<const float>(),
         reinterpret_cast<const PairTargets*>(pair_targets.as<const int32_t>()), logp.elements(),
         preference_weights(objective, lambda, normalisers, nll_includes_prompt), refused_);
}

namespace {

// dlogits may lie over the logits of its own row: a turn's logits are all read before one of them is written over, and
// T is never wider than A, so no turn reaches what a later one reads.
template <bool aligned, class T> __global__ void __launch_bounds__(threads)
    softmax_gradient_kernel(T* dlogits, int64_t dlogits_pitch, const float* logits, int64_t pitch, int64_t vocab,
                            const float* lse, const float* logp, const float* coefficient, const int32_t* targets,
                            Refused* refused) {
  const int64_t row = blockIdx.x;
  const int64_t target = targets[row];
  const float *l = logits + row * pitch, c = coefficient[row], log_sum = lse[row];
  if ((target < 0 || target >= vocab) && threadIdx.x == 0)
    refuse(refused, Refused::head_backward, {row, target, vocab});
  T* d = dlogits + row * dlogits_pitch;
  for (int64_t turn = 0; turn < vocab; turn += threads * N) {
    const int64_t i = turn + threadIdx.x * N;
    float x[N];
    load<aligned>(x, l + i, vocab - i);
    __syncthreads();
#pragma unroll
    for (int e = 0; e < N; ++e)
      x[e] = i + e == target ? static_cast<float>(static_cast<double>(c) * expm1(static_cast<double>(logp[row])))
                             : expf(x[e] - log_sum) * c;
    store<aligned>(d + i, x, vocab - i);
  }
}

}  // namespace

void CudaBackend::head_backward(const Tensor& dlogits, const Tensor& logits, const Tensor& lse, const Tensor& logp,
                                const Tensor& coefficient, const Tensor& target_tokens) {
  shapes::head_backward(dlogits, logits, lse, logp, coefficient, target_tokens);
  if (logits.rows() == 0) return;
  with_gpu_dtype("head_backward", dlogits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool fours = four_at_once(logits) && four_at_once(dlogits);
    launch(fours ? softmax_gradient_kernel<true, T> : softmax_gradient_kernel<false, T>,
           blocks_for(logits.rows()), threads, 0, compute_, dlogits.as<T>(), dlogits.pitch(),
           logits.as<const float>(), logits.pitch(), logits.columns(), lse.as<const float>(), logp.as<const float>(),
           coefficient.as<const float>(), target_tokens.as<const int32_t>(), refused_);
  });
}

}  // namespace orpo
