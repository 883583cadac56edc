// The optimiser: gradient norm and AdamW, one pass each.
#include "cuda/gpu.cuh"

namespace orpo {

namespace {

constexpr int threads = 256, master_entries = 4;  // that a thread updates
constexpr int64_t block_entries = 1 << 14;        // that a block sums: the grouping depends on the size alone

// partials[block] = sum of squares of its entries, in double.
template <bool aligned, class T> __global__ void __launch_bounds__(threads)
    squares_kernel(double* partials, const T* x, int64_t count) {
  constexpr int N = wide<T>;
  const int64_t begin = int64_t{blockIdx.x} * block_entries;
  double sum = 0;
  for (int64_t i = threadIdx.x * N; i < block_entries; i += threads * N) {
    if (begin + i >= count) break;
    float v[N];
    load<aligned>(v, x + begin + i, count - begin - i);
#pragma unroll
    for (int e = 0; e < N; ++e) sum += static_cast<double>(v[e]) * static_cast<double>(v[e]);
  }
  sum = block_sum<threads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// total[0] = sum of partials; one block.
__global__ void __launch_bounds__(threads) total_kernel(double* total, const double* partials, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += threads) sum += partials[i];
  sum = block_sum<threads>(sum);
  if (threadIdx.x == 0) total[0] = sum;
}

// The settings as each entry needs them.
struct Step {
  float beta1, beta2, one_minus_beta1, one_minus_beta2, epsilon, keep, rate, second_correction, gradient_scale;
};

Step step_of(const AdamW& s, bool decays) {
  const double step = static_cast<double>(s.step), lr = s.learning_rate;
  const auto f = [](double x) { return static_cast<float>(x); };
  return {f(s.beta1),
          f(s.beta2),
          f(1 - s.beta1),
          f(1 - s.beta2),
          f(s.epsilon),
          f(1 - (decays ? lr * s.weight_decay : 0)),
          f(lr / (1 - std::pow(s.beta1, step))),
          f(1 / std::sqrt(1 - std::pow(s.beta2, step))),
          f(s.gradient_scale)};
}

// N masters from entry i on: weights of fp32, or bf16 weights with their corrections (src/master.h). Of the last ones
// `left` are there.
template <bool aligned, int N>
__device__ __forceinline__ void load_masters(float (&w)[N], const float* weight, const int16_t*, int64_t i,
                                             int64_t left) {
  load<aligned>(w, weight + i, left);
}
template <bool aligned, int N>
__device__ __forceinline__ void load_masters(float (&w)[N], const bf16* weight, const int16_t* correction, int64_t i,
                                             int64_t left) {
  load<aligned>(w, weight + i, left);
#pragma unroll
  for (int e = 0; e < N; ++e)
    if (e < left) w[e] = of_bits(bits_of(w[e]) + static_cast<uint32_t>(correction[i + e]));
}
template <bool aligned, int N>
__device__ __forceinline__ void store_masters(float* weight, int16_t*, const float (&w)[N], int64_t i, int64_t left) {
  store<aligned>(weight + i, w, left);
}
template <bool aligned, int N>
__device__ __forceinline__ void store_masters(bf16* weight, int16_t* correction, const float (&w)[N], int64_t i,
                                              int64_t left) {
  store<aligned>(weight + i, w, left);
#pragma unroll
  for (int e = 0; e < N; ++e)
    if (e < left) {
      const auto difference = static_cast<int32_t>(bits_of(w[e]) - bits_of(to_float(to_bf16(w[e]))));
      correction[i + e] = static_cast<int16_t>(difference > 32767 ? 32767 : difference);
    }
}

template <bool aligned, class T> __global__ void __launch_bounds__(threads)
    adamw_kernel(T* weight, int16_t* correction, float* first, float* second, const float* gradient, int64_t count,
                 Step s) {
  constexpr int N = master_entries;
  const int64_t i = (int64_t{blockIdx.x} * threads + threadIdx.x) * N, left = count - i;
  if (left <= 0) return;
  float w[N], m[N], v[N], g[N];
  load_masters<aligned>(w, weight, correction, i, left);
  load<aligned>(m, first + i, left), load<aligned>(v, second + i, left), load<aligned>(g, gradient + i, left);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const float scaled = g[e] * s.gradient_scale;
    m[e] = m[e] * s.beta1 + scaled * s.one_minus_beta1;
    v[e] = v[e] * s.beta2 + scaled * scaled * s.one_minus_beta2;
    w[e] = w[e] * s.keep - m[e] * s.rate / (sqrtf(v[e]) * s.second_correction + s.epsilon);
  }
  store<aligned>(first + i, m, left), store<aligned>(second + i, v, left);
  store_masters<aligned>(weight, correction, w, i, left);
}

}  // namespace

void CudaBackend::sums_of_squares(const Tensor& sums, std::span<const Tensor> gradients) {
  shapes::sums_of_squares(sums, gradients);
  int64_t most_blocks = 0;
  for (const Tensor& g : gradients)
    most_blocks = std::max<int64_t>(most_blocks, blocks_for(g.elements(), block_entries));
  double* partials = scratch<double>(most_blocks);
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor& g = gradients[i];
    const int64_t blocks = blocks_for(g.elements(), block_entries);
    with_gpu_dtype("sums_of_squares", g.dtype, [&](auto zero) {
      using T = decltype(zero);
      if (blocks > 0)
        launch(starts_aligned({&g}) ? squares_kernel<true, T> : squares_kernel<false, T>, static_cast<unsigned>(blocks),
               threads, 0, compute_, partials, g.as<const T>(), g.elements());
    });
    launch(total_kernel, 1, threads, 0, compute_, sums.as<double>() + i, partials, blocks);
  }
}

void CudaBackend::adamw(std::span<const AdamWTensors> list, const AdamW& settings) {
  shapes::adamw(list, settings);
  for (const AdamWTensors& p : list) {
    const int64_t count = p.weight.elements();
    if (count == 0) continue;
    with_gpu_dtype("adamw", p.weight.dtype, [&](auto zero) {
      using T = decltype(zero);
      const bool aligned = starts_aligned({&p.weight, &p.first, &p.second, &p.gradient});
      launch(aligned ? adamw_kernel<true, T> : adamw_kernel<false, T>, blocks_for(count, threads * master_entries),
             threads, 0, compute_, p.weight.as<T>(), p.correction ? p.correction.as<int16_t>() : nullptr,
             p.first.as<float>(), p.second.as<float>(), p.gradient.as<const float>(), count,
             step_of(settings, p.decays));
    });
  }
}

}  // namespace orpo
