#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

constexpr double epsilon = 1e-5;

struct Case {
  int64_t rows, width;
  bool layer;  // layer norm with bias, or RMS norm
};
const Case cases[] = {{1, 1, false}, {1, 64, false}, {97, 123, false}, {130, 37, false},
                      {1, 1, true},  {1, 64, true},  {97, 123, true},  {130, 37, true}};
// Sums over rows that do not fit into a GPU's shared memory.
const Case wide_cases[] = {{3, 24581, false}, {3, 12301, true}};

template <class T>
struct Statistics {
  Sum<T> mean = 0, rstd = 0;
};
template <class T>
Statistics<T> statistics_of(const T* row, const Case& c) {
  Statistics<T> s;
  if (c.layer)
    for (int64_t i = 0; i < c.width; ++i) s.mean += Sum<T>(row[i]) / Sum<T>(c.width);
  Sum<T> squares = 0;
  for (int64_t i = 0; i < c.width; ++i) squares += (Sum<T>(row[i]) - s.mean) * (Sum<T>(row[i]) - s.mean);
  s.rstd = 1 / std::sqrt(squares / Sum<T>(c.width) + Sum<T>(epsilon));
  return s;
}

struct Forward {
  Values out, mean, rstd;
};

// Of the sum as stored: its rounding is not the norm's error.
template <class T>
Forward forward(const Values& sum, const Values& weight, const Values& bias, const Case& c) {
  const auto x = typed<T>(sum), w = typed<T>(weight), b = typed<T>(bias);
  Forward f;
  for (int64_t r = 0; r < c.rows; ++r) {
    const T* row = x.data() + r * c.width;
    const Statistics<T> s = statistics_of(row, c);
    f.mean.push_back(static_cast<double>(s.mean));
    f.rstd.push_back(static_cast<double>(s.rstd));
    for (int64_t i = 0; i < c.width; ++i) {
      const T normed = to<T>((Sum<T>(row[i]) - s.mean) * s.rstd), scaled = to<T>(Sum<T>(w[i]) * Sum<T>(normed));
      f.out.push_back(static_cast<double>(c.layer ? to<T>(Sum<T>(scaled) + Sum<T>(b[i])) : scaled));
    }
  }
  return f;
}

struct Backward {
  Values dsum, dweight, dbias;
};

// added: what dsum, dweight and dbias hold before.
template <class T>
Backward backward(const Backward& added, const Values& dout, const Values& sum, const Values& weight, const Case& c) {
  const auto g = typed<T>(dout), x = typed<T>(sum), w = typed<T>(weight);
  Backward b = added;
  std::vector<Sum<T>> dw(c.width), db(c.width);
  for (int64_t i = 0; i < c.width; ++i) dw[i] = Sum<T>(added.dweight[i]), db[i] = Sum<T>(added.dbias[i]);
  for (int64_t r = 0; r < c.rows; ++r) {
    const T *row = x.data() + r * c.width, *dy = g.data() + r * c.width;
    const Statistics<T> s = statistics_of(row, c);
    Sum<T> mean_g = 0, mean_product = 0;
    for (int64_t i = 0; i < c.width; ++i) {
      const Sum<T> scaled = Sum<T>(dy[i]) * Sum<T>(w[i]);
      if (c.layer) mean_g += scaled / Sum<T>(c.width);
      mean_product += scaled * (Sum<T>(row[i]) - s.mean) * s.rstd / Sum<T>(c.width);
    }
    for (int64_t i = 0; i < c.width; ++i) {
      const Sum<T> normed = (Sum<T>(row[i]) - s.mean) * s.rstd, scaled = Sum<T>(dy[i]) * Sum<T>(w[i]);
      dw[i] += Sum<T>(dy[i]) * normed;
      db[i] += Sum<T>(dy[i]);
      double& to_sum = b.dsum[r * c.width + i];
      const Sum<T> gradient = Sum<T>(to<T>((scaled - mean_g - normed * mean_product) * s.rstd));
      to_sum = static_cast<double>(to<T>(Sum<T>(to_sum) + gradient));
    }
  }
  for (int64_t i = 0; i < c.width; ++i)
    b.dweight[i] = static_cast<double>(dw[i]), b.dbias[i] = static_cast<double>(db[i]);
  return b;
}

// A tensor that only the layer norm has.
Tensor where(bool layer, const DeviceTensor& tensor) { return layer ? *tensor : Tensor(); }

}  // namespace

TEST_CASE("norm: forward adds the branch, keeps the sum, normalises it") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    for (const Case& c : cases)
      for (bool with_branch : {true, false}) {
        CAPTURE(c.layer);
        const Values residual = rounded(random_values(c.rows * c.width, 1, -1, 2), dtype),
                     weight = rounded(random_values(c.width, 3), dtype),
                     bias = rounded(random_values(c.width, 4), dtype);
        const Values branch = with_branch ? rounded(random_values(c.rows * c.width, 2, -3, 3), dtype) : Values{};
        DeviceTensor x(backend, dtype, {c.rows, c.width}, residual), y(backend, dtype, {c.rows, c.width}),
            w(backend, dtype, {c.width}, weight), b(backend, dtype, {c.width}, bias);
        DeviceTensor out(backend, dtype, {c.rows, c.width}, 5), sum(backend, dtype, {c.rows, c.width}, 5),
            mean(backend, sums, {c.rows}), rstd(backend, sums, {c.rows});
        if (with_branch) y.set(branch);
        backend.norm_forward(out, sum, where(c.layer, mean), rstd, x, where(with_branch, y), w, where(c.layer, b),
                             epsilon);
        const Values summed = with_branch ? rounded(plus(residual, branch), dtype) : residual;
        const Forward reference = forward<long double>(summed, weight, bias, c);
        with_type(dtype, [&](auto zero) {
          const Forward naive = forward<decltype(zero)>(summed, weight, bias, c);
          CHECK(sum.values() == summed);
          check_close("out", out.values(), naive.out, reference.out, dtype);
          check_close("mean", mean.values(), naive.mean, reference.mean, sums);
          check_close("rstd", rstd.values(), naive.rstd, reference.rstd, sums);
        });
        if (with_branch) continue;
        DeviceTensor again(backend, dtype, {c.rows, c.width});
        // The sum may be the residual itself.
        backend.norm_forward(again, x, where(c.layer, mean), rstd, x, Tensor(), w, where(c.layer, b), epsilon);
        CHECK(x.values() == residual);
        CHECK(again.values() == out.values());
      }
  });
}

TEST_CASE("norm: a layer norm loses no digits to a mean far from 0") {
  each_device([](Backend& backend, DType dtype) {
    if (dtype != DType::f32) return;
    for (const double far : {1e3, 1e6})
      for (const Case& c : {Case{3, 77, true}, Case{3, 4096, true}}) {
        CAPTURE(far);
        CAPTURE(c.width);
        const Values x = rounded(random_values(c.rows * c.width, 1, far, far + 1), dtype),
                     one(static_cast<size_t>(c.width), 1), zero(static_cast<size_t>(c.width), 0);
        DeviceTensor sum(backend, dtype, {c.rows, c.width}, x), weight(backend, dtype, {c.width}, one),
            bias(backend, dtype, {c.width}, zero), out(backend, dtype, {c.rows, c.width});
        DeviceTensor mean(backend, dtype, {c.rows}), rstd(backend, dtype, {c.rows});
        backend.norm_forward(out, sum, mean, rstd, sum, Tensor(), weight, bias, epsilon);
        const Forward reference = forward<long double>(x, one, zero, c);
        // The mean is the nearest float, half a unit of its last place away; all that the output loses is that.
        const double half = 0.5 * (std::nextafter(float(far), INFINITY) - float(far));
        CHECK(largest_error(mean.values(), reference.mean) < 1.01 * half);
        CHECK(largest_error(rstd.values(), reference.rstd) < 1e-5);
        CHECK(largest_error(out.values(), reference.out) < 1.01 * half * largest(reference.rstd) + 1e-5);
      }
  });
}

TEST_CASE("norm: backward adds to dsum, dweight and dbias") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    std::vector<Case> all(std::begin(cases), std::end(cases));
    all.insert(all.end(), std::begin(wide_cases), std::end(wide_cases));
    for (const Case& c : all) {
      CAPTURE(c.layer);
      CAPTURE(c.width);
      const int64_t n = c.rows * c.width;
      const Values sum = rounded(random_values(n, 1, -1, 2), dtype), weight = rounded(random_values(c.width, 2), dtype);
      const Values dout = rounded(random_values(n, 3), dtype);
      const Backward before{rounded(random_values(n, 4), dtype), rounded(random_values(c.width, 5), sums),
                            rounded(random_values(c.width, 6), sums)};
      const Forward exact = forward<long double>(sum, weight, weight, c);
      DeviceTensor x(backend, dtype, {c.rows, c.width}, sum), w(backend, dtype, {c.width}, weight),
          m(backend, sums, {c.rows}, exact.mean), r(backend, sums, {c.rows}, exact.rstd);
      DeviceTensor g(backend, dtype, {c.rows, c.width}, dout), dx(backend, dtype, {c.rows, c.width}, before.dsum),
          dweight(backend, sums, {c.width}, before.dweight), dbias(backend, sums, {c.width}, before.dbias);
      backend.norm_backward(dx, dweight, where(c.layer, dbias), Tensor(), g, x, where(c.layer, m), r, w,
                            where(c.layer, w));
      const Backward reference = backward<long double>(before, dout, sum, weight, c);
      with_type(dtype, [&](auto zero) {
        const Backward naive = backward<decltype(zero)>(before, dout, sum, weight, c);
        // rstd multiplies the rounding of dout * weight, which the naive loop may cancel by luck (one column: rstd 316).
        check_close("dsum", dx.values(), naive.dsum, reference.dsum, dtype, 2, 2 * std::max(1.0, largest(exact.rstd)));
        // What is added may nearly cancel what was there.
        check_close("dweight", dweight.values(), naive.dweight, reference.dweight, sums, 2, 8);
        if (c.layer) check_close("dbias", dbias.values(), naive.dbias, reference.dbias, sums, 2, 8);
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
          w(backend, dtype, {c.width}, random_values(c.width, 2)),
          b(backend, dtype, {c.width}, random_values(c.width, 4)),
          g(backend, dtype, {c.rows, c.width}, random_values(n, 3));
      DeviceTensor out(backend, dtype, {c.rows, c.width}), again(backend, dtype, {c.rows, c.width}, 5),
          mean(backend, sums, {c.rows}), rstd(backend, sums, {c.rows});
      const Tensor m = where(c.layer, mean), bias = where(c.layer, b);
      backend.norm_forward(out, x, m, rstd, x, Tensor(), w, bias, epsilon);
      Values dsum, dweight, dbias;
      for (const Tensor& to : {Tensor(), *again, *g}) {
        DeviceTensor dx(backend, dtype, {c.rows, c.width}, 1), dw(backend, sums, {c.width}, 1),
            db(backend, sums, {c.width}, 1);
        backend.norm_backward(dx, dw, where(c.layer, db), to, g, x, m, rstd, w, bias);
        if (dsum.empty()) dsum = dx.values(), dweight = dw.values(), dbias = db.values();
        CHECK(dx.values() == dsum);
        CHECK(dw.values() == dweight);
        CHECK(db.values() == dbias);
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
    for (const bool layer : {false, true}) {
      CAPTURE(layer);
      Values x = random_values(rows * width, 1), w = random_values(width, 2), b = random_values(width, 4);
      const Values dout = random_values(rows * width, 3);
      DeviceTensor sum(*backend, DType::f64, {rows, width}), weight(*backend, DType::f64, {width}),
          bias(*backend, DType::f64, {width}), out(*backend, DType::f64, {rows, width});
      DeviceTensor mean(*backend, DType::f64, {rows}), rstd(*backend, DType::f64, {rows}),
          dsum(*backend, DType::f64, {rows, width}), dweight(*backend, DType::f64, {width}),
          dbias(*backend, DType::f64, {width});
      DeviceTensor gradient(*backend, DType::f64, {rows, width}, dout);
      const auto loss = [&] {
        sum.set(x), weight.set(w), bias.set(b);
        backend->norm_forward(out, sum, where(layer, mean), rstd, sum, Tensor(), weight, where(layer, bias), epsilon);
        return dot(out.values(), dout);
      };
      loss();
      backend->norm_backward(dsum, dweight, where(layer, dbias), Tensor(), gradient, sum, where(layer, mean), rstd,
                             weight, where(layer, bias));
      check_gradient("dsum", x, dsum.values(), loss);
      check_gradient("dweight", w, dweight.values(), loss);
      check_gradient("dbias", b, dbias.values(), loss);
    }
  }
}

TEST_CASE("norm: 250 backward passes give the same bits, whatever the number of threads") {
  const int64_t rows = 333, width = 123;
  for (const bool layer : {false, true}) {
    Values first;
    for (int threads : {2, 1, 3, 64}) {
      const auto backend = make_cpu_backend(threads);
      DeviceTensor x(*backend, DType::bf16, {rows, width}, random_values(rows * width, 1)),
          w(*backend, DType::bf16, {width}, random_values(width, 2));
      DeviceTensor g(*backend, DType::bf16, {rows, width}, random_values(rows * width, 3)),
          dx(*backend, DType::bf16, {rows, width});
      DeviceTensor mean(*backend, DType::f32, {rows}, 0.3), rstd(*backend, DType::f32, {rows}, 1.7),
          dweight(*backend, DType::f32, {width}), dbias(*backend, DType::f32, {width});
      for (int repeat = 0; repeat < (threads == 2 ? 250 : 1); ++repeat) {
        backend->zero(dweight), backend->zero(dbias);
        backend->norm_backward(dx, dweight, where(layer, dbias), Tensor(), g, x, where(layer, mean), rstd, w,
                               where(layer, w));
        Values both = dweight.values();
        for (double v : dbias.values()) both.push_back(v);
        if (first.empty()) first = both;
        CHECK(both == first);
      }
    }
  }
}

TEST_CASE("norm: refuses widths that differ") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    DeviceTensor x(backend, dtype, {4, 6}), other(backend, dtype, {4, 7}), w(backend, dtype, {6}),
        w7(backend, dtype, {7}), rstd(backend, sums, {4});
    DeviceTensor rstd5(backend, sums, {5}), dweight(backend, sums, {6}), dbias7(backend, sums, {7});
    const Tensor none;
    const auto forward = [&](const Tensor& mean, const Tensor& r, const Tensor& branch, const Tensor& weight,
                             const Tensor& bias, double e) {
      return [=, &backend, &x] { backend.norm_forward(x, x, mean, r, x, branch, weight, bias, e); };
    };
    const char* op = "norm_forward";
    check_refuses(forward(none, rstd, other, w, none, 1e-5), op, "branch is [4, 7]");
    check_refuses(forward(none, rstd, none, w7, none, 1e-5), op, "weight is [7]");
    check_refuses(forward(none, rstd5, none, w, none, 1e-5), op, "rstd is [5]");
    check_refuses(forward(rstd5, rstd, none, w, none, 1e-5), op, "mean is [5]");
    check_refuses(forward(rstd, rstd, none, w, w7, 1e-5), op, "bias is [7]");
    check_refuses(forward(none, rstd, none, w, none, -1), op, "epsilon is -1");
    const auto backward = [&](const Tensor& dbias, const Tensor& out, const Tensor& dout, const Tensor& mean,
                              const Tensor& bias) {
      return [=, &backend, &x, &dweight, &rstd, &w] {
        backend.norm_backward(x, dweight, dbias, out, dout, x, mean, rstd, w, bias);
      };
    };
    op = "norm_backward";
    check_refuses(backward(none, none, other, none, none), op, "output gradient is [4, 7]");
    check_refuses(backward(none, other, x, none, none), op, "output is [4, 7]");
    check_refuses(backward(dbias7, none, x, none, w), op, "bias gradient is [7]");
    check_refuses(backward(none, none, x, none, w), op, "bias is [6]");
    check_refuses(backward(none, none, x, rstd5, none), op, "mean is [5]");
  });
}
