#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

struct Case {
  int64_t rows, n, k;
};
const Case cases[] = {{1, 1, 1},    {1, 123, 7},    {97, 123, 45}, {5, 64, 96},
                      {13, 67, 100}, {130, 33, 257}, {300, 64, 9},  {515, 70, 33}};

template <class T> Values product(const Values& a, const Values& b, const Values& bias, int64_t rows, int64_t n,
                                  int64_t k, bool into_sums) {
  const auto x = typed<T>(a), w = typed<T>(b), shift = typed<T>(bias);
  Values out;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; ++j) {
      Sum<T> sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += Sum<T>(x[i * k + l]) * Sum<T>(w[j * k + l]);
      if (!bias.empty()) sum += Sum<T>(shift[j]);
      out.push_back(static_cast<double>(into_sums ? sum : Sum<T>(to<T>(sum))));
    }
  return out;
}

// [rows, columns] -> [columns, rows]
Values transposed(const Values& a, int64_t rows, int64_t columns) {
  Values t(a.size());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) t[j * rows + i] = a[i * columns + j];
  return t;
}

// The same matrices at other places: the CPU gives the same bits; a GPU's library chooses the order of its sums by
// shape and alignment.
void check_same(const Backend& backend, const Values& a, const Values& b, DType dtype) {
  if (backend.name() == "cpu")
    CHECK(a == b);
  else
    CHECK(largest_error(a, b) <= 2 * spacing(dtype) * largest(b));
}

// A matrix in a larger one: `before` entries of 7 before it, rows `gap` entries longer, all others 7.
struct Placed {
  DeviceTensor memory;
  Tensor tensor;
  int64_t before, gap;
  Placed(Backend& backend, DType dtype, int64_t rows, int64_t columns, int64_t before, int64_t gap,
         const Values& values = {})
      : memory(backend, dtype, {before + rows * (columns + gap)}, spread(values, rows, columns, before, gap)),
        tensor(static_cast<char*>((*memory).data) + before * dtype_bytes(dtype), dtype, {rows, columns}),
        before(before),
        gap(gap) {
    tensor.row_pitch = columns + gap;
  }
  static Values spread(const Values& values, int64_t rows, int64_t columns, int64_t before, int64_t gap) {
    Values all(before + rows * (columns + gap), 7.0);
    if (!values.empty())
      for (int64_t r = 0; r < rows; ++r)
        std::copy_n(values.begin() + r * columns, columns, all.begin() + before + r * (columns + gap));
    return all;
  }
  // The matrix; everything around it is still 7.
  Values values() const {
    const Values all = memory.values();
    Values inside, outside(all.begin(), all.begin() + before);
    for (int64_t r = 0; r < tensor.rows(); ++r) {
      const auto row = all.begin() + before + r * tensor.pitch();
      inside.insert(inside.end(), row, row + tensor.columns());
      outside.insert(outside.end(), row + tensor.columns(), row + tensor.pitch());
    }
    CHECK(outside == Values(outside.size(), 7.0));
    return inside;
  }
};

}  // namespace

TEST_CASE("linear: forward, with and without bias, into the compute and the accumulation dtype") {
  each_device([](Backend& backend, DType dtype) {
    for (const Case& c : cases)
      for (bool with_bias : {false, true})
        for (DType out_dtype : {dtype, accumulation_dtype(dtype)}) {
          CAPTURE(c.rows);
          const Values a = rounded(random_values(c.rows * c.k, 1), dtype),
                       b = rounded(random_values(c.n * c.k, 2), dtype);
          const Values shift = with_bias ? rounded(random_values(c.n, 3), dtype) : Values{};
          DeviceTensor in(backend, dtype, {c.rows, c.k}, a), weight(backend, dtype, {c.n, c.k}, b),
              out(backend, out_dtype, {c.rows, c.n}, 7);
          DeviceTensor bias(backend, dtype, {c.n}, with_bias ? shift : Values(c.n));
          backend.linear_forward(out, in, weight, with_bias ? *bias : Tensor());
          const bool sums = out_dtype != dtype;
          with_type(dtype, [&](auto zero) {
            check_close("out", out.values(), product<decltype(zero)>(a, b, shift, c.rows, c.n, c.k, sums),
                        product<long double>(a, b, shift, c.rows, c.n, c.k, true), out_dtype);
          });
        }
  });
}

TEST_CASE("linear: adds to what is there: out and din of a second product") {
  each_device([](Backend& backend, DType dtype) {
    for (const Case& c : cases)
      for (bool with_bias : {false, true}) {
        CAPTURE(c.rows);
        const Values a = rounded(random_values(c.rows * c.k, 1), dtype),
                     b = rounded(random_values(c.n * c.k, 2), dtype),
                     g = rounded(random_values(c.rows * c.n, 3), dtype),
                     shift = with_bias ? rounded(random_values(c.n, 4), dtype) : Values{},
                     before = rounded(random_values(c.rows * c.n, 5), dtype),
                     dbefore = rounded(random_values(c.rows * c.k, 6), dtype), bt = transposed(b, c.n, c.k);
        DeviceTensor in(backend, dtype, {c.rows, c.k}, a), weight(backend, dtype, {c.n, c.k}, b),
            out(backend, dtype, {c.rows, c.n}, before), dout(backend, dtype, {c.rows, c.n}, g),
            din(backend, dtype, {c.rows, c.k}, dbefore), bias(backend, dtype, {c.n}, with_bias ? shift : Values(c.n));
        backend.linear_forward(out, in, weight, with_bias ? *bias : Tensor(), true);
        backend.linear_backward(din, Tensor(), Tensor(), dout, Tensor(), weight, true);
        with_type(dtype, [&](auto zero) {
          using T = decltype(zero);
          const auto rounded_sum = [&](const Values& x, const Values& y) { return rounded(plus(x, y), dtype); };
          check_close("out", out.values(), rounded_sum(product<T>(a, b, shift, c.rows, c.n, c.k, false), before),
                      plus(product<long double>(a, b, shift, c.rows, c.n, c.k, true), before), dtype);
          check_close("din", din.values(), rounded_sum(product<T>(g, bt, {}, c.rows, c.k, c.n, false), dbefore),
                      plus(product<long double>(g, bt, {}, c.rows, c.k, c.n, true), dbefore), dtype);
        });
      }
  });
}

TEST_CASE("linear: a row is the same alone and among others, and rows may stand at a pitch") {
  each_device([](Backend& backend, DType dtype) {
    const int64_t n = 35, k = 75, gap = 3;
    const Values b = rounded(random_values(n * k, 2), dtype);
    DeviceTensor weight(backend, dtype, {n, k}, b);
    for (int64_t rows : {2, 7, 8, 16}) {
      CAPTURE(rows);
      const Values a = rounded(random_values(rows * (k + gap), 1), dtype);
      DeviceTensor in(backend, dtype, {rows, k + gap}, a), out(backend, dtype, {rows, n + gap}, 7),
          alone(backend, dtype, {1, n});
      Tensor narrow_in = *in, narrow_out = *out;
      narrow_in.shape[1] = k, narrow_in.row_pitch = k + gap;
      narrow_out.shape[1] = n, narrow_out.row_pitch = n + gap;
      backend.linear_forward(narrow_out, narrow_in, weight, Tensor());
      Values expected;
      for (int64_t r = 0; r < rows; ++r) {
        backend.linear_forward(alone, narrow_in.slice(r, 1), weight, Tensor());
        const Values row = alone.values();
        expected.insert(expected.end(), row.begin(), row.end());
        expected.insert(expected.end(), gap, 7.0);
      }
      check_same(backend, out.values(), expected, dtype);
    }
  });
}

TEST_CASE("linear: backward writes din, adds to dweight and dbias, reads rows at a pitch") {
  each_device([](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    for (const Case& c : cases)
      for (int64_t gap : {0, 3}) {
        const Values a = rounded(random_values(c.rows * c.k, 1), dtype),
                     b = rounded(random_values(c.n * c.k, 2), dtype);
        const Values g = rounded(random_values(c.rows * c.n, 3), dtype);
        const Values dw = rounded(random_values(c.n * c.k, 4), sums), db = rounded(random_values(c.n, 5), sums);
        Values spread(c.rows * (c.n + gap), 1e30);
        for (int64_t r = 0; r < c.rows; ++r) std::copy_n(g.begin() + r * c.n, c.n, spread.begin() + r * (c.n + gap));
        DeviceTensor in(backend, dtype, {c.rows, c.k}, a), weight(backend, dtype, {c.n, c.k}, b),
            din(backend, dtype, {c.rows, c.k}, 9);
        DeviceTensor dout(backend, dtype, {c.rows, c.n + gap}, spread), dweight(backend, sums, {c.n, c.k}, dw),
            dbias(backend, sums, {c.n}, db);
        Tensor gradient = *dout;
        gradient.shape[1] = c.n, gradient.row_pitch = c.n + gap;
        backend.linear_backward(din, dweight, dbias, gradient, in, weight);
        const Values gt = transposed(g, c.rows, c.n), at = transposed(a, c.rows, c.k), bt = transposed(b, c.n, c.k),
                     ones(c.rows, 1.0);
        with_type(dtype, [&](auto zero) {
          using T = decltype(zero);
          check_close("din", din.values(), product<T>(g, bt, {}, c.rows, c.k, c.n, false),
                      product<long double>(g, bt, {}, c.rows, c.k, c.n, true), dtype);
          check_close("dweight", dweight.values(), plus(product<T>(gt, at, {}, c.n, c.k, c.rows, true), dw),
                      plus(product<long double>(gt, at, {}, c.n, c.k, c.rows, true), dw), sums);
          check_close("dbias", dbias.values(), plus(product<T>(gt, ones, {}, c.n, 1, c.rows, true), db),
                      plus(product<long double>(gt, ones, {}, c.n, 1, c.rows, true), db), sums);
        });
        // One after the other gives what all at once gave.
        DeviceTensor alone(backend, dtype, {c.rows, c.k}, 9), dweight_alone(backend, sums, {c.n, c.k}, dw),
            dbias_alone(backend, sums, {c.n}, db);
        backend.linear_backward(alone, Tensor(), Tensor(), gradient, Tensor(), weight);
        backend.linear_backward(Tensor(), dweight_alone, Tensor(), gradient, in, weight);
        backend.linear_backward(Tensor(), Tensor(), dbias_alone, gradient, Tensor(), weight);
        CHECK(alone.values() == din.values());
        CHECK(dweight_alone.values() == dweight.values());
        CHECK(dbias_alone.values() == dbias.values());
      }
  });
}

TEST_CASE("linear: bf16 gradient rows over their own fp32 logits") {
  each_device([](Backend& backend, DType dtype) {
    if (dtype != DType::bf16) return;
    const int64_t rows = 13, n = 123, k = 29;
    const Values a = rounded(random_values(rows * k, 1), dtype), b = rounded(random_values(n * k, 2), dtype);
    const Values g = rounded(random_values(rows * n, 3), dtype);
    DeviceTensor in(backend, dtype, {rows, k}, a), weight(backend, dtype, {n, k}, b),
        dweight(backend, DType::f32, {n, k});
    DeviceTensor din(backend, dtype, {rows, k}), plain(backend, dtype, {rows, n}, g),
        din_plain(backend, dtype, {rows, k});
    DeviceTensor dweight_plain(backend, DType::f32, {n, k});
    Values spread(rows * 2 * n, 1e30);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(g.begin() + r * n, n, spread.begin() + r * 2 * n);
    DeviceTensor logits(backend, dtype, {rows, 2 * n}, spread);
    Tensor over = *logits;
    over.shape[1] = n, over.row_pitch = 2 * n;
    backend.linear_backward(din, dweight, Tensor(), over, in, weight);
    backend.linear_backward(din_plain, dweight_plain, Tensor(), plain, in, weight);
    check_same(backend, din.values(), din_plain.values(), dtype);
    check_same(backend, dweight.values(), dweight_plain.values(), DType::f32);
  });
}

TEST_CASE("linear: matrices and biases may start anywhere and rows stand at any pitch; nothing else is written") {
  struct Starts {
    int64_t in, weight, out;  // din, dweight and bias, dout likewise
  };
  std::vector<Starts> places{{0, 0, 0}, {8, 8, 8}};
  for (int64_t shift : {1, 2, 4}) {  // all, then each alone
    places.push_back({shift, shift, shift});
    places.push_back({shift, 0, 0}), places.push_back({0, shift, 0}), places.push_back({0, 0, shift});
  }
  each_device([&](Backend& backend, DType dtype) {
    const DType sums = accumulation_dtype(dtype);
    const int64_t rows = 21, n = 40, k = 136;
    const Values a = rounded(random_values(rows * k, 1), dtype), b = rounded(random_values(n * k, 2), dtype),
                 shift = rounded(random_values(n, 3), dtype), g = rounded(random_values(rows * n, 4), dtype);
    const Values gt = transposed(g, rows, n), at = transposed(a, rows, k), bt = transposed(b, n, k);
    const Values ones(n * k, 1.0), one(n, 1.0), column(rows, 1.0);
    const auto results = [&](auto zero, DType out_dtype) {
      using T = decltype(zero);
      const bool exact = std::is_same_v<T, long double>;
      return std::array{product<T>(a, b, shift, rows, n, k, exact || out_dtype != dtype),
                        product<T>(g, bt, {}, rows, k, n, exact), plus(product<T>(gt, at, {}, n, k, rows, true), ones),
                        plus(product<T>(gt, column, {}, n, 1, rows, true), one)};
    };
    for (DType out_dtype : {dtype, sums}) {
      std::array<Values, 4> naive;
      with_type(dtype, [&](auto zero) { naive = results(zero, out_dtype); });
      const std::array<Values, 4> exact = results(0.0L, out_dtype);
      for (const Starts& place : places)
        for (int64_t gap : {0, 1, 8}) {
          CAPTURE(place.in);
          CAPTURE(place.weight);
          CAPTURE(place.out);
          CAPTURE(gap);
          const Placed in(backend, dtype, rows, k, place.in, gap, a), weight(backend, dtype, n, k, place.weight, 0, b),
              bias(backend, dtype, 1, n, place.weight, 0, shift), dout(backend, dtype, rows, n, place.out, gap, g);
          const Placed out(backend, out_dtype, rows, n, place.out, gap), din(backend, dtype, rows, k, place.in, gap),
              dweight(backend, sums, n, k, place.weight, 0, ones), dbias(backend, sums, 1, n, place.weight, 0, one);
          const Tensor bias_row(bias.tensor.data, dtype, {n}), dbias_row(dbias.tensor.data, sums, {n});
          backend.linear_forward(out.tensor, in.tensor, weight.tensor, bias_row);
          backend.linear_backward(din.tensor, dweight.tensor, dbias_row, dout.tensor, in.tensor, weight.tensor);
          check_close("out", out.values(), naive[0], exact[0], out_dtype);
          check_close("din", din.values(), naive[1], exact[1], dtype);
          check_close("dweight", dweight.values(), naive[2], exact[2], sums);
          check_close("dbias", dbias.values(), naive[3], exact[3], sums);
        }
    }
  });
}

TEST_CASE("linear: the same product gives the same bits every time, also after many others") {
  each_device([](Backend& backend, DType dtype) {
    const int64_t rows = 300, n = 24, k = 256;
    DeviceTensor in(backend, dtype, {rows, k}, rounded(random_values(rows * k, 1), dtype)),
        weight(backend, dtype, {n, k}, rounded(random_values(n * k, 2), dtype)), out(backend, dtype, {rows, n}),
        din(backend, dtype, {rows, k}), dweight(backend, accumulation_dtype(dtype), {n, k}),
        dbias(backend, accumulation_dtype(dtype), {n});
    const auto everything = [&] {
      backend.zero(dweight), backend.zero(dbias);
      backend.linear_forward(out, in, weight, Tensor());
      backend.linear_backward(din, dweight, dbias, out, in, weight);
      return std::vector<Values>{out.values(), din.values(), dweight.values(), dbias.values()};
    };
    const std::vector<Values> once = everything();
    for (int i = 0; i < 3; ++i) CHECK(everything() == once);
    for (int64_t some = 1; some < rows; ++some)  // more shapes than a backend keeps plans of
      backend.linear_forward((*out).slice(0, some), (*in).slice(0, some), weight, Tensor());
    CHECK(everything() == once);
  });
}

TEST_CASE("linear: products of one shape have their own biases") {
  each_device([](Backend& backend, DType dtype) {
    const int64_t rows = 3, n = 16, k = 8;
    DeviceTensor in(backend, dtype, {rows, k}), weight(backend, dtype, {n, k}, 1), out(backend, dtype, {rows, n});
    DeviceTensor one(backend, dtype, {n}, 1), two(backend, dtype, {n}, 2);
    for (const DeviceTensor* bias : {&one, &two}) {
      backend.linear_forward(out, in, weight, *bias);
      CHECK(out.values() == Values(rows * n, bias->values()[0]));
    }
    backend.linear_forward(out, in, weight, Tensor());
    CHECK(out.values() == Values(rows * n, 0.0));
  });
}

TEST_CASE("linear: a bias's gradient over many rows and columns") {
  each_device([](Backend& backend, DType dtype) {
    const int64_t rows = 2100, n = 300, k = 2;
    const DType sums = accumulation_dtype(dtype);
    const Values g = rounded(random_values(rows * n, 1), dtype), before = rounded(random_values(n, 2), sums);
    DeviceTensor dout(backend, dtype, {rows, n}, g), dbias(backend, sums, {n}, before), weight(backend, dtype, {n, k});
    backend.linear_backward(Tensor(), Tensor(), dbias, dout, Tensor(), weight);
    const Values gt = transposed(g, rows, n), column(rows, 1.0);
    with_type(dtype, [&](auto zero) {
      check_close("dbias", dbias.values(), plus(product<decltype(zero)>(gt, column, {}, n, 1, rows, true), before),
                  plus(product<long double>(gt, column, {}, n, 1, rows, true), before), sums);
    });
  });
}

TEST_CASE("linear: many shapes one after the other, and none at all") {
  each_device([](Backend& backend, DType dtype) {
    for (int64_t rows = 1; rows < 40; ++rows) {
      const Values a = rounded(random_values(rows * 5, 1), dtype), b = rounded(random_values(3 * 5, 2), dtype);
      DeviceTensor in(backend, dtype, {rows, 5}, a), weight(backend, dtype, {3, 5}, b), out(backend, dtype, {rows, 3});
      backend.linear_forward(out, in, weight, Tensor());
      const Values expected = product<long double>(a, b, {}, rows, 3, 5, true);
      CHECK(largest_error(out.values(), expected) <= 4 * spacing(dtype) * largest(expected));
    }
    DeviceTensor in(backend, dtype, {0, 5}), weight(backend, dtype, {3, 5}), out(backend, dtype, {0, 3}),
        dweight(backend, accumulation_dtype(dtype), {3, 5}, 2);
    backend.linear_forward(out, in, weight, Tensor());
    backend.linear_backward(in, dweight, Tensor(), out, in, weight);
    CHECK(dweight.values() == Values(15, 2.0));
  });
}

TEST_CASE("linear: refuses matrices that do not meet") {
  each_device([](Backend& backend, DType dtype) {
    DeviceTensor in(backend, dtype, {4, 5}), weight(backend, dtype, {3, 5}), out(backend, dtype, {4, 3}),
        wrong(backend, dtype, {3, 6});
    DeviceTensor dweight(backend, accumulation_dtype(dtype), {3, 5}), bias(backend, dtype, {4}),
        tokens(backend, DType::i32, {4, 5});
    check_refuses([&] { backend.linear_forward(out, in, wrong, Tensor()); }, "linear_forward", "weight is [3, 6]");
    check_refuses([&] { backend.linear_forward(in, in, weight, Tensor()); }, "linear_forward", "output is [4, 5]");
    check_refuses([&] { backend.linear_forward(out, in, weight, bias); }, "linear_forward", "bias is [4]");
    check_refuses([&] { backend.linear_forward(out, tokens, weight, bias); }, "linear_forward", "int32");
    check_refuses([&] { backend.linear_backward(in, weight, bias, out, in, wrong); }, "linear_backward",
                  "input gradient is [4, 5]");
    check_refuses([&] { backend.linear_backward(in, dweight, Tensor(), out, Tensor(), weight); }, "linear_backward",
                  "input is []");
    check_refuses([&] { backend.linear_backward(in, dweight, Tensor(), in, in, weight); }, "linear_backward",
                  "output gradient is [4, 5]");
    Tensor narrow = *out;
    narrow.row_pitch = 2;
    check_refuses([&] { backend.linear_backward(in, dweight, Tensor(), narrow, in, weight); }, "linear_backward",
                  "2 apart, 3 wide");
  });
}
