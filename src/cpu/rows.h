// Rows by a list of indices (the embedding's tokens and positions, the head's target rows), and sums over rows.
#pragma once

#include <algorithm>

#include "src/cpu/vector.h"

namespace orpo::cpu {

inline void require_below(const char* op, const char* what, const Tensor& indices, int64_t limit) {
  const int32_t* index = indices.as<const int32_t>();
  for (int64_t i = 0; i < indices.elements(); ++i)
    REQUIRE_SHAPE(op, index[i] >= 0 && index[i] < limit, what, " ", i, " is ", index[i], " of ", limit);
}

// out[i] = table[indices[i]]
inline void copy_rows(const Tensor& out, const Tensor& table, const Tensor& indices) {
  const int64_t bytes = out.columns() * dtype_bytes(out.dtype);
  for_rows(out.rows(), [&](int64_t row) {
    std::memcpy(static_cast<char*>(out.data) + row * bytes,
                static_cast<const char*>(table.data) + indices.as<const int32_t>()[row] * bytes,
                static_cast<size_t>(bytes));
  });
}

// out[i] += table[indices[i]], rounded to T
template <class T>
void add_to_rows(const Tensor& out, const Tensor& table, const Tensor& indices) {
  using A = Accumulator<T>;
  const int64_t width = out.columns();
  for_rows(out.rows(), [&](int64_t row) {
    T* to = out.as<T>() + row * width;
    const T* from = table.as<const T>() + indices.as<const int32_t>()[row] * width;
    for_vectors<A>(width, [&](int64_t i, auto n) { store(to + i, load(to + i, n) + load(from + i, n), n); });
  });
}

// table[indices[i]] += rows[i], in the order of i, but where the index is `left_out`. A task owns some columns of some
// of the table's rows, so equal indices meet in that order.
template <class To, class From>
void add_rows(const Tensor& table, const Tensor& rows, const Tensor& indices, int64_t left_out = -1) {
  using A = Accumulator<From>;
  const int64_t width = rows.columns(), count = rows.rows();
  const int32_t* index = indices.as<const int32_t>();
  for_column_blocks(width, [&](int64_t begin, int64_t columns, int64_t part, int64_t parts) {
    for (int64_t row = 0; row < count; ++row) {
      if ((index[row] & (parts - 1)) != part || index[row] == left_out) continue;
      To* to = table.as<To>() + index[row] * width + begin;
      const From* from = rows.as<From>() + row * width + begin;
      for_vectors<A>(columns, [&](int64_t i, auto n) { store(to + i, load(to + i, n) + load(from + i, n), n); });
    }
  });
}

// total[columns] A += sum over the rows of a matrix: a bias's gradient.
template <class T>
void add_column_sums(const Tensor& total, const Tensor& rows) {
  using A = Accumulator<T>;
  add_row_blocks(total.as<A>(), rows.rows(), rows.columns(), [&](A* partial, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* from = rows.as<const T>() + row * rows.pitch();
      for_vectors<A>(rows.columns(),
                     [&](int64_t i, auto n) { store(partial + i, load(partial + i, n) + load(from + i, n), n); });
    }
  });
}

}  // namespace orpo::cpu
