// The optimiser: gradient norm and AdamW, one pass each.
#include <algorithm>

#include "src/cpu/backend.h"
#include "src/cpu/vector.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

namespace {

constexpr int64_t block =
    1 << 14;  // entries a thread takes at a time; sums keep this grouping whatever the number of threads

template <class T> double squares_of_block(const T* x, int64_t count) {
  constexpr int64_t run = 8;
  double partial[run] = {};
  int64_t i = 0;
  for (; i + run <= count; i += run)
    for (int64_t l = 0; l < run; ++l) {
      const double value = static_cast<double>(static_cast<Accumulator<T>>(x[i + l]));
      partial[l] += value * value;
    }
  for (; i < count; ++i) partial[0] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return ((partial[0] + partial[1]) + (partial[2] + partial[3])) +
         ((partial[4] + partial[5]) + (partial[6] + partial[7]));
}

// The settings as each entry needs them.
template <class A> struct Step {
  A beta1, beta2, one_minus_beta1, one_minus_beta2, epsilon, keep, rate, second_correction, gradient_scale;

  explicit Step(const AdamW& s)
      : beta1(A(s.beta1)),
        beta2(A(s.beta2)),
        one_minus_beta1(A(1 - s.beta1)),
        one_minus_beta2(A(1 - s.beta2)),
        epsilon(A(s.epsilon)),
        keep(A(1 - s.learning_rate * s.weight_decay)),
        rate(A(s.learning_rate / (1 - std::pow(s.beta1, static_cast<double>(s.step))))),
        second_correction(A(1 / std::sqrt(1 - std::pow(s.beta2, static_cast<double>(s.step))))),
        gradient_scale(A(s.gradient_scale)) {}
};

template <class T, class A>
void update_block(T* weight, A* master, A* first, A* second, const A* gradient, int64_t count, const Step<A>& s) {
  for_vectors<A>(count, [&](int64_t i, auto n) {
    const Vector<A> g = load(gradient + i, n) * s.gradient_scale;
    const Vector<A> m = load(first + i, n) * s.beta1 + g * s.one_minus_beta1;
    const Vector<A> v = load(second + i, n) * s.beta2 + g * g * s.one_minus_beta2;
    store(first + i, m, n);
    store(second + i, v, n);
    const Vector<A> w =
        load(master + i, n) * s.keep - m * s.rate / (square_root<A>(v) * s.second_correction + s.epsilon);
    store(master + i, w, n);
    store(weight + i, w, n);
  });
}

}  // namespace

double CpuBackend::sum_of_squares(const Tensor& gradient) {
  shapes::sum_of_squares(gradient);
  const int64_t count = gradient.elements(), blocks = (count + block - 1) / block;
  std::vector<double> partials(static_cast<size_t>(blocks));
  with_dtype("sum_of_squares", gradient.dtype, [&](auto zero) {
    const auto* x = gradient.as<const decltype(zero)>();
    for_rows(blocks, [&](int64_t b) {
      partials[static_cast<size_t>(b)] = squares_of_block(x + b * block, std::min(block, count - b * block));
    });
  });
  double sum = 0;
  for (double partial : partials) sum += partial;
  return sum;
}

void CpuBackend::adamw(const Tensor& weight, const Tensor& master, const Tensor& first, const Tensor& second,
                       const Tensor& gradient, const AdamW& settings) {
  shapes::adamw(weight, master, first, second, gradient, settings);
  with_dtype("adamw", weight.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const Step<A> step(settings);
    const int64_t count = weight.elements();
    for_rows((count + block - 1) / block, [&](int64_t b) {
      const int64_t at = b * block;
      update_block(weight.as<T>() + at, master.as<A>() + at, first.as<A>() + at, second.as<A>() + at,
                   gradient.as<const A>() + at, std::min(block, count - at), step);
    });
  });
}

}  // namespace orpo
