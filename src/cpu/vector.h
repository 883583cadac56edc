// Vectors of the machine's width, rows for threads: what the CPU rooms share. A room reads and writes T (float, bf16 or
// double) and computes in the vector of its accumulation type A (float, float, double).
#pragma once

#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "src/tensor.h"

namespace orpo::cpu {

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64;
#elif defined(__AVX__)
inline constexpr int vector_bytes = 32;
#else
inline constexpr int vector_bytes = 16;
#endif

template <class T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <class T> using Accumulator = typename AccumulatorOf<T>::type;

template <class A> inline constexpr int lanes = vector_bytes / static_cast<int>(sizeof(A));

template <class A> struct VectorOf;
template <> struct VectorOf<float> {
  typedef float type __attribute__((vector_size(vector_bytes)));
  typedef int32_t integers __attribute__((vector_size(vector_bytes)));
};
template <> struct VectorOf<double> {
  typedef double type __attribute__((vector_size(vector_bytes)));
  typedef int64_t integers __attribute__((vector_size(vector_bytes)));
};
template <class A> using Vector = typename VectorOf<A>::type;
typedef uint32_t Words __attribute__((vector_size(vector_bytes)));
typedef uint16_t HalfWords __attribute__((vector_size(vector_bytes / 2)));

// Calls body with T's zero for the tensor's dtype: the one switch of a launcher.
template <class Body> void with_dtype(const char* op, DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bf16{});
    case DType::f64:
      return body(double{});
    default:
      fail_machine(op, ": needs fp32, bf16 or fp64; got ", dtype_name(dtype));
  }
}

// How many entries a load or store touches: Full at compile time, or the count of a tail.
template <class A> using Full = std::integral_constant<int, lanes<A>>;

// body(i, count) over n entries in steps of a vector of A; count is Full<A> but for the tail.
template <class A, class Body> inline void for_vectors(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + lanes<A> <= n; i += lanes<A>) body(i, Full<A>{});
  if (i < n) body(i, static_cast<int>(n - i));
}

template <class A> inline Vector<A> splat(A value) { return value - Vector<A>{}; }

inline Vector<float> widen(HalfWords h) {
  return std::bit_cast<Vector<float>>(__builtin_convertvector(h, Words) << 16);
}

// As bf16's constructor, a vector at a time.
inline HalfWords narrow(Vector<float> value) {
  const Words u = std::bit_cast<Words>(value);
  const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Words quiet_nan = (u >> 16) | 0x40u;
  return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded, HalfWords);
}

// What a store to bf16 writes. The instruction rounds as narrow does, but takes subnormal floats (below 1.2e-38) as 0,
// as the products that read bf16 do with theirs.
inline HalfWords stored(Vector<float> value) {
#if defined(__AVX512BF16__)
  return std::bit_cast<HalfWords>(_mm512_cvtneps_pbh(value));
#else
  return narrow(value);
#endif
}

template <class T> inline Vector<Accumulator<T>> load(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    HalfWords h;
    std::memcpy(&h, p, sizeof h);
    return widen(h);
  } else {
    Vector<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}

template <class T> inline void store(T* p, Vector<Accumulator<T>> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const HalfWords h = stored(v);
    std::memcpy(p, &h, sizeof h);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
// A tail in one masked instruction, which touches no memory past it.
inline __mmask32 first(int count) { return (__mmask32{1} << count) - 1; }
inline Vector<float> load_tail(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16(first(n)), p); }
inline Vector<double> load_tail(const double* p, int n) { return _mm512_maskz_loadu_pd(__mmask8(first(n)), p); }
inline Vector<float> load_tail(const bf16* p, int n) {
  return widen(std::bit_cast<HalfWords>(_mm256_maskz_loadu_epi16(__mmask16(first(n)), p)));
}
inline void store_tail(float* p, Vector<float> v, int n) { _mm512_mask_storeu_ps(p, __mmask16(first(n)), v); }
inline void store_tail(double* p, Vector<double> v, int n) { _mm512_mask_storeu_pd(p, __mmask8(first(n)), v); }
inline void store_tail(bf16* p, Vector<float> v, int n) {
  _mm256_mask_storeu_epi16(p, __mmask16(first(n)), std::bit_cast<__m256i>(stored(v)));
}
#else
template <class T> inline Vector<Accumulator<T>> load_tail(const T* p, int count) {
  T tail[lanes<Accumulator<T>>] = {};
  std::memcpy(tail, p, static_cast<size_t>(count) * sizeof(T));
  return load(tail);
}
template <class T> inline void store_tail(T* p, Vector<Accumulator<T>> v, int count) {
  T tail[lanes<Accumulator<T>>];
  store(tail, v);
  std::memcpy(p, tail, static_cast<size_t>(count) * sizeof(T));
}
#endif

// The first count entries; the rest of the vector is 0.
template <class T, class Count> inline Vector<Accumulator<T>> load(const T* p, Count count) {
  if constexpr (std::is_same_v<Count, int>)
    return load_tail(p, count);
  else
    return load(p);
}

template <class T, class Count> inline void store(T* p, Vector<Accumulator<T>> v, Count count) {
  if constexpr (std::is_same_v<Count, int>)
    store_tail(p, v, count);
  else
    store(p, v);
}

template <class V> inline V maximum(V a, V b) { return a > b ? a : b; }

// All lanes by halves: (v0 op v_half), ..., always in the same order.
template <class V, class Op, int... Low> inline auto fold_halves(V v, Op op, std::integer_sequence<int, Low...>) {
  constexpr int half = sizeof...(Low);
  if constexpr (half == 1) {
    return op(v[0], v[1]);
  } else {
    const auto folded = op(__builtin_shufflevector(v, v, Low...), __builtin_shufflevector(v, v, (Low + half)...));
    return fold_halves(folded, op, std::make_integer_sequence<int, half / 2>{});
  }
}

template <class A> inline A sum_lanes(Vector<A> v) {
  return fold_halves(
      v, [](auto a, auto b) { return a + b; }, std::make_integer_sequence<int, lanes<A> / 2>{});
}

// Of a vector of A for each lane: lane i of the result is the sum of all lanes of v[i] (v is used up). A level adds the
// halves of every block of lanes of a vector and of its partner, and puts the two sums side by side.
template <class A, int Block = lanes<A>> inline Vector<A> sum_each(Vector<A>* v) {
  constexpr int half = Block / 2, pairs = half;
  const auto halves = []<int... Lane>(Vector<A> a, Vector<A> b, std::integer_sequence<int, Lane...>) {
    constexpr auto from = [](int lane) {  // the first half of the block, of a or of b
      return lane / Block * Block + lane % half + (lane % Block < half ? 0 : lanes<A>);
    };
    return __builtin_shufflevector(a, b, from(Lane)...) + __builtin_shufflevector(a, b, (from(Lane) + half)...);
  };
  for (int i = 0; i < pairs; ++i) v[i] = halves(v[i], v[i + pairs], std::make_integer_sequence<int, lanes<A>>{});
  if constexpr (half == 1)
    return v[0];
  else
    return sum_each<A, half>(v);
}

template <class A> inline A maximum_of_lanes(Vector<A> v) {
  return fold_halves(
      v, [](auto a, auto b) { return maximum(a, b); }, std::make_integer_sequence<int, lanes<A> / 2>{});
}

template <class A> inline Vector<A> square_root(Vector<A> x) {
  A values[lanes<A>];
  std::memcpy(values, &x, sizeof x);
#pragma omp simd
  for (int i = 0; i < lanes<A>; ++i) values[i] = std::sqrt(values[i]);
  std::memcpy(&x, values, sizeof x);
  return x;
}

// exp to 1 ulp: x = k ln 2 + r with |r| <= ln 2 / 2, e^r by its series to r^7 / 7!, 2^k by scalef or in two factors, so
// that subnormal results keep their digits. 0 far below, infinity above, NaN stays.
inline Vector<float> exponential(Vector<float> x) {
  constexpr float log2_e = 0x1.715476p+0f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
  const Vector<float> low = splat(-110.f), high = splat(90.f);
#if defined(__AVX512F__)
  constexpr __mmask16 all = 0xffff;  // unmasked, g++ 12 warns of its own header
  x = _mm512_maskz_min_ps(all, high, _mm512_maskz_max_ps(all, low, x));
  const Vector<float> k = _mm512_maskz_roundscale_ps(all, x * log2_e, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  constexpr float to_integer = 0x1.8p+23f;  // adding it leaves the nearest integer in the low bits
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vector<float> shifted = x * log2_e + to_integer;
  const Vector<float> k = shifted - to_integer;
#endif
  const Vector<float> r = (x - k * ln2_high) - k * ln2_low;
  Vector<float> series = r * (1.f / 5040) + 1.f / 720;
  series = series * r + 1.f / 120;
  series = series * r + 1.f / 24;
  series = series * r + 1.f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.f;
  series = series * r + 1.f;
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(all, series, k);
#else
  using Integers = VectorOf<float>::integers;
  const Integers exponent = std::bit_cast<Integers>(shifted) - std::bit_cast<int32_t>(to_integer);
  const Integers half = exponent >> 1;
  const Vector<float> first = std::bit_cast<Vector<float>>((half + 127) << 23);
  const Vector<float> second = std::bit_cast<Vector<float>>((exponent - half + 127) << 23);
  return series * first * second;
#endif
}

inline Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// 2^x = 2^floor(x) * 2^r, r in [0, 1) by a polynomial through 1 at 0 of least relative error: 7e-8 for Terms 6,
// rounding included, 3e-6 for Terms 4 (enough before a rounding to bf16). 0 far below, infinity above, NaN stays.
template <int Terms> inline Vector<float> power_of_two(Vector<float> x) {
  static_assert(Terms == 4 || Terms == 6);
#if defined(__AVX512DQ__)
  const Vector<float> r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
#else
  constexpr float to_integer = 0x1.8p+23f;  // adding it leaves the nearest integer in the low bits
  const Vector<float> low = splat(-252.f), high = splat(129.f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vector<float> nearest = x + to_integer - to_integer;
  const Vector<float> floor = nearest > x ? nearest - 1.f : nearest;
  const Vector<float> r = x - floor;
#endif
  Vector<float> series;
  if constexpr (Terms == 4) {
    series = r * 0x1.b7f738p-7f + 0x1.abf866p-5f;
    series = series * r + 0x1.ee2452p-3f;
    series = series * r + 0x1.62d6c6p-1f;
  } else {
    series = r * 0x1.c5417ap-13f + 0x1.46d64cp-10f;
    series = series * r + 0x1.3d0b92p-7f;
    series = series * r + 0x1.c68912p-5f;
    series = series * r + 0x1.ebfd58p-3f;
    series = series * r + 0x1.62e42cp-1f;
  }
  series = series * r + 1.f;
#if defined(__AVX512DQ__)
  return _mm512_maskz_scalef_ps(0xffff, series, x);  // unmasked, g++ 12 warns of its own header
#else
  using Integers = VectorOf<float>::integers;  // in two factors, so that subnormal results keep their digits
  const Integers exponent = std::bit_cast<Integers>(floor + to_integer) - std::bit_cast<int32_t>(to_integer);
  const Integers half = exponent >> 1;
  return series * std::bit_cast<Vector<float>>((half + 127) << 23) *
         std::bit_cast<Vector<float>>((exponent - half + 127) << 23);
#endif
}

template <int Terms> inline Vector<double> power_of_two(Vector<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// body(row) for every row, rows dealt to threads in equal runs.
template <class Body> void for_rows(int64_t rows, Body&& body) {
#pragma omp parallel for schedule(static) if (rows > 1)
  for (int64_t row = 0; row < rows; ++row) body(row);
}

// body(first, count, part, parts) over columns in blocks of a few cache lines, each block once for every one of `parts`
// shares of a table's rows: those whose index has the low bits `part`. One share unless threads are many. For sums into
// the table in an order of the caller's: each entry is one task's own, so there is no lock and no dependence on the
// number of threads.
template <class Body> void for_column_blocks(int64_t columns, Body&& body) {
  constexpr int64_t block = 64, tasks_per_thread = 4, most_parts = 64;
  const int64_t blocks = (columns + block - 1) / block, tasks = tasks_per_thread * omp_get_max_threads();
  int64_t parts = 1;  // a power of two: a row's share is its index's low bits
  while (parts < most_parts && blocks * parts < tasks) parts *= 2;
  for_rows(blocks * parts, [&](int64_t task) {
    const int64_t begin = task / parts * block;
    body(begin, std::min(block, columns - begin), task % parts, parts);
  });
}

// total[width] += sum over rows, in an order that is fixed whatever the number of threads: body(partial, begin, end)
// adds rows [begin, end) of a block to its own zeroed partial[width]; the partials are then added block after block.
// Blocks are cut by the number of rows alone: 8 rows each up to 2,048, then 256 blocks.
template <class A, class Body> void add_row_blocks(A* total, int64_t rows, int64_t width, Body&& body) {
  const int64_t block = std::max<int64_t>(8, (rows + 255) / 256), blocks = (rows + block - 1) / block;
  const auto partials = std::make_unique_for_overwrite<A[]>(static_cast<size_t>(blocks * width));
  for_rows(blocks, [&](int64_t b) {
    A* partial = partials.get() + b * width;
    std::fill(partial, partial + width, A(0));
    body(partial, b * block, std::min(rows, (b + 1) * block));
  });
  for_rows((width + lanes<A> - 1) / lanes<A>, [&](int64_t v) {
    const int64_t begin = v * lanes<A>;
    const auto add = [&](auto n) {
      Vector<A> sum = load(total + begin, n);
      for (int64_t b = 0; b < blocks; ++b) sum += load(partials.get() + b * width + begin, n);
      store(total + begin, sum, n);
    };
    if (begin + lanes<A> <= width)
      add(Full<A>{});
    else
      add(static_cast<int>(width - begin));
  });
}

}  // namespace orpo::cpu
