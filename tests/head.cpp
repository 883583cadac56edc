// The head's operations: row lists, log-probabilities, preference coefficients, gradient of the logits over its own
// logits.
#include <cstring>
#include <limits>

#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

constexpr int64_t rows = 97, vocab = 123;

Values targets_of(int64_t count, int64_t limit) {
  Values t = random_values(count, 6, 0, static_cast<double>(limit));
  for (double& v : t) v = std::floor(v);
  t[0] = 0, t[static_cast<size_t>(count) - 1] = static_cast<double>(limit - 1);
  return t;
}

// The largest logit of a row, and the sum of exp(logit - largest).
template <class S> std::pair<S, S> largest_and_total(const double* row, int64_t width) {
  const S most = S(*std::max_element(row, row + width));
  S total = 0;
  for (int64_t i = 0; i < width; ++i) total += std::exp(S(row[i]) - most);
  return {most, total};
}

struct LogProbability {
  Values logp, lse;
};

template <class S> LogProbability log_probability(const Values& logits, const Values& targets, int64_t width) {
  LogProbability result;
  for (size_t r = 0; r < targets.size(); ++r) {
    const double* row = logits.data() + r * width;
    const auto [most, total] = largest_and_total<S>(row, width);
    const S lse = most + std::log(total);
    result.lse.push_back(static_cast<double>(lse));
    result.logp.push_back(static_cast<double>(S(row[int64_t(targets[r])]) - lse));
  }
  return result;
}

// c * (softmax - onehot)
template <class T> Values logits_gradient(const Values& logits, const Values& c, const Values& targets, int64_t width) {
  using S = Sum<T>;
  Values out;
  for (size_t r = 0; r < targets.size(); ++r) {
    const double* row = logits.data() + r * width;
    const auto [most, total] = largest_and_total<S>(row, width);
    for (int64_t i = 0; i < width; ++i)
      out.push_back(static_cast<double>(
          to<T>(S(c[r]) * (std::exp(S(row[i]) - most) / total - (i == int64_t(targets[r]) ? 1 : 0)))));
  }
  return out;
}

// The rows of a wider matrix begin with these.
Values spread(const Values& values, int64_t width, int64_t pitch) {
  Values out(values.size() / width * pitch, 1e30);
  for (size_t r = 0; r < values.size() / width; ++r)
    std::copy_n(values.begin() + r * width, width, out.begin() + r * pitch);
  return out;
}

DType logits_dtype(DType dtype) { return accumulation_dtype(dtype); }

}  // namespace

TEST_CASE("head: gather and scatter_add; a row named twice receives both") {
  each_device([](Backend& backend, DType dtype) {
    const int64_t width = 37, named = 6;
    const Values hidden = rounded(random_values(rows * width, 1), dtype),
                 g = rounded(random_values(named * width, 2), dtype), list = {0, 5, 5, 96, 1, 5};
    DeviceTensor in(backend, dtype, {rows, width}, hidden), out(backend, dtype, {named, width}),
        index(backend, DType::i32, {named}, list);
    DeviceTensor dout(backend, dtype, {rows, width}, hidden), din(backend, dtype, {named, width}, g);
    backend.gather(out, in, index);
    backend.scatter_add(dout, din, index);
    Values added = hidden, picked;
    for (int64_t r = 0; r < named; ++r)
      for (int64_t i = 0; i < width; ++i) {
        const size_t at = static_cast<size_t>(int64_t(list[r]) * width + i);
        picked.push_back(hidden[at]);
        added[at] = rounded(added[at] + g[r * width + i], dtype);
      }
    CHECK(out.values() == picked);
    CHECK(dout.values() == added);
    DeviceTensor outside(backend, DType::i32, {named}, Values{0, 1, 2, 97, 4, 5}),
        narrow(backend, dtype, {rows, width - 1});
    check_refuses([&] { backend.gather(out, in, outside), backend.synchronize(); }, "gather",
                  "target row 3 is 97 of 97");
    check_refuses([&] { backend.scatter_add(dout, din, outside), backend.synchronize(); }, "scatter_add",
                  "target row 3 is 97 of 97");
    // A training step asks for no more than its download.
    check_refuses([&] { backend.gather(out, in, outside), out.values(); }, "gather", "target row 3 is 97 of 97");
    CHECK_NOTHROW(out.values());
    check_refuses([&] { backend.gather(out, narrow, index); }, "gather", "stream is [97, 36]");
    check_refuses([&] { backend.scatter_add(narrow, din, index); }, "scatter_add", "stream is [97, 36]");
  });
}

TEST_CASE("head: log-sum-exp and log-probabilities, small and large vocabularies, large logits") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = logits_dtype(dtype);
    if (sums != dtype) return;  // logits are in the accumulation dtype
    struct Case {
      int64_t rows, vocab;
      double scale;
    };
    for (const Case& c :
         {Case{rows, vocab, 5}, Case{1, 1, 1}, Case{3, 49152, 12}, Case{2, 128256, 0.01}, Case{5, vocab, 1e4}}) {
      const Values x = rounded(random_values(c.rows * c.vocab, 1, -c.scale, c.scale), sums),
                   t = targets_of(c.rows, c.vocab);
      DeviceTensor logits(backend, sums, {c.rows, c.vocab}, x), logp(backend, sums, {c.rows}),
          lse(backend, sums, {c.rows}), tokens(backend, DType::i32, {c.rows}, t);
      backend.head_forward(logp, lse, logits, tokens);
      const LogProbability reference = log_probability<long double>(x, t, c.vocab);
      const LogProbability naive =
          dtype == DType::f64 ? log_probability<double>(x, t, c.vocab) : log_probability<float>(x, t, c.vocab);
      check_close("lse", lse.values(), naive.lse, reference.lse, sums);
      check_close("logp", logp.values(), naive.logp, reference.logp, sums);
      for (double v : logp.values()) CHECK(v <= 0);
      // A vocabulary's worth of terms costs no digits: within 1.5 roundings of the result, where naive sums lose more.
      CHECK(largest_error(lse.values(), reference.lse) <= 1.5 * spacing(sums) * largest(reference.lse));
    }
  });
}

TEST_CASE("head: p -> 1 keeps its digits, forward and backward") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = logits_dtype(dtype);
    const int64_t width = 1000;
    for (double gap : {5.0, 20.0, 30.0, 60.0}) {
      Values x(width, -gap);
      x[7] = 0;
      DeviceTensor logits(backend, sums, {1, width}, x), logp(backend, sums, {1}), lse(backend, sums, {1}),
          tokens(backend, DType::i32, {1}, Values{7});
      DeviceTensor c(backend, sums, {1}, 3), gradient(backend, dtype, {1, width});
      backend.head_forward(logp, lse, logits, tokens);
      const double rest = 999 * std::exp(-gap);
      CHECK(same_digits(logp.values()[0], -std::log1p(rest), 1e-6));
      backend.head_backward(gradient, logits, lse, logp, c, tokens);
      const double digits = dtype == DType::bf16 ? 4e-3 : 1e-6;
      CHECK(same_digits(gradient.values()[7], -3 * rest / (1 + rest), digits));
      CHECK(same_digits(gradient.values()[8], 3 * std::exp(-gap) / (1 + rest), digits));
    }
  });
}

TEST_CASE("head: gradient of the logits, over its own logits as apart from them") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = logits_dtype(dtype);
    const Values x = rounded(random_values(rows * vocab, 1, -4, 4), sums), t = targets_of(rows, vocab),
                 coefficients = rounded(random_values(rows, 3), sums);
    DeviceTensor logits(backend, sums, {rows, vocab}, x), logp(backend, sums, {rows}), lse(backend, sums, {rows}),
        tokens(backend, DType::i32, {rows}, t);
    DeviceTensor c(backend, sums, {rows}, coefficients), apart(backend, dtype, {rows, vocab});
    backend.head_forward(logp, lse, logits, tokens);
    backend.head_backward(apart, logits, lse, logp, c, tokens);
    with_type(dtype, [&](auto zero) {
      check_close("dlogits", apart.values(), logits_gradient<decltype(zero)>(x, coefficients, t, vocab),
                  logits_gradient<long double>(x, coefficients, t, vocab), dtype);
    });
    Tensor over = *logits;
    over.dtype = dtype;
    if (dtype != sums) over.row_pitch = 2 * vocab;
    backend.head_backward(over, logits, lse, logp, c, tokens);
    if (dtype == sums) {
      CHECK(logits.values() == apart.values());
      return;
    }
    DeviceTensor identity(backend, dtype, {vocab, 1}), column(backend, dtype, {rows, 1}),
        column_apart(backend, dtype, {rows, 1});
    DeviceTensor unused(backend, sums, {vocab, 1});
    for (int64_t j = 0; j < vocab; ++j) {  // each column of the pitched rows, read by a product with a unit vector
      Values unit(vocab);
      unit[j] = 1;
      identity.set(unit);
      backend.linear_backward(column, unused, Tensor(), over, column_apart, identity);
      backend.linear_backward(column_apart, unused, Tensor(), apart, column_apart, identity);
      CHECK(column.values() == column_apart.values());
    }
  });
}

TEST_CASE("head: logits at a pitch") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = logits_dtype(dtype);
    const Values x = rounded(random_values(rows * vocab, 1, -4, 4), sums), t = targets_of(rows, vocab);
    DeviceTensor dense(backend, sums, {rows, vocab}, x),
        wide(backend, sums, {rows, vocab + 5}, spread(x, vocab, vocab + 5)), tokens(backend, DType::i32, {rows}, t);
    Tensor pitched = *wide;
    pitched.shape[1] = vocab, pitched.row_pitch = vocab + 5;
    DeviceTensor logp(backend, sums, {rows}), lse(backend, sums, {rows}), logp_wide(backend, sums, {rows}),
        lse_wide(backend, sums, {rows});
    backend.head_forward(logp, lse, dense, tokens);
    backend.head_forward(logp_wide, lse_wide, pitched, tokens);
    CHECK(logp.values() == logp_wide.values());
    CHECK(lse.values() == lse_wide.values());
  });
}

TEST_CASE("head: a gradient of the sum of c * logp by finite differences") {
  const auto backend = make_cpu_backend(0);
  const int64_t n = 4, width = 17;
  Values x = random_values(n * width, 1, -3, 3);
  const Values t = {0, 16, 5, 5}, c = random_values(n, 2);
  DeviceTensor logits(*backend, DType::f64, {n, width}, x), logp(*backend, DType::f64, {n}),
      lse(*backend, DType::f64, {n}), tokens(*backend, DType::i32, {n}, t);
  DeviceTensor coefficient(*backend, DType::f64, {n}, c), gradient(*backend, DType::f64, {n, width});
  const auto loss = [&] {
    logits.set(x);
    backend->head_forward(logp, lse, logits, tokens);
    return -dot(logp.values(), c);
  };
  loss();
  backend->head_backward(gradient, logits, lse, logp, coefficient, tokens);
  check_gradient("dlogits", x, gradient.values(), loss);
}

namespace {

// Three pairs: prompt, chosen, rejected targets; one without a prompt, one without a rejected branch.
const Values pair_list = {0, 2, 3, 2, 7, 0, 1, 4, 12, 3, 2, 0};
constexpr int64_t pair_count = 3, target_count = 17;
const Normalisers normalisers{40, 5};

std::vector<PairResult> pair_results(const DeviceTensor& tensor) {
  const Values numbers = tensor.values();
  std::vector<PairResult> results(numbers.size() / pair_result_numbers);
  std::memcpy(results.data(), numbers.data(), numbers.size() * sizeof(double));
  return results;
}

struct Preferred {
  std::vector<PairResult> results;
  Values coefficient;
};

Preferred prefer(Backend& backend, DType dtype, const Values& logp, Objective objective, double lambda,
                 bool with_prompt) {
  DeviceTensor pairs(backend, DType::i32, {pair_count, 4}, pair_list), values(backend, dtype, {target_count}, logp),
      c(backend, dtype, {target_count}, 77);
  DeviceTensor results(backend, DType::f64, {pair_count, pair_result_numbers}, 77);
  backend.preference(results, c, values, pairs, objective, lambda, normalisers, with_prompt);
  return {pair_results(results), c.values()};
}

Values logps() { return random_values(target_count, 9, -3, -0.05); }

}  // namespace

TEST_CASE("preference: golden coefficients") {
  each_device([](Backend& backend, DType dtype) {
    if (accumulation_dtype(dtype) != dtype) return;
    // Means -0.7 and -1.2, then -1.5 and -0.4: objective.cpp's golden derivatives, divided by tokens and pairs.
    const Values logp = {-1, -2, -0.5, -0.7, -0.9, -1, -1.4, -1.5, -0.1, -0.2, -0.5, -0.8, -3, -1, -2, -0.5, -0.25};
    const double nll = 1.0 / 40, tolerance = dtype == DType::f64 ? 1e-13 : 1e-6;
    const Preferred p = prefer(backend, dtype, logp, Objective::orpo, 0.1, true);
    const Values expected = {nll,
                             nll,
                             nll + 0.1 / 5 * 0.6040286306412732 / 3,
                             nll + 0.1 / 5 * 0.6040286306412732 / 3,
                             nll + 0.1 / 5 * 0.6040286306412732 / 3,
                             -0.1 / 5 * 0.43513790924319484 / 2,
                             -0.1 / 5 * 0.43513790924319484 / 2,
                             nll + 0.1 / 5 * 1.127890661019945,
                             -0.1 / 5 * 2.6578025950930838 / 4,
                             -0.1 / 5 * 2.6578025950930838 / 4,
                             -0.1 / 5 * 2.6578025950930838 / 4,
                             -0.1 / 5 * 2.6578025950930838 / 4,
                             nll,
                             nll,
                             nll,
                             nll,
                             nll};
    for (int64_t i = 0; i < target_count; ++i)
      CHECK(same_digits(p.coefficient[i], expected[i], tolerance));
    CHECK(p.results[0].preference.log_odds == doctest::Approx(0.8279585849479512).epsilon(1e-6));
    CHECK(p.results[0].chosen_logp_sum == doctest::Approx(-2.1));
    CHECK(p.results[0].rejected_logp_sum == doctest::Approx(-2.4));
    CHECK(p.results[0].prompt_logp_sum == doctest::Approx(-3));
    CHECK(p.results[0].chosen_tokens == 3);
    CHECK(p.results[0].rejected_tokens == 2);
    CHECK(p.results[0].prompt_tokens == 2);
    CHECK(p.results[2].rejected_tokens == 0);
    CHECK(p.results[2].preference.loss == 0);
    CHECK(p.results[2].chosen_logp_sum == doctest::Approx(-0.75));
  });
}

TEST_CASE("preference: coefficients are the loss's derivatives") {
  const auto backend = make_cpu_backend(0);
  for (Objective objective : {Objective::orpo, Objective::sft, Objective::ratio})
    for (bool with_prompt : {true, false}) {
      Values logp = logps();
      const double lambda = 0.3;
      Values coefficient = prefer(*backend, DType::f64, logp, objective, lambda, with_prompt).coefficient;
      for (double& c : coefficient) c = -c;
      check_gradient(
          "coefficient", logp, coefficient,
          [&] {
            double nll = 0, preference = 0;
            for (const PairResult& r : prefer(*backend, DType::f64, logp, objective, lambda, with_prompt).results) {
              nll -= r.chosen_logp_sum + (with_prompt ? r.prompt_logp_sum : 0);
              preference += r.preference.loss;
            }
            return nll / normalisers.nll_tokens + preference_weight(objective, lambda) * preference / normalisers.pairs;
          },
          1e-8);
    }
}

TEST_CASE(
    "preference: sft leaves the rejected alone, ratio differs from orpo, a slice of the pairs touches its targets "
    "only") {
  const auto backend = make_cpu_backend(0);
  const Values logp = logps();
  const Preferred sft = prefer(*backend, DType::f64, logp, Objective::sft, 0.1, true),
                  orpo = prefer(*backend, DType::f64, logp, Objective::orpo, 0.1, true);
  const Preferred ratio = prefer(*backend, DType::f64, logp, Objective::ratio, 0.1, true);
  for (int64_t i : {5, 6, 8, 11}) {
    CHECK(sft.coefficient[i] == 0);
    CHECK(orpo.coefficient[i] < 0);
    CHECK(std::abs(ratio.coefficient[i]) < std::abs(orpo.coefficient[i]));
  }
  CHECK(sft.coefficient[2] == 1.0 / 40);
  CHECK(orpo.coefficient[2] > 1.0 / 40);
  CHECK(sft.results[0].preference.loss == orpo.results[0].preference.loss);

  DeviceTensor pairs(*backend, DType::i32, {pair_count, 4}, pair_list),
      values(*backend, DType::f64, {target_count}, logp), c(*backend, DType::f64, {target_count}, 77);
  DeviceTensor one(*backend, DType::f64, {1, pair_result_numbers});
  backend->preference(one, c, values, (*pairs).slice(1, 1), Objective::orpo, 0.1, normalisers, true);
  const Values touched = c.values();
  for (int64_t i = 0; i < target_count; ++i) CHECK(touched[i] == (i >= 7 && i < 12 ? orpo.coefficient[i] : 77));
  CHECK(pair_results(one)[0].preference.loss == orpo.results[1].preference.loss);
}

TEST_CASE("preference: finite where an answer is certain or impossible") {
  each_device([](Backend& backend, DType dtype) {
    if (accumulation_dtype(dtype) != dtype) return;
    for (double chosen : {0.0, -1e-30, -1e30, -HUGE_VAL})
      for (double rejected : {0.0, -1e-30, -1e30, -HUGE_VAL}) {
        Values logp(target_count, -1);
        for (int64_t i : {2, 3, 4, 7}) logp[i] = chosen;
        for (int64_t i : {5, 6, 8, 9, 10, 11}) logp[i] = rejected;
        const Preferred p = prefer(backend, dtype, logp, Objective::orpo, 0.1, true);
        for (double c : p.coefficient) CHECK(std::isfinite(c));
        for (const PairResult& r : p.results) CHECK(std::isfinite(r.preference.loss));
      }
  });
}

TEST_CASE("head: refuses targets outside the vocabulary and shapes that differ") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = logits_dtype(dtype);
    DeviceTensor logits(backend, sums, {2, 5}), v(backend, sums, {2}), v3(backend, sums, {3}),
        t(backend, DType::i32, {2}), gradient(backend, dtype, {2, 5});
    DeviceTensor outside(backend, DType::i32, {2}, Values{0, 5}), narrow(backend, dtype, {2, 4}),
        pairs(backend, DType::i32, {1, 4}, Values{0, 1, 1, 1});
    DeviceTensor result(backend, DType::f64, {1, pair_result_numbers}), wide(backend, DType::f64, {1, 14});
    check_refuses([&] { backend.head_forward(v, v, logits, outside), backend.synchronize(); }, "head_forward",
                  "target token 1 is 5 of 5");
    check_refuses([&] { backend.head_backward(gradient, logits, v, v, v, outside), backend.synchronize(); },
                  "head_backward", "target token 1 is 5 of 5");
    check_refuses([&] { backend.head_forward(v3, v, logits, t); }, "head_forward", "logp is [3]");
    check_refuses([&] { backend.head_backward(gradient, logits, v, v, v3, t); }, "head_backward", "coefficient is [3]");
    check_refuses([&] { backend.head_backward(narrow, logits, v, v, v, t); }, "head_backward", "dlogits is [2, 4]");
    check_refuses(
        [&] {
          backend.preference(result, v, v, pairs, Objective::orpo, 0.1, normalisers, true);
          backend.synchronize();
        },
        "preference", "[0, 3) of 2");
    check_refuses([&] { backend.preference(result, v3, v, pairs, Objective::orpo, 0.1, normalisers, true); },
                  "preference", "coefficient is [3]");
    check_refuses([&] { backend.preference(result, v, v, v, Objective::orpo, 0.1, normalisers, true); }, "preference",
                  "pair_targets");
    check_refuses([&] { backend.preference(wide, v, v, pairs, Objective::orpo, 0.1, normalisers, true); }, "preference",
                  "results is [1, 14]");
  });
}
