#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

struct Case {
  int64_t rows;
  RopeShape shape;
};
const Case cases[] = {{1, {1, 1, 2, 2, 10000}},
                      {97, {3, 1, 6, 6, 10000}},
                      {5, {3, 1, 10, 4, 500}},
                      {33, {4, 2, 64, 64, 1e6}},
                      {7, {2, 2, 80, 32, 10000}},
                      {3, {2, 1, 8, 0, 10}},
                      {29, {2, 1, 16, 16, 100, {RopeScaling::linear, 2.5}}},
                      {41, {1, 1, 32, 32, 50, {RopeScaling::llama3, 8, 0.5, 3, 30}}}};

int64_t width_of(const RopeShape& s) { return int64_t{s.heads + 2 * s.kv_heads} * s.head_dim; }

// Positions as in a packed stream: up, and back to the trunk's end.
Values positions_of(int64_t rows) {
  Values p(rows);
  for (int64_t r = 0; r < rows; ++r) p[r] = static_cast<double>(r % 29 + r / 29 * 7);
  return p;
}

// Written as transformers' modeling_rope_utils states it, by wavelengths.
template <class Angle> Angle frequency(const RopeShape& s, int64_t i) {
  const Angle plain = std::pow(Angle(s.theta), Angle(-2 * i) / Angle(s.rotary_dim));
  const RopeScaling& how = s.scaling;
  if (how.kind == RopeScaling::none) return plain;
  if (how.kind == RopeScaling::linear) return plain / Angle(how.factor);
  const Angle wavelength = 2 * Angle(3.14159265358979323846264L) / plain, original = Angle(how.original_positions);
  if (wavelength > original / Angle(how.low_frequency)) return plain / Angle(how.factor);
  if (wavelength < original / Angle(how.high_frequency)) return plain;
  const Angle smooth =
      (original / wavelength - Angle(how.low_frequency)) / Angle(how.high_frequency - how.low_frequency);
  return (1 - smooth) * plain / Angle(how.factor) + smooth * plain;
}

template <class T> Values rotated(const Values& qkv, const Values& positions, const RopeShape& s, int direction) {
  using Angle = std::conditional_t<std::is_same_v<T, long double>, long double, double>;
  auto x = typed<T>(qkv);
  const int64_t width = width_of(s), half = s.rotary_dim / 2;
  for (size_t r = 0; r < positions.size(); ++r)
    for (int head = 0; head < s.heads + s.kv_heads; ++head)
      for (int64_t i = 0; i < half; ++i) {
        const Angle angle = Angle(positions[r]) * frequency<Angle>(s, i);
        const Sum<T> cosine = static_cast<Sum<T>>(std::cos(angle)),
                     sine = static_cast<Sum<T>>(direction * std::sin(angle));
        T &a = x[r * width + head * s.head_dim + i], &b = x[r * width + head * s.head_dim + i + half];
        const Sum<T> u = a, v = b;
        a = to<T>(u * cosine - v * sine), b = to<T>(v * cosine + u * sine);
      }
  return untyped(x);
}

}  // namespace

TEST_CASE("rope: rotates query and key heads in halves, leaves values and the rest of a head alone") {
  each_device([](Backend& backend, DType dtype) {
    for (const Case& c : cases)
      for (int direction : {1, -1}) {
        const Values x = rounded(random_values(c.rows * width_of(c.shape), 1), dtype), at = positions_of(c.rows);
        DeviceTensor qkv(backend, dtype, {c.rows, width_of(c.shape)}, x), positions(backend, DType::i32, {c.rows}, at);
        direction > 0 ? backend.rope_forward(qkv, positions, c.shape) : backend.rope_backward(qkv, positions, c.shape);
        with_type(dtype, [&](auto zero) {
          check_close("qkv", qkv.values(), rotated<decltype(zero)>(x, at, c.shape, direction),
                      rotated<long double>(x, at, c.shape, direction), dtype);
        });
        if (c.shape.rotary_dim > 2) CHECK(qkv.values() != x);
        const Values after = qkv.values();
        for (int64_t r = 0; r < c.rows; ++r)
          for (int64_t i = 0; i < width_of(c.shape); ++i)
            if (i >= int64_t{c.shape.heads + c.shape.kv_heads} * c.shape.head_dim ||
                i % c.shape.head_dim >= c.shape.rotary_dim)
              CHECK(after[r * width_of(c.shape) + i] == x[r * width_of(c.shape) + i]);
      }
  });
}

TEST_CASE("rope: the backward rotation is the transpose of the forward one, and scores depend on distances alone") {
  const auto backend = make_cpu_backend(0);
  const RopeShape shape{1, 1, 10, 10, 100};
  const int64_t width = width_of(shape);
  const Values x = random_values(width, 1), g = random_values(width, 2);
  const auto run = [&](const Values& values, double position, bool back) {
    DeviceTensor t(*backend, DType::f64, {1, width}, values), p(*backend, DType::i32, {1}, Values{position});
    back ? backend->rope_backward(t, p, shape) : backend->rope_forward(t, p, shape);
    return t.values();
  };
  CHECK(dot(run(x, 17, false), g) == doctest::Approx(dot(x, run(g, 17, true))).epsilon(1e-14));
  const auto score = [&](double query_position, double key_position) {
    const Values q = run(x, query_position, false), k = run(g, key_position, false);
    return dot(Values(q.begin(), q.begin() + 10), Values(k.begin() + 10, k.begin() + 20));
  };
  CHECK(score(9, 4) == doctest::Approx(score(1005, 1000)).epsilon(1e-10));
  CHECK(score(9, 4) != doctest::Approx(score(9, 5)).epsilon(1e-3));
}

TEST_CASE("rope: tables follow theta and the rotary size") {
  const auto backend = make_cpu_backend(0);
  const Values at = positions_of(5);
  for (const RopeShape& shape : {RopeShape{1, 1, 8, 8, 100}, RopeShape{1, 1, 8, 8, 1000}, RopeShape{1, 1, 8, 4, 1000},
                                 RopeShape{1, 1, 8, 8, 100}}) {
    const Values x = random_values(5 * width_of(shape), 1);
    DeviceTensor qkv(*backend, DType::f64, {5, width_of(shape)}, x), positions(*backend, DType::i32, {5}, at);
    backend->rope_forward(qkv, positions, shape);
    CHECK(largest_error(qkv.values(), rotated<long double>(x, at, shape, 1)) < 1e-14);
  }
}

TEST_CASE("rope: refuses odd rotary sizes and negative positions") {
  each_device([](Backend& backend, DType dtype) {
    DeviceTensor qkv(backend, dtype, {2, 24}), positions(backend, DType::i32, {2}),
        below(backend, DType::i32, {2}, Values{0, -1});
    check_refuses([&] { backend.rope_forward(qkv, positions, {1, 1, 8, 3, 1e4}); }, "rope_forward", "rotary_dim is 3");
    check_refuses(
        [&] {
          backend.rope_forward(qkv, positions, {1, 1, 8, 10, 1e4});
        },
        "rope_forward", "rotary_dim is 10");
    check_refuses(
        [&] {
          backend.rope_backward(qkv, positions, {3, 2, 8, 8, 1e4});
        },
        "rope_backward", "3 query heads share 2");
    check_refuses([&] { backend.rope_backward(qkv, positions, {2, 1, 8, 8, 1e4}); }, "rope_backward", "qkv is [2, 24]");
    check_refuses(
        [&] {
          backend.rope_forward(qkv, below, {1, 1, 8, 8, 1e4});
          backend.synchronize();
        },
        "rope_forward", "position is -1");
  });
}
