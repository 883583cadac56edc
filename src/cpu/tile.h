// Products of small matrices that lie in cache: attention's tiles.
#pragma once

#include "src/cpu/vector.h"

namespace orpo::cpu {

// Rows of a register block: its sums, a row of b and a broadcast entry of a stay in registers.
inline constexpr int block_rows = vector_bytes == 64 ? 8 : 4;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class A, int Vectors>
inline void multiply_block(A* c, int64_t c_pitch, const A* a, int64_t a_row, int64_t a_column, const A* b,
                           int64_t b_pitch, int64_t depth, bool accumulate) {
  Vector<A> sums[block_rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < block_rows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) sums[r][v] = accumulate ? load(c + r * c_pitch + v * lanes<A>) : Vector<A>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<A> row[Vectors];
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) row[v] = load(b + k * b_pitch + v * lanes<A>);
#pragma GCC unroll 8
    for (int r = 0; r < block_rows; ++r) {
      const Vector<A> entry = splat(a[r * a_row + k * a_column]);
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) sums[r][v] += entry * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < block_rows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < Vectors; ++v) store(c + r * c_pitch + v * lanes<A>, sums[r][v]);
}

// c[rows, columns] = or += a[rows, depth] . b[depth, columns], with entry (i, k) of a at a[i * a_row + k * a_column] so
// that a transposed a costs nothing. rows is taken up to a multiple of block_rows and columns to one of a vector: c, a
// and b have that room.
template <class A>
void multiply_tile(A* c, int64_t c_pitch, const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t b_pitch,
                   int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  const auto blocks = [&]<int Vectors>(int64_t j, std::integral_constant<int, Vectors>) {
    for (int64_t i = 0; i < rows; i += block_rows)
      multiply_block<A, Vectors>(c + i * c_pitch + j, c_pitch, a + i * a_row, a_row, a_column, b + j, b_pitch, depth,
                                 accumulate);
    return Vectors * lanes<A>;
  };
  for (int64_t j = 0; j < columns;) {
    const int64_t left =
        (columns - j + lanes<A> - 1) / lanes<A>;  // vectors; four go as two and two, a single one is slow
    if (left == 3 || left > 4)
      j += blocks(j, std::integral_constant<int, 3>{});
    else if (left >= 2)
      j += blocks(j, std::integral_constant<int, 2>{});
    else
      j += blocks(j, std::integral_constant<int, 1>{});
  }
}

}  // namespace orpo::cpu
