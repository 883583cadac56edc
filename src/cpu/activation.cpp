// What the MLP computes between its two products: SwiGLU, GELU, GELU's tanh approximation, ReLU.
#include "src/cpu/backend.h"
#include "src/cpu/vector.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

namespace {

template <class A> Vector<A> sigmoid_of(Vector<A> x) { return A(1) / (A(1) + exponential(-x)); }

// A function of one vector and its derivative there.
template <class A> struct Slope { Vector<A> value, derivative; };

// silu(x) = x s with s = sigmoid(x);  silu'(x) = s (1 + x (1 - s)).
template <class A> Slope<A> silu(Vector<A> x) {
  const Vector<A> s = sigmoid_of<A>(x);
  return {x * s, s * (A(1) + x * (A(1) - s))};
}

// gelu(x) = x Phi(x);  gelu'(x) = Phi(x) + x phi(x), with the normal distribution's Phi(x) = erfc(-x / sqrt(2)) / 2,
// which keeps its digits far below 0.
template <class A> Slope<A> gelu(Vector<A> x) {
  Vector<A> phi_sum;
  for (int i = 0; i < lanes<A>; ++i) phi_sum[i] = A(0.5) * std::erfc(x[i] * A(-0.70710678118654752440));
  const Vector<A> density = exponential(x * x * A(-0.5)) * A(0.39894228040143267794);
  return {x * phi_sum, phi_sum + x * density};
}

// (1 + tanh(v / 2)) / 2 = sigmoid(v): gelu_tanh(x) = x s with s = sigmoid(v), v = 2 sqrt(2 / pi) (x + 0.044715 x^3);
// its derivative is s + x s (1 - s) v'. With e = exp(-|v|) the two of s and 1 - s are 1 / (1 + e) and e / (1 + e): no
// digits are lost to 1 - s, which x v' multiplies. Beyond 30 s is 0 or 1; clamped there, x^3 stays finite.
template <class A> Slope<A> gelu_tanh(Vector<A> x) {
  constexpr A slope = A(1.59576912160573071176), cubic = A(0.044715);
  const Vector<A> low = splat(A(-30)), high = splat(A(30));
  Vector<A> near = x < low ? low : x;
  near = near > high ? high : near;
  const Vector<A> square = near * near, v = slope * near * (A(1) + cubic * square), zero{};
  const Vector<A> e = exponential(v < zero ? v : -v), larger = A(1) / (A(1) + e), smaller = e * larger;
  const Vector<A> s = v < zero ? smaller : larger;
  return {x * s, s + near * larger * smaller * slope * (A(1) + 3 * cubic * square)};
}

template <class A> Slope<A> relu(Vector<A> x) {
  const Vector<A> zero{}, one = splat(A(1));
  return {x < zero ? zero : x, x > zero ? one : zero};  // NaN stays
}

// body(f) with the activation's function f(vector) -> Slope.
template <class A, class Body> void with_function(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::swiglu:
      return body([](Vector<A> x) { return silu<A>(x); });
    case Activation::gelu:
      return body([](Vector<A> x) { return gelu<A>(x); });
    case Activation::gelu_tanh:
      return body([](Vector<A> x) { return gelu_tanh<A>(x); });
    case Activation::relu:
      return body([](Vector<A> x) { return relu<A>(x); });
  }
}

}  // namespace

void CpuBackend::activation_forward(const Tensor& out, const Tensor& gate_up, Activation activation) {
  shapes::activation_forward(out, gate_up, activation);
  with_dtype("activation_forward", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const int64_t width = out.columns();
    const bool gated = is_gated(activation);
    with_function<A>(activation, [&](auto f) {
      for_rows(out.rows(), [&](int64_t row) {
        const T* in = gate_up.as<const T>() + row * gate_up.columns();
        T* y = out.as<T>() + row * width;
        for_vectors<A>(width, [&](int64_t i, auto n) {
          const Vector<A> value = f(load(in + i, n)).value;
          store(y + i, gated ? value * load(in + width + i, n) : value, n);
        });
      });
    });
  });
}

// Reads gate, up and dout at i before it writes there: in place is safe.
void CpuBackend::activation_backward(const Tensor& dgate_up, const Tensor& out, const Tensor& dout,
                                     const Tensor& gate_up, Activation activation) {
  shapes::activation_backward(dgate_up, out, dout, gate_up, activation);
  with_dtype("activation_backward", dout.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const int64_t width = dout.columns();
    const bool gated = is_gated(activation);
    with_function<A>(activation, [&](auto f) {
      for_rows(dout.rows(), [&](int64_t row) {
        const T* in = gate_up.as<const T>() + row * gate_up.columns();
        const T* dy = dout.as<const T>() + row * width;
        T* din = dgate_up.as<T>() + row * gate_up.columns();
        T* y = out ? out.as<T>() + row * width : nullptr;
        for_vectors<A>(width, [&](int64_t i, auto n) {
          const Vector<A> g = load(dy + i, n);
          const Slope<A> at = f(load(in + i, n));
          if (gated) {
            const Vector<A> up = load(in + width + i, n);
            store(din + i, g * up * at.derivative, n);
            store(din + width + i, g * at.value, n);
            if (y) store(y + i, at.value * up, n);
          } else {
            store(din + i, g * at.derivative, n);
            if (y) store(y + i, at.value, n);
          }
        });
      });
    });
  });
}

}  // namespace orpo
