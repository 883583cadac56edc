// The optimiser: gradient norm and AdamW, each one pass over memory in a few launches, however many tensors there are.
#include "cuda/gpu.cuh"

namespace orpo {

namespace {

constexpr int threads = 256;

// Tensors that one launch takes, each as blocks of entries. It is a kernel's parameter, so that a list costs no copy to
// the device: 4 KiB at most, as far as parameters go everywhere.
template <class Entry, int most> struct Run {
  int32_t count = 0;
  uint32_t first[most + 1] = {};  // block of each tensor; of the one after the last: all
  Entry entries[most];

  void add(const Entry& entry, int64_t block_entries) {
    entries[count] = entry;
    first[count + 1] = blocks_for(first[count] + (entry.elements + block_entries - 1) / block_entries);
    ++count;
  }
  unsigned blocks() const { return first[count]; }
  __device__ int tensor_of(uint32_t block) const {  // the last that begins at the block or before it
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first[middle] <= block ? low : high) = middle;
    }
    return low;
  }
};

// body(begin, end) for the list in runs of at most `most` tensors of one dtype.
template <class List, class DTypeOf, class Body>
void for_runs(const List& list, size_t most, DTypeOf dtype_of, Body body) {
  for (size_t begin = 0, end; begin < list.size(); begin = end) {
    end = begin + 1;
    while (end < list.size() && end - begin < most && dtype_of(list[end]) == dtype_of(list[begin])) ++end;
    body(begin, end);
  }
}

constexpr int64_t squares_entries = 1 << 14;  // that a block sums: the grouping depends on the size alone
constexpr int most_gradients = 192;

template <class T> struct Gradient {
  const T* x;
  int64_t elements;
};
template <class T> using Gradients = Run<Gradient<T>, most_gradients>;

// partials[block] = sum of squares of its entries, in double.
template <bool aligned, class T> __global__ void __launch_bounds__(threads)
    squares_kernel(double* partials, const __grid_constant__ Gradients<T> run) {
  constexpr int N = wide<T>;
  const int t = run.tensor_of(blockIdx.x);
  const int64_t begin = (int64_t{blockIdx.x} - run.first[t]) * squares_entries;
  const T* x = run.entries[t].x + begin;
  const int64_t count = run.entries[t].elements - begin;
  double sum = 0;
  for (int64_t i = threadIdx.x * N; i < squares_entries && i < count; i += threads * N) {
    float v[N];
    load<aligned>(v, x + i, count - i);
#pragma unroll
    for (int e = 0; e < N; ++e) sum += static_cast<double>(v[e]) * static_cast<double>(v[e]);
  }
  sum = block_sum<threads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// sums[t] = sum of the partials of tensor t; a block a tensor.
template <class T> __global__ void __launch_bounds__(threads)
    total_kernel(double* sums, const double* partials, const __grid_constant__ Gradients<T> run) {
  const int64_t t = blockIdx.x, end = run.first[t + 1];
  double sum = 0;
  for (int64_t i = run.first[t] + threadIdx.x; i < end; i += threads) sum += partials[i];
  sum = block_sum<threads>(sum);
  if (threadIdx.x == 0) sums[t] = sum;
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

constexpr int master_entries = 4;           // that a thread updates at a time
constexpr int64_t update_entries = 1 << 12;  // that a block updates
constexpr int most_updates = 64;

template <class T> struct Update {
  T* weight;
  int16_t* correction;
  float *first, *second;
  const float* gradient;
  int64_t elements;
  bool decays;
};
template <class T> using Updates = Run<Update<T>, most_updates>;

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
    adamw_kernel(const __grid_constant__ Updates<T> run, const Step decaying, const Step other) {
  constexpr int N = master_entries;
  const int t = run.tensor_of(blockIdx.x);
  const Update<T>& p = run.entries[t];
  const Step& s = p.decays ? decaying : other;
  const int64_t begin = (int64_t{blockIdx.x} - run.first[t]) * update_entries;
  for (int64_t i = begin + threadIdx.x * N; i < begin + update_entries && i < p.elements; i += threads * N) {
    const int64_t left = p.elements - i;
    float w[N], m[N], v[N], g[N];
    load_masters<aligned>(w, p.weight, p.correction, i, left);
    load<aligned>(m, p.first + i, left), load<aligned>(v, p.second + i, left), load<aligned>(g, p.gradient + i, left);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float scaled = g[e] * s.gradient_scale;
      m[e] = m[e] * s.beta1 + scaled * s.one_minus_beta1;
      v[e] = v[e] * s.beta2 + scaled * scaled * s.one_minus_beta2;
      w[e] = w[e] * s.keep - m[e] * s.rate / (sqrtf(v[e]) * s.second_correction + s.epsilon);
    }
    store<aligned>(p.first + i, m, left), store<aligned>(p.second + i, v, left);
    store_masters<aligned>(p.weight, p.correction, w, i, left);
  }
}

}  // namespace

void CudaBackend::sums_of_squares(const Tensor& sums, std::span<const Tensor> gradients) {
  shapes::sums_of_squares(sums, gradients);
  int64_t blocks = 0;
  for (const Tensor& g : gradients) blocks += blocks_for(g.elements(), squares_entries);
  double* partials = scratch<double>(blocks);
  for_runs(gradients, most_gradients, [](const Tensor& g) { return g.dtype; }, [&](size_t begin, size_t end) {
    with_gpu_dtype("sums_of_squares", gradients[begin].dtype, [&](auto zero) {
      using T = decltype(zero);
      Gradients<T> run;
      bool aligned = true;
      for (const Tensor& g : gradients.subspan(begin, end - begin)) {
        run.add({g.as<const T>(), g.elements()}, squares_entries);
        aligned = aligned && starts_aligned({&g});
      }
      if (run.blocks() > 0)
        launch(aligned ? squares_kernel<true, T> : squares_kernel<false, T>, run.blocks(), threads, 0, compute_,
               partials, run);
      launch(total_kernel<T>, blocks_for(run.count), threads, 0, compute_, sums.as<double>() + begin, partials, run);
    });
  });
}

void CudaBackend::adamw(std::span<const AdamWTensors> list, const AdamW& settings) {
  shapes::adamw(list, settings);
  const Step decaying = step_of(settings, true), other = step_of(settings, false);
  for_runs(list, most_updates, [](const AdamWTensors& p) { return p.weight.dtype; }, [&](size_t begin, size_t end) {
    with_gpu_dtype("adamw", list[begin].weight.dtype, [&](auto zero) {
      using T = decltype(zero);
      Updates<T> run;
      bool aligned = true;
      for (const AdamWTensors& p : list.subspan(begin, end - begin)) {
        run.add({p.weight.as<T>(), p.correction ? p.correction.as<int16_t>() : nullptr, p.first.as<float>(),
                 p.second.as<float>(), p.gradient.as<const float>(), p.weight.elements(), p.decays},
                update_entries);
        aligned = aligned && starts_aligned({&p.weight, &p.first, &p.second, &p.gradient});
      }
      if (run.blocks() > 0)
        launch(aligned ? adamw_kernel<true, T> : adamw_kernel<false, T>, run.blocks(), threads, 0, compute_, run,
               decaying, other);
    });
  });
}

}  // namespace orpo
