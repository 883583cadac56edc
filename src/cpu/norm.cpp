// Layer norm and RMS norm after the residual addition.
#include "src/cpu/backend.h"
#include "src/cpu/rows.h"
#include "src/cpu/vector.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

namespace {

// The first n lanes of v, the rest 0.
template <class V, class Count>
V first_lanes(V v, Count n) {
  if constexpr (std::is_same_v<Count, int>)
    for (size_t i = static_cast<size_t>(n); i < sizeof(V) / sizeof(v[0]); ++i) v[i] = 0;
  return v;
}

// out = weight * (sum - mean) * rstd + bias, which may be absent. Never inlined: both passes run the same instructions
// and write the same bits, however a compiler fuses products and sums.
template <class T>
[[gnu::noinline]] void normalise_row(T* out, const T* sum, Accumulator<T> mean, Accumulator<T> rstd, const T* weight,
                                     const T* bias, int64_t width) {
  using A = Accumulator<T>;
  for_vectors<A>(width, [&](int64_t i, auto n) {
    const Vector<A> scaled = load(weight + i, n) * ((load(sum + i, n) - mean) * rstd);
    store(out + i, bias ? scaled + load(bias + i, n) : scaled, n);
  });
}

// mean null: an RMS norm. A layer norm's first mean m carries the rounding of a sum as large as the row's entries
// together. Deviations from it are small, so their own mean d corrects it, and the variance with it (Chan, Golub and
// LeVeque 1983):
//   mean = m + d,   variance = mean((x - m)^2) - d^2
template <class T>
void forward_row(T* out, T* sum, Accumulator<T>* mean, Accumulator<T>* rstd, const T* residual, const T* branch,
                 const T* weight, const T* bias, int64_t width, double epsilon) {
  using A = Accumulator<T>;
  const auto mean_of = [&](Vector<A> v) { return static_cast<double>(sum_lanes<A>(v)) / static_cast<double>(width); };
  Vector<A> total{}, squares{};
  for_vectors<A>(width, [&](int64_t i, auto n) {
    if (sum != residual || branch) {
      Vector<A> x = load(residual + i, n);
      if (branch) x += load(branch + i, n);
      store(sum + i, x, n);
    }
    const Vector<A> stored = load(sum + i, n);  // as rounded to T: what the backward pass will see
    if (mean)
      total += stored;
    else
      squares += stored * stored;
  });
  A m = 0;
  double correction = 0;
  if (mean) {
    m = A(mean_of(total));
    Vector<A> deviations{};
    for_vectors<A>(width, [&](int64_t i, auto n) {  // around the mean: no difference of large squares
      const Vector<A> x = first_lanes(load(sum + i, n) - m, n);
      deviations += x;
      squares += x * x;
    });
    correction = mean_of(deviations);
    *mean = m = A(static_cast<double>(m) + correction);
  }
  const double variance = std::max(0.0, mean_of(squares) - correction * correction);
  const A r = A(1 / std::sqrt(variance + epsilon));
  *rstd = r;
  normalise_row(out, sum, m, r, weight, bias, width);
}

// With x^ = (sum - mean) * rstd and g = dout * weight:
//   dsum += rstd * (g - mean(g) - x^ * mean(g * x^)),  dweight += dout * x^,  out = weight * x^ + bias.
// Without a mean, which is an RMS norm, mean(g) drops out too. Reads dout's row before it writes out's: in place is
// safe.
template <class T>
void backward_row(T* dsum, Accumulator<T>* dweight, T* out, const T* dout, const T* sum, const Accumulator<T>* mean,
                  Accumulator<T> rstd, const T* weight, const T* bias, int64_t width) {
  using A = Accumulator<T>;
  const A m = mean ? *mean : A(0);
  Vector<A> total{}, products{};
  for_vectors<A>(width, [&](int64_t i, auto n) {
    const Vector<A> dy = load(dout + i, n), g = dy * load(weight + i, n), normed = (load(sum + i, n) - m) * rstd;
    if (mean) total += g;
    products += g * normed;
    store(dweight + i, load(dweight + i, n) + dy * normed, n);
  });
  const A mean_g = sum_lanes<A>(total) / static_cast<A>(width),
          mean_product = sum_lanes<A>(products) / static_cast<A>(width);
  for_vectors<A>(width, [&](int64_t i, auto n) {
    const Vector<A> g = load(dout + i, n) * load(weight + i, n), normed = (load(sum + i, n) - m) * rstd;
    store(dsum + i, load(dsum + i, n) + (g - mean_g - normed * mean_product) * rstd, n);
  });
  if (out) normalise_row(out, sum, m, rstd, weight, bias, width);
}

}  // namespace

void CpuBackend::norm_forward(const Tensor& out, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                              const Tensor& residual, const Tensor& branch, const Tensor& weight, const Tensor& bias,
                              double epsilon) {
  shapes::norm_forward(out, sum, mean, rstd, residual, branch, weight, bias, epsilon);
  with_dtype("norm_forward", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const int64_t width = out.columns();
    for_rows(out.rows(), [&](int64_t row) {
      const int64_t at = row * width;
      forward_row(out.as<T>() + at, sum.as<T>() + at, mean ? mean.as<A>() + row : nullptr, rstd.as<A>() + row,
                  residual.as<const T>() + at, branch ? branch.as<const T>() + at : nullptr, weight.as<const T>(),
                  bias ? bias.as<const T>() : nullptr, width, epsilon);
    });
  });
}

void CpuBackend::norm_backward(const Tensor& dsum, const Tensor& dweight, const Tensor& dbias, const Tensor& out,
                               const Tensor& dout, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                               const Tensor& weight, const Tensor& bias) {
  shapes::norm_backward(dsum, dweight, dbias, out, dout, sum, mean, rstd, weight, bias);
  with_dtype("norm_backward", sum.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const int64_t width = sum.columns();
    if (dbias) add_column_sums<T>(dbias, dout);  // before `out` may be written over it
    add_row_blocks(dweight.as<A>(), sum.rows(), width, [&](A* partial, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * width;
        backward_row(dsum.as<T>() + at, partial, out ? out.as<T>() + at : nullptr, dout.as<const T>() + at,
                     sum.as<const T>() + at, mean ? mean.as<const A>() + row : nullptr, rstd.as<const A>()[row],
                     weight.as<const T>(), bias ? bias.as<const T>() : nullptr, width);
      }
    });
  });
}

}  // namespace orpo
