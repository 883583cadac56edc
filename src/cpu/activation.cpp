// SwiGLU: silu(gate) * up with silu(x) = x sigmoid(x).
#include "src/cpu/backend.h"
#include "src/cpu/vector.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

namespace {

template <class A> Vector<A> sigmoid_of(Vector<A> x) { return A(1) / (A(1) + exponential(-x)); }

}  // namespace

void CpuBackend::activation_forward(const Tensor& out, const Tensor& gate_up) {
  shapes::activation_forward(out, gate_up);
  with_dtype("activation_forward", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const int64_t width = out.columns();
    for_rows(out.rows(), [&](int64_t row) {
      const T* gate = gate_up.as<const T>() + row * 2 * width;
      T* y = out.as<T>() + row * width;
      for_vectors<A>(width, [&](int64_t i, auto n) {
        const Vector<A> x = load(gate + i, n);
        store(y + i, x * sigmoid_of<A>(x) * load(gate + width + i, n), n);
      });
    });
  });
}

// silu'(x) = s (1 + x (1 - s)) with s = sigmoid(x). Reads gate, up and dout at i before it writes there: in place is
// safe.
void CpuBackend::activation_backward(const Tensor& dgate_up, const Tensor& out, const Tensor& dout,
                                     const Tensor& gate_up) {
  shapes::activation_backward(dgate_up, out, dout, gate_up);
  with_dtype("activation_backward", dout.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const int64_t width = dout.columns();
    for_rows(dout.rows(), [&](int64_t row) {
      const T* gate = gate_up.as<const T>() + row * 2 * width;
      const T* dy = dout.as<const T>() + row * width;
      T* dgate = dgate_up.as<T>() + row * 2 * width;
      T* y = out ? out.as<T>() + row * width : nullptr;
      for_vectors<A>(width, [&](int64_t i, auto n) {
        const Vector<A> x = load(gate + i, n), up = load(gate + width + i, n), g = load(dy + i, n),
                        s = sigmoid_of<A>(x);
        store(dgate + i, g * up * s * (A(1) + x * (A(1) - s)), n);
        store(dgate + width + i, g * x * s, n);
        if (y) store(y + i, x * s * up, n);
      });
    });
  });
}

}  // namespace orpo
