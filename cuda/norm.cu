// RMS norm after the residual addition: a block a row.
#include "cuda/gpu.cuh"

namespace orpo {

namespace {

constexpr int threads = 256;

template <bool aligned, class T> __global__ void __launch_bounds__(threads)
    norm_forward_kernel(T* out, T* sum, float* rstd, const T* residual, const T* branch, const T* weight, int64_t width,
                        float epsilon) {
  constexpr int N = wide<T>;
  const int64_t row = blockIdx.x, at = row * width;
  float squares = 0;
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
    for (int e = 0; e < N; ++e) squares += x[e] * x[e];
  }
  const float r = 1.0f / sqrtf(block_sum<threads>(squares) / static_cast<float>(width) + epsilon);
  if (threadIdx.x == 0) rstd[row] = r;
  for (int64_t i = threadIdx.x * N; i < width; i += threads * N) {
    float x[N], w[N];
    load<aligned>(x, sum + at + i, width - i);  // written above by this thread
    load<aligned>(w, weight + i, width - i);
#pragma unroll
    for (int e = 0; e < N; ++e) x[e] = w[e] * (x[e] * r);
    store<aligned>(out + at + i, x, width - i);
  }
}

}  // namespace

void CudaBackend::norm_forward(const Tensor& out, const Tensor& sum, const Tensor& rstd, const Tensor& residual,
                               const Tensor& branch, const Tensor& weight, double epsilon) {
  shapes::norm_forward(out, sum, {}, rstd, residual, branch, weight, {}, epsilon);
  if (out.rows() == 0) return;
  with_gpu_dtype("norm_forward", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_constant(rows_aligned({&out, &sum, &residual, &branch, &weight}), [&](auto aligned) {
      launch(norm_forward_kernel<aligned(), T>, static_cast<unsigned>(out.rows()), threads, 0, compute_, out.as<T>(),
             sum.as<T>(), rstd.as<float>(), residual.as<const T>(), branch ? branch.as<const T>() : nullptr,
             weight.as<const T>(), out.columns(), static_cast<float>(epsilon));
    });
  });
}

namespace {

// A block takes rows blockIdx.x, + gridDim.x, ... and adds their dweight up in columns[width]: column i belongs to one
// thread throughout. With x^ = sum * rstd and g = dout * weight:
//   dsum += rstd * (g - x^ * mean(g * x^)),   dweight += dout * x^,   out = weight * x^ as in the forward pass
// out may be absent, or dout itself: a thread has read dout's columns before it writes out's.
template <bool aligned, class T> __global__ void __launch_bounds__(threads)
    norm_backward_kernel(T* dsum, float* partials, T* out, const T* dout, const T* sum, const float* rstd,
                         const T* weight, int64_t rows, int64_t width, bool in_shared_memory) {
  constexpr int N = wide<T>;
  float* partial = partials + blockIdx.x * width;
  float* columns = partial;
  if (in_shared_memory) {
    DYN_SHARED(float, shared);
    columns = shared;
  }
  for (int64_t i = threadIdx.x * N; i < width; i += threads * N)
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (i + e < width) columns[i + e] = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t at = row * width;
    const float r = rstd[row];
    float products = 0;
    for (int64_t i = threadIdx.x * N; i < width; i += threads * N) {
      float g[N], x[N], w[N];
      load<aligned>(g, dout + at + i, width - i), load<aligned>(x, sum + at + i, width - i),
          load<aligned>(w, weight + i, width - i);
#pragma unroll
      for (int e = 0; e < N; ++e) products += g[e] * w[e] * (x[e] * r);
    }
    const float mean = block_sum<threads>(products) / static_cast<float>(width);
    for (int64_t i = threadIdx.x * N; i < width; i += threads * N) {
      float g[N], x[N], w[N], d[N];
      load<aligned>(g, dout + at + i, width - i), load<aligned>(x, sum + at + i, width - i),
          load<aligned>(w, weight + i, width - i);
      load<aligned>(d, dsum + at + i, width - i);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float normed = x[e] * r;
        d[e] += (g[e] * w[e] - normed * mean) * r;
        if (i + e < width) columns[i + e] += g[e] * normed;
        x[e] = w[e] * normed;
      }
      store<aligned>(dsum + at + i, d, width - i);
      if (out) store<aligned>(out + at + i, x, width - i);
    }
  }
  if (in_shared_memory)
    for (int64_t i = threadIdx.x * N; i < width; i += threads * N)
#pragma unroll
      for (int e = 0; e < N; ++e)
        if (i + e < width) partial[i + e] = columns[i + e];
}

// dweight += the blocks' partial sums, block after block.
__global__ void add_partials_kernel(float* dweight, const float* partials, int64_t count, int64_t width) {
  const int64_t i = int64_t{blockIdx.x} * threads + threadIdx.x;
  if (i >= width) return;
  float total = dweight[i];
  for (int64_t p = 0; p < count; ++p) total += partials[p * width + i];
  dweight[i] = total;
}

}  // namespace

void CudaBackend::norm_backward(const Tensor& dsum, const Tensor& dweight, const Tensor& out, const Tensor& dout,
                                const Tensor& sum, const Tensor& rstd, const Tensor& weight) {
  shapes::norm_backward(dsum, dweight, {}, out, dout, sum, {}, rstd, weight, {});
  const int64_t rows = sum.rows(), width = sum.columns();
  if (rows == 0) return;
  constexpr int64_t most_blocks = 256, most_shared_bytes = 96 << 10;  // so that two blocks share an A100's or H100's SM
  const int64_t blocks = std::min(rows, most_blocks), column_bytes = width * static_cast<int64_t>(sizeof(float));
  const bool in_shared_memory = column_bytes <= most_shared_bytes;
  float* partials = scratch<float>(blocks * width);
  with_gpu_dtype("norm_backward", sum.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_constant(rows_aligned({&dsum, &out, &dout, &sum, &weight}), [&](auto aligned) {
      launch(norm_backward_kernel<aligned(), T>, static_cast<unsigned>(blocks), threads,
             in_shared_memory ? static_cast<size_t>(column_bytes) : 0, compute_, dsum.as<T>(), partials,
             out ? out.as<T>() : nullptr, dout.as<const T>(), sum.as<const T>(), rstd.as<const float>(),
             weight.as<const T>(), rows, width, in_shared_memory);
    });
  });
  launch(add_partials_kernel, blocks_for(width, threads), threads, 0, compute_, dweight.as<float>(), partials, blocks,
         width);
}

}  // namespace orpo
