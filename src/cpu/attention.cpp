// Attention over the packed stream, in tiles (FlashAttention-2, Dao 2023): a tile of queries of all heads that share a
// key/value head meets tiles of keys; scores never leave the cache. Tiles are unpacked to the layouts that products
// read (tile.h) by the task that uses them, into its thread's memory. The backward pass of a tile stands in
// attention_backward.h.
#include <omp.h>

#include <algorithm>
#include <atomic>

#include "src/cpu/attention_backward.h"
#include "src/cpu/backend.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

struct CpuBackend::AttentionTiles {
  Scratch shared, threads;
};

namespace {

// ---- forward: online softmax over the key tiles of a query tile

template <class T> struct Forward : Geometry<T> {
  using G = Geometry<T>;
  using A = typename G::A;
  using Entry = typename G::Entry;
  using Word = typename G::Word;
  using G::shape, G::width, G::words, G::capacity, G::head_dim, G::group, G::rows, G::step;
  static constexpr A lowest = -std::numeric_limits<A>::infinity();
  T* out;
  A* lse;
  const T* qkv;

  // Rows of a query tile: many share the unpacking of a key tile; few leave enough tasks for every thread. The result
  // does not depend on it.
  static int64_t wanted_rows(const AttentionShape& s, int64_t stream_rows) {
    constexpr int64_t tasks_per_thread = 8, least = 64, most = 1024;
    return std::clamp<int64_t>(s.heads * stream_rows / (tasks_per_thread * omp_get_max_threads()), least, most);
  }

  Forward(T* o, A* l, const T* x, const AttentionShape& s, const Segment* segments, int64_t count, int64_t stream_rows)
      : G(s, segments, count, stream_rows, wanted_rows(s, stream_rows)), out(o), lse(l), qkv(x) {}

  struct Work {
    Entry *q, *unpacked, *probabilities;  // [capacity, width], [key_tile, width], [chunk, key_tile]
    Word *keys, *values;                  // turned [words, key_tile], paired [key_tile / step, width]
    A *o, *sums, *most, *scores;          // [capacity, width], [capacity, lanes], [capacity], [chunk, key_tile]
    Work(const Forward& f, Pieces& pieces) {
      q = pieces.take<Entry>(f.capacity * f.width);
      unpacked = pieces.take<Entry>(key_tile * f.width);
      probabilities = pieces.take<Entry>(f.chunk * key_tile);
      keys = pieces.take<Word>(f.words * key_tile);
      values = pieces.take<Word>(key_tile / step * f.width);
      o = pieces.take<A>(f.capacity * f.width);
      sums = pieces.take<A>(f.capacity * lanes<A>);
      most = pieces.take<A>(f.capacity);
      scores = pieces.take<A>(f.chunk * key_tile);
    }
  };

  // One query tile of one key/value head.
  void run(Pieces pieces, int64_t segment, const Tile& tile, int64_t kv_head) const {
    const Work w(*this, pieces);
    const int64_t count = this->rows_of(tile);
    this->unpack_queries(w.q, qkv, this->qkv_pitch(), tile, kv_head);
    std::fill(w.o, w.o + round_up(count, G::chunk) * width, A(0));
    std::fill(w.sums, w.sums + count * lanes<A>, A(0));
    std::fill(w.most, w.most + count, lowest);
    for (int64_t k = this->keys.first[segment]; k < this->keys.first[segment + 1]; ++k) {
      const Tile& key = this->keys.tiles[k];
      if (!meets(tile, key, shape.window)) continue;
      this->unpack_keys(w.unpacked, qkv, key, this->key_column(kv_head));
      transpose(w.keys, key_tile, reinterpret_cast<const Word*>(w.unpacked), words, key.count, this->head_words());
      this->unpack_keys(w.unpacked, qkv, key, this->value_column(kv_head));
      const Word* values = pair_rows(w.values, w.unpacked, round_up(key.count, G::grain), width);
      const Tile& next = this->keys.tiles[std::min(k + 1, this->keys.first[segment + 1] - 1)];
      for (int64_t r = 0; r < count; r += G::chunk) {
        this->prefetch(qkv, this->qkv_pitch(), next, this->key_column(kv_head), head_dim, r, count);
        this->prefetch(qkv, this->qkv_pitch(), next, this->value_column(kv_head), head_dim, r, count);
        attend(w, values, tile, r, key);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t head = kv_head * group + r % group, row = tile.row + r / group;
      const A sum = sum_lanes<A>(load(w.sums + r * lanes<A>));
      lse[head * rows + row] = w.most[r] * A(shape.scale) + std::log(sum);
      T* to = out + row * this->out_pitch() + head * head_dim;
      for_vectors<A>(head_dim, [&](int64_t i, auto n) { store(to + i, load(w.o + r * width + i) * (1 / sum), n); });
    }
  }

  // The chunk of query rows from `first` on meets a key tile.
  void attend(const Work& w, const Word* values, const Tile& tile, int64_t first, const Tile& key) const {
    const Span span = this->visible_to_chunk(tile, first, key);
    if (span.empty()) return;
    const int64_t count = std::min(G::chunk, this->rows_of(tile) - first), padded = round_up(count, block_rows);
    multiply_tile(w.scores + span.begin, key_tile, reinterpret_cast<const Word*>(w.q) + first * words, words, 1,
                  w.keys + span.begin, key_tile, padded, span.end - span.begin, this->head_words(), false);
    if (this->all_visible(tile, first, key)) {
      constexpr std::integral_constant<int64_t, 0> begin{};
      constexpr std::integral_constant<int64_t, key_tile> end{};
      for (int64_t r = 0; r < count; ++r) soften(w, r, first + r, begin, end);
    } else {
      for (int64_t r = 0; r < count; ++r) {
        mask(w.scores + r * key_tile, span, this->visible(tile, first + r, key));
        soften(w, r, first + r, span.begin, span.end);
      }
    }
    multiply_tile(w.o + first * width, width, reinterpret_cast<const Word*>(w.probabilities) + span.begin / step,
                  key_tile / step, 1, values + span.begin / step * width, width, padded, head_dim,
                  (span.end - span.begin) / step, true);
  }

  void mask(A* scores, const Span& span, const Span& visible) const {
    for (int64_t i = span.begin; i < span.end; i += lanes<A>)
      store(scores + i, masked<A>(load(scores + i), i, visible, lowest));
  }

  // A row of scores -> probabilities relative to the running maximum. Where that rises by more than 8 (to base 2) the
  // row's sum and output are rescaled; up to there, floating point has room for probabilities above 1.
  template <class Begin, class End>
  void soften(const Work& w, int64_t chunk_row, int64_t r, Begin begin, End end) const {
    const A* scores = w.scores + chunk_row * key_tile;
    Entry* probabilities = w.probabilities + chunk_row * key_tile;
    const A to_base_2 = A(shape.scale) * log2_e<A>;
    Vector<A> largest = load(scores + begin);
    for (int64_t i = begin + lanes<A>; i < end; i += lanes<A>) largest = maximum(load(scores + i), largest);
    if (any_above<A>(largest, w.most[r] + 8 / to_base_2)) {
      const A before = std::exchange(w.most[r], maximum_of_lanes<A>(largest));
      const A shrink = std::exp2((before - w.most[r]) * to_base_2);
      store(w.sums + r * lanes<A>, load(w.sums + r * lanes<A>) * shrink);
      for (A* o = w.o + r * width; o < w.o + (r + 1) * width; o += lanes<A>) store(o, load(o) * shrink);
    }
    const A most = w.most[r] == lowest ? 0 : w.most[r];  // a row that has seen nothing yet
    Vector<A> sum = load(w.sums + r * lanes<A>);
    for (int64_t i = begin; i < end; i += step * lanes<A>) {
      Vector<A> p[step];
#pragma GCC unroll 2
      for (int s = 0; s < step; ++s) {
        p[s] = power_of_two<exponential_terms<T>>((load(scores + i + s * lanes<A>) - most) * to_base_2);
        sum += p[s];
      }
      store_rows(probabilities + i, lanes<A>, p);
    }
    store(w.sums + r * lanes<A>, sum);
  }
};

// body(task, this thread's memory) for every task, begun in order, as threads become free.
template <class Body> void for_tasks(int64_t tasks, Scratch& scratch, int64_t thread_bytes, Body&& body) {
  char* memory = scratch.reserve<char>(static_cast<size_t>(thread_bytes * omp_get_max_threads()));
  std::atomic<int64_t> next{0};
#pragma omp parallel
  for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
    body(task, Pieces(memory + thread_bytes * omp_get_thread_num()));
}

template <class Side> int64_t thread_bytes(const Side& side) {
  Pieces counted(nullptr);
  typename Side::Work(side, counted);
  return counted.bytes();
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
    const Forward<T> forward(out.as<T>(), lse.as<A>(), qkv.as<const T>(), shape, segments, batch.segments.rows(),
                             qkv.rows());
    // Last tiles first: they see the most keys.
    const int64_t tasks = forward.query_tiles() * shape.kv_heads;
    for_tasks(tasks, tiles_->threads, thread_bytes(forward), [&](int64_t task, Pieces memory) {
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
    const int64_t tasks = static_cast<int64_t>(backward.strips.size()) * shape.kv_heads;
    for_tasks(tasks, tiles_->threads, thread_bytes(backward), [&](int64_t task, Pieces memory) {
      backward.run(memory, backward.strips[task / shape.kv_heads], task % shape.kv_heads);
    });
  });
}

}  // namespace orpo
