// A tensor here is a view: a pointer, a dtype and a shape. Memory belongs to an Arena (arena.h); nothing is counted or
// freed by a view.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "src/fail.h"

namespace orpo {

// bfloat16: the upper half of a float, rounded to nearest even; NaN stays NaN.
struct bf16 {
  uint16_t bits;
  bf16() = default;
  explicit bf16(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (u >> 16) | 0x40u;
    bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
  }
  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};
static_assert(sizeof(bf16) == 2);

// f64 exists for the gradient checks: every operation also runs in double on the CPU. i16: corrections (master.h).
enum class DType : uint8_t { f32, bf16, f64, i32, i16 };

inline int64_t dtype_bytes(DType d) { return d == DType::bf16 || d == DType::i16 ? 2 : d == DType::f64 ? 8 : 4; }
inline const char* dtype_name(DType d) {
  return d == DType::f32    ? "fp32"
         : d == DType::bf16 ? "bf16"
         : d == DType::f64  ? "fp64"
         : d == DType::i32  ? "int32"
                            : "int16";
}

template <class T> inline constexpr DType dtype_of = DType::f32;
template <> inline constexpr DType dtype_of<bf16> = DType::bf16;
template <> inline constexpr DType dtype_of<double> = DType::f64;
template <> inline constexpr DType dtype_of<int32_t> = DType::i32;
template <> inline constexpr DType dtype_of<int16_t> = DType::i16;

// The dtype in which sums over values of a dtype are kept: statistics, logits, parameter gradients.
inline DType accumulation_dtype(DType d) { return d == DType::f64 ? DType::f64 : DType::f32; }

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  std::array<int64_t, 4> shape{};  // row-major
  int64_t row_pitch = 0;           // elements from one row to the next; 0: dense

  Tensor() = default;
  Tensor(void* memory, DType type, std::initializer_list<int64_t> dimensions) : data(memory), dtype(type) {
    for (int64_t d : dimensions) shape[rank++] = d;
  }

  explicit operator bool() const { return rank != 0; }  // a default tensor stands for "absent": no bias, no branch
  int64_t elements() const {
    int64_t n = rank == 0 ? 0 : 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  int64_t bytes() const { return elements() * dtype_bytes(dtype); }
  int64_t columns() const { return rank == 0 ? 0 : shape[rank - 1]; }
  int64_t rows() const { return columns() == 0 ? 0 : elements() / columns(); }
  int64_t pitch() const { return row_pitch ? row_pitch : columns(); }

  // The entries, where T (or const T) is the dtype's type; else MachineError.
  template <class T> T* as() const {
    constexpr DType wanted = dtype_of<std::remove_const_t<T>>;
    if (dtype != wanted) fail_machine("tensor of ", dtype_name(dtype), " read as ", dtype_name(wanted));
    return static_cast<T*>(data);
  }

  // Rows [begin, begin + count) of a matrix (or entries of a vector), same memory. MachineError where there are fewer.
  Tensor slice(int64_t begin, int64_t count) const {
    const int64_t stride = row_pitch ? row_pitch : rank == 0 || shape[0] == 0 ? 0 : elements() / shape[0];
    if (begin < 0 || count < 0 || begin + count > shape[0])
      fail_machine("slice [", begin, ", ", begin + count, ") of a tensor with ", shape[0], " rows");
    Tensor part = *this;
    part.shape[0] = count;
    if (data) part.data = static_cast<char*>(data) + begin * stride * dtype_bytes(dtype);
    return part;
  }
};

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int i = 0; i < t.rank; ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
  return text + "] " + dtype_name(t.dtype);
}

}  // namespace orpo
