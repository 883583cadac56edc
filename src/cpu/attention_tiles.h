// The tiles of attention: which rows of the packed stream meet, and how they are unpacked.
#pragma once

#include <algorithm>

#include "src/backend.h"
#include "src/cpu/tile.h"

namespace orpo::cpu {

inline constexpr int64_t key_tile = 64;

enum Part : int32_t { trunk, chosen, rejected };

// Rows [row, row + count) of the stream, all of one part of one segment, at positions from position on.
struct Tile {
  Part part;
  int32_t row, count, position;
  int32_t last() const { return position + count - 1; }
};

// Whether some query of q sees some key of k: same sequence, not after, within the window.
inline bool meets(const Tile& q, const Tile& k, int window) {
  return (k.part == trunk || k.part == q.part) && k.position <= q.last() &&
         (window == 0 || k.last() > q.position - window);
}

struct Tiles {
  std::vector<Tile> tiles;
  std::vector<int64_t> first;  // [segments + 1] index of a segment's first tile

  Tiles(const Segment* segments, int64_t count, int64_t rows_per_tile) : first{0} {
    for (int64_t s = 0; s < count; ++s) {
      const Segment& at = segments[s];
      add(trunk, at.begin, at.trunk, 0, rows_per_tile);
      add(chosen, at.begin + at.trunk, at.chosen, at.trunk, rows_per_tile);
      add(rejected, at.begin + at.trunk + at.chosen, at.rejected, at.trunk, rows_per_tile);
      first.push_back(static_cast<int64_t>(tiles.size()));
    }
  }

 private:
  void add(Part part, int32_t row, int32_t rows, int32_t position, int64_t rows_per_tile) {
    for (int32_t r = 0; r < rows; r += static_cast<int32_t>(rows_per_tile))
      tiles.push_back({part, row + r, std::min(rows - r, static_cast<int32_t>(rows_per_tile)), position + r});
  }
};

// The segments are the whole stream, in order: every row belongs to exactly one.
inline const Segment* segments_of(const char* op, const DeviceBatch& batch, int64_t rows) {
  static_assert(sizeof(Segment) == 4 * sizeof(int32_t));
  const auto* segments = reinterpret_cast<const Segment*>(batch.segments.as<const int32_t>());
  int64_t end = 0;
  for (int64_t s = 0; s < batch.segments.rows(); ++s) {
    const Segment& at = segments[s];
    REQUIRE_SHAPE(op, at.begin == end && at.trunk >= 0 && at.chosen >= 0 && at.rejected >= 0, "segment ", s, " is {",
                  at.begin, ", ", at.trunk, ", ", at.chosen, ", ", at.rejected, "} where row ", end, " comes next");
    end = at.end();
  }
  REQUIRE_SHAPE(op, end == rows, "the segments end at row ", end, ", the stream has ", rows);
  return segments;
}

// Key columns [begin, end) of a tile that a query sees.
struct Visible {
  int64_t begin, end;
  Visible(int64_t query_position, const Tile& keys, int64_t columns, int window)
      : begin(window ? std::max<int64_t>(0, query_position - window + 1 - keys.position) : 0),
        end(std::min<int64_t>(columns, query_position - keys.position + 1)) {}
  bool empty() const { return begin >= end; }
  bool whole(int64_t columns) const { return begin == 0 && end >= columns; }
};

// x in the visible columns, otherwise elsewhere; columns from first on.
template <class A> Vector<A> masked(Vector<A> x, int64_t first, const Visible& visible, A otherwise) {
  using Integers = typename VectorOf<A>::integers;
  using Integer = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  Integers column;
  for (int i = 0; i < lanes<A>; ++i) column[i] = static_cast<Integer>(first + i);
  const Integers in = (column >= static_cast<Integer>(visible.begin)) & (column < static_cast<Integer>(visible.end));
  return in ? x : splat(otherwise);
}

// What forward and backward share: the tensors' geometry and the unpacking of tiles.
template <class T> struct Geometry {
  using A = Accumulator<T>;
  const AttentionShape& shape;
  int64_t rows, head_dim, group;
  int64_t width;     // head_dim with room for whole vectors
  int64_t capacity;  // query rows of a tile, all heads of the group, with room for whole register blocks
  int64_t query_rows;
  Tiles keys, queries;

  Geometry(const AttentionShape& s, const Segment* segments, int64_t segment_count, int64_t stream_rows)
      : shape(s),
        rows(stream_rows),
        head_dim(s.head_dim),
        group(s.heads / s.kv_heads),
        width(round_up(head_dim, lanes<A>)),
        query_rows(std::clamp<int64_t>(96 / group, 1, 64)),
        keys(segments, segment_count, key_tile),
        queries(segments, segment_count, query_rows) {
    capacity = round_up(query_rows * group, block_rows);
  }

  int64_t qkv_pitch() const { return (shape.heads + 2 * int64_t{shape.kv_heads}) * head_dim; }
  int64_t out_pitch() const { return shape.heads * head_dim; }
  int64_t key_column(int64_t kv_head) const { return (shape.heads + kv_head) * head_dim; }
  int64_t value_column(int64_t kv_head) const { return (shape.heads + shape.kv_heads + kv_head) * head_dim; }
  int64_t key_tiles() const { return static_cast<int64_t>(keys.tiles.size()); }
  int64_t query_tiles() const { return static_cast<int64_t>(queries.tiles.size()); }
  int64_t segment_of_query_tile(int64_t tile) const {
    return std::upper_bound(queries.first.begin(), queries.first.end(), tile) - queries.first.begin() - 1;
  }
  int64_t query_block() const { return capacity * width; }
  int64_t key_block() const { return key_tile * width; }

  // to[row, width] = scale * from[row, head_dim], the rest 0.
  void unpack(A* to, const T* from, int64_t pitch, int64_t count, A scale) const {
    for (int64_t r = 0; r < count; ++r)
      for_vectors<A>(head_dim,
                     [&](int64_t i, auto n) { store(to + r * width + i, load(from + r * pitch + i, n) * scale); });
  }
  // to[head_dim, key_tile] = transposed from[row, head_dim]
  void unpack_transposed(A* to, const T* from, int64_t pitch, int64_t count) const {
    for (int64_t i = 0; i < head_dim; ++i)
      for (int64_t r = 0; r < count; ++r) to[i * key_tile + r] = static_cast<A>(from[r * pitch + i]);
  }
  // A query tile's rows of matrix[rows, heads * head_dim or wider], heads of the group one after the other.
  void unpack_queries(A* to, const T* matrix, int64_t pitch, const Tile& tile, int64_t kv_head, A scale) const {
    for (int64_t g = 0; g < group; ++g)
      unpack(to + g * tile.count * width, matrix + tile.row * pitch + (kv_head * group + g) * head_dim, pitch,
             tile.count, scale);
  }
};

}  // namespace orpo::cpu
