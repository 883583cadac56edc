// What the tests of the rooms share: one body over backend x dtype, tensors of a device, the tolerance rule, finite
// differences.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "src/backend.h"
#include "tests/emulated.h"

// A case that lacks what it needs: says why and ends, counted as skipped.
#define SKIP_CASE(why)                                      \
  do {                                                      \
    ++orpo::test::skipped_cases;                            \
    std::printf("skipped: %s\n", std::string(why).c_str()); \
    return;                                                 \
  } while (0)

namespace orpo::test {

inline unsigned skipped_cases = 0;

using Values = std::vector<double>;

// ---- backends

struct Device {
  std::string name;
  std::function<std::unique_ptr<Backend>()> make;
  std::vector<DType> dtypes;
  bool emulated = false;
};

// The emulated GPU comes once for each order of its threads; a real one, where the environment asks for it, alone.
inline const std::vector<Device>& devices() {
  static const std::vector<Device> all = [] {
    std::vector<Device> list;
    const std::vector<DType> dtypes{DType::f32, DType::bf16};
    const auto emulated = [&](const char* order, emulator::Settings settings) {
      list.push_back({std::string("cuda-emulated, ") + order, [settings] { return make_emulated_backend(settings); },
                      dtypes, true});
    };
    using emulator::Order;
    if (tests_device("cuda")) list.push_back({"cuda", make_gpu_backend, dtypes});
    if (tests_device("cuda-emulated")) emulated("reverse", {.order = Order::reverse});
#ifndef __SANITIZE_THREAD__  // in any order it sees the same races; and not how OpenMP's threads wait for each other
    if (tests_device("cuda-emulated")) {
      emulated("forward", {.order = Order::forward});
      emulated("random, two threads", {.order = Order::random, .seed = 1, .threads = 2});
      emulated("another random", {.order = Order::random, .seed = 2});
    }
    if (tests_device("cpu"))
      list.push_back({"cpu", [] { return make_cpu_backend(0); }, {DType::f64, DType::f32, DType::bf16}});
#endif
    return list;
  }();
  return all;
}

// body(backend, dtype) for every backend and dtype. What the emulated GPU computes is the same bit by bit in every
// order of its threads.
template <class Body> void each_device(Body&& body) {
  std::map<DType, uint64_t> bits;
  for (const Device& device : devices())
    for (DType dtype : device.dtypes) {
      INFO(device.name, " ", std::string(dtype_name(dtype)));
      const auto backend = device.make();
      body(*backend, dtype);
      if (device.emulated) CHECK(bits.try_emplace(dtype, downloaded(*backend)).first->second == downloaded(*backend));
    }
}

// Calls body with a zero of the dtype's type: naive implementations are templates over it.
template <class Body> void with_type(DType dtype, Body&& body) {
  if (dtype == DType::f64)
    body(double{});
  else if (dtype == DType::f32)
    body(float{});
  else
    body(bf16{});
}

// The type that sums are kept in; the reference sums in long double.
template <class T> struct SumOf { using type = float; };
template <> struct SumOf<double> { using type = double; };
template <> struct SumOf<long double> { using type = long double; };
template <class T> using Sum = typename SumOf<T>::type;

// A sum as a T: a naive implementation stores every intermediate tensor in its dtype.
template <class T> T to(Sum<T> value) { return T(value); }

// ---- refusals

// The operation throws a MachineError that names it and holds these words.
template <class Body> void check_refuses(Body&& body, const std::string& operation, const std::string& words = "") {
  try {
    body();
  } catch (const MachineError& e) {
    const std::string text = e.what();
    INFO(text);
    CHECK(text.rfind(operation + ": needs ", 0) == 0);
    CHECK(text.find(words) != std::string::npos);
    CHECK(text.find('\n') == std::string::npos);
    return;
  }
  FAIL_CHECK(operation, " accepted what it must refuse");
}

// ---- values

// Seeded, the same everywhere: uniform in [low, high) (splitmix64's finaliser over a counter).
inline Values random_values(int64_t count, uint64_t seed, double low = -1, double high = 1) {
  Values values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) {
    uint64_t x = (seed << 32) + i + 0x9e3779b97f4a7c15u * (seed + 1);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    values[i] = low + (high - low) * static_cast<double>((x ^ (x >> 31)) >> 11) * 0x1p-53;
  }
  return values;
}

inline double rounded(double value, DType dtype) {
  return dtype == DType::f64   ? value
         : dtype == DType::f32 ? static_cast<float>(value)
                               : float(bf16(static_cast<float>(value)));
}
inline Values rounded(Values values, DType dtype) {
  for (double& v : values) v = rounded(v, dtype);
  return values;
}

inline Values plus(Values a, const Values& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

// The values as a vector of T (long double, double, float or bf16).
template <class T> std::vector<T> typed(const Values& values) {
  std::vector<T> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    if constexpr (std::is_same_v<T, bf16>)
      out[i] = T(static_cast<float>(values[i]));
    else
      out[i] = static_cast<T>(values[i]);
  }
  return out;
}
template <class T> Values untyped(const std::vector<T>& values) {
  Values out(values.size());
  for (size_t i = 0; i < values.size(); ++i) out[i] = static_cast<double>(values[i]);
  return out;
}

// A tensor in a device's memory.
class DeviceTensor {
 public:
  DeviceTensor(Backend& backend, DType dtype, std::initializer_list<int64_t> shape, const Values& values)
      : DeviceTensor(backend, Tensor(nullptr, dtype, shape)) {
    REQUIRE(static_cast<int64_t>(values.size()) == tensor_.elements());
    set(values);
  }
  DeviceTensor(Backend& backend, DType dtype, std::initializer_list<int64_t> shape, double fill = 0)
      : DeviceTensor(backend, dtype, shape,
                     Values(static_cast<size_t>(Tensor(nullptr, dtype, shape).elements()), fill)) {}
  DeviceTensor(const DeviceTensor&) = delete;
  DeviceTensor(DeviceTensor&& other) noexcept : backend_(other.backend_), tensor_(other.tensor_) {
    other.tensor_.data = nullptr;
  }
  ~DeviceTensor() {
    if (tensor_.data) backend_.release(tensor_.data, bytes());
  }

  operator const Tensor&() const { return tensor_; }
  const Tensor& operator*() const { return tensor_; }

  void set(const Values& values) {
    std::vector<char> host(static_cast<size_t>(bytes()));
    const auto fill = [&](auto* p) {
      using T = std::remove_reference_t<decltype(*p)>;
      const std::vector<T> converted = typed<T>(values);
      std::copy(converted.begin(), converted.end(), p);
    };
    if (tensor_.dtype == DType::i32)
      fill(reinterpret_cast<int32_t*>(host.data()));
    else if (tensor_.dtype == DType::i16)
      fill(reinterpret_cast<int16_t*>(host.data()));
    else
      with_type(tensor_.dtype, [&](auto zero) { fill(reinterpret_cast<decltype(zero)*>(host.data())); });
    backend_.upload(tensor_, host.data());
  }
  Values values() const {
    std::vector<char> host(static_cast<size_t>(bytes()));
    backend_.download(host.data(), tensor_);
    Values out;
    const auto read = [&](const auto* p) {
      for (int64_t i = 0; i < tensor_.elements(); ++i) out.push_back(static_cast<double>(p[i]));
    };
    if (tensor_.dtype == DType::i32)
      read(reinterpret_cast<const int32_t*>(host.data()));
    else if (tensor_.dtype == DType::i16)
      read(reinterpret_cast<const int16_t*>(host.data()));
    else
      with_type(tensor_.dtype, [&](auto zero) { read(reinterpret_cast<const decltype(zero)*>(host.data())); });
    return out;
  }

 private:
  DeviceTensor(Backend& backend, const Tensor& shape) : backend_(backend), tensor_(shape) {
    tensor_.data = backend.allocate(bytes());
  }
  int64_t bytes() const { return std::max<int64_t>(tensor_.bytes(), 1); }

  Backend& backend_;
  Tensor tensor_;
};

// A tensor that begins some entries past an aligned address.
class ShiftedTensor {
 public:
  ShiftedTensor(Backend& backend, DType dtype, std::initializer_list<int64_t> shape, const Values& values,
                int64_t shift)
      : memory_(backend, dtype, {shift + static_cast<int64_t>(values.size())}, padded(values, shift)),
        view_(static_cast<char*>((*memory_).data) + shift * dtype_bytes(dtype), dtype, shape),
        shift_(shift) {
    REQUIRE(view_.elements() == static_cast<int64_t>(values.size()));
  }
  ShiftedTensor(Backend& backend, DType dtype, std::initializer_list<int64_t> shape, double fill, int64_t shift)
      : ShiftedTensor(backend, dtype, shape,
                      Values(static_cast<size_t>(Tensor(nullptr, dtype, shape).elements()), fill), shift) {}
  operator const Tensor&() const { return view_; }
  Values values() const {
    const Values all = memory_.values();
    return {all.begin() + shift_, all.end()};
  }

 private:
  static Values padded(Values values, int64_t shift) {
    values.insert(values.begin(), static_cast<size_t>(shift), 99);
    return values;
  }
  DeviceTensor memory_;
  Tensor view_;
  int64_t shift_;
};

// ---- the tolerance rule

inline double largest_error(const Values& a, const Values& b) {
  REQUIRE(a.size() == b.size());
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double error = a[i] == b[i] ? 0 : std::abs(a[i] - b[i]);
    if (!(error <= worst)) worst = error;  // NaN counts
  }
  return worst;
}

inline double largest(const Values& a) {
  double most = 0;
  for (double v : a) most = std::max(most, std::abs(v));
  return most;
}

inline double spacing(DType dtype) { return dtype == DType::f64 ? 0x1p-52 : dtype == DType::f32 ? 0x1p-23 : 0x1p-7; }

// Equal to so many digits, however small both are (doctest's Approx compares absolutely below 1).
inline bool same_digits(double a, double b, double relative) {
  return a == b || std::abs(a - b) <= relative * std::max(std::abs(a), std::abs(b));
}

// The error against a reference of higher precision is at most k times that of a naive implementation in the same
// precision. A naive result can be exact by luck, so some spacings of dtype at the largest reference value are always
// allowed.
inline void check_close(const char* what, const Values& actual, const Values& naive, const Values& reference,
                        DType dtype, double k = 2, double spacings = 2) {
  const double error = largest_error(actual, reference), naive_error = largest_error(naive, reference);
  const double allowed = k * naive_error + spacings * spacing(dtype) * largest(reference);
  INFO(std::string(what), ": error ", error, ", naive error ", naive_error, ", allowed ", allowed);
  CHECK(error <= allowed);
}

// ---- finite differences

// analytic[i] = d loss / d x[i], by central differences of fourth order in double on up to `most` entries spread over
// x. loss reads x.
inline void check_gradient(const char* what, Values& x, const Values& analytic, const std::function<double()>& loss,
                           double tolerance = 1e-7, size_t most = 150) {
  REQUIRE(x.size() == analytic.size());
  constexpr double h = 1e-3;
  const double scale = std::max(1e-3, largest(analytic));
  const size_t stride = std::max<size_t>(1, x.size() / most);
  double worst = 0;
  size_t where = 0;
  for (size_t i = 0; i < x.size(); i += stride) {
    const double kept = x[i];
    const auto at = [&](double step) { return x[i] = kept + step * h, loss(); };
    const double slope = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h);
    x[i] = kept;
    const double error = std::abs(slope - analytic[i]) / scale;
    if (!(error <= worst)) worst = error, where = i;
  }
  INFO(std::string(what), ": entry ", where, " off by ", worst, " of the largest");
  CHECK(worst <= tolerance);
}

inline double dot(const Values& a, const Values& b) {
  REQUIRE(a.size() == b.size());
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace orpo::test
