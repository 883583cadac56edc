// Attention over the packed stream (FlashAttention-2, Dao 2023): a block takes a tile of queries of one head and meets
// the keys that it sees, tile by tile; scores stay in registers. The backward pass stands in attention_backward.cu.
#include "cuda/attention.cuh"
#include "cuda/gpu.cuh"
#include "cuda/tiles.cuh"

namespace orpo {

namespace {

constexpr int threads = attention_threads;

template <int D> constexpr int key_rows_of = D <= 128 ? 64 : 32;

// Online softmax of a warp's 16 queries.
template <int key_rows> struct Softmax {
  float most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  // Scores -> exp(score - most), with what was summed so far rescaled by shrink where the maximum rises.
  __device__ __forceinline__ void soften(Scores<key_rows>& s, float (&shrink)[2], int query, const Run& keys,
                                         const Layout& at) {
    const int column = threadIdx.x % 4 * 2;
    float highest[2] = {most[0], most[1]}, added[2] = {0, 0};
    each_score<key_rows>(s, [&](float& x, int h, int k) {
      k += column;
      x = k < keys.count && sees(query + h * 8, keys.position + k, at.window) ? x * at.scale : -INFINITY;
      highest[h] = fmaxf(highest[h], x);
    });
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      highest[h] = quad_max(highest[h]);
      base[h] = highest[h] == -INFINITY ? 0.0f : highest[h];  // nothing seen yet: exp(-inf - 0) = 0
      shrink[h] = fast_exp(most[h] - base[h]);
      most[h] = highest[h];
    }
    each_score<key_rows>(s, [&](float& x, int h, int) {
      x = fast_exp(x - base[h]);
      added[h] += x;
    });
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] = sum[h] * shrink[h] + added[h];
  }
};

template <int D, bool aligned> __global__ void __launch_bounds__(threads)
    attention_forward_kernel(bf16* out, float* lse, const bf16* qkv, TileList list, Layout at) {
  constexpr int key_rows = key_rows_of<D>, pitch = pitch_of<D>;
  if (static_cast<int>(blockIdx.x) >= *list.count) return;  // the whole block
  DYN_SHARED(bf16, queries);
  bf16 *keys = queries + tile_rows * pitch, *values = keys + key_rows * pitch;
  const Tile tile = list.tiles[*list.count - 1 - blockIdx.x];  // the last ones see most, so they come first
  const auto seen = keys_seen<key_rows>(tile, at.window);
  const int head = blockIdx.y, lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
  const auto load = [&](bf16* to, int64_t column, int t) {
    const Run run = seen.tile(t);
    load_tile<D, key_rows, aligned>(to, qkv + run.row * at.pitch() + column, run.count, at.head_dim, at.pitch());
  };

  Output<D> o = {};
  Softmax<key_rows> softmax;
  load_tile<D, tile_rows, aligned>(queries, qkv + tile.row * at.pitch() + at.query(head), tile.count, at.head_dim,
                                   at.pitch());
  load(keys, at.key(head), 0);
  for (int t = 0, last = seen.tiles(); t < last; ++t) {
    load(values, at.value(head), t);
    cp_async_wait<1>();  // this tile's keys
    __syncthreads();
    Scores<key_rows> s = {};
    multiply_rows<D, key_rows>(s, queries + row * pitch, keys);  // S = Q K^T
    __syncthreads();                                             // nobody reads these keys any more
    if (t + 1 < last)
      load(keys, at.key(head), t + 1);
    else
      cp_async_commit();
    float shrink[2];
    softmax.soften(s, shrink, tile.position + row + lane / 4, seen.tile(t), at);
#pragma unroll
    for (int c = 0; c < D / columns_of<D>; ++c)
#pragma unroll
      for (int j = 0; j < columns_of<D> / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[c][0][j][e] *= shrink[e / 2];
    cp_async_wait<1>();  // this tile's values
    __syncthreads();
    add_weighed<D, D, key_rows>(o, s, values);  // O += P V
    __syncthreads();                            // nor these values
  }
  cp_async_wait<0>();

  float factor[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = quad_sum(softmax.sum[h]);
    const int r = row + lane / 4 + h * 8;
    factor[h] = 1 / sum;
    if (lane % 4 == 0 && r < tile.count) lse[head * at.rows + tile.row + r] = softmax.most[h] + logf(sum);
  }
  store_output<D, aligned>(out + tile.row * at.out_pitch() + at.query(head), o, factor, row + lane / 4, tile.count,
                           at.head_dim, at.out_pitch());
}

__global__ void __launch_bounds__(threads)
    attention_forward_fp32_kernel(float* out, float* lse, const float* qkv, TileList list, Layout at) {
  if (static_cast<int>(blockIdx.x) >= *list.count) return;
  SHARED(float, probabilities, [threads / 32][32]);
  const Tile tile = list.tiles[*list.count - 1 - blockIdx.x];
  const auto seen = keys_seen<32>(tile, at.window);
  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = warp; r < tile.count; r += threads / 32) {
    const float* query = qkv + (tile.row + r) * at.pitch() + at.query(head);
    float o[most_entries] = {}, most = -INFINITY, sum = 0;
    for (int t = 0; t < seen.tiles(); ++t) {
      const Run run = seen.tile(t);
      const float* keys = qkv + run.row * at.pitch();
      float score = -INFINITY;
      if (lane < run.count && sees(tile.position + r, run.position + lane, at.window))
        score = dot(query, keys + lane * at.pitch() + at.key(head), at.head_dim) * at.scale;
      const float highest = fmaxf(most, warp_max(score)), base = highest == -INFINITY ? 0.0f : highest;
      const float p = expf(score - base), shrink = expf(most - base);
      sum = sum * shrink + warp_sum(p);
      most = highest;
      probabilities[warp][lane] = p;
      __syncwarp();
#pragma unroll
      for (int i = 0; i < most_entries; ++i) o[i] *= shrink;
      add_weighed(o, probabilities[warp], keys + at.value(head), run.count, at.head_dim, at.pitch());
      __syncwarp();  // the next keys' probabilities come here
    }
    if (lane == 0) lse[head * at.rows + tile.row + r] = most + logf(sum);
    store_output(out + (tile.row + r) * at.out_pitch() + at.query(head), o, 1 / sum, at.head_dim);
  }
}

}  // namespace

void CudaBackend::attention_forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, const DeviceBatch& batch,
                                    const AttentionShape& shape) {
  shapes::attention("attention_forward", qkv, out, lse, batch, shape);
  const int64_t rows = qkv.rows(), most = most_tiles(rows, batch.segments.rows());
  const Layout at = layout_of(qkv, shape);
  Tile* tiles = scratch<Tile>(most + 1);
  const TileList list{tiles, reinterpret_cast<int32_t*>(tiles + most)};
  list_tiles(compute_, list, batch.segments, rows, refused_, Refused::attention_segment, Refused::attention_end);
  if (most == 0) return;
  const dim3 grid(static_cast<unsigned>(most), static_cast<unsigned>(shape.heads));
  with_head_size("attention_forward", shape.head_dim, [&](auto d) {
    if (qkv.dtype == DType::f32)
      return launch(attention_forward_fp32_kernel, grid, threads, 0, compute_, out.as<float>(), lse.as<float>(),
                    qkv.as<const float>(), list, at);
    const bool aligned = heads_aligned({&qkv, &out}, shape);
    constexpr size_t shared_rows = tile_rows + 2 * key_rows_of<d()>;
    launch(aligned ? attention_forward_kernel<d(), true> : attention_forward_kernel<d(), false>, grid, threads,
           shared_rows * pitch_of<d()> * sizeof(bf16), compute_, out.as<bf16>(), lse.as<float>(), qkv.as<const bf16>(),
           list, at);
  });
}

}  // namespace orpo
