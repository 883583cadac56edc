// SwiGLU: silu(gate) * up with silu(x) = x sigmoid(x).
#include "cuda/gpu.cuh"

namespace orpo {

namespace {

constexpr int threads = 256;

// fp32 is the parity mode: its exponential has all its digits.
template <class T> __device__ __forceinline__ float sigmoid_of(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return 1.0f / (1.0f + fast_exp(-x));
  else
    return 1.0f / (1.0f + expf(-x));
}

// A thread takes N = wide<T> columns of a row; groups = ceil(width / N).
template <bool aligned, class T>
__global__ void activation_forward_kernel(T* out, const T* gate_up, int64_t rows, int64_t width, int64_t groups) {
  constexpr int N = wide<T>;
  const int64_t index = int64_t{blockIdx.x} * threads + threadIdx.x, row = index / groups, i = index % groups * N;
  if (row >= rows) return;
  const T* gate = gate_up + row * 2 * width + i;
  float x[N], up[N];
  load<aligned>(x, gate, width - i), load<aligned>(up, gate + width, width - i);
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] = x[e] * sigmoid_of<T>(x[e]) * up[e];
  store<aligned>(out + row * width + i, x, width - i);
}

// silu'(x) = s (1 + x (1 - s)) with s = sigmoid(x). A thread reads all before it writes: dgate_up may be gate_up, out
// may be dout, or absent.
template <bool aligned, class T> __global__ void activation_backward_kernel(T* dgate_up, T* out, const T* dout,
                                                                            const T* gate_up, int64_t rows,
                                                                            int64_t width, int64_t groups) {
  constexpr int N = wide<T>;
  const int64_t index = int64_t{blockIdx.x} * threads + threadIdx.x, row = index / groups, i = index % groups * N;
  if (row >= rows) return;
  const int64_t at = row * 2 * width + i;
  float x[N], up[N], g[N], y[N];
  load<aligned>(x, gate_up + at, width - i), load<aligned>(up, gate_up + at + width, width - i);
  load<aligned>(g, dout + row * width + i, width - i);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const float s = sigmoid_of<T>(x[e]), dup = g[e] * x[e] * s;
    y[e] = x[e] * s * up[e];
    x[e] = g[e] * up[e] * s * (1.0f + x[e] * (1.0f - s));
    up[e] = dup;
  }
  store<aligned>(dgate_up + at, x, width - i), store<aligned>(dgate_up + at + width, up, width - i);
  if (out) store<aligned>(out + row * width + i, y, width - i);
}

}  // namespace

void CudaBackend::activation_forward(const Tensor& out, const Tensor& gate_up) {
  shapes::activation_forward(out, gate_up, Activation::swiglu);
  if (out.elements() == 0) return;
  with_gpu_dtype("activation_forward", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_constant(rows_aligned({&out, &gate_up}), [&](auto aligned) {
      const int64_t rows = out.rows(), width = out.columns(), groups = (width + wide<T> - 1) / wide<T>;
      launch(activation_forward_kernel<aligned(), T>, blocks_for(rows * groups, threads), threads, 0, compute_,
             out.as<T>(), gate_up.as<const T>(), rows, width, groups);
    });
  });
}

void CudaBackend::activation_backward(const Tensor& dgate_up, const Tensor& out, const Tensor& dout,
                                      const Tensor& gate_up) {
  shapes::activation_backward(dgate_up, out, dout, gate_up, Activation::swiglu);
  if (dout.elements() == 0) return;
  with_gpu_dtype("activation_backward", dout.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_constant(rows_aligned({&dgate_up, &out, &dout, &gate_up}), [&](auto aligned) {
      const int64_t rows = dout.rows(), width = dout.columns(), groups = (width + wide<T> - 1) / wide<T>;
      launch(activation_backward_kernel<aligned(), T>, blocks_for(rows * groups, threads), threads, 0, compute_,
             dgate_up.as<T>(), out ? out.as<T>() : nullptr, dout.as<const T>(), gate_up.as<const T>(), rows, width,
             groups);
    });
  });
}

}  // namespace orpo
