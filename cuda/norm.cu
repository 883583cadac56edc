// Layer norm and RMS norm after the residual addition: a block a row.
#include "cuda/gpu.cuh"
#include "cuda/partials.cuh"

namespace orpo {

namespace {

constexpr int threads = 256;

// out = weight * (sum - mean) * rstd + bias. Both passes write the same bits: the fused product is asked for, not left
// to a compiler.
__device__ __forceinline__ float normalised(float x, float mean, float rstd, float weight, float bias) {
  return fmaf(weight, (x - mean) * rstd, bias);
}

// layer: with a mean m, whose first value carries the rounding of a sum as large as the row's entries together.
// Deviations from it are small, so their own mean d corrects it, and the variance with it (Chan, Golub and LeVeque
// 1983):
//   mean = m + d,   variance = mean((x - m)^2) - d^2
// Otherwise an RMS norm, m = 0. A thread reads again only what it wrote.
template <bool aligned, bool layer, class T> __global__ void __launch_bounds__(threads)
    norm_forward_kernel(T* out, T* sum, float* mean, float* rstd, const T* residual, const T* branch, const T* weight,
                        const T* bias, int64_t width, float epsilon) {
  constexpr int N = wide<T>;
  const int64_t row = blockIdx.x, at = row * width;
  const float columns = static_cast<float>(width);
  float total = 0;  // of the entries, or of their squares
  for (int64_t i = threadIdx.x * N; i < width; i += threads * N) {
    float x[N];
    load<aligned>(x, residual + at + i, width - i);
    if (branch) {
      float y[N];
      load<aligned>(y, branch + at + i, width - i);
#pragma unroll
      for (int e = 0; e < N; ++e) x[e] = to_float(from_float<T>(x[e] + y[e]));  // what the backward pass will see
    }
    if (branch || sum != residual) store<aligned>(sum + at + i, x, width - i);
#pragma unroll
    for (int e = 0; e < N; ++e) total += layer ? x[e] : x[e] * x[e];
  }
  total = block_sum<threads>(total) / columns;
  float m = 0, variance = total;
  if constexpr (layer) {
    float moments[2] = {};  // of the deviations from m
    for (int64_t i = threadIdx.x * N; i < width; i += threads * N) {
      float x[N];
      load<aligned>(x, sum + at + i, width - i);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float deviation = i + e < width ? x[e] - total : 0.0f;
        moments[0] += deviation, moments[1] += deviation * deviation;
      }
    }
    block_sums<threads>(moments);
    const float d = moments[0] / columns;
    m = total + d;
    variance = fmaxf(moments[1] / columns - d * d, 0.0f);
    if (threadIdx.x == 0) mean[row] = m;
  }
  const float r = 1.0f / sqrtf(variance + epsilon);
  if (threadIdx.x == 0) rstd[row] = r;
  for (int64_t i = threadIdx.x * N; i < width; i += threads * N) {
    float x[N], w[N], b[N] = {};
    load<aligned>(x, sum + at + i, width - i), load<aligned>(w, weight + i, width - i);
    if (bias) load<aligned>(b, bias + i, width - i);
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] = normalised(x[e], m, r, w[e], b[e]);
    store<aligned>(out + at + i, x, width - i);
  }
}

}  // namespace

void CudaBackend::norm_forward(const Tensor& out, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                               const Tensor& residual, const Tensor& branch, const Tensor& weight, const Tensor& bias,
                               double epsilon) {
  shapes::norm_forward(out, sum, mean, rstd, residual, branch, weight, bias, epsilon);
  if (out.rows() == 0) return;
  with_gpu_dtype("norm_forward", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_constant(rows_aligned({&out, &sum, &residual, &branch, &weight, &bias}), [&](auto aligned) {
      with_constant(static_cast<bool>(mean), [&](auto layer) {
        launch(norm_forward_kernel<aligned(), layer(), T>, blocks_for(out.rows()), threads, 0, compute_,
               out.as<T>(), sum.as<T>(), mean ? mean.as<float>() : nullptr, rstd.as<float>(), residual.as<const T>(),
               branch ? branch.as<const T>() : nullptr, weight.as<const T>(), bias ? bias.as<const T>() : nullptr,
               out.columns(), static_cast<float>(epsilon));
      });
    });
  });
}

namespace {

// A block takes rows blockIdx.x, + gridDim.x, ... and adds their dweight, and dbias where there is one, up in
// columns[1 or 2, pitch]: column i belongs to one thread throughout. With x^ = (sum - mean) * rstd, g = dout * weight:
//   dsum += rstd * (g - mean(g) - x^ * mean(g * x^)),   dweight += dout * x^,   dbias += dout,   out as before
// Without a mean, which is an RMS norm, mean(g) drops out too. out may be absent, or dout itself: a thread has read
// dout's columns before it writes out's. pitch: the width, rounded up to `wide` entries.
template <bool aligned, bool layer, class T> __global__ void __launch_bounds__(threads)
    norm_backward_kernel(T* dsum, float* partials, T* out, const T* dout, const T* sum, const float* mean,
                         const float* rstd, const T* weight, const T* bias, int64_t rows, int64_t width, int64_t pitch,
                         bool with_bias, bool in_shared_memory) {
  constexpr int N = wide<T>;
  float* partial = partials + blockIdx.x * (with_bias ? 2 : 1) * pitch;
  float* columns = partial;
  if (in_shared_memory) {
    DYN_SHARED(float, shared);
    columns = shared;
  }
  const float none[N] = {};
  for (int64_t i = threadIdx.x * N; i < width; i += threads * N) {
    store_aligned(columns + i, none);
    if (with_bias) store_aligned(columns + pitch + i, none);
  }
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t at = row * width;
    const float m = layer ? mean[row] : 0.0f, r = rstd[row];
    float sums[layer ? 2 : 1] = {};  // of g x^, and of g
    for (int64_t i = threadIdx.x * N; i < width; i += threads * N) {
      float g[N], x[N], w[N];
      load<aligned>(g, dout + at + i, width - i), load<aligned>(x, sum + at + i, width - i),
          load<aligned>(w, weight + i, width - i);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        sums[0] += g[e] * w[e] * ((x[e] - m) * r);
        if constexpr (layer) sums[1] += g[e] * w[e];
      }
    }
    block_sums<threads>(sums);
    const float mean_product = sums[0] / static_cast<float>(width);
    const float mean_g = layer ? sums[layer] / static_cast<float>(width) : 0.0f;
    for (int64_t i = threadIdx.x * N; i < width; i += threads * N) {
      float g[N], x[N], w[N], d[N], c[N], b[N] = {};
      load<aligned>(g, dout + at + i, width - i), load<aligned>(x, sum + at + i, width - i),
          load<aligned>(w, weight + i, width - i), load<aligned>(d, dsum + at + i, width - i);
      load_aligned(c, columns + i);
      if (bias) load<aligned>(b, bias + i, width - i);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float normed = (x[e] - m) * r;
        d[e] += (g[e] * w[e] - mean_g - normed * mean_product) * r;
        c[e] += g[e] * normed;
        x[e] = normalised(x[e], m, r, w[e], b[e]);
      }
      store<aligned>(dsum + at + i, d, width - i);
      store_aligned(columns + i, c);
      if (with_bias) {
        load_aligned(c, columns + pitch + i);
#pragma unroll
        for (int e = 0; e < N; ++e) c[e] += g[e];
        store_aligned(columns + pitch + i, c);
      }
      if (out) store<aligned>(out + at + i, x, width - i);
    }
  }
  if (!in_shared_memory) return;
  for (int64_t i = threadIdx.x * N; i < width; i += threads * N) {
    float c[N];
    load_aligned(c, columns + i), store_aligned(partial + i, c);
    if (with_bias) load_aligned(c, columns + pitch + i), store_aligned(partial + pitch + i, c);
  }
}

}  // namespace

void CudaBackend::norm_backward(const Tensor& dsum, const Tensor& dweight, const Tensor& dbias, const Tensor& out,
                                const Tensor& dout, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                                const Tensor& weight, const Tensor& bias) {
  shapes::norm_backward(dsum, dweight, dbias, out, dout, sum, mean, rstd, weight, bias);
  const int64_t rows = sum.rows(), width = sum.columns();
  if (rows == 0) return;
  constexpr int64_t most_blocks = 256, most_shared_bytes = 96 << 10;  // so that two blocks share an A100's or H100's SM
  const int64_t blocks = std::min(rows, most_blocks), kinds = dbias ? 2 : 1, pitch = (width + 7) / 8 * 8;
  const int64_t column_bytes = kinds * pitch * static_cast<int64_t>(sizeof(float));
  const bool in_shared_memory = column_bytes <= most_shared_bytes;
  float* partials = scratch<float>(blocks * kinds * pitch);
  with_gpu_dtype("norm_backward", sum.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_constant(rows_aligned({&dsum, &out, &dout, &sum, &weight, &bias}), [&](auto aligned) {
      with_constant(static_cast<bool>(mean), [&](auto layer) {
        launch(norm_backward_kernel<aligned(), layer(), T>, static_cast<unsigned>(blocks), threads,
               in_shared_memory ? static_cast<size_t>(column_bytes) : 0, compute_, dsum.as<T>(), partials,
               out ? out.as<T>() : nullptr, dout.as<const T>(), sum.as<const T>(),
               mean ? mean.as<const float>() : nullptr, rstd.as<const float>(), weight.as<const T>(),
               bias ? bias.as<const T>() : nullptr, rows, width, pitch, static_cast<bool>(dbias), in_shared_memory);
      });
    });
  });
  add_partials(compute_, dweight.as<float>(), dbias ? dbias.as<float>() : nullptr, partials, blocks, width, pitch);
}

}  // namespace orpo
