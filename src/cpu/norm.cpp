// RMS norm after the residual addition.
#include "src/cpu/backend.h"
#include "src/cpu/vector.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

namespace {

template <class T>
void forward_row(T* out, T* sum, Accumulator<T>* rstd, const T* residual, const T* branch, const T* weight,
                 int64_t width, double epsilon) {
  using A = Accumulator<T>;
  Vector<A> squares{};
  for_vectors<A>(width, [&](int64_t i, auto n) {
    if (sum != residual || branch) {
      Vector<A> x = load(residual + i, n);
      if (branch) x += load(branch + i, n);
      store(sum + i, x, n);
    }
    const Vector<A> stored = load(sum + i, n);  // as rounded to T: what the backward pass will see
    squares += stored * stored;
  });
  const A r = A(1 / std::sqrt(static_cast<double>(sum_lanes<A>(squares)) / static_cast<double>(width) + epsilon));
  *rstd = r;
  for_vectors<A>(width, [&](int64_t i, auto n) { store(out + i, load(weight + i, n) * (load(sum + i, n) * r), n); });
}

// With x^ = sum * rstd and g = dout * weight:  dsum += rstd * (g - x^ * mean(g * x^)),  dweight += dout * x^,
// out = weight * x^. Reads dout at i for the last time before it writes out there: in place is safe.
template <class T>
void backward_row(T* dsum, Accumulator<T>* dweight, T* out, const T* dout, const T* sum, Accumulator<T> rstd,
                  const T* weight, int64_t width) {
  using A = Accumulator<T>;
  Vector<A> products{};
  for_vectors<A>(width, [&](int64_t i, auto n) {
    const Vector<A> g = load(dout + i, n), normed = load(sum + i, n) * rstd;
    products += g * load(weight + i, n) * normed;
    store(dweight + i, load(dweight + i, n) + g * normed, n);
  });
  const A mean = sum_lanes<A>(products) / static_cast<A>(width);
  for_vectors<A>(width, [&](int64_t i, auto n) {
    const Vector<A> w = load(weight + i, n), g = load(dout + i, n) * w, normed = load(sum + i, n) * rstd;
    store(dsum + i, load(dsum + i, n) + (g - normed * mean) * rstd, n);
    if (out) store(out + i, w * normed, n);
  });
}

}  // namespace

void CpuBackend::norm_forward(const Tensor& out, const Tensor& sum, const Tensor& rstd, const Tensor& residual,
                              const Tensor& branch, const Tensor& weight, double epsilon) {
  shapes::norm_forward(out, sum, rstd, residual, branch, weight, epsilon);
  with_dtype("norm_forward", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t width = out.columns();
    for_rows(out.rows(), [&](int64_t row) {
      const int64_t at = row * width;
      forward_row(out.as<T>() + at, sum.as<T>() + at, rstd.as<Accumulator<T>>() + row, residual.as<const T>() + at,
                  branch ? branch.as<const T>() + at : nullptr, weight.as<const T>(), width, epsilon);
    });
  });
}

void CpuBackend::norm_backward(const Tensor& dsum, const Tensor& dweight, const Tensor& out, const Tensor& dout,
                               const Tensor& sum, const Tensor& rstd, const Tensor& weight) {
  shapes::norm_backward(dsum, dweight, out, dout, sum, rstd, weight);
  with_dtype("norm_backward", sum.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const int64_t width = sum.columns();
    add_row_blocks(dweight.as<A>(), sum.rows(), width, [&](A* partial, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * width;
        backward_row(dsum.as<T>() + at, partial, out ? out.as<T>() + at : nullptr, dout.as<const T>() + at,
                     sum.as<const T>() + at, rstd.as<const A>()[row], weight.as<const T>(), width);
      }
    });
  });
}

}  // namespace orpo
