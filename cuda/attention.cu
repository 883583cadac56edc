// Attention over the packed stream (FlashAttention-2, Dao 2023): a block takes a tile of queries of one head and meets
// the keys that it sees, tile by tile; scores stay in registers. The backward pass stands in attention_backward.cu.
#include "cuda/attention.cuh"
#include "cuda/gpu.cuh"
#include "cuda/tiles.cuh"

namespace orpo {

namespace {

// A warp's rows, in blocks of 16, and keys at a time: what an output of 16 I x D and scores of 16 I x keys leave room
// for in registers.
template <int D> constexpr int row_blocks = D <= 128 ? 2 : 1;
template <int D> constexpr int key_rows_of = D <= 64 ? 64 : 32;
// Blocks of an SM for which registers have to suffice: 8 warps.
template <int D> constexpr int blocks_of = D <= 128 ? 4 : 2;

// Online softmax of a warp's 16 I queries.
template <int key_rows, int I> struct Softmax {
  float most[2 * I], sum[2 * I] = {};

  __device__ Softmax() {
#pragma unroll
    for (float& m : most) m = -INFINITY;
  }
  // Scores -> exp(scale (score - most)), with what was summed so far rescaled by shrink where the maximum rises.
  // to_base_2: scale / ln 2.
  __device__ __forceinline__ void soften(Scores<key_rows, I>& s, float (&shrink)[2 * I], float to_base_2) {
    float before[2 * I];
#pragma unroll
    for (int r = 0; r < 2 * I; ++r) before[r] = most[r];
    each_score<key_rows, I>(s, [&](float& x, int r, int) { most[r] = fmaxf(most[r], x); });
    float base[2 * I];
#pragma unroll
    for (int r = 0; r < 2 * I; ++r) {
      most[r] = quad_max(most[r]);
      base[r] = most[r] == -INFINITY ? 0.0f : most[r] * to_base_2;  // nothing seen yet: exp(-inf - 0) = 0
      shrink[r] = fast_exp2(before[r] * to_base_2 - base[r]);
      sum[r] *= shrink[r];
    }
    each_score<key_rows, I>(s, [&](float& x, int r, int) {
      x = fast_exp2(x * to_base_2 - base[r]);
      sum[r] += x;
    });
  }
};

template <int D, bool aligned> __global__ void __launch_bounds__(threads_of<row_blocks<D>>, blocks_of<D>)
    attention_forward_kernel(bf16* out, float* lse, const bf16* qkv, TileList list, Layout at) {
  constexpr int key_rows = key_rows_of<D>, pitch = pitch_of<D>, I = row_blocks<D>, threads = threads_of<I>;
  if (static_cast<int>(blockIdx.x) >= *list.count) return;  // the whole block
  DYN_SHARED(bf16, queries);
  bf16 *keys = queries + tile_rows * pitch, *values = keys + key_rows * pitch;
  const Tile tile = list.tiles[*list.count - 1 - blockIdx.x];  // the last ones see most, so they come first
  using Seen = Walk<2, key_rows>;
  SHARED(Seen, seen, [1]);  // registers are short here
  if (threadIdx.x == 0) *seen = keys_seen<key_rows>(tile, at.window);
  __syncthreads();
  const int head = blockIdx.y, lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * I, last = seen->tiles();
  const auto load = [&](bf16* to, int64_t column, const Run& run) {
    load_tile<D, key_rows, threads, aligned>(to, qkv + run.row * at.pitch() + column, run.count, at.head_dim,
                                             at.pitch());
  };

  Output<D, I> o = {};
  Softmax<key_rows, I> softmax;
  load_tile<D, tile_rows, threads, aligned>(queries, qkv + tile.row * at.pitch() + at.query(head), tile.count,
                                            at.head_dim, at.pitch());
  Run run = seen->tile(0);
  load(keys, at.key(head), run);
  for (int t = 0; t < last; ++t) {
    load(values, at.value(head), run);
    cp_async_wait<1>();  // this tile's keys
    __syncthreads();
    Scores<key_rows, I> s = {};
    multiply_rows<D, key_rows, I>(s, queries + row * pitch, keys);  // S = Q K^T
    __syncthreads();                                                // nobody reads these keys any more
    Run next = run;
    if (t + 1 < last)
      load(keys, at.key(head), next = seen->tile(t + 1));
    else
      cp_async_commit();
    if (run.count < key_rows || !all_see(tile, run, at.window))
      each_score<key_rows, I>(s, [&](float& x, int r, int k) {
        const Columns visible = visible_keys(tile.position + row + lane / 4 + r * 8, run, at.window);
        x = visible.hold(k + lane % 4 * 2) ? x : -INFINITY;
      });
    run = next;
    float shrink[2 * I];
    softmax.soften(s, shrink, at.scale * log2_e);
#pragma unroll
    for (auto& columns : o)
#pragma unroll
      for (int r = 0; r < 2 * I; ++r)
#pragma unroll
        for (auto& x : columns[r / 2]) x[r % 2 * 2] *= shrink[r], x[r % 2 * 2 + 1] *= shrink[r];
    cp_async_wait<1>();  // this tile's values
    __syncthreads();
    add_weighed<D, D, key_rows, I>(o, s, values);  // O += P V
    __syncthreads();                               // nor these values
  }
  cp_async_wait<0>();

  float factor[2 * I];
#pragma unroll
  for (int r = 0; r < 2 * I; ++r) {
    const float sum = quad_sum(softmax.sum[r]);
    const int query = row + lane / 4 + r * 8;
    factor[r] = 1 / sum;
    if (lane % 4 == 0 && query < tile.count)
      lse[head * at.rows + tile.row + query] = softmax.most[r] * at.scale + logf(sum);
  }
  store_output<D, I, aligned>(out + tile.row * at.out_pitch() + at.query(head), o, factor, row + lane / 4, tile.count,
                              at.head_dim, at.out_pitch());
}

__global__ void __launch_bounds__(fp32_threads)
    attention_forward_fp32_kernel(float* out, float* lse, const float* qkv, TileList list, Layout at) {
  if (static_cast<int>(blockIdx.x) >= *list.count) return;
  SHARED(float, probabilities, [fp32_threads / 32][32]);
  const Tile tile = list.tiles[*list.count - 1 - blockIdx.x];
  const auto seen = keys_seen<32>(tile, at.window);
  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = warp; r < tile.count; r += fp32_threads / 32) {
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
      return launch(attention_forward_fp32_kernel, grid, fp32_threads, 0, compute_, out.as<float>(), lse.as<float>(),
                    qkv.as<const float>(), list, at);
    const bool aligned = heads_aligned({&qkv, &out}, shape);
    constexpr size_t shared_rows = tile_rows + 2 * key_rows_of<d()>;
    launch(aligned ? attention_forward_kernel<d(), true> : attention_forward_kernel<d(), false>, grid,
           threads_of<row_blocks<d()>>, shared_rows * pitch_of<d()> * sizeof(bf16), compute_, out.as<bf16>(),
           lse.as<float>(), qkv.as<const bf16>(), list, at);
  });
}

}  // namespace orpo
