// Attention of new rows over cached keys and values against naive attention over the same sequences.
#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

struct Heads {
  int query, key_value, head_dim;
};

// Row r is position positions[r] of cached sequence sequences[r]; the cache holds random keys and values everywhere.
struct Problem {
  AttentionShape shape;
  int64_t cached, capacity;
  Values sequences, positions, qkv, keys, values;

  Problem(const Heads& h, int window, int64_t cached, int64_t capacity, const Values& sequences,
          const Values& positions, DType dtype, double scale = 2)
      : shape{h.query, h.key_value, h.head_dim, static_cast<float>(1 / std::sqrt(static_cast<double>(h.head_dim))),
              window},
        cached(cached),
        capacity(capacity),
        sequences(sequences),
        positions(positions) {
    qkv = rounded(random_values(rows() * width(), 1, -scale, scale), dtype);
    keys = rounded(random_values(cached * capacity * cache_width(), 2, -scale, scale), dtype);
    values = rounded(random_values(cached * capacity * cache_width(), 3, -scale, scale), dtype);
  }
  int64_t rows() const { return static_cast<int64_t>(sequences.size()); }
  int64_t width() const { return int64_t{shape.heads + 2 * shape.kv_heads} * shape.head_dim; }
  int64_t cache_width() const { return int64_t{shape.kv_heads} * shape.head_dim; }
  int64_t out_width() const { return int64_t{shape.heads} * shape.head_dim; }
};

struct Result {
  Values out, keys, values;
};

// What a step of decoding asks for: keep the rows' keys and values, then attend. shift: how many entries past an
// aligned address the tensors begin.
Result run(Backend& backend, DType dtype, const Problem& p, int64_t shift = 0) {
  const int64_t heads = p.shape.kv_heads, size = p.shape.head_dim;
  ShiftedTensor qkv(backend, dtype, {p.rows(), p.width()}, p.qkv, shift),
      out(backend, dtype, {p.rows(), p.out_width()}, 99, shift);
  ShiftedTensor keys(backend, dtype, {p.cached, heads, p.capacity, size}, p.keys, shift),
      values(backend, dtype, {p.cached, heads, p.capacity, size}, p.values, shift);
  DeviceTensor sequences(backend, DType::i32, {p.rows()}, p.sequences),
      positions(backend, DType::i32, {p.rows()}, p.positions);
  backend.keep_keys_values(keys, values, qkv, sequences, positions, p.shape);
  backend.synchronize();  // where a GPU refuses
  backend.attention_decode(out, qkv, keys, values, sequences, positions, p.shape);
  return {out.values(), keys.values(), values.values()};
}

// S = scale q K^T, P = softmax(S), O = P V, each stored as T.
template <class T> Result naive(const Problem& p) {
  Result result{Values(static_cast<size_t>(p.rows() * p.out_width())), p.keys, p.values};
  const AttentionShape& s = p.shape;
  const int64_t d = s.head_dim;
  const auto cached = [&](int64_t r, int64_t kv_head, int64_t position) {
    return ((static_cast<int64_t>(p.sequences[r]) * s.kv_heads + kv_head) * p.capacity + position) * d;
  };
  for (int64_t r = 0; r < p.rows(); ++r)
    for (int64_t i = 0; i < p.cache_width(); ++i) {
      const int64_t to = cached(r, i / d, static_cast<int64_t>(p.positions[r])) + i % d,
                    from = r * p.width() + s.heads * d + i;
      result.keys[to] = p.qkv[from];
      result.values[to] = p.qkv[from + p.cache_width()];
    }
  const auto x = typed<T>(p.qkv), k = typed<T>(result.keys), v = typed<T>(result.values);
  for (int64_t r = 0; r < p.rows(); ++r)
    for (int64_t head = 0; head < s.heads; ++head) {
      const auto last = static_cast<int64_t>(p.positions[r]);
      const int64_t begin = s.window ? std::max<int64_t>(0, last - s.window + 1) : 0;
      const auto row = [&](int64_t j) { return cached(r, head / (s.heads / s.kv_heads), j); };
      std::vector<T> scores;
      Sum<T> most = -std::numeric_limits<Sum<T>>::infinity(), total = 0;
      for (int64_t j = begin; j <= last; ++j) {
        Sum<T> sum = 0;
        for (int64_t l = 0; l < d; ++l)
          sum += Sum<T>(x[r * p.width() + head * d + l]) * Sum<T>(k[row(j) + l]);
        scores.push_back(to<T>(sum * Sum<T>(s.scale)));
        most = std::max(most, Sum<T>(scores.back()));
      }
      for (const T& score : scores) total += std::exp(Sum<T>(score) - most);
      for (int64_t l = 0; l < d; ++l) {
        Sum<T> out = 0;
        for (int64_t j = begin; j <= last; ++j)
          out += Sum<T>(to<T>(std::exp(Sum<T>(scores[j - begin]) - most) / total)) *
                 Sum<T>(v[row(j) + l]);
        result.out[r * p.out_width() + head * d + l] = static_cast<double>(to<T>(out));
      }
    }
  return result;
}

// On every device; what is naive is computed once a dtype.
void compare(const Heads& heads, int window) {
  std::map<DType, std::pair<Result, Result>> expected;
  each_device([&](Backend& backend, DType dtype) {
    CAPTURE(heads.head_dim);
    CAPTURE(window);
    // A sequence of one token, tiles' and chunks' edges, several chunks; sequences out of order, one left out, two
    // rows of one sequence.
    const Problem p(heads, window, 7, 600, {3, 0, 6, 1, 5, 2, 2}, {0, 63, 64, 255, 256, 598, 599}, dtype);
    if (!expected.count(dtype))
      with_type(dtype, [&](auto zero) { expected[dtype] = {naive<decltype(zero)>(p), naive<long double>(p)}; });
    const Result actual = run(backend, dtype, p);
    const auto& [same, reference] = expected[dtype];
    CHECK(actual.keys == reference.keys);
    CHECK(actual.values == reference.values);
    check_close("out", actual.out, same.out, reference.out, dtype);
  });
}

}  // namespace

TEST_CASE("attention_decode: rows over the cache equal naive attention over their sequences") {
  for (const Heads& heads : {Heads{1, 1, 1}, Heads{3, 1, 6}, Heads{2, 2, 10}, Heads{6, 2, 64}, Heads{1, 1, 80},
                             Heads{7, 1, 16}, Heads{32, 1, 3}})
    for (int window : {0, 1, 5, 300}) compare(heads, window);
  for (const Heads& heads : {Heads{2, 1, 33}, Heads{5, 1, 128}, Heads{1, 1, 96}, Heads{2, 1, 256}}) compare(heads, 300);
}

TEST_CASE("attention_decode: tensors at any address give the same bits; no rows are no work") {
  each_device([](Backend& backend, DType dtype) {
    const Problem p({6, 2, 64}, 0, 2, 300, {1, 0}, {290, 5}, dtype);
    const Result aligned = run(backend, dtype, p), shifted = run(backend, dtype, p, 1);
    CHECK(aligned.out == shifted.out);
    CHECK(aligned.keys == shifted.keys);
    CHECK(aligned.values == shifted.values);
    CHECK(run(backend, dtype, Problem({6, 2, 64}, 0, 2, 30, {}, {}, dtype)).out.empty());
  });
}

TEST_CASE("attention_decode: every row of a sequence gives what attention_forward gives") {
  each_device([](Backend& backend, DType dtype) {
    constexpr int64_t rows = 300;
    for (int window : {0, 1, 70}) {
      CAPTURE(window);
      Values positions;
      for (int64_t i = 0; i < rows; ++i) positions.push_back(static_cast<double>(i));
      const Problem p({3, 1, 6}, window, 1, rows, Values(rows), positions, dtype);
      DeviceTensor qkv(backend, dtype, {rows, p.width()}, p.qkv), out(backend, dtype, {rows, p.out_width()}),
          lse(backend, accumulation_dtype(dtype), {3, rows}),
          segments(backend, DType::i32, {1, 4}, Values{0, rows, 0, 0});
      DeviceBatch batch;
      batch.segments = segments;
      backend.attention_forward(out, lse, qkv, batch, p.shape);
      const Values decoded = run(backend, dtype, p).out, reference = naive<long double>(p).out;
      if (dtype == DType::f64)
        CHECK(largest_error(decoded, out.values()) < 1e-14);
      else
        check_close("out", decoded, out.values(), reference, dtype);
    }
  });
}

TEST_CASE("attention_decode: a window of one passes values through; a window as long as the sequence changes nothing") {
  each_device([](Backend& backend, DType dtype) {
    const auto result = [&](int window) {
      return run(backend, dtype, Problem({2, 1, 10}, window, 1, 400, {0}, {300}, dtype)).out;
    };
    const Problem p({2, 1, 10}, 1, 1, 400, {0}, {300}, dtype);
    const Values one = result(1);
    for (int64_t i = 0; i < 20; ++i) CHECK(one[i] == p.qkv[30 + i % 10]);
    CHECK(result(301) == result(0));
    CHECK(result(300) != result(0));
  });
}

TEST_CASE("attention_decode: later positions and other sequences of the cache are not read; large scores stay finite") {
  each_device([](Backend& backend, DType dtype) {
    Problem p({3, 1, 6}, 0, 3, 90, {1}, {70}, dtype, 50);
    const Values before = run(backend, dtype, p).out;
    for (int64_t i = 0; i < static_cast<int64_t>(p.keys.size()); ++i) {
      const int64_t sequence = i / (90 * 6), position = i / 6 % 90;
      if (sequence != 1 || position > 69) p.keys[i] = p.values[i] = std::nan("");
    }
    const Values after = run(backend, dtype, p).out;
    CHECK(after == before);
    for (double v : after) CHECK(std::isfinite(v));
  });
}

TEST_CASE("attention_decode: 250 runs give the same bits, whatever the number of threads") {
  const Problem p({6, 2, 10}, 0, 2, 700, {0, 1}, {699, 300}, DType::bf16);
  Values first;
  for (int threads : {2, 1, 3}) {
    const auto backend = make_cpu_backend(threads);
    for (int repeat = 0; repeat < (threads == 2 ? 250 : 1); ++repeat) {
      const Values out = run(*backend, DType::bf16, p).out;
      if (first.empty()) first = out;
      CHECK(out == first);
    }
  }
}

TEST_CASE("attention_decode: refuses a full cache, unknown sequences and shapes that do not fit") {
  each_device([](Backend& backend, DType dtype) {
    const auto attempt = [&](const Values& sequences, const Values& positions) {
      run(backend, dtype, Problem({2, 1, 6}, 0, 2, 5, sequences, positions, dtype));
    };
    check_refuses([&] { attempt({0, 1}, {4, 5}); }, "keep_keys_values",
                  "the cache is full: position 5 of sequence 1 where there is room for 5");
    check_refuses([&] { attempt({0, 1}, {4, -1}); }, "keep_keys_values", "position -1");
    check_refuses([&] { attempt({0, 2}, {4, 4}); }, "keep_keys_values", "sequence 1 is 2 of 2");
    DeviceTensor qkv(backend, dtype, {2, 24}), out(backend, dtype, {2, 12}), cache(backend, dtype, {2, 1, 5, 6}),
        wide(backend, dtype, {2, 1, 5, 7}), rows(backend, DType::i32, {2}), full(backend, DType::i32, {2}, 5),
        three(backend, DType::i32, {3});
    const AttentionShape shape{2, 1, 6, 1, 0};
    check_refuses(
        [&] {
          backend.attention_decode(out, qkv, cache, cache, rows, full, shape);
          backend.synchronize();
        },
        "attention_decode", "the cache is full");
    check_refuses(
        [&] {
          backend.attention_decode(out, qkv, cache, cache, full, rows, shape);
          backend.synchronize();
        },
        "attention_decode", "is 5 of 2");
    check_refuses([&] { backend.attention_decode(out, qkv, wide, cache, rows, rows, shape); }, "attention_decode",
                  "the cache is [2, 1, 5, 7]");
    check_refuses([&] { backend.attention_decode(out, qkv, cache, cache, rows, three, shape); }, "attention_decode",
                  "positions is [3] int32");
    check_refuses([&] { backend.attention_decode(qkv, qkv, cache, cache, rows, rows, shape); }, "attention_decode",
                  "output is [2, 24]");
    check_refuses([&] { backend.attention_decode(out, qkv, cache, cache, rows, rows, {3, 2, 6, 1, 0}); },
                  "attention_decode", "3 query heads share 2");
  });
}
