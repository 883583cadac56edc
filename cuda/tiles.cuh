// Attention's tiles: runs of query rows of one part of one segment, listed on the device, and the keys that each sees.
#pragma once

namespace orpo {

inline constexpr int query_rows = 64;  // a tile's

// Rows [row, row + count) of the stream at positions from position on. A trunk tile sees the trunk, a branch tile the
// trunk and its own branch, both up to itself.
struct QueryTile {
  int32_t row, count, position;
  int32_t trunk_row, trunk_count;  // of its segment
  int32_t branch_row;              // where its branch begins; -1: it is part of the trunk
};

inline int64_t most_tiles(int64_t rows, int64_t segments) { return rows / query_rows + 3 * segments; }

// One thread: checks that the segments are the stream, in order, and lists their tiles. Segments that are not give
// none.
static __global__ void list_tiles_kernel(QueryTile* tiles, int32_t* tile_count, const Segment* segments, int64_t count,
                                         int64_t rows, Refused* refused) {
  if (threadIdx.x != 0) return;
  int32_t listed = 0;
  int64_t end = 0;
  for (int64_t s = 0; s < count && listed >= 0; ++s) {
    const Segment at = segments[s];
    const int32_t sizes[3] = {at.trunk, at.chosen, at.rejected};
    if (at.begin != end || at.trunk < 0 || at.chosen < 0 || at.rejected < 0) {
      refuse(refused, Refused::attention_segment, {s, at.begin, at.trunk, at.chosen, at.rejected, end});
      listed = -1;
      break;
    }
    end += int64_t{at.trunk} + at.chosen + at.rejected;
    if (end > rows) break;
    int32_t row = at.begin;
    for (int part = 0; part < 3; ++part) {
      const int32_t position = part == 0 ? 0 : at.trunk;
      for (int32_t i = 0; i < sizes[part]; i += query_rows)
        tiles[listed++] = {row + i,      sizes[part] - i < query_rows ? sizes[part] - i : query_rows,
                           position + i, at.begin,
                           at.trunk,     part == 0 ? -1 : row};
      row += sizes[part];
    }
  }
  if (listed >= 0 && end != rows) refuse(refused, Refused::attention_end, {end, rows}), listed = -1;
  *tile_count = listed < 0 ? 0 : listed;
}

// The keys that a tile sees, in tiles of `key_rows`: the trunk's, then its branch's; those wholly before the window are
// not listed.
template <int key_rows> struct KeyTiles {
  QueryTile tile;
  int trunk_seen, branch_seen, trunk_tiles, first, last;

  __device__ KeyTiles(const QueryTile& t, int window) : tile(t) {
    const bool in_trunk = tile.branch_row < 0;
    trunk_seen = in_trunk ? tile.position + tile.count : tile.trunk_count;
    branch_seen = in_trunk ? 0 : tile.position - tile.trunk_count + tile.count;
    trunk_tiles = (trunk_seen + key_rows - 1) / key_rows;
    last = trunk_tiles + (branch_seen + key_rows - 1) / key_rows;
    const int lowest = window > 0 && tile.position >= window ? tile.position - window + 1 : 0;
    first = lowest < trunk_seen ? lowest / key_rows : trunk_tiles + (lowest - trunk_seen) / key_rows;
  }
  __device__ int row(int t) const {
    return t < trunk_tiles ? tile.trunk_row + t * key_rows : tile.branch_row + (t - trunk_tiles) * key_rows;
  }
  __device__ int position(int t) const {
    return t < trunk_tiles ? t * key_rows : tile.trunk_count + (t - trunk_tiles) * key_rows;
  }
  __device__ int count(int t) const {
    const int left = t < trunk_tiles ? trunk_seen - t * key_rows : branch_seen - (t - trunk_tiles) * key_rows;
    return left < key_rows ? left : key_rows;
  }
};

// Whether a query at this position sees a key at that one, of a sequence that both belong to.
__device__ __forceinline__ bool sees(int query, int key, int window) {
  return key <= query && (window == 0 || key > query - window);
}

}  // namespace orpo
