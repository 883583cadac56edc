// Products of small matrices that lie in cache, attention's tiles, and the layouts that they read.
//
// A product runs over words: an entry each, or, for bf16 on a CPU that multiplies pairs (vdpbf16ps), two entries that
// are neighbours along the depth. Its left matrix is read a word at a time; its right one has words in rows:
//   rows    [n][width]                     entries as they come, two words' entries side by side: depth along the width
//   turned  [width / step][n]              words of `rows`, transposed
//   paired  [n / step][width]              words that join the same column of `step` rows: depth along the rows
#pragma once

#include "src/cpu/vector.h"

namespace orpo::cpu {

// Rows of a register block: its sums, words of b and one of a stay in registers.
inline constexpr int block_rows = vector_bytes == 64 ? 8 : 4;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t round_down(int64_t n, int64_t to) { return n / to * to; }

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define ORPO_BF16_PAIRS
#endif

// What products of a T read: words of `step` entries.
template <class T> struct Operand {
  using Entry = Accumulator<T>;
  using Word = Entry;
  static constexpr int step = 1;
};
template <class W> struct WordVectorOf { using type = Vector<W>; };
template <class V> inline void multiply_add(V& sum, V a, V b) { sum += a * b; }

#if defined(ORPO_BF16_PAIRS)
template <> struct Operand<bf16> {
  using Entry = bf16;
  using Word = uint32_t;
  static constexpr int step = 2;
};
template <> struct WordVectorOf<uint32_t> { using type = Words; };
inline void multiply_add(Vector<float>& sum, Words a, Words b) {
  sum = _mm512_dpbf16_ps(sum, std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b));
}
#endif

template <class W> using WordVector = typename WordVectorOf<W>::type;

template <class W> inline WordVector<W> load_words(const W* p) {
  WordVector<W> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class A> inline bool any_above(Vector<A> v, A value) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) return _mm512_cmp_ps_mask(v, splat(value), _CMP_GT_OQ) != 0;
#endif
  return maximum_of_lanes<A>(v) > value;
}

// ---- layouts

// The transpose of a square of words, by halves: lanes whose number has bit Half change places with rows that have it.
template <class V, int Half, size_t... Lane> inline void exchange(V& low, V& high, std::index_sequence<Lane...>) {
  constexpr int n = sizeof...(Lane);
  const V a = low, b = high;
  low = __builtin_shufflevector(a, b, (int(Lane) & Half ? n + int(Lane) - Half : int(Lane))...);
  high = __builtin_shufflevector(a, b, (int(Lane) & Half ? n + int(Lane) : int(Lane) + Half)...);
}
template <class V, int Half, size_t N> inline void transpose_square(V (&square)[N]) {
#pragma GCC unroll 16
  for (size_t i = 0; i < N; ++i)
    if (!(i & Half)) exchange<V, Half>(square[i], square[i + Half], std::make_index_sequence<N>{});
  if constexpr (Half > 1) transpose_square<V, Half / 2>(square);
}

// to[columns, to_pitch] = from[rows, from_pitch] transposed; both counts are taken up to whole vectors.
template <class W>
void transpose(W* to, int64_t to_pitch, const W* from, int64_t from_pitch, int64_t rows, int64_t columns) {
  using V = WordVector<W>;
  constexpr int n = sizeof(V) / sizeof(W);
  for (int64_t r = 0; r < rows; r += n)
    for (int64_t c = 0; c < columns; c += n) {
      V square[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) square[i] = load_words(from + (r + i) * from_pitch + c);
      transpose_square<V, n / 2>(square);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) std::memcpy(to + (c + i) * to_pitch + r, &square[i], sizeof(V));
    }
}

// One vector of each of `step` neighbouring rows: stored as rows of entries, `pitch` apart, or as paired words.
template <class A> inline void store_rows(A* to, int64_t /*pitch*/, const Vector<A> (&row)[1]) { store(to, row[0]); }
template <class A> inline void store_paired(A* to, const Vector<A> (&row)[1]) { store(to, row[0]); }

// `rows` in the layout `paired`, at `to`, or, where the two are one, as they are.
template <class A> inline const A* pair_rows(A* /*to*/, const A* rows, int64_t /*count*/, int64_t /*width*/) {
  return rows;
}

#if defined(ORPO_BF16_PAIRS)
typedef uint16_t TwoRows __attribute__((vector_size(vector_bytes)));

inline TwoRows rounded(const Vector<float> (&row)[2]) {
  return std::bit_cast<TwoRows>(_mm512_cvtne2ps_pbh(row[1], row[0]));
}

inline void store_rows(bf16* to, int64_t pitch, const Vector<float> (&row)[2]) {
  const TwoRows r = rounded(row);
  const HalfWords low = __builtin_shufflevector(r, r, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                  high = __builtin_shufflevector(r, r, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
  std::memcpy(to, &low, sizeof low);
  std::memcpy(to + pitch, &high, sizeof high);
}

// Two vectors side by side, in a register: through memory a load would wait for both their stores.
inline TwoRows joined(HalfWords low, HalfWords high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
                                 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
}

inline Words paired(TwoRows r) {
  return std::bit_cast<Words>(__builtin_shufflevector(r, r, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8,
                                                      24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}
// The first n entries of a row and of another (null: zeros), the rest 0.
template <class Count> inline Words paired(const bf16* row, const bf16* other, Count n) {
  const auto read = [&](const bf16* p) { return (HalfWords)_mm256_maskz_loadu_epi16(__mmask16(first(n)), p); };
  return paired(joined(read(row), other ? read(other) : HalfWords{}));
}
inline void store_paired(uint32_t* to, TwoRows rows) {
  const Words words = paired(rows);
  std::memcpy(to, &words, sizeof words);
}
inline void store_paired(uint32_t* to, const Vector<float> (&row)[2]) { store_paired(to, rounded(row)); }

inline const uint32_t* pair_rows(uint32_t* to, const bf16* rows, int64_t count, int64_t width) {
  for (int64_t r = 0; r < count; r += 2)
    for (int64_t i = 0; i < width; i += lanes<float>) {
      HalfWords two[2];
      std::memcpy(&two[0], rows + r * width + i, sizeof two[0]);
      std::memcpy(&two[1], rows + (r + 1) * width + i, sizeof two[1]);
      store_paired(to + r / 2 * width + i, joined(two[0], two[1]));
    }
  return to;
}
#endif

// ---- products

// A register block of multiply_tile: block_rows rows of c, Vectors vectors wide.
template <class A, class W, int Vectors>
inline void multiply_block(A* c, int64_t c_pitch, const W* a, int64_t a_row, int64_t a_column, const W* b,
                           int64_t b_pitch, int64_t depth, bool accumulate) {
  Vector<A> sums[block_rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < block_rows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) sums[r][v] = accumulate ? load(c + r * c_pitch + v * lanes<A>) : Vector<A>{};
  for (int64_t k = 0; k < depth; ++k) {
    WordVector<W> row[Vectors];
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) row[v] = load_words(b + k * b_pitch + v * lanes<A>);
#pragma GCC unroll 8
    for (int r = 0; r < block_rows; ++r) {
      const WordVector<W> word = a[r * a_row + k * a_column] - WordVector<W>{};
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) multiply_add(sums[r][v], word, row[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < block_rows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) store(c + r * c_pitch + v * lanes<A>, sums[r][v]);
}

// c[rows, columns] = or += a[rows, depth] . b[depth, columns], depth in words, with word (i, k) of a at
// a[i * a_row + k * a_column] so that a transposed a costs nothing. rows is taken up to a multiple of block_rows and
// columns to one of a vector: c, a and b have that room.
template <class A, class W>
void multiply_tile(A* c, int64_t c_pitch, const W* a, int64_t a_row, int64_t a_column, const W* b, int64_t b_pitch,
                   int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  const auto blocks = [&]<int Vectors>(int64_t j, std::integral_constant<int, Vectors>) {
    for (int64_t i = 0; i < rows; i += block_rows)
      multiply_block<A, W, Vectors>(c + i * c_pitch + j, c_pitch, a + i * a_row, a_row, a_column, b + j, b_pitch, depth,
                                    accumulate);
    return Vectors * lanes<A>;
  };
  for (int64_t j = 0; j < columns;) {
    const int64_t left = (columns - j + lanes<A> - 1) / lanes<A>;  // vectors; four go as two and two: one alone is slow
    if (left == 3 || left > 4)
      j += blocks(j, std::integral_constant<int, 3>{});
    else if (left >= 2)
      j += blocks(j, std::integral_constant<int, 2>{});
    else
      j += blocks(j, std::integral_constant<int, 1>{});
  }
}

}  // namespace orpo::cpu
