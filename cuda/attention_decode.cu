// Decoding's attention: new rows look back over cached keys and values. Bounded by reading the cache, so a block reads
// each key and value once for several query heads that share it, and blocks take chunks of positions, whose results are
// joined by their maxima and sums (flash decoding, Dao et al. 2023). Chunks depend on the row alone: so do the results.
#include <algorithm>

#include "cuda/attention.cuh"
#include "cuda/gpu.cuh"

namespace orpo {

namespace {

constexpr int threads = 128, join_threads = 64, chunk_positions = 256;

// keys, values[sequences, kv_heads, capacity, head_dim]; row r is position positions[r] of sequence sequences[r].
struct Cache {
  int64_t sequences, capacity;
  const int32_t *sequence_of, *position_of;

  __device__ int64_t entry(int64_t row, int kv_head, int64_t position, const Layout& at) const {
    return ((int64_t{sequence_of[row]} * at.kv_heads + kv_head) * capacity + position) * at.head_dim;
  }
  // Whether the row has a place here; the block's first thread notes where it has none.
  __device__ bool holds(int64_t row, Refused* refused, Refused::Kind sequence, Refused::Kind position) const {
    const int32_t s = sequence_of[row], p = position_of[row];
    const bool known = s >= 0 && s < sequences, fits = p >= 0 && p < capacity;
    if (threadIdx.x == 0 && !known) refuse(refused, sequence, {row, s, sequences});
    if (threadIdx.x == 0 && known && !fits) refuse(refused, position, {p, s, capacity});
    return known && fits;
  }
};

Cache cache_of(const Tensor& keys, const Tensor& sequences, const Tensor& positions) {
  return {keys.shape[0], keys.shape[2], sequences.as<const int32_t>(), positions.as<const int32_t>()};
}

// Bits are moved as they are. aligned: whole heads in units of 16 bytes.
template <bool aligned, class T> __device__ __forceinline__ void copy(T* to, const T* from, int count) {
  if constexpr (aligned)
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  else
    for (int e = 0; e < wide<T> && e < count; ++e) to[e] = from[e];
}

// A block a row.
template <bool aligned, class T> __global__ void __launch_bounds__(threads)
    keep_kernel(T* keys, T* values, const T* qkv, Cache cache, Layout at, Refused* refused) {
  constexpr int N = wide<T>;
  const int64_t row = blockIdx.x;
  if (!cache.holds(row, refused, Refused::keep_sequence, Refused::keep_position)) return;
  const int groups = (at.head_dim + N - 1) / N;
  for (int index = threadIdx.x; index < at.kv_heads * groups; index += threads) {
    const int kv_head = index / groups, i = index % groups * N, left = at.head_dim - i;
    const T* from = qkv + row * at.pitch() + at.key_of(kv_head) + i;
    const int64_t to = cache.entry(row, kv_head, cache.position_of[row], at) + i;
    copy<aligned>(keys + to, from, left);
    copy<aligned>(values + to, from + int64_t{at.kv_heads} * at.head_dim, left);
  }
}

// The positions that a row sees, and the chunks they are cut into.
struct Span {
  int64_t begin, end;
  __device__ Span(int64_t position, int window)
      : begin(window > 0 && position >= window ? position - window + 1 : 0), end(position + 1) {}
  __device__ int chunks() const { return static_cast<int>((end - begin + chunk_positions - 1) / chunk_positions); }
};

// What a chunk gives for one query head: values[head_dim] weighed by exp(score - most), the weights' sum, most.
struct Partials {
  float* memory;
  int64_t first_row;  // rows from here on
  int chunks;         // room for so many a row
  __device__ float* at(int64_t row, int head, int chunk, const Layout& l) const {
    return memory + (((row - first_row) * l.heads + head) * chunks + chunk) * (l.head_dim + 2);
  }
};

// A block takes a row (x), H query heads of a key/value head (y) and a chunk of positions (z). `lanes` lanes take a
// position together, eight entries each.
template <int H, bool aligned, class T> __global__ void __launch_bounds__(threads)
    attend_kernel(Partials partials, const T* qkv, const T* keys, const T* values, Cache cache, Layout at, int lanes,
                  Refused* refused) {
  constexpr int N = entries_a_lane;
  SHARED(float, scores, [H][chunk_positions]);
  SHARED(float, sums, [threads * H * N]);  // [threads / lanes][H][lanes * N]
  const int64_t row = partials.first_row + blockIdx.x;
  if (!cache.holds(row, refused, Refused::decode_sequence, Refused::decode_position)) return;  // the whole block
  const Span span(cache.position_of[row], at.window);
  const int chunk = blockIdx.z, left = static_cast<int>(span.end - span.begin) - chunk * chunk_positions;
  if (left <= 0) return;  // likewise
  const int count = left < chunk_positions ? left : chunk_positions;
  const int group = at.heads / at.kv_heads, batches = (group + H - 1) / H;
  const int kv_head = blockIdx.y / batches, in_group = blockIdx.y % batches * H, head = kv_head * group + in_group;
  const int heads = group - in_group < H ? group - in_group : H;
  const int own = threadIdx.x / lanes, step = threads / lanes, column = threadIdx.x % lanes * N;
  const int entries = at.head_dim - column;
  const int64_t first = cache.entry(row, kv_head, span.begin + chunk * chunk_positions, at) + column;

  float q[H][N];
#pragma unroll
  for (int h = 0; h < H; ++h)
    load<aligned>(q[h], qkv + row * at.pitch() + at.query(head + h) + column, h < heads ? entries : 0);
#pragma unroll 2
  for (int j = own; j - own < count; j += step) {  // as often for every thread
    float k[N];
    load<aligned>(k, keys + first + int64_t{j} * at.head_dim, j < count ? entries : 0);
#pragma unroll
    for (int h = 0; h < H; ++h) {
      float x = 0;
#pragma unroll
      for (int e = 0; e < N; ++e) x = fmaf(q[h][e], k[e], x);  // said, so that no compiler chooses
      x = lanes_sum(x, lanes);
      if (column == 0 && j < count) scores[h][j] = x * at.scale;
    }
  }
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int h = warp; h < H; h += threads / 32) {
    float most = -INFINITY, sum = 0;
    for (int j = lane; j < count; j += 32) most = fmaxf(most, scores[h][j]);
    most = warp_max(most);
    for (int j = lane; j < count; j += 32) sum += scores[h][j] = expf(scores[h][j] - most);
    sum = warp_sum(sum);
    if (lane == 0 && h < heads) {
      float* statistics = partials.at(row, head + h, chunk, at) + at.head_dim;
      statistics[0] = sum, statistics[1] = most;
    }
  }
  __syncthreads();

  float o[H][N] = {};
#pragma unroll 2
  for (int j = own; j < count; j += step) {
    float v[N];
    load<aligned>(v, values + first + int64_t{j} * at.head_dim, entries);
#pragma unroll
    for (int h = 0; h < H; ++h)
#pragma unroll
      for (int e = 0; e < N; ++e) o[h][e] = fmaf(scores[h][j], v[e], o[h][e]);
  }
#pragma unroll
  for (int h = 0; h < H; ++h) store<true>(sums + ((own * H + h) * lanes * N + column), o[h], N);
  __syncthreads();
  for (int i = threadIdx.x; i < heads * at.head_dim; i += threads) {
    const int h = i / at.head_dim, c = i % at.head_dim;
    float sum = 0;
    for (int g = 0; g < step; ++g) sum += sums[(g * H + h) * lanes * N + c];
    partials.at(row, head + h, chunk, at)[c] = sum;
  }
}

// A block joins the chunks of a row (x) and a query head (y), in their order:
// out = sum over chunks c of exp(most_c - most) values_c / sum of exp(most_c - most) sum_c.
template <class T> __global__ void __launch_bounds__(join_threads)
    join_kernel(T* out, Partials partials, Cache cache, Layout at) {
  const int64_t row = partials.first_row + blockIdx.x;
  const int32_t sequence = cache.sequence_of[row], position = cache.position_of[row];
  if (sequence < 0 || sequence >= cache.sequences || position < 0 || position >= cache.capacity) return;  // refused
  const int head = blockIdx.y, chunks = Span(position, at.window).chunks(), size = at.head_dim;
  float most = -INFINITY, sum = 0;
  for (int c = 0; c < chunks; ++c) most = fmaxf(most, partials.at(row, head, c, at)[size + 1]);
  for (int c = 0; c < chunks; ++c) {
    const float* part = partials.at(row, head, c, at);
    sum += expf(part[size + 1] - most) * part[size];
  }
  for (int i = threadIdx.x; i < size; i += join_threads) {
    float o = 0;
    for (int c = 0; c < chunks; ++c) {
      const float* part = partials.at(row, head, c, at);
      o += expf(part[size + 1] - most) * part[i];
    }
    out[row * at.heads * size + at.query(head) + i] = from_float<T>(o / sum);
  }
}

// body(constant H): how many query heads of a group a block takes.
template <class Body> void with_heads(int group, Body&& body) {
  if (group == 1)
    body(std::integral_constant<int, 1>{});
  else if (group == 2)
    body(std::integral_constant<int, 2>{});
  else if (group <= 4)
    body(std::integral_constant<int, 4>{});
  else
    body(std::integral_constant<int, 8>{});
}

}  // namespace

void CudaBackend::keep_keys_values(const Tensor& keys, const Tensor& values, const Tensor& qkv, const Tensor& sequences,
                                   const Tensor& positions, const AttentionShape& shape) {
  shapes::cached_rows("keep_keys_values", qkv, keys, values, sequences, positions, shape);
  if (qkv.rows() == 0) return;
  with_gpu_dtype("keep_keys_values", qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_constant(heads_aligned({&keys, &values, &qkv}, shape), [&](auto aligned) {
      launch(keep_kernel<aligned(), T>, static_cast<unsigned>(qkv.rows()), threads, 0, compute_, keys.as<T>(),
             values.as<T>(), qkv.as<const T>(), cache_of(keys, sequences, positions), layout_of(qkv, shape), refused_);
    });
  });
}

void CudaBackend::attention_decode(const Tensor& out, const Tensor& qkv, const Tensor& keys, const Tensor& values,
                                   const Tensor& sequences, const Tensor& positions, const AttentionShape& shape) {
  const char* op = "attention_decode";
  shapes::attention_decode(out, qkv, keys, values, sequences, positions, shape);
  REQUIRE_SHAPE(op, shape.head_dim <= most_head_dim, "the head size is ", shape.head_dim);
  const int64_t capacity = keys.shape[2], longest = shape.window ? std::min<int64_t>(shape.window, capacity) : capacity;
  const auto chunks = std::max(1u, blocks_for(longest, chunk_positions));
  // Rows go in slices: their partial results take at most so many bytes.
  constexpr int64_t most_bytes = 64 << 20;
  const int64_t row_floats = int64_t{shape.heads} * chunks * (shape.head_dim + 2);
  const int64_t slice = std::clamp<int64_t>(most_bytes / 4 / row_floats, 1, std::max<int64_t>(qkv.rows(), 1));
  const Layout at = layout_of(qkv, shape);
  const Cache cache = cache_of(keys, sequences, positions);
  with_gpu_dtype(op, qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = heads_aligned({&keys, &values, &qkv}, shape);
    with_heads(shape.heads / shape.kv_heads, [&](auto heads) {
      constexpr int H = heads();
      for (int64_t row = 0; row < qkv.rows(); row += slice) {
        const Partials partials{scratch<float>(slice * row_floats), row, static_cast<int>(chunks)};
        const auto rows = static_cast<unsigned>(std::min(slice, qkv.rows() - row));
        const dim3 grid(rows, static_cast<unsigned>(shape.kv_heads) * blocks_for(shape.heads / shape.kv_heads, H),
                        chunks);
        launch(aligned ? attend_kernel<H, true, T> : attend_kernel<H, false, T>, grid, threads, 0, compute_, partials,
               qkv.as<const T>(), keys.as<const T>(), values.as<const T>(), cache, at, lanes_for(shape.head_dim),
               refused_);
        launch(join_kernel<T>, dim3(rows, static_cast<unsigned>(shape.heads)), join_threads, 0, compute_, out.as<T>(),
               partials, cache, at);
      }
    });
  });
}

}  // namespace orpo
