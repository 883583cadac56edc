#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

constexpr double epsilon = 1e-5;

struct Case {
  int64_t rows, width;
};
const Case cases[] = {{1, 1}, {1, 64}, {97, 123}, {130, 37}};

struct Forward {
  Values out, sum, rstd;
};

template <class T>
Forward forward(const Values& residual, const Values& branch, const Values& weight, int64_t rows, int64_t width) {
  const auto x = typed<T>(residual), y = typed<T>(branch), w = typed<T>(weight);
  Forward f;
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<T> sum(width);
    Sum<T> squares = 0;
    for (int64_t i = 0; i < width; ++i) {
      sum[i] = branch.empty() ? x[r * width + i] : to<T>(Sum<T>(x[r * width + i]) + Sum<T>(y[r * width + i]));
      squares += Sum<T>(sum[i]) * Sum<T>(sum[i]);
    }
    const Sum<T> rstd = 1 / std::sqrt(squares / Sum<T>(width) + Sum<T>(epsilon));
    f.rstd.push_back(static_cast<double>(rstd));
    for (int64_t i = 0; i < width; ++i) {
      f.sum.push_back(static_cast<double>(sum[i]));
      f.out.push_back(static_cast<double>(to<T>(Sum<T>(w[i]) * Sum<T>(to<T>(Sum<T>(sum[i]) * rstd)))));
    }
  }
  return f;
}

struct Backward {
  Values dsum, dweight;
};

template <class T>
Backward backward(const Values& dsum, const Values& dweight, const Values& dout, const Values& sum,
                  const Values& weight, int64_t rows, int64_t width) {
  const auto g = typed<T>(dout), x = typed<T>(sum), w = typed<T>(weight);
  Backward b{dsum, dweight};
  std::vector<Sum<T>> dw(width);
  for (int64_t i = 0; i < width; ++i) dw[i] = Sum<T>(dweight[i]);
  for (int64_t r = 0; r < rows; ++r) {
    Sum<T> squares = 0, dot = 0;
    for (int64_t i = 0; i < width; ++i) squares += Sum<T>(x[r * width + i]) * Sum<T>(x[r * width + i]);
    const Sum<T> rstd = 1 / std::sqrt(squares / Sum<T>(width) + Sum<T>(epsilon));
    for (int64_t i = 0; i < width; ++i)
      dot += Sum<T>(g[r * width + i]) * Sum<T>(w[i]) * Sum<T>(x[r * width + i]) * rstd;
    for (int64_t i = 0; i < width; ++i) {
      const Sum<T> normed = Sum<T>(x[r * width + i]) * rstd, scaled = Sum<T>(g[r * width + i]) * Sum<T>(w[i]);
      dw[i] += Sum<T>(g[r * width + i]) * normed;
      const Sum<T> gradient = Sum<T>(to<T>((scaled - normed * dot / Sum<T>(width)) * rstd));
      b.dsum[r * width + i] = static_cast<double>(to<T>(Sum<T>(dsum[r * width + i]) + gradient));
    }
  }
  for (int64_t i = 0; i < width; ++i) b.dweight[i] = static_cast<double>(dw[i]);
  return b;
}

}  // namespace

TEST_CASE("norm: forward adds the branch, keeps the sum, normalises it") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    for (const Case& c : cases)
      for (bool with_branch : {true, false}) {
        const Values residual = rounded(random_values(c.rows * c.width, 1), dtype),
                     weight = rounded(random_values(c.width, 3), dtype);
        const Values branch = with_branch ? rounded(random_values(c.rows * c.width, 2, -3, 3), dtype) : Values{};
        DeviceTensor x(backend, dtype, {c.rows, c.width}, residual), y(backend, dtype, {c.rows, c.width}),
            w(backend, dtype, {c.width}, weight);
        DeviceTensor out(backend, dtype, {c.rows, c.width}, 5), sum(backend, dtype, {c.rows, c.width}, 5),
            rstd(backend, sums, {c.rows});
        if (with_branch) y.set(branch);
        backend.norm_forward(out, sum, rstd, x, with_branch ? *y : Tensor(), w, epsilon);
        // Of the sum as stored: its rounding is not the norm's error.
        const Values summed = with_branch ? rounded(plus(residual, branch), dtype) : residual;
        const Forward reference = forward<long double>(summed, {}, weight, c.rows, c.width);
        with_type(dtype, [&](auto zero) {
          const Forward naive = forward<decltype(zero)>(residual, branch, weight, c.rows, c.width);
          CHECK(sum.values() == summed);
          check_close("out", out.values(), naive.out, reference.out, dtype);
          check_close("rstd", rstd.values(), naive.rstd, reference.rstd, sums);
        });
        if (with_branch) continue;
        DeviceTensor again(backend, dtype, {c.rows, c.width});
        backend.norm_forward(again, x, rstd, x, Tensor(), w, epsilon);  // the sum may be the residual itself
        CHECK(x.values() == residual);
        CHECK(again.values() == out.values());
      }
  });
}

TEST_CASE("norm: backward adds to dsum and dweight") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    for (const Case& c : cases) {
      const int64_t n = c.rows * c.width;
      const Values sum = rounded(random_values(n, 1), dtype), weight = rounded(random_values(c.width, 2), dtype);
      const Values dout = rounded(random_values(n, 3), dtype), dsum = rounded(random_values(n, 4), dtype),
                   dw = rounded(random_values(c.width, 5), sums);
      const Values rstd = forward<long double>(sum, {}, weight, c.rows, c.width).rstd;
      DeviceTensor x(backend, dtype, {c.rows, c.width}, sum), w(backend, dtype, {c.width}, weight),
          r(backend, sums, {c.rows}, rstd);
      DeviceTensor g(backend, dtype, {c.rows, c.width}, dout), dx(backend, dtype, {c.rows, c.width}, dsum),
          dweight(backend, sums, {c.width}, dw);
      backend.norm_backward(dx, dweight, Tensor(), g, x, r, w);
      const Backward reference = backward<long double>(dsum, dw, dout, sum, weight, c.rows, c.width);
      with_type(dtype, [&](auto zero) {
        const Backward naive = backward<decltype(zero)>(dsum, dw, dout, sum, weight, c.rows, c.width);
        check_close("dsum", dx.values(), naive.dsum, reference.dsum, dtype);
        // What is added may nearly cancel what was there.
        check_close("dweight", dweight.values(), naive.dweight, reference.dweight, sums, 2, 8);
      });
    }
  });
}

TEST_CASE("norm: backward makes the output again, bit for bit, over its gradient too") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    for (const Case& c : cases) {
      const int64_t n = c.rows * c.width;
      DeviceTensor x(backend, dtype, {c.rows, c.width}, random_values(n, 1)),
          w(backend, dtype, {c.width}, random_values(c.width, 2)), g(backend, dtype, {c.rows, c.width}, random_values(n, 3));
      DeviceTensor out(backend, dtype, {c.rows, c.width}), again(backend, dtype, {c.rows, c.width}, 5),
          rstd(backend, sums, {c.rows});
      backend.norm_forward(out, x, rstd, x, Tensor(), w, epsilon);
      Values dsum, dweight;
      for (const Tensor& to : {Tensor(), *again, *g}) {
        DeviceTensor dx(backend, dtype, {c.rows, c.width}, 1), dw(backend, sums, {c.width}, 1);
        backend.norm_backward(dx, dw, to, g, x, rstd, w);
        if (dsum.empty()) dsum = dx.values(), dweight = dw.values();
        CHECK(dx.values() == dsum);
        CHECK(dw.values() == dweight);
      }
      CHECK(again.values() == out.values());
      CHECK(g.values() == out.values());
    }
  });
}

TEST_CASE("norm: gradients agree with finite differences") {
  for (const Device& device : devices()) {
    if (device.dtypes.front() != DType::f64) continue;
    const auto backend = device.make();
    const int64_t rows = 5, width = 19;
    Values x = random_values(rows * width, 1), w = random_values(width, 2);
    const Values dout = random_values(rows * width, 3);
    DeviceTensor sum(*backend, DType::f64, {rows, width}), weight(*backend, DType::f64, {width}),
        out(*backend, DType::f64, {rows, width});
    DeviceTensor rstd(*backend, DType::f64, {rows}), dsum(*backend, DType::f64, {rows, width}),
        dweight(*backend, DType::f64, {width});
    DeviceTensor gradient(*backend, DType::f64, {rows, width}, dout);
    const auto loss = [&] {
      sum.set(x), weight.set(w);
      backend->norm_forward(out, sum, rstd, sum, Tensor(), weight, epsilon);
      return dot(out.values(), dout);
    };
    loss();
    backend->norm_backward(dsum, dweight, Tensor(), gradient, sum, rstd, weight);
    check_gradient("dsum", x, dsum.values(), loss);
    check_gradient("dweight", w, dweight.values(), loss);
  }
}

TEST_CASE("norm: 250 backward passes give the same bits, whatever the number of threads") {
  const int64_t rows = 333, width = 123;
  Values first;
  for (int threads : {2, 1, 3}) {
    const auto backend = make_cpu_backend(threads);
    DeviceTensor x(*backend, DType::bf16, {rows, width}, random_values(rows * width, 1)),
        w(*backend, DType::bf16, {width}, random_values(width, 2));
    DeviceTensor g(*backend, DType::bf16, {rows, width}, random_values(rows * width, 3)),
        dx(*backend, DType::bf16, {rows, width});
    DeviceTensor rstd(*backend, DType::f32, {rows}, 1.7), dweight(*backend, DType::f32, {width});
    for (int repeat = 0; repeat < (threads == 2 ? 250 : 1); ++repeat) {
      backend->zero(dweight);
      backend->norm_backward(dx, dweight, Tensor(), g, x, rstd, w);
      if (first.empty()) first = dweight.values();
      CHECK(dweight.values() == first);
    }
  }
}

TEST_CASE("norm: refuses widths that differ") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    DeviceTensor x(backend, dtype, {4, 6}), other(backend, dtype, {4, 7}), w(backend, dtype, {6}),
        w7(backend, dtype, {7}), rstd(backend, sums, {4});
    DeviceTensor rstd5(backend, sums, {5}), dweight(backend, sums, {6});
    check_refuses([&] { backend.norm_forward(x, x, rstd, x, other, w, 1e-5); }, "norm_forward", "branch is [4, 7]");
    check_refuses([&] { backend.norm_forward(x, x, rstd, x, Tensor(), w7, 1e-5); }, "norm_forward", "weight is [7]");
    check_refuses([&] { backend.norm_forward(x, x, rstd5, x, Tensor(), w, 1e-5); }, "norm_forward", "rstd is [5]");
    check_refuses([&] { backend.norm_forward(x, x, rstd, x, Tensor(), w, -1); }, "norm_forward", "epsilon is -1");
    check_refuses([&] { backend.norm_backward(x, dweight, Tensor(), other, x, rstd, w); }, "norm_backward",
                  "output gradient is [4, 7]");
    check_refuses([&] { backend.norm_backward(x, dweight, other, x, x, rstd, w); }, "norm_backward",
                  "output is [4, 7]");
  });
}
