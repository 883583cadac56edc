// Attention over the packed stream (FlashAttention-2, Dao 2023): a block takes a tile of queries of one head and meets
// the keys that it sees, tile by tile; scores stay in registers. The backward pass has no kernels yet.
#include "cuda/attention.cuh"
#include "cuda/gpu.cuh"
#include "cuda/tiles.cuh"

namespace orpo {

namespace {

constexpr int threads = 128;

// ---- bf16: tensor cores; head sizes up to D, padded with zeros in shared memory

template <int D> constexpr int pitch_of = D + 8;  // so that the eight rows of ldmatrix lie in different banks
template <int D> constexpr int key_rows_of = D <= 128 ? 64 : 32;
template <int D> constexpr int columns_of = D % 32 == 0 ? 32 : 16;  // of the output, at a time

// shared[rows][D] = from[count][size] at a pitch, zeros elsewhere. Aligned: asynchronously.
template <int D, int rows, bool aligned>
__device__ __forceinline__ void load_tile(bf16* shared, const bf16* from, int count, int size, int64_t pitch) {
  for (int i = threadIdx.x; i < rows * (D / 8); i += threads) {
    const int row = i / (D / 8), column = i % (D / 8) * 8;
    bf16* to = shared + row * pitch_of<D> + column;
    if constexpr (aligned) {
      const bool real = row < count && column < size;
      cp_async_16(to, real ? from + row * pitch + column : from, real ? 16 : 0);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        to[e] = row < count && column + e < size ? from[row * pitch + column + e] : to_bf16(0.0f);
    }
  }
  cp_async_commit();
}

// Each warp has 16 queries; in a lane h = 0, 1 are rows lane / 4 and lane / 4 + 8, and scores s[0][j][2 h + e] belong
// to keys 8 j + lane % 4 * 2 + e.
template <int D, int key_rows> struct Softmax {
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  // Scores -> exp(score - most), with what was summed so far rescaled by shrink where the maximum rises.
  __device__ __forceinline__ void soften(float (&s)[1][key_rows / 8][4], float (&shrink)[2], int query, int key,
                                         int key_count, const Layout& at) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest = most[h];
#pragma unroll
      for (int j = 0; j < key_rows / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[0][j][2 * h + e];
          const int k = j * 8 + column + e;
          x = k < key_count && sees(query + h * 8, key + k, at.window) ? x * at.scale : -INFINITY;
          highest = fmaxf(highest, x);
        }
      highest = quad_max(highest);
      const float base = highest == -INFINITY ? 0.0f : highest;  // nothing seen yet: exp(-inf - 0) = 0
      shrink[h] = fast_exp(most[h] - base);
      most[h] = highest;
      float added = 0;
#pragma unroll
      for (int j = 0; j < key_rows / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[0][j][2 * h + e];
          x = fast_exp(x - base);
          added += x;
        }
      sum[h] = sum[h] * shrink[h] + added;
    }
  }
};

template <int D, bool aligned> __global__ void __launch_bounds__(threads)
    attention_forward_kernel(bf16* out, float* lse, const bf16* qkv, const QueryTile* tiles, const int32_t* tile_count,
                             Layout at) {
  constexpr int key_rows = key_rows_of<D>, pitch = pitch_of<D>, columns = columns_of<D>;
  if (static_cast<int>(blockIdx.x) >= *tile_count) return;  // the whole block
  DYN_SHARED(bf16, queries);
  bf16 *keys = queries + query_rows * pitch, *values = keys + key_rows * pitch;
  const QueryTile tile = tiles[blockIdx.x];
  const KeyTiles<key_rows> seen(tile, at.window);
  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int query = tile.position + warp * 16 + lane / 4;  // and query + 8
  const auto load_keys = [&](bf16* to, int64_t column, int t) {
    load_tile<D, key_rows, aligned>(to, qkv + seen.row(t) * at.pitch() + column, seen.count(t), at.head_dim,
                                    at.pitch());
  };

  float o[D / columns][1][columns / 8][4] = {};
  Softmax<D, key_rows> softmax;
  load_tile<D, query_rows, aligned>(queries, qkv + tile.row * at.pitch() + at.query(head), tile.count, at.head_dim,
                                    at.pitch());
  load_keys(keys, at.key(head), seen.first);
  for (int t = seen.first; t < seen.last; ++t) {
    load_keys(values, at.value(head), t);
    cp_async_wait<1>();  // this tile's keys
    __syncthreads();
    float s[1][key_rows / 8][4] = {};
#pragma unroll
    for (int d = 0; d < D; d += 16) {  // S = Q K^T
      uint32_t q[1][4], k[key_rows / 8][2];
      ldmatrix_x4(q[0], queries + (warp * 16 + lane % 16) * pitch + d + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < key_rows / 8; j += 2)
        ldmatrix_x4(k[j], k[j + 1], keys + (j * 8 + lane % 8 + lane / 16 * 8) * pitch + d + lane / 8 % 2 * 8);
      mma_tile(s, q, k);
    }
    __syncthreads();  // nobody reads these keys any more
    if (t + 1 < seen.last)
      load_keys(keys, at.key(head), t + 1);
    else
      cp_async_commit();
    float shrink[2];
    softmax.soften(s, shrink, query, seen.position(t), seen.count(t), at);
#pragma unroll
    for (int c = 0; c < D / columns; ++c)
#pragma unroll
      for (int j = 0; j < columns / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[c][0][j][e] *= shrink[e / 2];
    cp_async_wait<1>();  // this tile's values
    __syncthreads();
#pragma unroll
    for (int i = 0; i < key_rows / 16; ++i) {  // O += P V: the scores' registers are the A fragment
      const uint32_t p[1][4] = {{pack_bf16(s[0][2 * i][0], s[0][2 * i][1]), pack_bf16(s[0][2 * i][2], s[0][2 * i][3]),
                                 pack_bf16(s[0][2 * i + 1][0], s[0][2 * i + 1][1]),
                                 pack_bf16(s[0][2 * i + 1][2], s[0][2 * i + 1][3])}};
#pragma unroll
      for (int c = 0; c < D / columns; ++c) {
        uint32_t v[columns / 8][2];
#pragma unroll
        for (int j = 0; j < columns / 8; j += 2)
          ldmatrix_x4_trans(v[j], v[j + 1],
                            values + (i * 16 + lane % 16) * pitch + c * columns + j * 8 + lane / 16 * 8);
        mma_tile(o[c], p, v);
      }
    }
    __syncthreads();  // nor these values
  }
  cp_async_wait<0>();

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp * 16 + lane / 4 + h * 8;
    const float sum = quad_sum(softmax.sum[h]);
    if (row >= tile.count) continue;
    if (lane % 4 == 0) lse[head * at.rows + tile.row + row] = softmax.most[h] + logf(sum);
    bf16* to = out + int64_t{tile.row + row} * at.heads * at.head_dim + at.query(head);
#pragma unroll
    for (int c = 0; c < D / columns; ++c)
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) {
        const int column = c * columns + j * 8 + lane % 4 * 2;
        const float x = o[c][0][j][2 * h] / sum, y = o[c][0][j][2 * h + 1] / sum;
        if constexpr (aligned) {
          if (column < at.head_dim) *reinterpret_cast<uint32_t*>(to + column) = pack_bf16(x, y);
        } else {
          if (column < at.head_dim) to[column] = to_bf16(x);
          if (column + 1 < at.head_dim) to[column + 1] = to_bf16(y);
        }
      }
  }
}

// body(integral constant D): the smallest padded head size that holds head_dim.
template <class Body> void with_head_size(int head_dim, Body&& body) {
  const auto fits = [&](auto d) { return head_dim <= d() && (body(d), true); };
  const bool any = fits(std::integral_constant<int, 32>{}) || fits(std::integral_constant<int, 64>{}) ||
                   fits(std::integral_constant<int, 80>{}) || fits(std::integral_constant<int, 96>{}) ||
                   fits(std::integral_constant<int, 128>{}) || fits(std::integral_constant<int, 256>{});
  REQUIRE_SHAPE("attention", any, "the head size is ", head_dim, ", at most 256 has kernels");
}

// ---- fp32, the parity mode: a warp takes a query at a time and 32 keys at a time, a lane a key

constexpr int most_entries = 256 / 32;  // of the output, a lane

__global__ void __launch_bounds__(threads)
    attention_forward_fp32_kernel(float* out, float* lse, const float* qkv, const QueryTile* tiles,
                                  const int32_t* tile_count, Layout at) {
  if (static_cast<int>(blockIdx.x) >= *tile_count) return;
  SHARED(float, probabilities, [threads / 32][32]);
  const QueryTile tile = tiles[blockIdx.x];
  const KeyTiles<32> seen(tile, at.window);
  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = warp; r < tile.count; r += threads / 32) {
    const float* query = qkv + (tile.row + r) * at.pitch() + at.query(head);
    float o[most_entries] = {}, most = -INFINITY, sum = 0;
    for (int t = seen.first; t < seen.last; ++t) {
      const int64_t row = seen.row(t);
      const bool visible = lane < seen.count(t) && sees(tile.position + r, seen.position(t) + lane, at.window);
      float score = -INFINITY;
      if (visible) {
        const float* key = qkv + (row + lane) * at.pitch() + at.key(head);
        score = 0;
        for (int d = 0; d < at.head_dim; ++d) score += query[d] * key[d];
        score *= at.scale;
      }
      const float highest = fmaxf(most, warp_max(score)), base = highest == -INFINITY ? 0.0f : highest;
      const float p = expf(score - base), shrink = expf(most - base);
      sum = sum * shrink + warp_sum(p);
      most = highest;
      probabilities[warp][lane] = p;
      __syncwarp();
#pragma unroll
      for (int i = 0; i < most_entries; ++i) o[i] *= shrink;
      const float* value = qkv + row * at.pitch() + at.value(head) + lane;
      for (int k = 0; k < seen.count(t); ++k, value += at.pitch())
#pragma unroll
        for (int i = 0; i < most_entries; ++i)
          if (i * 32 + lane < at.head_dim) o[i] += probabilities[warp][k] * value[i * 32];
      __syncwarp();  // the next keys' probabilities come here
    }
    if (lane == 0) lse[head * at.rows + tile.row + r] = most + logf(sum);
    float* to = out + int64_t{tile.row + r} * at.heads * at.head_dim + at.query(head);
#pragma unroll
    for (int i = 0; i < most_entries; ++i)
      if (i * 32 + lane < at.head_dim) to[i * 32 + lane] = o[i] / sum;
  }
}

}  // namespace

void CudaBackend::attention_forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, const DeviceBatch& batch,
                                    const AttentionShape& shape) {
  shapes::attention("attention_forward", qkv, out, lse, batch, shape);
  const int64_t rows = qkv.rows(), segments = batch.segments.rows(), most = most_tiles(rows, segments);
  const Layout at = layout_of(qkv, shape);
  static_assert(sizeof(Segment) == 4 * sizeof(int32_t));
  QueryTile* tiles = scratch<QueryTile>(most + 1);
  auto* tile_count = reinterpret_cast<int32_t*>(tiles + most);
  launch(list_tiles_kernel, 1, 32, 0, compute_, tiles, tile_count,
         reinterpret_cast<const Segment*>(batch.segments.as<const int32_t>()), segments, rows, refused_);
  if (most == 0) return;
  const dim3 grid(static_cast<unsigned>(most), static_cast<unsigned>(shape.heads));
  with_head_size(shape.head_dim, [&](auto d) {
    if (qkv.dtype == DType::f32)
      return launch(attention_forward_fp32_kernel, grid, threads, 0, compute_, out.as<float>(), lse.as<float>(),
                    qkv.as<const float>(), tiles, tile_count, at);
    const bool aligned = heads_aligned({&qkv, &out}, shape);
    constexpr size_t shared_rows = query_rows + 2 * key_rows_of<d()>;
    launch(aligned ? attention_forward_kernel<d(), true> : attention_forward_kernel<d(), false>, grid, threads,
           shared_rows * pitch_of<d()> * sizeof(bf16), compute_, out.as<bf16>(), lse.as<float>(), qkv.as<const bf16>(),
           tiles, tile_count, at);
  });
}

}  // namespace orpo
