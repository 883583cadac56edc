#include "src/master.h"
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

Values joined(const DeviceTensor& weights, const DeviceTensor& corrections) {
  const Values weight = weights.values(), correction = corrections.values();
  Values masters;
  for (size_t i = 0; i < weight.size(); ++i)
    masters.push_back(join_master({bf16(static_cast<float>(weight[i])), static_cast<int16_t>(correction[i])}));
  return masters;
}

Values sums_of_squares(Backend& backend, std::span<const Tensor> gradients) {
  DeviceTensor sums(backend, DType::f64, {static_cast<int64_t>(gradients.size())}, 77);
  backend.sums_of_squares(sums, gradients);
  return sums.values();
}
double sum_of_squares(Backend& backend, const Tensor& gradient) { return sums_of_squares(backend, {&gradient, 1})[0]; }

}  // namespace

TEST_CASE(
    "adamw: three steps as the formula, with decay and clipping, and one copy of the weights where they are fp32") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    for (int64_t n : {int64_t{1}, int64_t{97}, int64_t{40000}})
      for (bool decays : {false, true}) {
        const Values start = rounded(random_values(n, 1), sums);
        const Values weights = rounded(start, dtype);
        DeviceTensor weight(backend, dtype, {n}, weights), correction(backend, DType::i16, {n}),
            first(backend, sums, {n}), second(backend, sums, {n});
        State reference{weights, weights, Values(n), Values(n)}, naive = reference;
        for (int64_t step = 1; step <= 3; ++step) {
          const Values g = rounded(random_values(n, 10 + step), sums);
          DeviceTensor gradient(backend, sums, {n}, g);
          const orpo::AdamW settings{1e-2, 0.9, 0.999, 1e-8, 0.1, step, 0.37};
          const AdamWTensors one{weight, dtype == sums ? Tensor() : *correction, first, second, gradient, decays};
          backend.adamw({&one, 1}, settings);
          orpo::AdamW same = settings;
          if (!decays) same.weight_decay = 0;
          reference = updated<long double>(reference, g, same, DType::f64);
          naive = dtype == DType::f64 ? updated<double>(naive, g, same, dtype) : updated<float>(naive, g, same, dtype);
        }
        const Values master = dtype == sums ? weight.values() : joined(weight, correction);
        check_close("first moment", first.values(), naive.first, reference.first, sums);
        check_close("second moment", second.values(), naive.second, reference.second, sums);
        check_close("master", master, naive.master, reference.master, sums);
        if (dtype != sums) CHECK(weight.values() == rounded(master, dtype));
        CHECK(largest_error(master, start) > 1e-3);
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
    const double sum = sum_of_squares(backend, gradient);
    CHECK(std::abs(sum - static_cast<double>(exact)) <= 1e-13 * static_cast<double>(exact));
    for (double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
      g[n - 1] = bad;
      gradient.set(g);
      CHECK_FALSE(std::isfinite(sum_of_squares(backend, gradient)));
    }
    DeviceTensor none(backend, sums, {0});
    CHECK(sum_of_squares(backend, none) == 0);
  });
  const Values g = random_values(200000, 2);
  double first = 0;
  for (int threads : {2, 1, 3}) {
    const auto backend = make_cpu_backend(threads);
    DeviceTensor gradient(*backend, DType::f32, {200000}, g);
    for (int repeat = 0; repeat < (threads == 2 ? 250 : 1); ++repeat) {
      const double sum = sum_of_squares(*backend, gradient);
      if (first == 0) first = sum;
      CHECK(sum == first);
    }
  }
}

TEST_CASE("adamw: refuses tensors of different sizes and a step before the first") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    DeviceTensor w(backend, dtype, {4}), m(backend, sums, {4}), five(backend, sums, {5}), c(backend, DType::i16, {4}),
        short_of(backend, DType::i16, {3});
    const Tensor correction = dtype == sums ? Tensor() : *c;
    const orpo::AdamW settings{1e-2, 0.9, 0.999, 1e-8, 0, 1, 1}, early{1e-2, 0.9, 0.999, 1e-8, 0, 0, 1};
    const auto refuses = [&](const AdamWTensors& one, const orpo::AdamW& s, const char* words) {
      check_refuses([&] { backend.adamw({&one, 1}, s); }, "adamw", words);
    };
    refuses({w, correction, m, m, five, true}, settings, "gradient [5]");
    refuses({w, correction, five, m, m, true}, settings, "moments [5]");
    refuses({w, dtype == sums ? *c : Tensor(), m, m, m, true}, settings,
            dtype == sums ? "correction [4]" : "correction []");
    refuses({w, *short_of, m, m, m, true}, settings, "correction [3]");
    refuses({w, correction, m, m, m, true}, early, "step is 0");
    DeviceTensor tokens(backend, DType::i32, {4});
    check_refuses([&] { sum_of_squares(backend, tokens); }, "sums_of_squares", "int32");
    check_refuses([&] { sum_of_squares(backend, c); }, "sums_of_squares", "int16");
  });
}

namespace {

// Tensors of these sizes updated and summed together as each alone.
void check_list(Backend& backend, DType dtype, const std::vector<int64_t>& sizes) {
  const DType sums = accumulation_dtype(dtype);
  std::vector<DeviceTensor> memory;
  std::vector<AdamWTensors> alone, listed;
  std::vector<Tensor> gradients;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const int64_t n = sizes[i];
    const auto tensor = [&](DType type, const Values& values) -> const Tensor& {
      return *memory.emplace_back(backend, type, std::initializer_list<int64_t>{n}, values);
    };
    const Values w = rounded(random_values(n, 3 + i), dtype), g = rounded(random_values(n, 400 + i), sums), zero(n);
    gradients.push_back(tensor(sums, g));
    for (auto* list : {&alone, &listed})
      list->push_back({tensor(dtype, w), dtype == sums ? Tensor() : tensor(DType::i16, zero), tensor(sums, zero),
                       tensor(sums, zero), gradients.back(), n % 2 == 1});
  }
  const orpo::AdamW settings{1e-2, 0.9, 0.999, 1e-8, 0.1, 1, 0.37};
  backend.adamw(listed, settings);
  const Values squares = sums_of_squares(backend, gradients);
  const auto bytes = [&](const Tensor& t) {
    std::string text(static_cast<size_t>(t.bytes()), ' ');
    backend.download(text.data(), t);
    return text;
  };
  for (size_t i = 0; i < alone.size(); ++i) {
    backend.adamw({&alone[i], 1}, settings);
    CHECK(bytes(alone[i].weight) == bytes(listed[i].weight));
    CHECK(bytes(alone[i].correction) == bytes(listed[i].correction));
    CHECK(bytes(alone[i].second) == bytes(listed[i].second));
    CHECK(squares[i] == sum_of_squares(backend, gradients[i]));
  }
}

}  // namespace

TEST_CASE("adamw: tensors of a list, tiny and empty ones among them, are updated and summed as alone") {
  each_device([](Backend& backend, DType dtype) {
    check_list(backend, dtype, {0, 5, 1 << 14, 0, (1 << 15) + 3, 1});
    std::vector<int64_t> many(200);  // more than a launch takes
    for (size_t i = 0; i < many.size(); ++i) many[i] = static_cast<int64_t>(i % 5);
    check_list(backend, dtype, many);
  });
}
