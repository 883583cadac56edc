#include "cuda/emulator/product.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cuda/emulator/types.h"

namespace orpo::emulator {

namespace {

float read(const void* data, bool is_bf16, int64_t at) {
  return is_bf16 ? to_float(static_cast<const bf16*>(data)[at]) : static_cast<const float*>(data)[at];
}
void write(void* data, bool is_bf16, int64_t at, float value) {
  if (is_bf16)
    static_cast<bf16*>(data)[at] = to_bf16(value);
  else
    static_cast<float*>(data)[at] = value;
}
float entry(const ColumnMajor& m, int64_t i, int64_t j) {
  return read(m.data, m.bf16, m.transposed ? j + i * m.leading : i + j * m.leading);
}

// How many of d's rows are computed together.
constexpr int64_t strip = 64;

// sum[i] = the part [begin, end) of column j's sums, for a strip of rows; a[k][strip], b[k].
void add_up(float (&sum)[strip], const float* a, const float* b, int64_t begin, int64_t end, int64_t block) {
  std::fill(sum, sum + strip, 0.0f);
  for (int64_t k = begin; k < end; k += block) {
    float terms[strip] = {};
    for (int64_t l = k; l < std::min(k + block, end); ++l)
      for (int64_t i = 0; i < strip; ++i) terms[i] += a[l * strip + i] * b[l];
    for (int64_t i = 0; i < strip; ++i) sum[i] += terms[i];
  }
}

}  // namespace

void ColumnMajorProduct::run() const {
  static std::atomic<int64_t> runs{0};
  const int64_t m = d.rows, n = d.columns, depth = a.transposed ? a.rows : a.columns;
  const int64_t part = (depth + summation.splits - 1) / summation.splits;
  const int64_t first = summation.in_place ? runs++ : 0;
  std::vector<float> strip_of_a(static_cast<size_t>(depth * strip)), columns_of_b(static_cast<size_t>(depth * n));
  for (int64_t j = 0; j < n; ++j)
    for (int64_t k = 0; k < depth; ++k) columns_of_b[static_cast<size_t>(j * depth + k)] = entry(b, k, j);
  for (int64_t begin = 0; begin < m; begin += strip) {
    const int64_t count = std::min(strip, m - begin);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < count; ++i) strip_of_a[static_cast<size_t>(k * strip + i)] = entry(a, begin + i, k);
    for (int64_t j = 0; j < n; ++j) {
      float total[strip] = {}, sum[strip];
      for (int64_t s = 0; s < summation.splits; ++s) {
        const int64_t from = (s + first) % summation.splits * part;
        add_up(sum, strip_of_a.data(), &columns_of_b[static_cast<size_t>(j * depth)], from,
               std::min(from + part, depth), summation.block);
        for (int64_t i = 0; i < strip; ++i) {
          total[i] += sum[i];
          if (summation.in_place && d.bf16) total[i] = to_float(to_bf16(total[i]));
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        float value = alpha * total[i];
        if (beta != 0) value += beta * entry(c, begin + i, j);
        if (bias) value += read(bias, d.bf16, begin + i);
        write(d.data, d.bf16, begin + i + j * d.leading, value);
      }
    }
  }
}

}  // namespace orpo::emulator
