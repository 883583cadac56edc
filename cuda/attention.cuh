// What attention's kernels share: where heads lie in qkv, tiles in shared memory, their products on tensor cores.
#pragma once

#include "cuda/gpu.cuh"
#include "cuda/tiles.cuh"

namespace orpo {

inline constexpr int most_head_dim = 256;
inline constexpr float log2_e = 1.44269504f;  // bf16's exponentials are taken to base 2

// What a kernel has to know of qkv[rows, (heads + 2 kv_heads) * head_dim].
struct Layout {
  int heads, kv_heads, head_dim, window;
  int64_t rows;
  float scale;

  __device__ int64_t pitch() const { return int64_t{heads + 2 * kv_heads} * head_dim; }
  __device__ int64_t out_pitch() const { return int64_t{heads} * head_dim; }
  __device__ int64_t query(int head) const { return int64_t{head} * head_dim; }
  __device__ int64_t key_of(int kv_head) const { return int64_t{heads + kv_head} * head_dim; }
  __device__ int64_t key(int head) const { return key_of(head / (heads / kv_heads)); }
  __device__ int64_t value_of(int kv_head) const { return key_of(kv_heads + kv_head); }
  __device__ int64_t value(int head) const { return value_of(head / (heads / kv_heads)); }
};

inline Layout layout_of(const Tensor& qkv, const AttentionShape& shape) {
  return {shape.heads, shape.kv_heads, shape.head_dim, shape.window, qkv.rows(), shape.scale};
}

// Whether every head of every row starts on 16 bytes and ends there.
inline bool heads_aligned(std::initializer_list<const Tensor*> tensors, const AttentionShape& shape) {
  for (const Tensor* x : tensors)
    if (shape.head_dim * dtype_bytes(x->dtype) % 16) return false;
  return starts_aligned(tensors);
}

// Lanes that hold a head's entries together, entries_a_lane each: a power of two, up to a warp.
inline constexpr int entries_a_lane = 8;
static_assert(most_head_dim <= 32 * entries_a_lane);
inline int lanes_for(int head_dim) {
  int lanes = 1;
  while (lanes * entries_a_lane < head_dim) lanes *= 2;
  return lanes;
}
// The sum over each such group of lanes, in each of them.
__device__ __forceinline__ float lanes_sum(float value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// body(integral constant D): the smallest padded head size that holds head_dim.
template <class Body> void with_head_size(const char* op, int head_dim, Body&& body) {
  const auto fits = [&](auto d) { return head_dim <= d() && (body(d), true); };
  const bool any = fits(std::integral_constant<int, 32>{}) || fits(std::integral_constant<int, 64>{}) ||
                   fits(std::integral_constant<int, 80>{}) || fits(std::integral_constant<int, 96>{}) ||
                   fits(std::integral_constant<int, 128>{}) || fits(std::integral_constant<int, most_head_dim>{});
  REQUIRE_SHAPE(op, any, "the head size is ", head_dim, ", at most ", most_head_dim, " has kernels");
}

// ---- bf16: tensor cores. Tiles lie in shared memory at a pitch, head sizes padded with zeros to D; a warp has I
// blocks of 16 rows of a product: each fragment of the other side that it reads serves all of them. In a lane,
// x[i][j][2 h + e] is of row 8 r + lane / 4, r = 2 i + h, and column 8 j + lane % 4 * 2 + e.

template <int D> inline constexpr int pitch_of = D + 8;  // so that the eight rows of ldmatrix lie in different banks
template <int W> inline constexpr int columns_of = W % 32 == 0 ? 32 : 16;                  // of an output, at a time
template <int n, int I> using Scores = float[I][n / 8][4];                                 // [16 I, n]
template <int W, int I> using Output = float[W / columns_of<W>][I][columns_of<W> / 8][4];  // [16 I, W]

// Threads of a block whose warps have I blocks of 16 rows of a tile each.
template <int I> inline constexpr int threads_of = tile_rows / (16 * I) * 32;

// shared[rows][D] = from[count][size] at a pitch, zeros elsewhere. Aligned: asynchronously, as a group of copies. A
// thread keeps to its column, so that addresses are sums.
template <int D, int rows, int threads, bool aligned>
__device__ __forceinline__ void load_tile(bf16* shared, const bf16* from, int count, int size, int64_t pitch) {
  constexpr int per_row = D <= 32 ? 4 : D <= 64 ? 8 : D <= 128 ? 16 : 32, at_once = threads / per_row;
  static_assert(rows % at_once == 0 && D <= 8 * per_row);
  const int column = threadIdx.x % per_row * 8, first = threadIdx.x / per_row;
  shared += first * pitch_of<D> + column, from += first * pitch + column;
  [[maybe_unused]] constexpr int unrolled = aligned ? rows / at_once : 1;
#pragma unroll unrolled
  for (int row = 0; row < rows; row += at_once, from += at_once * pitch) {
    if (D < 8 * per_row && column >= D) break;
    bf16* to = shared + row * pitch_of<D>;
    const bool exists = row + first < count;
    if constexpr (aligned) {
      cp_async_16(to, from, exists && column < size ? 16 : 0);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) to[e] = exists && column + e < size ? from[e] : to_bf16(0.0f);
    }
  }
  cp_async_commit();
}

// s[16 I, n] += a[16 I, D] . b[n, D]^T
template <int D, int n, int I>
__device__ __forceinline__ void multiply_rows(Scores<n, I>& s, const bf16* a, const bf16* b) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    uint32_t x[I][4], y[n / 8][2];
#pragma unroll
    for (int i = 0; i < I; ++i) ldmatrix_x4(x[i], a + (i * 16 + lane % 16) * pitch_of<D> + d + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < n / 8; j += 2)
      ldmatrix_x4(y[j], y[j + 1], b + (j * 8 + lane % 8 + lane / 16 * 8) * pitch_of<D> + d + lane / 8 % 2 * 8);
    mma_tile(s, x, y);
  }
}

// o[16 I, W] += p[16 I, n] . b[n, W], b a tile of heads of D, p rounded: its registers are the A fragment already.
template <int D, int W, int n, int I>
__device__ __forceinline__ void add_weighed(Output<W, I>& o, const Scores<n, I>& p, const bf16* b) {
  constexpr int columns = columns_of<W>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < n / 16; ++k) {
    uint32_t x[I][4];
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float(&from)[4] = p[i][2 * k + half];
        x[i][2 * half] = pack_bf16(from[0], from[1]), x[i][2 * half + 1] = pack_bf16(from[2], from[3]);
      }
#pragma unroll
    for (int c = 0; c < W / columns; ++c) {
      uint32_t y[columns / 8][2];
#pragma unroll
      for (int j = 0; j < columns / 8; j += 2)
        ldmatrix_x4_trans(y[j], y[j + 1], b + (k * 16 + lane % 16) * pitch_of<D> + c * columns + j * 8 + lane / 16 * 8);
      mma_tile(o[c], x, y);
    }
  }
}

// body(x, r, column) for every x of the lane; column without lane % 4 * 2.
template <int n, int I, class Body> __device__ __forceinline__ void each_score(Scores<n, I>& s, Body&& body) {
#pragma unroll
  for (int r = 0; r < 2 * I; ++r)
#pragma unroll
    for (int j = 0; j < n / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) body(s[r / 2][j][r % 2 * 2 + e], r, j * 8 + e);
}
// The same with the score of another block at the same place.
template <int n, int I, class Body>
__device__ __forceinline__ void each_score(Scores<n, I>& s, const Scores<n, I>& other, Body&& body) {
#pragma unroll
  for (int r = 0; r < 2 * I; ++r)
#pragma unroll
    for (int j = 0; j < n / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) body(s[r / 2][j][r % 2 * 2 + e], other[r / 2][j][r % 2 * 2 + e], r, j * 8 + e);
}

// Columns [begin, end) of a tile.
struct Columns {
  int begin, end;
  __device__ __forceinline__ bool hold(int column) const { return (column >= begin) & (column < end); }
};
// The keys of a run that a query at this position sees, and the queries of one that see a key.
__device__ __forceinline__ Columns visible_keys(int query, const Run& keys, int window) {
  const int own = query - keys.position;
  return {window > 0 ? own - window + 1 : 0, own < keys.count ? own + 1 : keys.count};
}
__device__ __forceinline__ Columns seeing_queries(int key, const Run& queries, int window) {
  constexpr int far = 1 << 30;  // more than any stream's positions
  return {key - queries.position, key - queries.position + (window > 0 && window < far ? window : far)};
}

// to[row + 8 r][size] at a pitch = factor[r] * o, rounded, for rows below count; `to` and size begin at o's columns.
template <int W, int I, bool aligned>
__device__ __forceinline__ void store_output(bf16* to, const Output<W, I>& o, const float (&factor)[2 * I], int row,
                                             int count, int size, int64_t pitch) {
  constexpr int columns = columns_of<W>;
#pragma unroll
  for (int r = 0; r < 2 * I; ++r) {
    if (row + r * 8 >= count) continue;
    bf16* at = to + (row + r * 8) * pitch;
#pragma unroll
    for (int c = 0; c < W / columns; ++c)
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) {
        const int column = c * columns + j * 8 + threadIdx.x % 4 * 2;
        const float(&from)[4] = o[c][r / 2][j];
        const float x = from[r % 2 * 2] * factor[r], y = from[r % 2 * 2 + 1] * factor[r];
        if constexpr (aligned) {
          if (column < size) *reinterpret_cast<uint32_t*>(at + column) = pack_bf16(x, y);
        } else {
          if (column < size) at[column] = to_bf16(x);
          if (column + 1 < size) at[column + 1] = to_bf16(y);
        }
      }
  }
}

// ---- fp32, the parity mode: a warp takes a row of one side at a time and 32 of the other, a lane each

inline constexpr int fp32_threads = 128;

inline constexpr int most_entries = most_head_dim / 32;  // of a head, a lane: entries lane, lane + 32, ...

// o += weights[count] . rows[count][size] at a pitch
__device__ __forceinline__ void add_weighed(float (&o)[most_entries], const float* weights, const float* rows,
                                            int count, int size, int64_t pitch) {
  rows += threadIdx.x % 32;
  for (int k = 0; k < count; ++k, rows += pitch)
#pragma unroll
    for (int i = 0; i < most_entries; ++i)
      if (i * 32 + static_cast<int>(threadIdx.x % 32) < size) o[i] += weights[k] * rows[i * 32];
}
__device__ __forceinline__ void store_output(float* to, const float (&o)[most_entries], float factor, int size) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < most_entries; ++i)
    if (i * 32 + lane < size) to[i * 32 + lane] = o[i] * factor;
}
__device__ __forceinline__ float dot(const float* a, const float* b, int size) {
  float sum = 0;
  for (int d = 0; d < size; ++d) sum += a[d] * b[d];
  return sum;
}

}  // namespace orpo
