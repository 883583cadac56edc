// Attention over the packed stream, in tiles (FlashAttention-2, Dao 2023): a tile of queries of all heads that share a
// key/value head meets tiles of keys; scores never leave the cache. Tiles are unpacked to A once, so that every product
// runs on dense rows.
#include <omp.h>

#include <algorithm>
#include <utility>

#include "src/cpu/attention_tiles.h"
#include "src/cpu/backend.h"
#include "src/cpu/scratch.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

struct CpuBackend::AttentionTiles {
  Scratch shared, threads;
};

namespace {

// ---- forward: online softmax over the key tiles of a query tile

template <class T> struct Forward : Geometry<T> {
  using A = Accumulator<T>;
  using Geometry<T>::shape, Geometry<T>::width, Geometry<T>::capacity, Geometry<T>::head_dim, Geometry<T>::group,
      Geometry<T>::rows;
  T* out;
  A* lse;
  const T* qkv;
  A *keys_turned = nullptr, *values = nullptr;  // [key tiles, kv_heads, key_block]

  Forward(T* o, A* l, const T* x, const AttentionShape& s, const Segment* segments, int64_t count, int64_t stream_rows)
      : Geometry<T>(s, segments, count, stream_rows), out(o), lse(l), qkv(x) {}

  int64_t thread_entries() const { return capacity * (2 * width + key_tile + lanes<A> + 1); }

  void reserve(Scratch& shared) {
    const int64_t entries = this->key_tiles() * shape.kv_heads * this->key_block();
    keys_turned = shared.reserve<A>(static_cast<size_t>(2 * entries));
    values = keys_turned + entries;
  }

  // One key tile of one key/value head.
  void unpack_keys(int64_t index) const {
    const int64_t kv_head = index % shape.kv_heads;
    const Tile& tile = this->keys.tiles[index / shape.kv_heads];
    const T* row = qkv + tile.row * this->qkv_pitch();
    this->unpack_transposed(keys_turned + index * this->key_block(), row + this->key_column(kv_head), this->qkv_pitch(),
                            tile.count);
    this->unpack(values + index * this->key_block(), row + this->value_column(kv_head), this->qkv_pitch(), tile.count,
                 1);
  }

  // One query tile of one key/value head. scores becomes probabilities relative to the running maximum.
  void run(A* q, int64_t segment, const Tile& tile, int64_t kv_head) const {
    A* o = q + capacity * width;
    A* scores = o + capacity * width;
    A* sums = scores + capacity * key_tile;  // [capacity, lanes]
    A* most = sums + capacity * lanes<A>;
    const int64_t count = tile.count * group;
    this->unpack_queries(q, qkv, this->qkv_pitch(), tile, kv_head, A(shape.scale));
    std::fill(o, o + count * width, A(0));
    std::fill(sums, sums + count * lanes<A>, A(0));
    std::fill(most, most + count, -std::numeric_limits<A>::infinity());
    for (int64_t k = this->keys.first[segment]; k < this->keys.first[segment + 1]; ++k) {
      const Tile& key = this->keys.tiles[k];
      if (!meets(tile, key, shape.window)) continue;
      const int64_t columns = std::min<int64_t>(key.count, tile.last() - key.position + 1);
      const int64_t block = (k * shape.kv_heads + kv_head) * this->key_block();
      multiply_tile(scores, key_tile, q, width, 1, keys_turned + block, key_tile, count, columns, head_dim, false);
      for (int64_t r = 0; r < count; ++r) {
        const Visible visible(tile.position + r % tile.count, key, columns, shape.window);
        soften(scores + r * key_tile, sums + r * lanes<A>, most[r], o + r * width, columns, visible);
      }
      multiply_tile(o, width, scores, key_tile, 1, values + block, width, count, head_dim, columns, true);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t head = kv_head * group + r / tile.count, row = tile.row + r % tile.count;
      const A sum = sum_lanes<A>(load(sums + r * lanes<A>));
      lse[head * rows + row] = most[r] + std::log(sum);
      T* to = out + row * this->out_pitch() + head * head_dim;
      for_vectors<A>(head_dim, [&](int64_t i, auto n) { store(to + i, load(o + r * width + i) / sum, n); });
    }
  }

  // A row of scores -> exp(score - most), with the row's running maximum, sum and output rescaled where the maximum
  // rises.
  void soften(A* scores, A* sums, A& most, A* o, int64_t columns, const Visible& visible) const {
    const int64_t padded = round_up(columns, lanes<A>);
    const A lowest = -std::numeric_limits<A>::infinity();
    if (visible.empty()) return std::fill(scores, scores + padded, A(0));
    const bool whole = visible.whole(padded);
    Vector<A> largest = splat(lowest);
    for (int64_t i = 0; i < padded; i += lanes<A>) {
      Vector<A> x = load(scores + i);
      if (!whole) store(scores + i, x = masked<A>(x, i, visible, lowest));
      largest = maximum(x, largest);
    }
    const A highest = std::max(most, maximum_of_lanes<A>(largest));
    Vector<A> sum = load(sums);
    if (highest > most) {
      const A shrink = std::exp(most - highest);
      most = highest;
      sum *= shrink;
      for (int64_t i = 0; i < width; i += lanes<A>) store(o + i, load(o + i) * shrink);
    }
    for (int64_t i = 0; i < padded; i += lanes<A>) {
      const Vector<A> p = exponential(load(scores + i) - most);
      sum += p;
      store(scores + i, p);
    }
    store(sums, sum);
  }
};

// ---- backward: probabilities again from lse, key tile by key tile

// With P = exp(S - lse), dP = dout . V^T and delta = sum over head_dim of dout * out:
//   dS = P * (dP - delta),   dV = P^T . dout,   dK = dS^T . (scale Q),   dQ = scale dS . K
// A task takes a strip of a segment's key tiles and owns their dK and dV; dQ is summed over strips afterwards, in
// order. How many strips there are depends on the batch alone, so the result does not depend on the number of threads.
template <class T> struct Backward : Geometry<T> {
  using A = Accumulator<T>;
  using Geometry<T>::shape, Geometry<T>::width, Geometry<T>::capacity, Geometry<T>::head_dim, Geometry<T>::group,
      Geometry<T>::rows;
  struct Strip {
    int64_t segment, begin, end;  // key tiles
    int64_t dq;                   // its first block of dq
  };
  T* dqkv;
  const T *dout, *out;
  const A* lse;
  const T* qkv;
  std::vector<Strip> strips;
  int64_t dq_blocks = 0;
  A *keys_plain = nullptr, *keys_turned = nullptr, *values_turned = nullptr;  // [key tiles, kv_heads, key_block]
  A *q = nullptr, *g = nullptr,
    *dq = nullptr;          // scaled queries, output gradient [query tiles, kv_heads, query_block]; dq once a strip
  A* statistics = nullptr;  // [query tiles, kv_heads, 2, capacity] lse and delta

  Backward(T* dx, const T* d, const T* o, const A* l, const T* x, const AttentionShape& s, const Segment* segments,
           int64_t count, int64_t stream_rows)
      : Geometry<T>(s, segments, count, stream_rows), dqkv(dx), dout(d), out(o), lse(l), qkv(x) {
    constexpr int64_t enough_tasks = 64, most_strips = 8, least_tiles = 4;
    const int64_t wanted = std::clamp<int64_t>(enough_tasks / std::max<int64_t>(1, count * s.kv_heads), 1, most_strips);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = this->keys.first[i], tiles = this->keys.first[i + 1] - begin;
      const int64_t parts = std::clamp<int64_t>(tiles / least_tiles, 1, wanted);
      for (int64_t part = 0; part < parts; ++part) {
        strips.push_back({i, begin + tiles * part / parts, begin + tiles * (part + 1) / parts, dq_blocks});
        dq_blocks += (this->queries.first[i + 1] - this->queries.first[i]) * s.kv_heads;
      }
    }
  }

  int64_t thread_entries() const { return 2 * capacity * key_tile + 2 * this->key_block(); }

  void reserve(Scratch& shared) {
    const int64_t key_entries = this->key_tiles() * shape.kv_heads * this->key_block();
    const int64_t query_blocks = this->query_tiles() * shape.kv_heads,
                  query_entries = query_blocks * this->query_block();
    A* next = shared.reserve<A>(static_cast<size_t>(3 * key_entries + 2 * query_entries +
                                                    dq_blocks * this->query_block() + 2 * query_blocks * capacity));
    const auto take = [&](int64_t entries) { return std::exchange(next, next + entries); };
    keys_plain = take(key_entries), keys_turned = take(key_entries), values_turned = take(key_entries);
    q = take(query_entries), g = take(query_entries), dq = take(dq_blocks * this->query_block());
    statistics = take(2 * query_blocks * capacity);
  }

  void unpack_keys(int64_t index) const {
    const int64_t kv_head = index % shape.kv_heads, at = index * this->key_block();
    const Tile& tile = this->keys.tiles[index / shape.kv_heads];
    const T* row = qkv + tile.row * this->qkv_pitch();
    this->unpack(keys_plain + at, row + this->key_column(kv_head), this->qkv_pitch(), tile.count, 1);
    this->unpack_transposed(keys_turned + at, row + this->key_column(kv_head), this->qkv_pitch(), tile.count);
    this->unpack_transposed(values_turned + at, row + this->value_column(kv_head), this->qkv_pitch(), tile.count);
  }

  void unpack_query_tile(int64_t index) const {
    const int64_t kv_head = index % shape.kv_heads;
    const Tile& tile = this->queries.tiles[index / shape.kv_heads];
    A* gradient = g + index * this->query_block();
    this->unpack_queries(q + index * this->query_block(), qkv, this->qkv_pitch(), tile, kv_head, A(shape.scale));
    this->unpack_queries(gradient, dout, this->out_pitch(), tile, kv_head, 1);
    A *row_lse = statistics + index * 2 * capacity, *delta = row_lse + capacity;
    for (int64_t r = 0; r < tile.count * group; ++r) {
      const int64_t head = kv_head * group + r / tile.count, row = tile.row + r % tile.count;
      const T* o = out + row * this->out_pitch() + head * head_dim;
      Vector<A> sum{};
      for_vectors<A>(head_dim, [&](int64_t i, auto n) { sum += load(o + i, n) * load(gradient + r * width + i); });
      delta[r] = sum_lanes<A>(sum);
      row_lse[r] = lse[head * rows + row];
    }
  }

  // One strip of one key/value head: dK and dV of its key tiles, its share of dQ.
  void run(A* work, const Strip& strip, int64_t kv_head) const {
    A *probabilities = work, *dscores = probabilities + capacity * key_tile;
    A *dk = dscores + capacity * key_tile, *dv = dk + this->key_block();
    const int64_t first = this->queries.first[strip.segment], last = this->queries.first[strip.segment + 1];
    const auto dq_of = [&](int64_t i) {
      return dq + (strip.dq + (i - first) * shape.kv_heads + kv_head) * this->query_block();
    };
    for (int64_t i = first; i < last; ++i) std::fill(dq_of(i), dq_of(i) + this->query_block(), A(0));
    for (int64_t k = strip.begin; k < strip.end; ++k) {
      const Tile& key = this->keys.tiles[k];
      const int64_t block = (k * shape.kv_heads + kv_head) * this->key_block();
      std::fill(dk, dk + 2 * this->key_block(), A(0));
      for (int64_t i = first; i < last; ++i) {
        const Tile& tile = this->queries.tiles[i];
        if (!meets(tile, key, shape.window)) continue;
        const int64_t index = i * shape.kv_heads + kv_head, count = tile.count * group;
        const int64_t columns = std::min<int64_t>(key.count, tile.last() - key.position + 1);
        const A *queries = q + index * this->query_block(), *gradient = g + index * this->query_block();
        multiply_tile(probabilities, key_tile, queries, width, 1, keys_turned + block, key_tile, count, columns,
                      head_dim, false);
        multiply_tile(dscores, key_tile, gradient, width, 1, values_turned + block, key_tile, count, columns, head_dim,
                      false);
        differentiate(probabilities, dscores, statistics + index * 2 * capacity, tile, key, columns);
        multiply_tile(dv, width, probabilities, 1, key_tile, gradient, width, columns, head_dim, count, true);
        multiply_tile(dk, width, dscores, 1, key_tile, queries, width, columns, head_dim, count, true);
        multiply_tile(dq_of(i), width, dscores, key_tile, 1, keys_plain + block, width, count, head_dim, columns, true);
      }
      for (int64_t r = 0; r < key.count; ++r) {
        T* row = dqkv + (key.row + r) * this->qkv_pitch();
        for_vectors<A>(head_dim, [&](int64_t i, auto n) {
          store(row + this->key_column(kv_head) + i, load(dk + r * width + i), n);
          store(row + this->value_column(kv_head) + i, load(dv + r * width + i), n);
        });
      }
    }
  }

  // Scores -> probabilities, dP -> dS, in place.
  void differentiate(A* scores, A* dscores, const A* lse_and_delta, const Tile& tile, const Tile& key,
                     int64_t columns) const {
    const int64_t padded =
        round_up(columns, std::max(lanes<A>, block_rows));  // columns that dK and dV read: none undefined
    for (int64_t r = 0; r < tile.count * group; ++r) {
      const Visible visible(tile.position + r % tile.count, key, columns, shape.window);
      const bool whole = visible.whole(padded);
      const A row_lse = lse_and_delta[r], delta = lse_and_delta[capacity + r];
      for (int64_t i = 0; i < padded; i += lanes<A>) {
        Vector<A> p = exponential(load(scores + r * key_tile + i) - row_lse);
        Vector<A> ds = p * (load(dscores + r * key_tile + i) - delta);
        if (!whole) p = masked<A>(p, i, visible, 0), ds = masked<A>(ds, i, visible, 0);
        store(scores + r * key_tile + i, p);
        store(dscores + r * key_tile + i, ds);
      }
    }
  }

  // dQ of one query tile of one key/value head: the strips' shares, in order.
  void add_strips(int64_t index) const {
    const int64_t kv_head = index % shape.kv_heads, tile_index = index / shape.kv_heads;
    const Tile& tile = this->queries.tiles[tile_index];
    const int64_t segment = this->segment_of_query_tile(tile_index);
    const int64_t block =
        ((tile_index - this->queries.first[segment]) * shape.kv_heads + kv_head) * this->query_block();
    const auto own = std::equal_range(strips.begin(), strips.end(), Strip{segment, 0, 0, 0},
                                      [](const Strip& a, const Strip& b) { return a.segment < b.segment; });
    for (int64_t r = 0; r < tile.count * group; ++r) {
      const int64_t head = kv_head * group + r / tile.count;
      T* to = dqkv + (tile.row + r % tile.count) * this->qkv_pitch() + head * head_dim;
      for_vectors<A>(head_dim, [&](int64_t i, auto n) {
        Vector<A> sum{};
        for (auto strip = own.first; strip != own.second; ++strip)
          sum += load(dq + strip->dq * this->query_block() + block + r * width + i);
        store(to + i, sum * A(shape.scale), n);
      });
    }
  }
};

// body(task, this thread's memory) for every task, dealt as threads become free.
template <class A, class Body> void for_tasks(int64_t tasks, Scratch& scratch, int64_t thread_entries, Body&& body) {
  const int64_t stride = round_up(thread_entries, 64 / static_cast<int64_t>(sizeof(A)));
  A* memory = scratch.reserve<A>(static_cast<size_t>(stride * omp_get_max_threads()));
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t task = 0; task < tasks; ++task) body(task, memory + stride * omp_get_thread_num());
}

}  // namespace

void CpuBackend::attention_forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, const DeviceBatch& batch,
                                   const AttentionShape& shape) {
  shapes::attention("attention_forward", qkv, out, lse, batch, shape);
  const Segment* segments = segments_of("attention_forward", batch, qkv.rows());
  if (!tiles_) tiles_ = std::make_shared<AttentionTiles>();
  with_dtype("attention_forward", qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    Forward<T> forward(out.as<T>(), lse.as<A>(), qkv.as<const T>(), shape, segments, batch.segments.rows(), qkv.rows());
    forward.reserve(tiles_->shared);
    for_rows(forward.key_tiles() * shape.kv_heads, [&](int64_t index) { forward.unpack_keys(index); });
    // Last tiles first: they see the most keys.
    const int64_t tasks = forward.query_tiles() * shape.kv_heads;
    for_tasks<A>(tasks, tiles_->threads, forward.thread_entries(), [&](int64_t task, A* memory) {
      const int64_t index = tasks - 1 - task, tile = index / shape.kv_heads;
      forward.run(memory, forward.segment_of_query_tile(tile), forward.queries.tiles[tile], index % shape.kv_heads);
    });
  });
}

void CpuBackend::attention_backward(const Tensor& dqkv, const Tensor& dout, const Tensor& out, const Tensor& lse,
                                    const Tensor& qkv, const DeviceBatch& batch, const AttentionShape& shape) {
  shapes::attention_backward(dqkv, dout, out, lse, qkv, batch, shape);
  const Segment* segments = segments_of("attention_backward", batch, qkv.rows());
  if (!tiles_) tiles_ = std::make_shared<AttentionTiles>();
  with_dtype("attention_backward", qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    Backward<T> backward(dqkv.as<T>(), dout.as<const T>(), out.as<const T>(), lse.as<const A>(), qkv.as<const T>(),
                         shape, segments, batch.segments.rows(), qkv.rows());
    backward.reserve(tiles_->shared);
    for_rows(backward.key_tiles() * shape.kv_heads, [&](int64_t index) { backward.unpack_keys(index); });
    for_rows(backward.query_tiles() * shape.kv_heads, [&](int64_t index) { backward.unpack_query_tile(index); });
    const int64_t tasks = static_cast<int64_t>(backward.strips.size()) * shape.kv_heads;
    for_tasks<A>(tasks, tiles_->threads, backward.thread_entries(), [&](int64_t task, A* memory) {
      backward.run(memory, backward.strips[task / shape.kv_heads], task % shape.kv_heads);
    });
    for_rows(backward.query_tiles() * shape.kv_heads, [&](int64_t index) { backward.add_strips(index); });
  });
}

}  // namespace orpo
