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

Step step_of(const AdamW& s) {
  const double step = static_cast<double>(s.step), lr = s.learning_rate;
  const auto f = [](double x) { return static_cast<float>(x); };
  return {f(s.beta1),
          f(s.beta2),
          f(1 - s.beta1),
          f(1 - s.beta2),
          f(s.epsilon),
          f(1 - lr * s.weight_decay),
          f(lr / (1 - std::pow(s.beta1, step))),
          f(1 / std::sqrt(1 - std::pow(s.beta2, step))),
          f(s.gradient_scale)};
}

// weight may be master: both are written by the thread that read master.
template <bool aligned, class T> __global__ void __launch_bounds__(threads)
    adamw_kernel(T* weight, float* master, float* first, float* second, const float* gradient, int64_t count, Step s) {
  constexpr int N = master_entries;
  const int64_t i = (int64_t{blockIdx.x} * threads + threadIdx.x) * N, left = count - i;
  if (left <= 0) return;
  float w[N], m[N], v[N], g[N];
  load<aligned>(w, master + i, left), load<aligned>(m, first + i, left), load<aligned>(v, second + i, left),
      load<aligned>(g, gradient + i, left);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const float scaled = g[e] * s.gradient_scale;
    m[e] = m[e] * s.beta1 + scaled * s.one_minus_beta1;
    v[e] = v[e] * s.beta2 + scaled * scaled * s.one_minus_beta2;
    w[e] = w[e] * s.keep - m[e] * s.rate / (sqrtf(v[e]) * s.second_correction + s.epsilon);
  }
  store<aligned>(first + i, m, left), store<aligned>(second + i, v, left), store<aligned>(master + i, w, left),
      store<aligned>(weight + i, w, left);
}

}  // namespace

double CudaBackend::sum_of_squares(const Tensor& gradient) {
  shapes::sum_of_squares(gradient);
  const int64_t count = gradient.elements(), blocks = blocks_for(count, block_entries);
  if (count == 0) return 0;
  double* partials = scratch<double>(blocks + 1);
  with_gpu_dtype("sum_of_squares", gradient.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(starts_aligned({&gradient}) ? squares_kernel<true, T> : squares_kernel<false, T>,
           static_cast<unsigned>(blocks), threads, 0, nullptr, partials + 1, gradient.as<const T>(), count);
  });
  launch(total_kernel, 1, threads, 0, nullptr, partials, partials + 1, blocks);
  double total;
  gpu_download(&total, partials, sizeof total, nullptr);
  gpu_wait(nullptr);
  return total;
}

void CudaBackend::adamw(const Tensor& weight, const Tensor& master, const Tensor& first, const Tensor& second,
                        const Tensor& gradient, const AdamW& settings) {
  shapes::adamw(weight, master, first, second, gradient, settings);
  const int64_t count = weight.elements();
  if (count == 0) return;
  with_gpu_dtype("adamw", weight.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = starts_aligned({&weight, &master, &first, &second, &gradient});
    launch(aligned ? adamw_kernel<true, T> : adamw_kernel<false, T>, blocks_for(count, threads * master_entries),
           threads, 0, nullptr, weight.as<T>(), master.as<float>(), first.as<float>(), second.as<float>(),
           gradient.as<const float>(), count, step_of(settings));
  });
}

}  // namespace orpo
