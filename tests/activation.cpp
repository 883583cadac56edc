#include "src/cpu/vector.h"
#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

struct Case {
  int64_t rows, width;
};
const Case cases[] = {{1, 1}, {97, 123}, {3, 64}};

// The gate's columns come first, where there is one.
int64_t columns(const Case& c, Activation activation) { return is_gated(activation) ? 2 * c.width : c.width; }

constexpr Activation activations[] = {Activation::swiglu, Activation::gelu, Activation::gelu_tanh, Activation::relu};
constexpr double pi = 3.14159265358979323846;

// f(x) as its definition says, and f'(x).
template <class T> T function(Activation activation, T x) {
  switch (activation) {
    case Activation::swiglu:
      return x / (1 + std::exp(-x));
    case Activation::gelu:
      return x * std::erfc(-x / std::sqrt(T(2))) / 2;
    case Activation::gelu_tanh:
      return x * (1 + std::tanh(std::sqrt(T(2 / pi)) * (x + T(0.044715) * x * x * x))) / 2;
    case Activation::relu:
      return x > 0 ? x : T(0);
  }
  return 0;
}
template <class T> T derivative(Activation activation, T x) {
  switch (activation) {
    case Activation::swiglu: {
      const T s = 1 / (1 + std::exp(-x));
      return s + x * s * (1 - s);
    }
    case Activation::gelu:
      return std::erfc(-x / std::sqrt(T(2))) / 2 + x * std::exp(-x * x / 2) / std::sqrt(T(2 * pi));
    case Activation::gelu_tanh: {
      const T slope = std::sqrt(T(2 / pi)), t = std::tanh(slope * (x + T(0.044715) * x * x * x));
      return (1 + t) / 2 + x * (1 - t * t) * slope * (1 + 3 * T(0.044715) * x * x) / 2;
    }
    case Activation::relu:
      return x > 0 ? T(1) : T(0);
  }
  return 0;
}

template <class T> Values forward(const Values& gate_up, const Case& c, Activation activation) {
  const auto x = typed<T>(gate_up);
  const int64_t in = columns(c, activation);
  Values out;
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t i = 0; i < c.width; ++i) {
      const T value = to<T>(function<Sum<T>>(activation, x[r * in + i]));
      out.push_back(
          static_cast<double>(is_gated(activation) ? to<T>(Sum<T>(value) * Sum<T>(x[r * in + c.width + i])) : value));
    }
  return out;
}

template <class T> Values backward(const Values& dout, const Values& gate_up, const Case& c, Activation activation) {
  const auto x = typed<T>(gate_up), g = typed<T>(dout);
  const int64_t in = columns(c, activation);
  Values out(gate_up.size());
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t i = 0; i < c.width; ++i) {
      const int64_t at = r * in + i, up = at + c.width;
      const Sum<T> gate = x[at], dy = g[r * c.width + i];
      const Sum<T> into = is_gated(activation) ? Sum<T>(to<T>(dy * Sum<T>(x[up]))) : dy;
      out[at] = static_cast<double>(to<T>(into * derivative<Sum<T>>(activation, gate)));
      if (is_gated(activation))
        out[up] = static_cast<double>(to<T>(dy * Sum<T>(to<T>(function<Sum<T>>(activation, gate)))));
    }
  return out;
}

}  // namespace

TEST_CASE("activation: forward and backward, in place too; backward makes the output again, bit for bit") {
  each_device([](Backend& backend, DType dtype) {
    for (const Activation activation : activations)
      for (const Case& c : cases) {
        CAPTURE(static_cast<int>(activation));
        const int64_t in = columns(c, activation);
        const Values x = rounded(random_values(c.rows * in, 1, -8, 8), dtype),
                     g = rounded(random_values(c.rows * c.width, 2), dtype);
        DeviceTensor gate_up(backend, dtype, {c.rows, in}, x), out(backend, dtype, {c.rows, c.width}),
            dout(backend, dtype, {c.rows, c.width}, g);
        DeviceTensor gradient(backend, dtype, {c.rows, in});
        backend.activation_forward(out, gate_up, activation);
        backend.activation_backward(gradient, Tensor(), dout, gate_up, activation);
        with_type(dtype, [&](auto zero) {
          using T = decltype(zero);
          check_close("out", out.values(), forward<T>(x, c, activation), forward<long double>(x, c, activation), dtype);
          check_close("dgate_up", gradient.values(), backward<T>(g, x, c, activation),
                      backward<long double>(g, x, c, activation), dtype);
        });
        const Values apart = gradient.values();
        DeviceTensor again(backend, dtype, {c.rows, c.width}, 5);
        backend.activation_backward(gradient, again, dout, gate_up, activation);
        CHECK(gradient.values() == apart);
        CHECK(again.values() == out.values());
        backend.activation_backward(gate_up, dout, dout, gate_up, activation);
        CHECK(gate_up.values() == apart);
        CHECK(dout.values() == out.values());
      }
  });
}

TEST_CASE("activation: gradients agree with finite differences") {
  const auto backend = make_cpu_backend(0);
  const Case c{3, 11};
  for (const Activation activation : activations) {
    CAPTURE(static_cast<int>(activation));
    const int64_t in = columns(c, activation);
    Values x = random_values(c.rows * in, 1, -4, 4);
    const Values g = random_values(c.rows * c.width, 2);
    DeviceTensor gate_up(*backend, DType::f64, {c.rows, in}, x), out(*backend, DType::f64, {c.rows, c.width}),
        dout(*backend, DType::f64, {c.rows, c.width}, g);
    DeviceTensor gradient(*backend, DType::f64, {c.rows, in});
    backend->activation_backward(gradient, Tensor(), dout, gate_up, activation);
    check_gradient("dgate_up", x, gradient.values(), [&] {
      gate_up.set(x);
      backend->activation_forward(out, gate_up, activation);
      return dot(out.values(), g);
    });
  }
}

TEST_CASE("activation: finite far out, 0 on the left and x on the right, NaN stays") {
  each_device([](Backend& backend, DType dtype) {
    const Values x = {-1e30, -200, -90, -0.0, 0, 90, 200, 1e30, 1, 1, 1, 1, 1, 1, 1, 1};
    for (const Activation activation : activations) {
      CAPTURE(static_cast<int>(activation));
      const int64_t in = is_gated(activation) ? 16 : 8;
      DeviceTensor gate_up(backend, dtype, {1, in}, Values(x.begin(), x.begin() + in)), out(backend, dtype, {1, 8}),
          dout(backend, dtype, {1, 8}, 1), gradient(backend, dtype, {1, in});
      backend.activation_forward(out, gate_up, activation);
      backend.activation_backward(gradient, Tensor(), dout, gate_up, activation);
      for (double v : out.values()) CHECK(std::isfinite(v));
      for (double v : gradient.values()) CHECK(std::isfinite(v));
      CHECK(out.values()[0] == 0);
      CHECK(out.values()[7] == rounded(1e30, dtype));
      CHECK(gradient.values()[0] == 0);
      CHECK(gradient.values()[7] == 1);
      gate_up.set(Values(static_cast<size_t>(in), std::nan("")));
      backend.activation_forward(out, gate_up, activation);
      for (double v : out.values()) CHECK(std::isnan(v));
    }
  });
}

TEST_CASE("activation: refuses an odd width where there is a gate, and other shapes") {
  each_device([](Backend& backend, DType dtype) {
    DeviceTensor odd(backend, dtype, {2, 7}), even(backend, dtype, {2, 8}), out(backend, dtype, {2, 3});
    const auto swiglu = Activation::swiglu, relu = Activation::relu;
    check_refuses([&] { backend.activation_forward(out, odd, swiglu); }, "activation_forward", "[2, 7]");
    check_refuses([&] { backend.activation_forward(out, even, swiglu); }, "activation_forward", "output is [2, 3]");
    check_refuses([&] { backend.activation_forward(out, odd, relu); }, "activation_forward", "output is [2, 3]");
    check_refuses([&] { backend.activation_backward(even, Tensor(), out, even, swiglu); }, "activation_backward",
                  "output gradient is [2, 3]");
    check_refuses([&] { backend.activation_backward(odd, out, odd, odd, relu); }, "activation_backward",
                  "output is [2, 3]");
    check_refuses([&] { backend.activation_backward(even, odd, odd, odd, relu); }, "activation_backward",
                  "gate_up gradient is [2, 8]");
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
