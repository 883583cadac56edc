// Rotary position embedding, in place on the query and key heads.
#include <algorithm>

#include "src/cpu/backend.h"
#include "src/cpu/vector.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

// Cosines and sines of position * rope_frequency(i) for the positions seen so far: [positions][2][rotary_dim / 2],
// angles in double.
struct CpuBackend::RotaryTables {
  template <class A> struct Table {
    int rotary_dim = 0;
    double theta = 0;
    RopeScaling scaling;
    std::vector<A> values;

    void cover(const RopeShape& shape, int64_t positions) {
      if (rotary_dim != shape.rotary_dim || theta != shape.theta || scaling != shape.scaling) values.clear();
      rotary_dim = shape.rotary_dim, theta = shape.theta, scaling = shape.scaling;
      const int64_t half = rotary_dim / 2,
                    begin = static_cast<int64_t>(values.size()) / std::max<int64_t>(rotary_dim, 1);
      if (begin >= positions) return;
      values.resize(static_cast<size_t>(positions * rotary_dim));
      for_rows(positions - begin, [&](int64_t n) {
        A* row = values.data() + (begin + n) * rotary_dim;
        for (int64_t i = 0; i < half; ++i) {
          const double angle = static_cast<double>(begin + n) * rope_frequency(shape, static_cast<int>(i));
          row[i] = static_cast<A>(std::cos(angle));
          row[half + i] = static_cast<A>(std::sin(angle));
        }
      });
    }
  };
  Table<float> f32;
  Table<double> f64;
  template <class A> Table<A>& of() {
    if constexpr (std::is_same_v<A, double>)
      return f64;
    else
      return f32;
  }
};

namespace {

// (a, b) -> (a cos - b sin, b cos + a sin) for each pair (i, i + half) of a head.
template <class T>
void rotate_head(T* head, const Accumulator<T>* cosine, const Accumulator<T>* sine, int64_t half,
                 Accumulator<T> direction) {
  using A = Accumulator<T>;
  for_vectors<A>(half, [&](int64_t i, auto n) {
    const Vector<A> a = load(head + i, n), b = load(head + half + i, n), c = load(cosine + i, n),
                    s = load(sine + i, n) * direction;
    store(head + i, a * c - b * s, n);
    store(head + half + i, b * c + a * s, n);
  });
}

// direction 1 rotates, -1 rotates back.
template <class Tables>
void rotate(const char* op, Tables& tables, const Tensor& qkv, const Tensor& positions, const RopeShape& shape,
            int direction) {
  shapes::rope(op, qkv, positions, shape);
  const int32_t* position = positions.as<const int32_t>();
  const int64_t rows = qkv.rows(), half = shape.rotary_dim / 2;
  if (rows == 0) return;
  const auto range = std::minmax_element(position, position + rows);
  const int64_t least = *range.first, most = *range.second;
  REQUIRE_SHAPE(op, least >= 0, "a position is ", least);
  with_dtype(op, qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    auto& table = tables.template of<A>();
    table.cover(shape, most + 1);
    for_rows(rows, [&](int64_t row) {
      const A* cosine = table.values.data() + position[row] * shape.rotary_dim;
      for (int head = 0; head < shape.heads + shape.kv_heads; ++head)
        rotate_head(qkv.as<T>() + row * qkv.columns() + int64_t{head} * shape.head_dim, cosine, cosine + half, half,
                    A(direction));
    });
  });
}

}  // namespace

void CpuBackend::rope_forward(const Tensor& qkv, const Tensor& positions, const RopeShape& shape) {
  if (!tables_) tables_ = std::make_shared<RotaryTables>();
  rotate("rope_forward", *tables_, qkv, positions, shape, 1);
}

void CpuBackend::rope_backward(const Tensor& dqkv, const Tensor& positions, const RopeShape& shape) {
  if (!tables_) tables_ = std::make_shared<RotaryTables>();
  rotate("rope_backward", *tables_, dqkv, positions, shape, -1);
}

}  // namespace orpo
