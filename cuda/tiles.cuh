// Attention's tiles: runs of rows of one part of one segment, listed on the device; the keys that a tile of queries
// sees, and the queries that see a tile of keys.
#pragma once

#include "cuda/gpu.cuh"

namespace orpo {

inline constexpr int tile_rows = 64;

// Rows [row, row + count) of the stream at positions from position on.
struct Run {
  int32_t row, count, position;
};

// A trunk row sees the trunk, a branch row the trunk and its own branch, both up to itself.
struct alignas(16) Tile : Run {
  enum Part : int32_t { trunk, chosen, rejected };
  int32_t part;
  Segment segment;
};

// ---- the list

__device__ __forceinline__ int tiles_of(int rows, int per_tile) { return (rows + per_tile - 1) / per_tile; }

// The sum over the lanes up to one's own.
template <class T> __device__ __forceinline__ T running_sum(T value) {
  for (int step = 1; step < 32; step *= 2) {
    const T before = __shfl_up_sync(0xffffffffu, value, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) value += before;
  }
  return value;
}

// One warp: checks that the segments are the stream, in order, and lists their tiles. Segments that are not give none.
static __global__ void list_tiles_kernel(Tile* tiles, int32_t* tile_count, const Segment* segments, int64_t count,
                                         int64_t rows, Refused* refused, Refused::Kind bad_segment,
                                         Refused::Kind bad_end) {
  const int lane = threadIdx.x;
  int32_t listed = 0;
  int64_t end = 0;  // of the segments so far
  uint32_t bad = 0;
  for (int64_t first = 0; first < count && !bad; first += 32) {
    const int64_t s = first + lane;
    const Segment at = s < count ? segments[s] : Segment{0, 0, 0, 0};
    const int32_t sizes[3] = {at.trunk, at.chosen, at.rejected};
    const int64_t size = int64_t{at.trunk} + at.chosen + at.rejected, after = end + running_sum(size);
    const bool in_order =
        s >= count || (at.begin == after - size && at.trunk >= 0 && at.chosen >= 0 && at.rejected >= 0);
    bad = __ballot_sync(0xffffffffu, !in_order);
    if (bad && lane == __ffs(bad) - 1)
      refuse(refused, bad_segment, {s, at.begin, at.trunk, at.chosen, at.rejected, after - size});
    int32_t own = 0;
    for (int part = 0; part < 3 && !bad && after <= rows; ++part) own += tiles_of(sizes[part], tile_rows);
    const int32_t listed_after = listed + running_sum(own);
    Tile* to = tiles + listed_after - own;
    Tile tile{{at.begin, 0, 0}, Tile::trunk, at};
    for (; own > 0 && tile.part < 3; ++tile.part) {
      tile.position = tile.part == Tile::trunk ? 0 : at.trunk;
      for (int left = sizes[tile.part]; left > 0; left -= tile_rows) {
        tile.count = left < tile_rows ? left : tile_rows;
        *to++ = tile;
        tile.row += tile.count, tile.position += tile.count;
      }
    }
    end = __shfl_sync(0xffffffffu, after, 31);
    listed = __shfl_sync(0xffffffffu, listed_after, 31);
  }
  if (lane != 0) return;
  if (!bad && end != rows) refuse(refused, bad_end, {end, rows});
  *tile_count = bad || end != rows ? 0 : listed;
}

// Room for a stream's tiles, and how many there are.
struct TileList {
  Tile* tiles;
  int32_t* count;
};
inline int64_t most_tiles(int64_t rows, int64_t segments) { return rows / tile_rows + 3 * segments; }

inline void list_tiles(GpuStream stream, const TileList& list, const Tensor& segments, int64_t rows, Refused* refused,
                       Refused::Kind bad_segment, Refused::Kind bad_end) {
  static_assert(sizeof(Segment) == 4 * sizeof(int32_t));
  launch(list_tiles_kernel, 1, 32, 0, stream, list.tiles, list.count,
         reinterpret_cast<const Segment*>(segments.as<const int32_t>()), segments.rows(), rows, refused, bad_segment,
         bad_end);
}

// ---- who sees whom

// Whether a query at this position sees a key at that one, of a sequence that both belong to.
__device__ __forceinline__ bool sees(int query, int key, int window) {
  return key <= query && (window == 0 || key > query - window);
}
// Whether every query of one run sees every key of another.
__device__ __forceinline__ bool all_see(const Run& queries, const Run& keys, int window) {
  return keys.position + keys.count - 1 <= queries.position &&
         (window == 0 || keys.position > queries.position + queries.count - 1 - window);
}

// The rows of a part at positions [begin, end).
__device__ __forceinline__ Run run_of(const Segment& s, int part, int64_t begin, int64_t end) {
  const int first = part == Tile::trunk ? 0 : s.trunk;
  const int size = part == Tile::trunk ? s.trunk : part == Tile::chosen ? s.chosen : s.rejected;
  const int from = begin > first ? static_cast<int>(begin) : first;
  const int to = end < int64_t{first} + size ? static_cast<int>(end) : first + size;
  const int row = s.begin + (part == Tile::rejected ? s.chosen : 0) + from;  // positions count on from the trunk
  return {row, to > from ? to - from : 0, from};
}

// Up to `most` runs, one after the other, in tiles of `rows`.
template <int most, int rows> struct Walk {
  Run runs[most];

  __device__ __forceinline__ int tiles() const {
    int n = 0;
#pragma unroll
    for (int i = 0; i < most; ++i) n += tiles_of(runs[i].count, rows);
    return n;
  }
  __device__ __forceinline__ Run tile(int t) const {
    Run at = runs[0];
    int begin = 0, end = 0;  // tiles of the runs up to here
#pragma unroll
    for (int i = 0; i + 1 < most; ++i) {
      end += tiles_of(runs[i].count, rows);
      if (t >= end) at = runs[i + 1], begin = end;
    }
    const int skipped = (t - begin) * rows, left = at.count - skipped;
    return {at.row + skipped, left < rows ? left : rows, at.position + skipped};
  }
};

// The trunk's keys, then its branch's; those before the window are left out.
template <int rows> __device__ __forceinline__ Walk<2, rows> keys_seen(const Tile& queries, int window) {
  const int end = queries.position + queries.count;
  const int begin = window > 0 && queries.position >= window ? queries.position - window + 1 : 0;
  const bool in_branch = queries.part != Tile::trunk;
  return {{run_of(queries.segment, Tile::trunk, begin, end),
           run_of(queries.segment, queries.part, begin, in_branch ? end : 0)}};
}
// The queries of its own part, then, for keys of the trunk, those of both branches; as far as the window reaches.
template <int rows> __device__ __forceinline__ Walk<3, rows> queries_seeing(const Tile& keys, int window) {
  const int64_t begin = keys.position, end = begin + keys.count - 1 + (window > 0 ? window : int64_t{1} << 31);
  const int64_t branches_end = keys.part == Tile::trunk ? end : 0;
  return {{run_of(keys.segment, keys.part, begin, end), run_of(keys.segment, Tile::chosen, begin, branches_end),
           run_of(keys.segment, Tile::rejected, begin, branches_end)}};
}

}  // namespace orpo
