// A product with few rows, as in decoding: out[rows, n] = in[rows, k] . weight[n, k]^T + bias[n]. Reading the weight
// from memory is what it costs, so each vector of it serves all rows while it is in a register. An entry of out is one
// dot product in one order, whatever the number of rows and threads.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "src/cpu/vector.h"

namespace orpo::cpu {

// More rows than these go to oneDNN.
inline constexpr int64_t few_rows = 16;

// A step of a dot product over entries of T: a vector widened to A or, where the CPU multiplies pairs of bf16
// (vdpbf16ps, which takes subnormal numbers as 0, as oneDNN's products do), twice as many entries as they are.
template <class T> struct Terms {
  using A = Accumulator<T>;
  static constexpr int count = lanes<A>;
  template <class Count> static Vector<A> read(const T* p, Count n) { return load(p, n); }
  static Vector<A> add(Vector<A> sum, Vector<A> a, Vector<A> b) { return sum + a * b; }
};
#if defined(__AVX512BF16__)
template <> struct Terms<bf16> {
  static constexpr int count = 32;
  static __m512bh read(const bf16* p, std::integral_constant<int, count>) {
    return std::bit_cast<__m512bh>(_mm512_loadu_si512(p));
  }
  static __m512bh read(const bf16* p, int n) {
    return std::bit_cast<__m512bh>(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
  }
  static Vector<float> add(Vector<float> sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
};
#endif

// sums[o][r] = weight row o . input row r
template <class T, int Outputs, int Rows>
void dot_products(Accumulator<T> (&sums)[Outputs][Rows], const T* weight, const T* in, int64_t in_pitch, int64_t k) {
  using A = Accumulator<T>;
  Vector<A> partial[Outputs][Rows] = {};
  const auto step = [&](int64_t i, auto n) {
    decltype(Terms<T>::read(weight, n)) w[Outputs];
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; ++o) {
      __builtin_prefetch(weight + (Outputs + o) * k + i);  // the rows that come next
      w[o] = Terms<T>::read(weight + o * k + i, n);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const auto x = Terms<T>::read(in + r * in_pitch + i, n);
#pragma GCC unroll 8
      for (int o = 0; o < Outputs; ++o) partial[o][r] = Terms<T>::add(partial[o][r], w[o], x);
    }
  };
  constexpr int wide = Terms<T>::count;
  int64_t i = 0;
  for (; i + wide <= k; i += wide) step(i, std::integral_constant<int, wide>{});
  if (i < k) step(i, static_cast<int>(k - i));
  for (int o = 0; o < Outputs; ++o)
    for (int r = 0; r < Rows; ++r) sums[o][r] = sum_lanes<A>(partial[o][r]);
}

// body(std::integral_constant<int, count>), count in [1, number of Index].
template <int... Index, class Body>
void with_count(std::integer_sequence<int, Index...>, int64_t count, const Body& body) {
  ((count == Index + 1 ? body(std::integral_constant<int, Index + 1>{}) : void()), ...);
}

// Out is T or A; bias may be null; adds: out +=; pitches are in entries, and the weight is dense. Threads own blocks
// of weight rows, which stay in cache while the input rows pass in groups.
template <class T, class Out>
void multiply_few_rows(Out* out, int64_t out_pitch, const T* in, int64_t in_pitch, const T* weight, const T* bias,
                       int64_t rows, int64_t n, int64_t k, bool adds = false) {
  using A = Accumulator<T>;
  constexpr int outputs = 4, most = vector_bytes == 64 ? 6 : 2;  // their products, sums and factors fit the registers
  const int64_t groups = (rows + most - 1) / most, group = (rows + groups - 1) / groups;
  const auto block = [&]<int Outputs>(int64_t first, std::integral_constant<int, Outputs>) {
    for (int64_t row = 0; row < rows; row += group)
      with_count(std::make_integer_sequence<int, most>{}, std::min(group, rows - row), [&]<int Rows>(
                     std::integral_constant<int, Rows>) {
        A sums[Outputs][Rows];
        dot_products<T, Outputs, Rows>(sums, weight + first * k, in + row * in_pitch, in_pitch, k);
        for (int o = 0; o < Outputs; ++o)
          for (int r = 0; r < Rows; ++r) {
            Out& to = out[(row + r) * out_pitch + first + o];
            const A sum = bias ? sums[o][r] + A(bias[first + o]) : sums[o][r];
            to = Out(adds ? A(to) + sum : sum);
          }
      });
  };
  for_rows((n + outputs - 1) / outputs, [&](int64_t b) {
    const int64_t first = b * outputs;
    if (first + outputs <= n) return block(first, std::integral_constant<int, outputs>{});
    for (int64_t o = first; o < n; ++o) block(o, std::integral_constant<int, 1>{});
  });
}

}  // namespace orpo::cpu
