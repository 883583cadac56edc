// Attention over the packed stream against naive attention over each sequence on its own: trunk + chosen and trunk +
// rejected.
#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

struct Stream {
  std::vector<Segment> segments;
  int64_t rows() const { return segments.empty() ? 0 : segments.back().end(); }
};

// {trunk, chosen, rejected} of each pair, one after the other.
Stream stream(std::initializer_list<std::array<int32_t, 3>> pairs) {
  Stream s;
  for (const auto& p : pairs) s.segments.push_back({static_cast<int32_t>(s.rows()), p[0], p[1], p[2]});
  return s;
}

// Empty trunk, empty rejected, branches of one row or none, one token alone, tiles' edges, many pairs.
std::vector<Stream> streams() {
  return {stream({{1, 0, 0}}),
          stream({{97, 0, 0}}),
          stream({{0, 5, 3}}),
          stream({{7, 1, 1}}),
          stream({{3, 9, 0}}),
          stream({{0, 1, 0}, {2, 0, 5}}),
          stream({{64, 64, 64}}),
          stream({{65, 33, 130}}),
          stream({{5, 2, 3}, {0, 4, 4}, {11, 1, 17}, {1, 1, 1}, {70, 3, 80}, {2, 2, 2}})};
}

struct Heads {
  int query, key_value, head_dim;
};

struct Problem {
  AttentionShape shape;
  int64_t rows;
  Values qkv, dout;

  Problem(const Stream& s, const Heads& h, int window, DType dtype, uint64_t seed)
      : shape{h.query, h.key_value, h.head_dim, static_cast<float>(1 / std::sqrt(static_cast<double>(h.head_dim))),
              window},
        rows(s.rows()) {
    qkv = rounded(random_values(rows * width(), seed, -2, 2), dtype);
    dout = rounded(random_values(rows * out_width(), seed + 1), dtype);
  }
  int64_t width() const { return int64_t{shape.heads + 2 * shape.kv_heads} * shape.head_dim; }
  int64_t out_width() const { return int64_t{shape.heads} * shape.head_dim; }
};

struct Result {
  Values out, lse, dqkv;
};

// shift: how many entries past an aligned address the tensors begin.
Result run(Backend& backend, DType dtype, const Problem& p, const Stream& s, int64_t shift = 0) {
  Values packed;
  for (const Segment& at : s.segments)
    for (int32_t v : {at.begin, at.trunk, at.chosen, at.rejected}) packed.push_back(v);
  DeviceTensor segments(backend, DType::i32, {static_cast<int64_t>(s.segments.size()), 4}, packed);
  DeviceBatch batch;
  batch.segments = segments;
  ShiftedTensor qkv(backend, dtype, {p.rows, p.width()}, p.qkv, shift),
      out(backend, dtype, {p.rows, p.out_width()}, 99, shift),
      dout(backend, dtype, {p.rows, p.out_width()}, p.dout, shift);
  DeviceTensor lse(backend, accumulation_dtype(dtype), {p.shape.heads, p.rows}, 99);
  ShiftedTensor dqkv(backend, dtype, {p.rows, p.width()}, 99, shift);
  backend.attention_forward(out, lse, qkv, batch, p.shape);
  backend.synchronize();  // where a GPU refuses
  backend.attention_backward(dqkv, dout, out, lse, qkv, batch, p.shape);
  return {out.values(), lse.values(), dqkv.values()};
}

// One sequence of stream rows, in order, on its own: S = scale Q K^T, P = softmax(S), O = P V, each stored as T; only
// the rows from `first` on are this sequence's queries (a pair's trunk is asked once).
template <class T>
void attend(Result& result, std::vector<Sum<T>>& dqkv, const Problem& p, const std::vector<int64_t>& sequence,
            int64_t first) {
  const auto x = typed<T>(p.qkv), g = typed<T>(p.dout);
  const AttentionShape& s = p.shape;
  const int64_t d = s.head_dim, group = s.heads / s.kv_heads;
  for (int64_t head = 0; head < s.heads; ++head)
    for (int64_t i = first; i < static_cast<int64_t>(sequence.size()); ++i) {
      const int64_t begin = s.window ? std::max<int64_t>(0, i - s.window + 1) : 0,
                    q = sequence[i] * p.width() + head * d;
      const auto key = [&](int64_t j) { return sequence[j] * p.width() + (s.heads + head / group) * d; };
      const auto value = [&](int64_t j) { return key(j) + s.kv_heads * d; };
      std::vector<T> scores, probabilities;
      Sum<T> most = -std::numeric_limits<Sum<T>>::infinity(), total = 0;
      for (int64_t j = begin; j <= i; ++j) {
        Sum<T> sum = 0;
        for (int64_t l = 0; l < d; ++l) sum += Sum<T>(x[q + l]) * Sum<T>(x[key(j) + l]);
        scores.push_back(to<T>(sum * Sum<T>(s.scale)));
        most = std::max(most, Sum<T>(scores.back()));
      }
      for (const T& score : scores) total += std::exp(Sum<T>(score) - most);
      for (const T& score : scores) probabilities.push_back(to<T>(std::exp(Sum<T>(score) - most) / total));
      const int64_t at = sequence[i] * p.out_width() + head * d;
      std::vector<Sum<T>> out(d);
      for (int64_t j = begin; j <= i; ++j)
        for (int64_t l = 0; l < d; ++l) out[l] += Sum<T>(probabilities[j - begin]) * Sum<T>(x[value(j) + l]);
      Sum<T> delta = 0;
      for (int64_t l = 0; l < d; ++l) {
        result.out[at + l] = static_cast<double>(to<T>(out[l]));
        delta += Sum<T>(to<T>(out[l])) * Sum<T>(g[at + l]);
      }
      result.lse[head * p.rows + sequence[i]] = static_cast<double>(most + std::log(total));
      for (int64_t j = begin; j <= i; ++j) {
        const Sum<T> probability = probabilities[j - begin];
        Sum<T> dp = 0;
        for (int64_t l = 0; l < d; ++l) dp += Sum<T>(g[at + l]) * Sum<T>(x[value(j) + l]);
        const Sum<T> ds = Sum<T>(to<T>(probability * (dp - delta))) * Sum<T>(s.scale);
        for (int64_t l = 0; l < d; ++l) {
          dqkv[value(j) + l] += probability * Sum<T>(g[at + l]);
          dqkv[key(j) + l] += ds * Sum<T>(x[q + l]);
          dqkv[q + l] += ds * Sum<T>(x[key(j) + l]);
        }
      }
    }
}

template <class T> Result naive(const Problem& p, const Stream& s) {
  Result result{Values(p.dout.size()), Values(static_cast<size_t>(p.shape.heads * p.rows)), {}};
  std::vector<Sum<T>> dqkv(p.qkv.size());
  for (const Segment& at : s.segments)
    for (bool chosen : {true, false}) {
      std::vector<int64_t> sequence;
      for (int32_t r = 0; r < at.trunk; ++r) sequence.push_back(at.begin + r);
      const int32_t branch = at.begin + at.trunk + (chosen ? 0 : at.chosen);
      for (int32_t r = 0; r < (chosen ? at.chosen : at.rejected); ++r) sequence.push_back(branch + r);
      attend<T>(result, dqkv, p, sequence, chosen ? 0 : at.trunk);
    }
  for (Sum<T> v : dqkv) result.dqkv.push_back(static_cast<double>(to<T>(v)));
  return result;
}

// On every device, or on the CPU alone; what is naive is computed once a dtype.
void compare(const Stream& s, const std::function<Problem(DType)>& problem, bool cpu_alone = false) {
  std::map<DType, std::pair<Result, Result>> expected;
  each_device([&](Backend& backend, DType dtype) {
    if (cpu_alone && backend.name() != "cpu") return;
    const Problem p = problem(dtype);
    CAPTURE(p.shape.heads);
    CAPTURE(p.shape.head_dim);
    CAPTURE(p.shape.window);
    CAPTURE(p.rows);
    if (!expected.count(dtype))
      with_type(dtype, [&](auto zero) { expected[dtype] = {naive<decltype(zero)>(p, s), naive<long double>(p, s)}; });
    const Result actual = run(backend, dtype, p, s);
    const auto& [same, reference] = expected[dtype];
    check_close("out", actual.out, same.out, reference.out, dtype);
    // Sums of head_dim products that may nearly cancel, in another order.
    check_close("lse", actual.lse, same.lse, reference.lse, accumulation_dtype(dtype), 2, 8);
    // dP - delta cancels; the naive sums run in the same order on both sides and may cancel exactly.
    check_close("dqkv", actual.dqkv, same.dqkv, reference.dqkv, dtype, 3, 16);
  });
}
void compare(const Stream& s, const Heads& heads, int window, uint64_t seed = 1, bool cpu_alone = false) {
  compare(s, [&](DType dtype) { return Problem(s, heads, window, dtype, seed); }, cpu_alone);
}

}  // namespace

TEST_CASE("attention: the packed stream equals naive attention over separate sequences") {
  for (const Heads& heads :
       {Heads{1, 1, 1}, Heads{3, 1, 6}, Heads{2, 2, 10}, Heads{6, 2, 64}, Heads{1, 1, 80}, Heads{32, 1, 3}})
    for (const Stream& s : streams())
      for (int window : {0, 1, 5}) {
        if (window == 1 && heads.query * heads.head_dim * s.rows() > 10000) continue;  // the naive side takes long
        const bool long_on_the_emulator = heads.query == 32;
        compare(s, heads, window, 1, long_on_the_emulator);
      }
}

TEST_CASE("attention: head sizes up to 256") {
  for (const Heads& heads : {Heads{2, 1, 8}, Heads{1, 1, 20}, Heads{1, 1, 96}, Heads{1, 1, 100}, Heads{2, 1, 128},
                             Heads{1, 1, 160}, Heads{1, 1, 256}})
    for (int window : {0, 5}) compare(stream({{70, 3, 65}, {5, 2, 3}}), heads, window);
}

TEST_CASE("attention: more segments than a warp lists at a time") {
  Stream s;
  for (int i = 0; i < 34; ++i) s.segments.push_back({static_cast<int32_t>(s.rows()), i % 2, 1, i % 3 == 0});
  compare(s, {1, 1, 8}, 0);
}

// Segments of several tiles and strips, the largest and an odd head size, more heads than a tile has rows for.
TEST_CASE("attention: long segments and large heads equal naive attention over separate sequences") {
  for (const Heads& heads : {Heads{2, 1, 6}, Heads{3, 3, 33}, Heads{1, 1, 256}, Heads{129, 1, 2}})
    for (int window : {0, 100}) {
      const bool small = heads.query * heads.head_dim < 16;
      const Stream s = small ? stream({{300, 370, 130}, {1, 600, 2}}) : stream({{50, 91, 20}});
      const bool long_on_the_emulator = small || heads.query == 129;
      compare(s, heads, window, 13, long_on_the_emulator);
    }
}

TEST_CASE("attention: tensors at any address give the same bits") {
  each_device([](Backend& backend, DType dtype) {
    for (int head_dim : {24, 64}) {
      const Stream s = stream({{20, 50, 3}, {0, 2, 1}});
      const Problem p(s, {3, 1, head_dim}, 9, dtype, 17);
      const Result aligned = run(backend, dtype, p, s), shifted = run(backend, dtype, p, s, 1);
      CHECK(aligned.out == shifted.out);
      CHECK(aligned.lse == shifted.lse);
      CHECK(aligned.dqkv == shifted.dqkv);
    }
  });
}

TEST_CASE("attention: a window of one passes values through; long windows change nothing") {
  each_device([](Backend& backend, DType dtype) {
    const Stream s = stream({{9, 4, 6}});
    const Problem p(s, {2, 1, 10}, 1, dtype, 3);
    const Result one = run(backend, dtype, p, s);
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t i = 0; i < 20; ++i) CHECK(one.out[r * 20 + i] == p.qkv[r * p.width() + 30 + i % 10]);
    const Problem whole(s, {2, 1, 10}, 0, dtype, 3), wide(s, {2, 1, 10}, 15, dtype, 3),
        narrow(s, {2, 1, 10}, 14, dtype, 3);
    CHECK(run(backend, dtype, wide, s).dqkv == run(backend, dtype, whole, s).dqkv);
    CHECK(run(backend, dtype, narrow, s).out != run(backend, dtype, whole, s).out);
  });
}

TEST_CASE("attention: branches do not see each other") {
  each_device([](Backend& backend, DType dtype) {
    const Stream s = stream({{70, 20, 66}, {3, 4, 5}});
    Problem p(s, {3, 1, 6}, 0, dtype, 5);
    const Result before = run(backend, dtype, p, s);
    for (int64_t i = 70 * p.width(); i < 90 * p.width(); ++i)
      p.qkv[i] = rounded(p.qkv[i] + 1, dtype);  // the chosen branch
    const Result after = run(backend, dtype, p, s);
    for (int64_t i = 0; i < static_cast<int64_t>(before.out.size()); ++i) {
      const int64_t row = i / p.out_width();
      if (row < 70 || row >= 90) CHECK(before.out[i] == after.out[i]);
    }
    CHECK(before.out != after.out);
  });
}

TEST_CASE("attention: gradients agree with finite differences") {
  const auto backend = make_cpu_backend(0);
  for (int window : {0, 3}) {
    const Stream s = stream({{4, 3, 2}, {0, 2, 3}});
    Problem p(s, {3, 1, 6}, window, DType::f64, 7);
    const Values analytic = run(*backend, DType::f64, p, s).dqkv;
    check_gradient("dqkv", p.qkv, analytic, [&] { return dot(run(*backend, DType::f64, p, s).out, p.dout); });
  }
}

TEST_CASE("attention: large scores stay finite") {
  each_device([](Backend& backend, DType dtype) {
    const Stream s = stream({{80, 7, 9}});
    Problem p(s, {2, 1, 10}, 0, dtype, 9);
    for (double& v : p.qkv) v = rounded(v * 50, dtype);
    const Result r = run(backend, dtype, p, s);
    for (const Values* values : {&r.out, &r.lse, &r.dqkv})
      for (double v : *values) CHECK(std::isfinite(v));
  });
}

TEST_CASE("attention: a maximum that rises over several tiles") {
  const Stream s = stream({{150, 170, 90}});
  compare(s, [&](DType dtype) {
    Problem p(s, {2, 1, 10}, 0, dtype, 15);
    for (int64_t r = 0; r < p.rows; ++r)  // keys grow along the stream
      for (int64_t i = 20; i < 30; ++i) p.qkv[r * p.width() + i] = rounded(p.qkv[r * p.width() + i] * r / 20., dtype);
    return p;
  });
}

TEST_CASE("attention: 250 runs give the same bits, whatever the number of threads") {
  const Stream s = stream({{300, 370, 130}, {5, 6, 7}});
  const Problem p(s, {3, 1, 10}, 0, DType::bf16, 11);
  Result first;
  for (int threads : {2, 1, 3}) {
    const auto backend = make_cpu_backend(threads);
    for (int repeat = 0; repeat < (threads == 2 ? 250 : 1); ++repeat) {
      const Result r = run(*backend, DType::bf16, p, s);
      if (first.out.empty()) first = r;
      CHECK(r.out == first.out);
      CHECK(r.lse == first.lse);
      CHECK(r.dqkv == first.dqkv);
    }
  }
}

TEST_CASE("attention: refuses shapes and segments that do not fit the stream") {
  each_device([](Backend& backend, DType dtype) {
    const Stream s = stream({{3, 2, 1}});
    const auto attempt = [&](Heads heads, int window, const Stream& described, int64_t rows) {
      Problem p(described, heads, window, dtype, 1);
      p.rows = rows;
      p.qkv = Values(rows * p.width()), p.dout = Values(rows * p.out_width());
      run(backend, dtype, p, described);
    };
    check_refuses([&] { attempt({3, 2, 6}, 0, s, 6); }, "attention_forward", "3 query heads share 2");
    check_refuses([&] { attempt({2, 1, 6}, -1, s, 6); }, "attention_forward", "window is -1");
    Problem unscaled(s, {2, 1, 6}, 0, dtype, 1);
    unscaled.shape.scale = 0;
    check_refuses([&] { run(backend, dtype, unscaled, s); }, "attention_forward", "the scale is 0");
    check_refuses([&] { attempt({2, 1, 6}, 0, s, 7); }, "attention_forward", "end at row 6, the stream has 7");
    check_refuses([&] { attempt({2, 1, 6}, 0, stream({{0, 40, 40}}), 70); }, "attention_forward",
                  "end at row 80, the stream has 70");
    Stream many;  // more than a warp lists at once
    for (int i = 0; i < 40; ++i) many.segments.push_back({2 * i, 1, 0, i == 35 ? 2 : 1});
    check_refuses([&] { attempt({2, 1, 6}, 0, many, 80); }, "attention_forward",
                  "segment 36 is {72, 1, 0, 1} where row 73 comes next");
    Stream gap = s;
    gap.segments.push_back({7, 1, 0, 0});
    check_refuses([&] { attempt({2, 1, 6}, 0, gap, 8); }, "attention_forward", "where row 6 comes next");
    Stream negative = stream({{3, -1, 4}});
    check_refuses([&] { attempt({2, 1, 6}, 0, negative, 6); }, "attention_forward", "segment 0 is {0, 3, -1, 4}");
    DeviceTensor qkv(backend, dtype, {6, 24}), out(backend, dtype, {6, 12}), narrow(backend, dtype, {6, 11}),
        lse(backend, accumulation_dtype(dtype), {2, 6});
    DeviceTensor segments(backend, DType::i32, {1, 4}, Values{0, 3, 2, 1});
    DeviceBatch batch;
    batch.segments = segments;
    DeviceTensor bad(backend, DType::i32, {1, 4}, Values{0, 1, 2, 1}), gradient(backend, dtype, {6, 24});
    DeviceBatch short_batch;
    short_batch.segments = bad;
    check_refuses(
        [&] {
          backend.attention_backward(gradient, out, out, lse, qkv, short_batch, {2, 1, 6, 1, 0});
          backend.synchronize();
        },
        "attention_backward", "end at row 4, the stream has 6");
    check_refuses(
        [&] {
          backend.attention_backward(qkv, narrow, out, lse, qkv, batch, {2, 1, 6, 1, 0});
        },
        "attention_backward", "output gradient is [6, 11]");
    check_refuses(
        [&] {
          backend.attention_backward(out, out, out, lse, qkv, batch, {2, 1, 6, 1, 0});
        },
        "attention_backward", "qkv gradient is [6, 12]");
  });
}
