// The backward pass of attention (FlashAttention-2, Dao 2023). With P = exp(scale S - lse), S = Q K^T, dP = dO V^T and
// delta = sum over head_dim of dO * O:
//   dS = P * (dP - delta),   dV = P^T dO,   dK = scale dS^T Q,   dQ = scale dS K
// Three kernels: delta; dK and dV by blocks that own a tile of keys and meet the queries that see it, those of all
// heads of the group; dQ by blocks that own a tile of queries. S and dP are computed twice, seven products in place of
// five, and so every sum has one owner, without atomics, in one order.
//
// P and dS never leave registers: the keys' blocks compute S^T and dP^T, whose accumulators are, rounded, the fragments
// that P^T dO and dS^T Q take. The side that is met comes in two buffers: one is loaded while the other is used.
#include "cuda/attention.cuh"
#include "cuda/gpu.cuh"
#include "cuda/tiles.cuh"

namespace orpo {

namespace {

// Rows of the side that is met, at a time.
template <int D> constexpr int step_of = D <= 128 ? 32 : 16;
// A warp's rows of the side that is owned, in blocks of 16: twice as many halve what is read from shared memory for
// each product, where registers have room for their sums and, unaligned, for addresses.
template <int D, bool aligned> constexpr int key_blocks = D <= 64 && aligned ? 2 : 1;
template <int D> constexpr int query_blocks = D <= 96 ? 2 : 1;
// Above 128 two warps share 16 keys, half a head each, so that their dK and dV have room in registers.
template <int D> constexpr int splits_of = D <= 128 ? 1 : 2;
template <int D> constexpr int owned_keys = tile_rows / splits_of<D>;
// Two owned tiles and twice two met: 68 KiB at 128; 99 KiB where 256 owns queries, all that a block of sm_86 and sm_89
// may have.
template <int D> constexpr size_t shared_bytes(int owned) {
  return (2 * owned + 4 * step_of<D>)*pitch_of<D> * sizeof(bf16);
}
// Blocks of an SM for which registers have to suffice: 8 warps (up to 255 registers), or 12 (168).
template <int D, bool aligned> constexpr int key_sharers = D <= 64 && aligned ? 4 : 2;
template <int D> constexpr int query_sharers = D <= 96 ? 4 : D <= 128 ? 3 : 2;

constexpr int delta_threads = 128;

// delta[heads, rows] = dout . out, a block a row; `lanes` lanes take a head, eight entries each.
template <bool aligned, class T> __global__ void __launch_bounds__(delta_threads)
    delta_kernel(float* delta, const T* dout, const T* out, int64_t rows, int heads, int head_dim, int lanes) {
  constexpr int N = entries_a_lane;
  const int64_t row = blockIdx.x;
  const int own = threadIdx.x / lanes, column = threadIdx.x % lanes * N;
  for (int head = own; head - own < heads; head += delta_threads / lanes) {  // as often for every thread
    const int64_t from = (row * heads + head) * head_dim + column;
    const int count = head < heads ? head_dim - column : 0;
    float g[N], o[N], sum = 0;
    load<aligned>(g, dout + from, count), load<aligned>(o, out + from, count);
#pragma unroll
    for (int e = 0; e < N; ++e) sum = fmaf(g[e], o[e], sum);  // said, so that no compiler chooses
    sum = lanes_sum(sum, lanes);
    if (column == 0 && head < heads) delta[head * rows + row] = sum;
  }
}

// What the kernels read besides the list: qkv and dout; lse and delta[heads, rows].
template <class T> struct Inputs {
  const T *qkv, *dout;
  const float *lse, *delta;
};

// dK and dV of a tile of keys (x) of a key/value head (y); above 128, of half of it (z).
template <int D, bool aligned>
__global__ void __launch_bounds__(threads_of<key_blocks<D, aligned>>, key_sharers<D, aligned>)
    attention_backward_keys_kernel(bf16* dqkv, Inputs<bf16> in, TileList list, Layout at) {
  constexpr int step = step_of<D>, pitch = pitch_of<D>, I = key_blocks<D, aligned>, threads = threads_of<I>;
  constexpr int splits = splits_of<D>, W = D / splits, owned = owned_keys<D>;
  static_assert(2 * step <= threads);
  if (static_cast<int>(blockIdx.x) >= *list.count) return;  // the whole block
  DYN_SHARED(bf16, keys);
  bf16 *values = keys + owned * pitch, *met = values + owned * pitch;  // [2] queries and their output's gradients
  SHARED(float, statistics, [2][2][step]);                             // of those: lse / ln 2, delta
  Tile tile = list.tiles[blockIdx.x];
  const int skipped = blockIdx.z * owned;
  tile.row += skipped, tile.position += skipped, tile.count -= skipped;
  if (tile.count <= 0) return;  // likewise
  if (tile.count > owned) tile.count = owned;
  using Seeing = Walk<3, step>;
  SHARED(Seeing, seeing, [1]);  // registers are short here
  if (threadIdx.x == 0) *seeing = queries_seeing<step>(tile, at.window);
  __syncthreads();
  const int kv_head = blockIdx.y, group = at.heads / at.kv_heads, per_head = seeing->tiles(), last = group * per_head;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp / splits * 16 * I, first = warp % splits * W;

  const auto load_queries = [&](bf16* to, const Run& run, int head) {
    load_tile<D, step, threads, aligned>(to, in.qkv + run.row * at.pitch() + at.query(head), run.count, at.head_dim,
                                         at.pitch());
    load_tile<D, step, threads, aligned>(to + step * pitch, in.dout + run.row * at.out_pitch() + at.query(head),
                                         run.count, at.head_dim, at.out_pitch());
  };
  // A thread's share of statistics. Queries that do not exist have P = exp2(0 - infinity) = 0.
  const int query = threadIdx.x % step;
  const bool of_lse = static_cast<int>(threadIdx.x) < step, any = static_cast<int>(threadIdx.x) < 2 * step;
  const auto load_statistic = [&](const Run& run, int head) {
    if (!any || query >= run.count) return of_lse ? INFINITY : 0.0f;
    const int64_t from = head * at.rows + run.row + query;
    return of_lse ? in.lse[from] * log2_e : in.delta[from];
  };

  const bf16* own = in.qkv + tile.row * at.pitch();
  load_tile<D, owned, threads, aligned>(keys, own + at.key_of(kv_head), tile.count, at.head_dim, at.pitch());
  load_tile<D, owned, threads, aligned>(values, own + at.value_of(kv_head), tile.count, at.head_dim, at.pitch());
  Run run = seeing->tile(0);
  load_queries(met, run, kv_head * group);
  if (any) statistics[0][!of_lse][query] = load_statistic(run, kv_head * group);
  Output<W, I> dk = {}, dv = {};
  for (int t = 0; t < last; ++t) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before any more
    float statistic = 0;
    Run next = run;
    if (t + 1 < last) {
      const int head = kv_head * group + (t + 1) / per_head;
      next = seeing->tile((t + 1) % per_head);
      load_queries(met + (t + 1) % 2 * 2 * step * pitch, next, head);
      statistic = load_statistic(next, head);
    }
    const bf16 *q = met + t % 2 * 2 * step * pitch, *g = q + step * pitch;
    const float *lse = statistics[t % 2][0] + lane % 4 * 2, *delta = statistics[t % 2][1] + lane % 4 * 2;

    Scores<step, I> p = {}, ds = {};
    multiply_rows<D, step, I>(p, keys + row * pitch, q);  // S^T = K Q^T
    each_score<step, I>(p, [&](float& x, int, int c) { x = fast_exp2(x * (at.scale * log2_e) - lse[c]); });
    if (!all_see(run, tile, at.window))
      each_score<step, I>(p, [&](float& x, int r, int c) {
        const Columns visible = seeing_queries(tile.position + row + lane / 4 + r * 8, run, at.window);
        x = visible.hold(c + lane % 4 * 2) ? x : 0.0f;
      });
    add_weighed<D, W, step, I>(dv, p, g + first);            // dV += P^T dO
    multiply_rows<D, step, I>(ds, values + row * pitch, g);  // dP^T = V dO^T
    each_score<step, I>(ds, p, [&](float& x, float probability, int, int c) { x = probability * (x - delta[c]); });
    add_weighed<D, W, step, I>(dk, ds, q + first);  // dK += dS^T Q
    if (any && t + 1 < last) statistics[(t + 1) % 2][!of_lse][query] = statistic;
    run = next;
  }

  const auto store = [&](int64_t column, const Output<W, I>& o, float factor) {
    float factors[2 * I];
#pragma unroll
    for (float& f : factors) f = factor;
    store_output<W, I, aligned>(dqkv + tile.row * at.pitch() + column + first, o, factors, row + lane / 4, tile.count,
                                at.head_dim - first, at.pitch());
  };
  store(at.key_of(kv_head), dk, at.scale), store(at.value_of(kv_head), dv, 1);
}

// dQ of a tile of queries (x) of a head (y).
template <int D, bool aligned> __global__ void __launch_bounds__(threads_of<query_blocks<D>>, query_sharers<D>)
    attention_backward_queries_kernel(bf16* dqkv, Inputs<bf16> in, TileList list, Layout at) {
  constexpr int step = step_of<D>, pitch = pitch_of<D>, I = query_blocks<D>, threads = threads_of<I>;
  if (static_cast<int>(blockIdx.x) >= *list.count) return;  // the whole block
  DYN_SHARED(bf16, queries);
  bf16 *gradients = queries + tile_rows * pitch, *met = gradients + tile_rows * pitch;  // [2] keys and values
  const Tile tile = list.tiles[*list.count - 1 - blockIdx.x];  // the last ones see most, so they come first
  const auto seen = keys_seen<step>(tile, at.window);
  const int head = blockIdx.y, lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * I, last = seen.tiles();
  const auto load_keys = [&](bf16* to, const Run& run) {
    const bf16* from = in.qkv + run.row * at.pitch();
    load_tile<D, step, threads, aligned>(to, from + at.key(head), run.count, at.head_dim, at.pitch());
    load_tile<D, step, threads, aligned>(to + step * pitch, from + at.value(head), run.count, at.head_dim, at.pitch());
  };

  load_tile<D, tile_rows, threads, aligned>(queries, in.qkv + tile.row * at.pitch() + at.query(head), tile.count,
                                            at.head_dim, at.pitch());
  load_tile<D, tile_rows, threads, aligned>(gradients, in.dout + tile.row * at.out_pitch() + at.query(head), tile.count,
                                            at.head_dim, at.out_pitch());
  Run run = seen.tile(0);
  load_keys(met, run);
  float lse[2 * I] = {}, delta[2 * I] = {}, factor[2 * I];
#pragma unroll
  for (int r = 0; r < 2 * I; ++r) {
    const int query = row + lane / 4 + r * 8;
    const int64_t from = head * at.rows + tile.row + query;
    if (query < tile.count) lse[r] = in.lse[from] * log2_e, delta[r] = in.delta[from];
    factor[r] = at.scale;
  }
  Output<D, I> dq = {};
  for (int t = 0; t < last; ++t) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, and nobody reads the one before any more
    Run next = run;
    if (t + 1 < last) load_keys(met + (t + 1) % 2 * 2 * step * pitch, next = seen.tile(t + 1));
    const bf16 *k = met + t % 2 * 2 * step * pitch, *v = k + step * pitch;

    Scores<step, I> p = {}, ds = {};
    multiply_rows<D, step, I>(p, queries + row * pitch, k);  // S = Q K^T
    each_score<step, I>(p, [&](float& x, int r, int) { x = fast_exp2(x * (at.scale * log2_e) - lse[r]); });
    if (run.count < step || !all_see(tile, run, at.window))
      each_score<step, I>(p, [&](float& x, int r, int c) {
        const Columns visible = visible_keys(tile.position + row + lane / 4 + r * 8, run, at.window);
        x = visible.hold(c + lane % 4 * 2) ? x : 0.0f;
      });
    multiply_rows<D, step, I>(ds, gradients + row * pitch, v);  // dP = dO V^T
    each_score<step, I>(ds, p, [&](float& x, float probability, int r, int) { x = probability * (x - delta[r]); });
    add_weighed<D, D, step, I>(dq, ds, k);  // dQ += dS K
    run = next;
  }
  store_output<D, I, aligned>(dqkv + tile.row * at.pitch() + at.query(head), dq, factor, row + lane / 4, tile.count,
                              at.head_dim, at.pitch());
}

// ---- fp32

// P and scale dS of a query and a key.
struct Pair {
  float p, ds;
};
__device__ __forceinline__ Pair pair_of(const float* query, const float* key, const float* gradient, const float* value,
                                        float lse, float delta, const Layout& at) {
  const float p = expf(dot(query, key, at.head_dim) * at.scale - lse);
  return {p, p * (dot(gradient, value, at.head_dim) - delta) * at.scale};
}

__global__ void __launch_bounds__(fp32_threads)
    attention_backward_keys_fp32_kernel(float* dqkv, Inputs<float> in, TileList list, Layout at) {
  if (static_cast<int>(blockIdx.x) >= *list.count) return;
  SHARED(float, weights, [fp32_threads / 32][2][32]);  // P, scale dS
  const Tile tile = list.tiles[blockIdx.x];
  const auto seeing = queries_seeing<32>(tile, at.window);
  const int kv_head = blockIdx.y, group = at.heads / at.kv_heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = warp; r < tile.count; r += fp32_threads / 32) {
    const int64_t row = (tile.row + r) * at.pitch();
    float dk[most_entries] = {}, dv[most_entries] = {};
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int t = 0; t < seeing.tiles(); ++t) {
        const Run run = seeing.tile(t);
        const float* queries = in.qkv + run.row * at.pitch() + at.query(head);
        const float* gradients = in.dout + run.row * at.out_pitch() + at.query(head);
        Pair pair{0, 0};
        if (lane < run.count && sees(run.position + lane, tile.position + r, at.window)) {
          const int64_t statistic = head * at.rows + run.row + lane;
          pair =
              pair_of(queries + lane * at.pitch(), in.qkv + row + at.key_of(kv_head), gradients + lane * at.out_pitch(),
                      in.qkv + row + at.value_of(kv_head), in.lse[statistic], in.delta[statistic], at);
        }
        weights[warp][0][lane] = pair.p, weights[warp][1][lane] = pair.ds;
        __syncwarp();
        add_weighed(dv, weights[warp][0], gradients, run.count, at.head_dim, at.out_pitch());
        add_weighed(dk, weights[warp][1], queries, run.count, at.head_dim, at.pitch());
        __syncwarp();  // the next queries' weights come here
      }
    store_output(dqkv + row + at.key_of(kv_head), dk, 1, at.head_dim);
    store_output(dqkv + row + at.value_of(kv_head), dv, 1, at.head_dim);
  }
}

__global__ void __launch_bounds__(fp32_threads)
    attention_backward_queries_fp32_kernel(float* dqkv, Inputs<float> in, TileList list, Layout at) {
  if (static_cast<int>(blockIdx.x) >= *list.count) return;
  SHARED(float, weights, [fp32_threads / 32][32]);  // scale dS
  const Tile tile = list.tiles[*list.count - 1 - blockIdx.x];
  const auto seen = keys_seen<32>(tile, at.window);
  const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = warp; r < tile.count; r += fp32_threads / 32) {
    const int64_t row = tile.row + r, statistic = head * at.rows + row;
    float dq[most_entries] = {};
    for (int t = 0; t < seen.tiles(); ++t) {
      const Run run = seen.tile(t);
      const float* keys = in.qkv + run.row * at.pitch() + at.key(head);
      const float* values = in.qkv + run.row * at.pitch() + at.value(head);
      weights[warp][lane] = 0;
      if (lane < run.count && sees(tile.position + r, run.position + lane, at.window))
        weights[warp][lane] = pair_of(in.qkv + row * at.pitch() + at.query(head), keys + lane * at.pitch(),
                                      in.dout + row * at.out_pitch() + at.query(head), values + lane * at.pitch(),
                                      in.lse[statistic], in.delta[statistic], at)
                                  .ds;
      __syncwarp();
      add_weighed(dq, weights[warp], keys, run.count, at.head_dim, at.pitch());
      __syncwarp();  // the next keys' weights come here
    }
    store_output(dqkv + row * at.pitch() + at.query(head), dq, 1, at.head_dim);
  }
}

}  // namespace

void CudaBackend::attention_backward(const Tensor& dqkv, const Tensor& dout, const Tensor& out, const Tensor& lse,
                                     const Tensor& qkv, const DeviceBatch& batch, const AttentionShape& shape) {
  const char* op = "attention_backward";
  shapes::attention_backward(dqkv, dout, out, lse, qkv, batch, shape);
  const int64_t rows = qkv.rows(), most = most_tiles(rows, batch.segments.rows());
  const Layout at = layout_of(qkv, shape);
  // Working memory: the tiles, their number, delta.
  const int64_t delta_tiles = (shape.heads * rows * int64_t{sizeof(float)} + int64_t{sizeof(Tile)} - 1) / sizeof(Tile);
  Tile* tiles = scratch<Tile>(most + 1 + delta_tiles);
  const TileList list{tiles, reinterpret_cast<int32_t*>(tiles + most)};
  auto* delta = reinterpret_cast<float*>(tiles + most + 1);
  list_tiles(compute_, list, batch.segments, rows, refused_, Refused::attention_backward_segment,
             Refused::attention_backward_end);
  if (rows == 0 || most == 0) return;
  const bool aligned = heads_aligned({&dqkv, &dout, &out, &qkv}, shape);
  const dim3 of_keys(static_cast<unsigned>(most), static_cast<unsigned>(shape.kv_heads)),
      of_queries(static_cast<unsigned>(most), static_cast<unsigned>(shape.heads));
  const auto find_delta = [&](auto zero) {
    using T = decltype(zero);
    launch(aligned ? delta_kernel<true, T> : delta_kernel<false, T>, static_cast<unsigned>(rows), delta_threads, 0,
           compute_, delta, dout.as<const T>(), out.as<const T>(), rows, shape.heads, shape.head_dim,
           lanes_for(shape.head_dim));
    return Inputs<T>{qkv.as<const T>(), dout.as<const T>(), lse.as<const float>(), delta};
  };
  with_head_size(op, shape.head_dim, [&](auto d) {
    constexpr int D = d();
    if (qkv.dtype == DType::f32) {
      const Inputs<float> in = find_delta(float{});
      launch(attention_backward_keys_fp32_kernel, of_keys, fp32_threads, 0, compute_, dqkv.as<float>(), in, list, at);
      launch(attention_backward_queries_fp32_kernel, of_queries, fp32_threads, 0, compute_, dqkv.as<float>(), in, list,
             at);
      return;
    }
    const Inputs<bf16> in = find_delta(bf16{});
    with_constant(aligned, [&](auto aligned_rows) {
      constexpr bool whole = aligned_rows();
      launch(attention_backward_keys_kernel<D, whole>, dim3(of_keys.x, of_keys.y, splits_of<D>),
             threads_of<key_blocks<D, whole>>, shared_bytes<D>(owned_keys<D>), compute_, dqkv.as<bf16>(), in, list, at);
      launch(attention_backward_queries_kernel<D, whole>, of_queries, threads_of<query_blocks<D>>,
             shared_bytes<D>(tile_rows), compute_, dqkv.as<bf16>(), in, list, at);
    });
  });
}

}  // namespace orpo
