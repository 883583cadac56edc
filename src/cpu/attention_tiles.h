// The tiles of attention: which rows of the packed stream meet, and how they are unpacked.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

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

// Key columns [begin, end) of a tile, or query rows.
struct Span {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// x in the columns of `visible`, otherwise elsewhere; columns from first on.
template <class A> Vector<A> masked(Vector<A> x, int64_t first, const Span& visible, A otherwise) {
  using Integers = typename VectorOf<A>::integers;
  using Integer = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  const auto count = [&]<int... Lane>(std::integer_sequence<int, Lane...>) { return Integers{Lane...}; };
  const Integers column = count(std::make_integer_sequence<int, lanes<A>>{}) + static_cast<Integer>(first);
  const Integers in = (column >= static_cast<Integer>(visible.begin)) & (column < static_cast<Integer>(visible.end));
  return in ? x : splat(otherwise);
}

// Hands out typed, aligned pieces of a block of memory; over none it only counts them.
class Pieces {
 public:
  explicit Pieces(char* memory) : memory_(memory) {}
  template <class X> X* take(int64_t count) {
    const int64_t at = std::exchange(bytes_, bytes_ + round_up(count * static_cast<int64_t>(sizeof(X)), 64));
    return memory_ ? reinterpret_cast<X*>(memory_ + at) : nullptr;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

// Exponentials of softmax are taken to base 2, over scores times scale * log2(e).
template <class A> inline constexpr A log2_e = A(1.4426950408889634074L);
template <class A> inline constexpr A ln_2 = A(0.6931471805599453094L);
template <class T> inline constexpr int exponential_terms = std::is_same_v<T, bf16> ? 4 : 6;

// What forward and backward share: the tensors' geometry, the unpacking of tiles, what a block of rows sees.
//
// A query tile holds the rows of all heads that share a key/value head, position by position: row r is head
// r % group at position r / group. So what a block of rows sees is one span of keys, and what sees a key one span of
// rows.
template <class T> struct Geometry {
  using A = Accumulator<T>;
  using Entry = typename Operand<T>::Entry;
  using Word = typename Operand<T>::Word;
  static constexpr int step = Operand<T>::step;
  static constexpr int64_t grain = std::max(step * lanes<A>, block_rows);  // spans of keys are taken up to it
  static constexpr int64_t chunk = std::is_same_v<T, bf16> ? block_rows : 4 * block_rows;  // query rows taken at a time

  const AttentionShape& shape;
  int64_t rows, head_dim, group;
  int64_t width, words;     // of an unpacked row: entries, with room for whole vectors of words; words
  int64_t query_positions;  // of a query tile
  int64_t capacity;         // rows of a query tile, with room for whole register blocks
  Tiles keys, queries;

  // wanted: rows of a query tile
  Geometry(const AttentionShape& s, const Segment* segments, int64_t segment_count, int64_t stream_rows, int64_t wanted)
      : shape(s),
        rows(stream_rows),
        head_dim(s.head_dim),
        group(s.heads / s.kv_heads),
        width(round_up(head_dim, step * lanes<A>)),
        words(width / step),
        query_positions(std::max<int64_t>(wanted / group, 1)),
        capacity(round_up(query_positions * group, chunk)),
        keys(segments, segment_count, key_tile),
        queries(segments, segment_count, query_positions) {}

  int64_t qkv_pitch() const { return (shape.heads + 2 * int64_t{shape.kv_heads}) * head_dim; }
  int64_t out_pitch() const { return shape.heads * head_dim; }
  int64_t key_column(int64_t kv_head) const { return (shape.heads + kv_head) * head_dim; }
  int64_t value_column(int64_t kv_head) const { return (shape.heads + shape.kv_heads + kv_head) * head_dim; }
  int64_t query_tiles() const { return static_cast<int64_t>(queries.tiles.size()); }
  int64_t segment_of_query_tile(int64_t tile) const {
    return std::upper_bound(queries.first.begin(), queries.first.end(), tile) - queries.first.begin() - 1;
  }
  int64_t head_words() const { return (head_dim + step - 1) / step; }
  int64_t rows_of(const Tile& tile) const { return tile.count * group; }

  // A key tile's rows of the head at `column` of qkv; zeros up to whole grains.
  void unpack_keys(Entry* to, const T* qkv, const Tile& tile, int64_t column) const {
    for (int64_t r = 0; r < tile.count; ++r) unpack_row(to + r * width, qkv + (tile.row + r) * qkv_pitch() + column);
    std::fill(to + tile.count * width, to + round_up(tile.count, grain) * width, Entry{});
  }
  // A query tile's rows of matrix[rows, heads * head_dim or wider].
  void unpack_queries(Entry* to, const T* matrix, int64_t pitch, const Tile& tile, int64_t kv_head) const {
    for (int64_t p = 0; p < tile.count; ++p)
      for (int64_t g = 0; g < group; ++g)
        unpack_row(to + (p * group + g) * width, matrix + (tile.row + p) * pitch + (kv_head * group + g) * head_dim);
    const int64_t count = rows_of(tile);
    std::fill(to + count * width, to + round_up(count, chunk) * width, Entry{});
  }

  // Asks for a share of a tile's rows ahead of their use: entries [column, column + count), the share that belongs to
  // the chunk of rows from r on of `all`. Spread like this, requests do not wait for one another.
  template <class X>
  void prefetch(const X* matrix, int64_t pitch, const Tile& tile, int64_t column, int64_t count, int64_t r,
                int64_t all) const {
    const int64_t end = std::min<int64_t>(tile.count, (r + chunk) * tile.count / all);
    for (int64_t row = r * tile.count / all; row < end; ++row) {
      const char* at = reinterpret_cast<const char*>(matrix + (tile.row + row) * pitch + column);
      for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(X)); i += 64) __builtin_prefetch(at + i, 0, 2);
    }
  }

  // Keys of a tile that row r of a query tile sees; none for rows beyond the tile.
  Span visible(const Tile& tile, int64_t r, const Tile& key) const {
    const int64_t position = tile.position + static_cast<int32_t>(r) / static_cast<int32_t>(group);
    if (position > tile.last()) return {0, 0};
    return {shape.window ? std::max<int64_t>(position - shape.window + 1 - key.position, 0) : 0,
            std::min<int64_t>(key.count, position - key.position + 1)};
  }
  // Keys that the chunk of rows from r on sees, taken up to whole grains.
  Span visible_to_chunk(const Tile& tile, int64_t r, const Tile& key) const {
    const int64_t last = std::min(r + chunk, rows_of(tile)) - 1;
    const int64_t begin = visible(tile, r, key).begin, end = visible(tile, last, key).end;
    return {round_down(begin, grain), begin < end ? round_up(end, grain) : 0};
  }
  // Whether every row of that chunk sees every key of the tile, and the tile is full.
  bool all_visible(const Tile& tile, int64_t r, const Tile& key) const {
    return r + chunk <= rows_of(tile) && visible(tile, r, key).end == key_tile &&
           visible(tile, r + chunk - 1, key).begin == 0;
  }
  // Rows of a query tile that see some of the block_rows keys from `first` on, taken up to whole words.
  Span seers(const Tile& tile, const Tile& key, int64_t first) const {
    const int64_t last = std::min<int64_t>(first + block_rows, key.count) - 1, count = rows_of(tile);
    const int64_t begin = std::max<int64_t>((key.position + first - tile.position) * group, 0);
    const int64_t end =
        shape.window ? std::min((key.position + last + shape.window - tile.position) * group, count) : count;
    return {round_down(begin, step), round_up(end, step)};
  }

 private:
  void unpack_row(Entry* to, const T* from) const {
    if constexpr (std::is_same_v<T, Entry>) {
      constexpr int64_t n = vector_bytes / sizeof(T);
      int64_t i = 0;
      for (; i + n <= head_dim; i += n) std::memcpy(to + i, from + i, vector_bytes);
      std::copy(from + i, from + head_dim, to + i);
    } else {
      for_vectors<A>(head_dim, [&](int64_t i, auto n) { store(to + i, load(from + i, n)); });
    }
    std::fill(to + head_dim, to + width, Entry{});
  }
};

}  // namespace orpo::cpu
