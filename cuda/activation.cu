// What the MLP computes between its two products: SwiGLU, GELU, GELU's tanh approximation, ReLU.
#include "cuda/gpu.cuh"

namespace orpo {

namespace {

constexpr int threads = 256;

// fp32 is the parity mode: its exponential has all its digits.
template <class T> __device__ __forceinline__ float exponential(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return fast_exp(x);
  else
    return expf(x);
}

// A function of one number and its derivative there.
struct Slope {
  float value, derivative;
};

// silu(x) = x s with s = sigmoid(x);  silu'(x) = s (1 + x (1 - s)).
template <class T> __device__ __forceinline__ Slope silu(float x) {
  const float s = 1.0f / (1.0f + exponential<T>(-x));
  return {x * s, s * (1.0f + x * (1.0f - s))};
}

// gelu(x) = x Phi(x);  gelu'(x) = Phi(x) + x phi(x), with the normal distribution's Phi(x) = erfc(-x / sqrt(2)) / 2,
// which keeps its digits far below 0.
template <class T> __device__ __forceinline__ Slope gelu(float x) {
  const float phi_sum = 0.5f * erfcf(x * -0.70710678118654752440f);
  const float density = exponential<T>(x * x * -0.5f) * 0.39894228040143267794f;
  return {x * phi_sum, phi_sum + x * density};
}

// (1 + tanh(v / 2)) / 2 = sigmoid(v): gelu_tanh(x) = x s with s = sigmoid(v), v = 2 sqrt(2 / pi) (x + 0.044715 x^3);
// its derivative is s + x s (1 - s) v'. With e = exp(-|v|) the two of s and 1 - s are 1 / (1 + e) and e / (1 + e): no
// digits are lost to 1 - s, which x v' multiplies. Beyond 30 s is 0 or 1; clamped there, x^3 stays finite.
template <class T> __device__ __forceinline__ Slope gelu_tanh(float x) {
  constexpr float slope = 1.59576912160573071176f, cubic = 0.044715f;
  const float near = x < -30.0f ? -30.0f : x > 30.0f ? 30.0f : x, square = near * near;  // NaN stays
  const float v = slope * near * (1.0f + cubic * square), e = exponential<T>(v < 0 ? v : -v);
  const float larger = 1.0f / (1.0f + e), smaller = e * larger, s = v < 0 ? smaller : larger;
  return {x * s, s + near * larger * smaller * slope * (1.0f + 3 * cubic * square)};
}

__device__ __forceinline__ Slope relu(float x) { return {x < 0 ? 0.0f : x, x > 0 ? 1.0f : 0.0f}; }  // NaN stays

template <Activation activation, class T> __device__ __forceinline__ Slope slope_at(float x) {
  if constexpr (activation == Activation::swiglu)
    return silu<T>(x);
  else if constexpr (activation == Activation::gelu)
    return gelu<T>(x);
  else if constexpr (activation == Activation::gelu_tanh)
    return gelu_tanh<T>(x);
  else
    return relu(x);
}

template <Activation activation> constexpr bool gated = is_gated(activation);

// A thread takes N = wide<T> columns of a row of `width` outputs; groups = ceil(width / N). Where there is a gate its
// columns come first, then up's; otherwise up is what the function is of.
template <bool aligned, Activation activation, class T>
__global__ void activation_forward_kernel(T* out, const T* gate_up, int64_t rows, int64_t width, int64_t groups) {
  constexpr int N = wide<T>;
  const int64_t index = int64_t{blockIdx.x} * threads + threadIdx.x, row = index / groups, i = index % groups * N;
  if (row >= rows) return;
  const T* in = gate_up + row * (gated<activation> ? 2 : 1) * width + i;
  float x[N], up[N];
  load<aligned>(x, in, width - i);
  if constexpr (gated<activation>) load<aligned>(up, in + width, width - i);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    x[e] = slope_at<activation, T>(x[e]).value;
    if constexpr (gated<activation>) x[e] *= up[e];
  }
  store<aligned>(out + row * width + i, x, width - i);
}

// A thread reads all before it writes: dgate_up may be gate_up, out may be dout, or absent.
template <bool aligned, Activation activation, class T>
__global__ void activation_backward_kernel(T* dgate_up, T* out, const T* dout, const T* gate_up, int64_t rows,
                                           int64_t width, int64_t groups) {
  constexpr int N = wide<T>;
  const int64_t index = int64_t{blockIdx.x} * threads + threadIdx.x, row = index / groups, i = index % groups * N;
  if (row >= rows) return;
  const int64_t at = row * (gated<activation> ? 2 : 1) * width + i;
  float x[N], up[N], g[N], y[N];
  load<aligned>(x, gate_up + at, width - i), load<aligned>(g, dout + row * width + i, width - i);
  if constexpr (gated<activation>) load<aligned>(up, gate_up + at + width, width - i);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    const Slope f = slope_at<activation, T>(x[e]);
    y[e] = gated<activation> ? f.value * up[e] : f.value;
    x[e] = (gated<activation> ? g[e] * up[e] : g[e]) * f.derivative;
    if constexpr (gated<activation>) up[e] = g[e] * f.value;
  }
  store<aligned>(dgate_up + at, x, width - i);
  if constexpr (gated<activation>) store<aligned>(dgate_up + at + width, up, width - i);
  if (out) store<aligned>(out + row * width + i, y, width - i);
}

// body(constant) with the activation as a template argument.
template <class Body> void with_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::swiglu:
      return body(std::integral_constant<Activation, Activation::swiglu>{});
    case Activation::gelu:
      return body(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return body(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::relu:
      return body(std::integral_constant<Activation, Activation::relu>{});
  }
}

}  // namespace

void CudaBackend::activation_forward(const Tensor& out, const Tensor& gate_up, Activation activation) {
  shapes::activation_forward(out, gate_up, activation);
  if (out.elements() == 0) return;
  with_gpu_dtype("activation_forward", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = out.rows(), width = out.columns(), groups = (width + wide<T> - 1) / wide<T>;
    with_constant(rows_aligned({&out, &gate_up}), [&](auto aligned) {
      with_activation(activation, [&](auto kind) {
        launch(activation_forward_kernel<aligned(), kind(), T>, blocks_for(rows * groups, threads), threads, 0,
               compute_, out.as<T>(), gate_up.as<const T>(), rows, width, groups);
      });
    });
  });
}

void CudaBackend::activation_backward(const Tensor& dgate_up, const Tensor& out, const Tensor& dout,
                                      const Tensor& gate_up, Activation activation) {
  shapes::activation_backward(dgate_up, out, dout, gate_up, activation);
  if (dout.elements() == 0) return;
  with_gpu_dtype("activation_backward", dout.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = dout.rows(), width = dout.columns(), groups = (width + wide<T> - 1) / wide<T>;
    with_constant(rows_aligned({&dgate_up, &out, &dout, &gate_up}), [&](auto aligned) {
      with_activation(activation, [&](auto kind) {
        launch(activation_backward_kernel<aligned(), kind(), T>, blocks_for(rows * groups, threads), threads, 0,
               compute_, dgate_up.as<T>(), out ? out.as<T>() : nullptr, dout.as<const T>(), gate_up.as<const T>(), rows,
               width, groups);
      });
    });
  });
}

}  // namespace orpo
