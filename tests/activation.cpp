#include "src/cpu/vector.h"
#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

struct Case {
  int64_t rows, width;
};
const Case cases[] = {{1, 1}, {97, 123}, {3, 64}};

template <class T> Values forward(const Values& gate_up, int64_t rows, int64_t width) {
  const auto x = typed<T>(gate_up);
  Values out;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width; ++i) {
      const Sum<T> gate = x[r * 2 * width + i], up = x[r * 2 * width + width + i];
      out.push_back(static_cast<double>(to<T>(Sum<T>(to<T>(gate / (1 + std::exp(-gate)))) * up)));
    }
  return out;
}

template <class T> Values backward(const Values& dout, const Values& gate_up, int64_t rows, int64_t width) {
  const auto x = typed<T>(gate_up), g = typed<T>(dout);
  Values out(gate_up.size());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = r * 2 * width + i;
      const Sum<T> gate = x[at], up = x[at + width], dy = g[r * width + i], s = 1 / (1 + std::exp(-gate));
      out[at] = static_cast<double>(to<T>(Sum<T>(to<T>(dy * up)) * (s + gate * s * (1 - s))));
      out[at + width] = static_cast<double>(to<T>(dy * Sum<T>(to<T>(gate * s))));
    }
  return out;
}

}  // namespace

TEST_CASE("activation: forward and backward, in place too; backward makes the output again, bit for bit") {
  each_device([](Backend& backend, DType dtype) {
    for (const Case& c : cases) {
      const Values x = rounded(random_values(c.rows * 2 * c.width, 1, -8, 8), dtype),
                   g = rounded(random_values(c.rows * c.width, 2), dtype);
      DeviceTensor gate_up(backend, dtype, {c.rows, 2 * c.width}, x), out(backend, dtype, {c.rows, c.width}),
          dout(backend, dtype, {c.rows, c.width}, g);
      DeviceTensor gradient(backend, dtype, {c.rows, 2 * c.width});
      backend.activation_forward(out, gate_up);
      backend.activation_backward(gradient, Tensor(), dout, gate_up);
      with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        check_close("out", out.values(), forward<T>(x, c.rows, c.width), forward<long double>(x, c.rows, c.width),
                    dtype);
        check_close("dgate_up", gradient.values(), backward<T>(g, x, c.rows, c.width),
                    backward<long double>(g, x, c.rows, c.width), dtype);
      });
      const Values apart = gradient.values();
      DeviceTensor again(backend, dtype, {c.rows, c.width}, 5);
      backend.activation_backward(gradient, again, dout, gate_up);
      CHECK(gradient.values() == apart);
      CHECK(again.values() == out.values());
      backend.activation_backward(gate_up, dout, dout, gate_up);
      CHECK(gate_up.values() == apart);
      CHECK(dout.values() == out.values());
    }
  });
}

TEST_CASE("activation: gradients agree with finite differences") {
  const auto backend = make_cpu_backend(0);
  const int64_t rows = 3, width = 11;
  Values x = random_values(rows * 2 * width, 1, -4, 4);
  const Values g = random_values(rows * width, 2);
  DeviceTensor gate_up(*backend, DType::f64, {rows, 2 * width}, x), out(*backend, DType::f64, {rows, width}),
      dout(*backend, DType::f64, {rows, width}, g);
  DeviceTensor gradient(*backend, DType::f64, {rows, 2 * width});
  backend->activation_backward(gradient, Tensor(), dout, gate_up);
  check_gradient("dgate_up", x, gradient.values(), [&] {
    gate_up.set(x);
    backend->activation_forward(out, gate_up);
    return dot(out.values(), g);
  });
}

TEST_CASE("activation: finite far out") {
  each_device([](Backend& backend, DType dtype) {
    const Values x = {-1e30, -200, -90, -0.0, 0, 90, 200, 1e30, 1, 1, 1, 1, 1, 1, 1, 1};
    DeviceTensor gate_up(backend, dtype, {1, 16}, x), out(backend, dtype, {1, 8}), dout(backend, dtype, {1, 8}, 1),
        gradient(backend, dtype, {1, 16});
    backend.activation_forward(out, gate_up);
    backend.activation_backward(gradient, Tensor(), dout, gate_up);
    for (double v : out.values()) CHECK(std::isfinite(v));
    for (double v : gradient.values()) CHECK(std::isfinite(v));
    CHECK(out.values()[0] == 0);
    CHECK(out.values()[7] == rounded(1e30, dtype));
  });
}

TEST_CASE("activation: refuses an odd width") {
  each_device([](Backend& backend, DType dtype) {
    DeviceTensor odd(backend, dtype, {2, 7}), even(backend, dtype, {2, 8}), out(backend, dtype, {2, 3});
    check_refuses([&] { backend.activation_forward(out, odd); }, "activation_forward", "[2, 7]");
    check_refuses([&] { backend.activation_forward(out, even); }, "activation_forward", "output is [2, 3]");
    check_refuses([&] { backend.activation_backward(even, Tensor(), out, even); }, "activation_backward",
                  "output gradient is [2, 3]");
    check_refuses([&] { backend.activation_backward(even, out, out, even); }, "activation_backward",
                  "output is [2, 3]");
  });
}

TEST_CASE("activation: the CPU rooms' exponential is within 2 ulp, 0 far below, infinity above") {
  double worst = 0;
  for (double x = -103; x < 88.7; x += 0.000937) {
    const float at = static_cast<float>(x), value = orpo::cpu::exponential(orpo::cpu::splat(at))[0];
    const double exact = std::exp(static_cast<double>(at));
    const float nearest = static_cast<float>(exact), next = std::nextafter(nearest, HUGE_VALF);
    worst = std::max(worst, std::abs(value - exact) / static_cast<double>(next - nearest));
  }
  CHECK(worst <= 2);
  CHECK(orpo::cpu::exponential(orpo::cpu::splat(-HUGE_VALF))[0] == 0);
  CHECK(orpo::cpu::exponential(orpo::cpu::splat(HUGE_VALF))[0] == HUGE_VALF);
  CHECK(std::isnan(orpo::cpu::exponential(orpo::cpu::splat(std::nanf("")))[0]));
}
