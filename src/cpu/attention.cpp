// Attention over the packed stream, in tiles (FlashAttention-2, Dao 2023): a tile of queries of all heads that share a
// key/value head meets tiles of keys; scores never leave the cache. Tiles are unpacked to the layouts that products
// read (tile.h) by the task that uses them, into its thread's memory.
#include <omp.h>

#include <algorithm>
#include <atomic>

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

// Exponentials of softmax are taken to base 2, over scores times scale * log2(e).
template <class A> inline constexpr A log2_e = A(1.4426950408889634074L);
template <class A> inline constexpr A ln_2 = A(0.6931471805599453094L);
template <class T> inline constexpr int exponential_terms = std::is_same_v<T, bf16> ? 4 : 6;

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
    constexpr int64_t tasks_per_thread = 8, least = 64, most = 384;
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
      for (int64_t r = 0; r < count; r += G::chunk) attend(w, values, tile, r, key);
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

  // A row of scores -> probabilities relative to the running maximum; where that rises, the row's sum and output are
  // rescaled.
  template <class Begin, class End>
  void soften(const Work& w, int64_t chunk_row, int64_t r, Begin begin, End end) const {
    const A* scores = w.scores + chunk_row * key_tile;
    Entry* probabilities = w.probabilities + chunk_row * key_tile;
    const A to_base_2 = A(shape.scale) * log2_e<A>;
    Vector<A> largest = load(scores + begin);
    for (int64_t i = begin + lanes<A>; i < end; i += lanes<A>) largest = maximum(load(scores + i), largest);
    if (any_above<A>(largest, w.most[r])) {
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

// ---- backward: probabilities again from lse

// With P = exp(S - lse), dP = dout . V^T and delta = sum over head_dim of dout * out:
//   dS = P * (dP - delta),   dV = P^T . dout,   dK = scale dS^T . Q,   dQ = scale dS . K
// A task takes a strip of a segment's key tiles and owns their dK and dV. It meets the segment's query tiles from the
// last on; what a strip gives to a tile's dQ is added in the order of strips, each waiting for the one before, which
// was begun before. Strips depend on the batch alone, so the result does not depend on the number of threads.
template <class T> struct Backward : Geometry<T> {
  using G = Geometry<T>;
  using A = typename G::A;
  using Entry = typename G::Entry;
  using Word = typename G::Word;
  using G::shape, G::width, G::words, G::capacity, G::head_dim, G::group, G::rows, G::step;
  static constexpr int64_t strip_tiles = 4;
  struct Strip {
    int64_t segment, begin, end;  // key tiles
  };
  T* dqkv;
  const T *dout, *out;
  const A* lse;
  const T* qkv;
  std::vector<Strip> strips;                       // first strips of all segments, then second ones, ...
  mutable std::vector<std::atomic<int32_t>> done;  // [query tiles, kv_heads] strips that have added to dQ
  A* dq = nullptr;                                 // [rows, heads * head_dim] sums of some strips; unused where A is T

  Backward(T* dx, const T* d, const T* o, const A* l, const T* x, const AttentionShape& s, const Segment* segments,
           int64_t count, int64_t stream_rows)
      : G(s, segments, count, stream_rows, 128),
        dqkv(dx),
        dout(d),
        out(o),
        lse(l),
        qkv(x),
        done(this->queries.tiles.size() * s.kv_heads) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = this->keys.first[i]; k < this->keys.first[i + 1]; k += strip_tiles)
        strips.push_back({i, k, std::min(k + strip_tiles, this->keys.first[i + 1])});
    const auto ordinal = [&](const Strip& strip) { return strip.begin - this->keys.first[strip.segment]; };
    std::stable_sort(strips.begin(), strips.end(),
                     [&](const Strip& a, const Strip& b) { return ordinal(a) < ordinal(b); });
  }

  void reserve(Scratch& shared) {
    if constexpr (!std::is_same_v<T, A>) dq = shared.reserve<A>(static_cast<size_t>(rows * this->out_pitch()));
  }

  struct KeyWork {
    Word *keys_turned, *values_turned, *keys_paired;  // [words, key_tile] twice, [key_tile / step, width]
    A *dk, *dv;                                       // [key_tile, width]
  };
  struct Work {
    KeyWork keys[strip_tiles];
    Entry *unpacked, *q, *g;              // [key_tile, width]; queries and output gradient [capacity, width]
    Word *q_paired, *g_paired;            // [capacity / step, width]
    Word *probabilities, *dscores;        // paired [capacity / step, key_tile]
    A *row_lse, *delta, *dq;              // [capacity] twice, [capacity, width]
    A *score_block, *dprobability_block;  // [chunk, key_tile]
    Entry* dscore_block;                  // [chunk, key_tile]

    Work(const Backward& b, Pieces& pieces) {
      for (KeyWork& k : keys) {
        k.keys_turned = pieces.take<Word>(b.words * key_tile);
        k.values_turned = pieces.take<Word>(b.words * key_tile);
        k.keys_paired = pieces.take<Word>(key_tile / step * b.width);
        k.dk = pieces.take<A>(key_tile * b.width);
        k.dv = pieces.take<A>(key_tile * b.width);
      }
      unpacked = pieces.take<Entry>(key_tile * b.width);
      q = pieces.take<Entry>(b.capacity * b.width);
      g = pieces.take<Entry>(b.capacity * b.width);
      q_paired = pieces.take<Word>(b.capacity / step * b.width);
      g_paired = pieces.take<Word>(b.capacity / step * b.width);
      probabilities = pieces.take<Word>(b.capacity / step * key_tile);
      dscores = pieces.take<Word>(b.capacity / step * key_tile);
      row_lse = pieces.take<A>(b.capacity);
      delta = pieces.take<A>(b.capacity);
      dq = pieces.take<A>(b.capacity * b.width);
      score_block = pieces.take<A>(b.chunk * key_tile);
      dprobability_block = pieces.take<A>(b.chunk * key_tile);
      dscore_block = pieces.take<Entry>(b.chunk * key_tile);
    }
  };

  bool meets_strip(const Tile& tile, const Strip& strip) const {
    return std::any_of(&this->keys.tiles[strip.begin], &this->keys.tiles[strip.begin] + (strip.end - strip.begin),
                       [&](const Tile& key) { return meets(tile, key, shape.window); });
  }

  // One strip of one key/value head: dK and dV of its key tiles, its share of dQ.
  void run(Pieces pieces, const Strip& strip, int64_t kv_head) const {
    Work w(*this, pieces);
    for (int64_t k = strip.begin; k < strip.end; ++k)
      begin_keys(w, w.keys[k - strip.begin], this->keys.tiles[k], kv_head);
    const int64_t first = this->queries.first[strip.segment];
    for (int64_t i = this->queries.first[strip.segment + 1] - 1; i >= first; --i) {
      const Tile& tile = this->queries.tiles[i];
      if (!meets_strip(tile, strip)) continue;
      unpack_query_tile(w, tile, kv_head);
      const Word* q_paired = pair_rows(w.q_paired, w.q, this->rows_of(tile), width);
      const Word* g_paired = pair_rows(w.g_paired, w.g, this->rows_of(tile), width);
      std::fill(w.dq, w.dq + capacity * width, A(0));
      for (int64_t k = strip.begin; k < strip.end; ++k) {
        const Tile& key = this->keys.tiles[k];
        if (meets(tile, key, shape.window)) meet(w, w.keys[k - strip.begin], q_paired, g_paired, tile, key);
      }
      add_dq(w.dq, strip, i, kv_head);
    }
    for (int64_t k = strip.begin; k < strip.end; ++k) {
      const Tile& key = this->keys.tiles[k];
      const KeyWork& of = w.keys[k - strip.begin];
      for (int64_t r = 0; r < key.count; ++r) {
        T* row = dqkv + (key.row + r) * this->qkv_pitch();
        for_vectors<A>(head_dim, [&](int64_t i, auto n) {
          store(row + this->key_column(kv_head) + i, load(of.dk + r * width + i) * A(shape.scale), n);
          store(row + this->value_column(kv_head) + i, load(of.dv + r * width + i), n);
        });
      }
    }
  }

  void begin_keys(Work& w, KeyWork& to, const Tile& key, int64_t kv_head) const {
    const auto turn = [&](Word* turned, int64_t column) {
      this->unpack_keys(w.unpacked, qkv, key, column);
      transpose(turned, key_tile, reinterpret_cast<const Word*>(w.unpacked), words, key.count, this->head_words());
    };
    turn(to.values_turned, this->value_column(kv_head));
    turn(to.keys_turned, this->key_column(kv_head));
    if constexpr (step == 1)
      std::copy(w.unpacked, w.unpacked + round_up(key.count, G::grain) * width, to.keys_paired);
    else
      pair_rows(to.keys_paired, w.unpacked, round_up(key.count, G::grain), width);
    std::fill(to.dk, to.dk + key_tile * width, A(0));
    std::fill(to.dv, to.dv + key_tile * width, A(0));
  }

  void unpack_query_tile(Work& w, const Tile& tile, int64_t kv_head) const {
    this->unpack_queries(w.q, qkv, this->qkv_pitch(), tile, kv_head);
    this->unpack_queries(w.g, dout, this->out_pitch(), tile, kv_head);
    const int64_t count = this->rows_of(tile);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t head = kv_head * group + r % group, row = tile.row + r / group;
      const T* o = out + row * this->out_pitch() + head * head_dim;
      Vector<A> sum{};
      for_vectors<A>(head_dim, [&](int64_t i, auto n) { sum += load(o + i, n) * load(w.g + r * width + i); });
      w.delta[r] = sum_lanes<A>(sum);
      w.row_lse[r] = lse[head * rows + row] * log2_e<A>;
    }
    std::fill(w.delta + count, w.delta + capacity, A(0));
    std::fill(w.row_lse + count, w.row_lse + capacity, A(0));
  }

  // A query tile meets a key tile: block by block of query rows P, dS and dQ, then dV and dK over all of them.
  void meet(const Work& w, const KeyWork& of, const Word* q_paired, const Word* g_paired, const Tile& tile,
            const Tile& key) const {
    const int64_t count = this->rows_of(tile), depth = this->head_words();
    for (int64_t r = 0; r < count; r += G::chunk) {
      const Span span = this->visible_to_chunk(tile, r, key);
      if (span.empty()) continue;
      const int64_t columns = span.end - span.begin, padded = round_up(std::min(G::chunk, count - r), block_rows);
      multiply_tile(w.score_block + span.begin, key_tile, reinterpret_cast<const Word*>(w.q) + r * words, words, 1,
                    of.keys_turned + span.begin, key_tile, padded, columns, depth, false);
      multiply_tile(w.dprobability_block + span.begin, key_tile, reinterpret_cast<const Word*>(w.g) + r * words, words,
                    1, of.values_turned + span.begin, key_tile, padded, columns, depth, false);
      if (this->all_visible(tile, r, key)) {
        constexpr std::integral_constant<int64_t, 0> begin{};
        constexpr std::integral_constant<int64_t, key_tile> end{};
        for (int64_t i = 0; i < padded; i += step) differentiate(w, i, r + i, begin, end, nullptr);
      } else {
        for (int64_t i = 0; i < padded; i += step) {
          Span visible[step];
          for (int s = 0; s < step; ++s) visible[s] = this->visible(tile, r + i + s, key);
          differentiate(w, i, r + i, span.begin, span.end, visible);
        }
      }
      multiply_tile(w.dq + r * width, width, reinterpret_cast<const Word*>(w.dscore_block) + span.begin / step,
                    key_tile / step, 1, of.keys_paired + span.begin / step * width, width, padded, head_dim,
                    columns / step, true);
    }
    for (int64_t k = 0; k < key.count; k += block_rows) {
      const Span seers = this->seers(tile, key, k);
      if (seers.empty()) continue;
      const int64_t begin = seers.begin / step, deep = (seers.end - seers.begin) / step;
      multiply_tile(of.dv + k * width, width, w.probabilities + begin * key_tile + k, 1, key_tile,
                    g_paired + begin * width, width, block_rows, head_dim, deep, true);
      multiply_tile(of.dk + k * width, width, w.dscores + begin * key_tile + k, 1, key_tile, q_paired + begin * width,
                    width, block_rows, head_dim, deep, true);
    }
  }

  // Scores and dP of `step` rows -> P and dS; 0 where not visible, if that is given.
  template <class Begin, class End, class Visible>
  void differentiate(const Work& w, int64_t chunk_row, int64_t r, Begin begin, End end, Visible visible) const {
    const A to_base_2 = A(shape.scale) * log2_e<A>;
    const A *scores = w.score_block + chunk_row * key_tile,
            *dprobabilities = w.dprobability_block + chunk_row * key_tile;
    for (int64_t i = begin; i < end; i += lanes<A>) {
      Vector<A> p[step], ds[step];
#pragma GCC unroll 2
      for (int s = 0; s < step; ++s) {
        p[s] = power_of_two<exponential_terms<T>>(load(scores + s * key_tile + i) * to_base_2 - w.row_lse[r + s]);
        ds[s] = p[s] * (load(dprobabilities + s * key_tile + i) - w.delta[r + s]);
        if constexpr (std::is_pointer_v<Visible>)
          p[s] = masked<A>(p[s], i, visible[s], 0), ds[s] = masked<A>(ds[s], i, visible[s], 0);
      }
      store_paired(w.probabilities + r / step * key_tile + i, p);
      store_paired(w.dscores + r / step * key_tile + i, ds);
      store_rows(w.dscore_block + chunk_row * key_tile + i, key_tile, ds);
    }
  }

  // dQ of a query tile += share, in the order of the segment's strips; the last one rounds.
  void add_dq(const A* share, const Strip& strip, int64_t index, int64_t kv_head) const {
    const Tile& tile = this->queries.tiles[index];
    int32_t before = 0, after = 0;
    for (int64_t k = this->keys.first[strip.segment]; k < this->keys.first[strip.segment + 1]; k += strip_tiles) {
      const Strip other{strip.segment, k, std::min(k + strip_tiles, this->keys.first[strip.segment + 1])};
      if (meets_strip(tile, other)) ++(k < strip.begin ? before : after);
    }
    std::atomic<int32_t>& turn = done[index * shape.kv_heads + kv_head];
    for (int32_t now = turn.load(std::memory_order_acquire); now != before; now = turn.load(std::memory_order_acquire))
      turn.wait(now, std::memory_order_acquire);
    for (int64_t r = 0; r < this->rows_of(tile); ++r) {
      const int64_t column = (kv_head * group + r % group) * head_dim, row = tile.row + r / group;
      T* to = dqkv + row * this->qkv_pitch() + column;
      A* sum;
      if constexpr (std::is_same_v<T, A>)
        sum = to;
      else
        sum = dq + row * this->out_pitch() + column;
      for_vectors<A>(head_dim, [&](int64_t i, auto n) {
        Vector<A> x = load(share + r * width + i) * A(shape.scale);
        if (before) x += load(sum + i, n);
        if (after > 1)
          store(sum + i, x, n);
        else
          store(to + i, x, n);
      });
    }
    turn.store(before + 1, std::memory_order_release);
    turn.notify_all();
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
