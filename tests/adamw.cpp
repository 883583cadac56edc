#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

struct State {
  Values weight, master, first, second;
};

// torch.optim.AdamW's formula in S; the weight as rounded to dtype.
template <class S> State updated(const State& before, const Values& gradient, const orpo::AdamW& s, DType dtype) {
  State after = before;
  const S b1 = S(s.beta1), b2 = S(s.beta2), lr = S(s.learning_rate);
  for (size_t i = 0; i < gradient.size(); ++i) {
    const S g = S(gradient[i]) * S(s.gradient_scale);
    const S m = b1 * S(before.first[i]) + (1 - b1) * g, v = b2 * S(before.second[i]) + (1 - b2) * g * g;
    const S m_hat = m / (1 - std::pow(b1, S(s.step))), v_hat = v / (1 - std::pow(b2, S(s.step)));
    const S w = S(before.master[i]) * (1 - lr * S(s.weight_decay)) - lr * m_hat / (std::sqrt(v_hat) + S(s.epsilon));
    after.first[i] = double(m), after.second[i] = double(v), after.master[i] = double(w),
    after.weight[i] = rounded(double(w), dtype);
  }
  return after;
}

}  // namespace

TEST_CASE(
    "adamw: three steps as the formula, with decay and clipping, and one copy of the weights where they are fp32") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    for (int64_t n : {int64_t{1}, int64_t{97}, int64_t{40000}})
      for (double decay : {0.0, 0.1}) {
        const Values start = rounded(random_values(n, 1), sums);
        DeviceTensor weight(backend, dtype, {n}, start), master(backend, sums, {n}, start), first(backend, sums, {n}),
            second(backend, sums, {n});
        State reference{start, start, Values(n), Values(n)}, naive = reference;
        for (int64_t step = 1; step <= 3; ++step) {
          const Values g = rounded(random_values(n, 10 + step), sums);
          DeviceTensor gradient(backend, sums, {n}, g);
          const orpo::AdamW settings{1e-2, 0.9, 0.999, 1e-8, decay, step, 0.37};
          backend.adamw(dtype == sums ? *master : *weight, master, first, second, gradient, settings);
          reference = updated<long double>(reference, g, settings, DType::f64);
          naive = dtype == DType::f64 ? updated<double>(naive, g, settings, dtype)
                                      : updated<float>(naive, g, settings, dtype);
        }
        check_close("first moment", first.values(), naive.first, reference.first, sums);
        check_close("second moment", second.values(), naive.second, reference.second, sums);
        check_close("master", master.values(), naive.master, reference.master, sums);
        if (dtype != sums) CHECK(weight.values() == rounded(master.values(), dtype));
        CHECK(largest_error(master.values(), start) > 1e-3);
      }
  });
}

TEST_CASE("adamw: sum of squares in double, the same for any number of threads, not finite where an entry is not") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    const int64_t n = 100003;
    Values g = rounded(random_values(n, 1, -1e3, 1e3), sums);
    long double exact = 0;
    for (double v : g) exact += static_cast<long double>(v) * v;
    DeviceTensor gradient(backend, sums, {n}, g);
    const double sum = backend.sum_of_squares(gradient);
    CHECK(std::abs(sum - static_cast<double>(exact)) <= 1e-13 * static_cast<double>(exact));
    for (double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
      g[n - 1] = bad;
      gradient.set(g);
      CHECK_FALSE(std::isfinite(backend.sum_of_squares(gradient)));
    }
    DeviceTensor none(backend, sums, {0});
    CHECK(backend.sum_of_squares(none) == 0);
  });
  const Values g = random_values(200000, 2);
  double first = 0;
  for (int threads : {2, 1, 3}) {
    const auto backend = make_cpu_backend(threads);
    DeviceTensor gradient(*backend, DType::f32, {200000}, g);
    for (int repeat = 0; repeat < (threads == 2 ? 250 : 1); ++repeat) {
      const double sum = backend->sum_of_squares(gradient);
      if (first == 0) first = sum;
      CHECK(sum == first);
    }
  }
}

TEST_CASE("adamw: refuses tensors of different sizes and a step before the first") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    DeviceTensor w(backend, dtype, {4}), m(backend, sums, {4}), five(backend, sums, {5});
    const orpo::AdamW settings{1e-2, 0.9, 0.999, 1e-8, 0, 1, 1}, early{1e-2, 0.9, 0.999, 1e-8, 0, 0, 1};
    check_refuses([&] { backend.adamw(w, m, m, m, five, settings); }, "adamw", "gradient [5]");
    check_refuses([&] { backend.adamw(w, five, m, m, m, settings); }, "adamw", "master [5]");
    check_refuses([&] { backend.adamw(w, m, m, m, m, early); }, "adamw", "step is 0");
    DeviceTensor tokens(backend, DType::i32, {4});
    check_refuses([&] { backend.sum_of_squares(tokens); }, "sum_of_squares", "int32");
  });
}
