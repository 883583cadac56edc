// The backward pass of attention's tiles.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <span>
#include <utility>
#include <vector>

#include "src/cpu/attention_tiles.h"
#include "src/cpu/scratch.h"

namespace orpo::cpu {

// With P = exp(S - lse), dP = dout . V^T and delta = sum over head_dim of dout * out:
//   dS = P * (dP - delta),   dV = P^T . dout,   dK = scale dS^T . Q,   dQ = scale dS . K
// A task takes a strip of a segment's key tiles and owns their dK and dV. It meets the segment's query tiles from the
// last on. A query tile's dQ goes from strip to strip: each waits for the one before, which was begun before, and adds
// its key tiles' shares. So every sum runs in one order, whatever the strips and the number of threads.
template <class T> struct Backward : Geometry<T> {
  using G = Geometry<T>;
  using A = typename G::A;
  using Entry = typename G::Entry;
  using Word = typename G::Word;
  using G::shape, G::width, G::words, G::capacity, G::head_dim, G::group, G::rows, G::step;
  static constexpr int64_t most_tiles = 16;  // of a strip
  struct Strip {
    int64_t segment, begin, end;  // key tiles
  };
  T* dqkv;
  const T *dout, *out;
  const A* lse;
  const T* qkv;
  int64_t strip_tiles;
  std::vector<Strip> strips;                       // in the order in which they are begun
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
    // Long strips unpack a query tile less often; they have to leave tasks for every thread and to fit into a cache.
    constexpr int64_t tasks_per_thread = 6, cache_bytes = 1 << 20;
    const int64_t tile_bytes = key_tile * width * static_cast<int64_t>(3 * sizeof(Entry) + 2 * sizeof(A));
    const int64_t tiles = static_cast<int64_t>(this->keys.tiles.size());
    strip_tiles = std::clamp<int64_t>(tiles * s.kv_heads / (tasks_per_thread * omp_get_max_threads()), 1,
                                      std::clamp<int64_t>(cache_bytes / tile_bytes, 1, most_tiles));
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = this->keys.first[i]; k < this->keys.first[i + 1]; k += strip_tiles)
        strips.push_back({i, k, std::min(k + strip_tiles, this->keys.first[i + 1])});
    // First strips of all segments, then second ones, ...; in long segments first.
    const auto order = [&](const Strip& strip) {
      const int64_t begin = this->keys.first[strip.segment], end = this->keys.first[strip.segment + 1];
      return std::pair(strip.begin - begin, begin - end);
    };
    std::stable_sort(strips.begin(), strips.end(), [&](const Strip& a, const Strip& b) { return order(a) < order(b); });
  }

  void reserve(Scratch& shared) {
    if constexpr (!std::is_same_v<T, A>) dq = shared.reserve<A>(static_cast<size_t>(rows * this->out_pitch()));
  }

  struct KeyWork {
    Word *keys_turned, *values_turned, *keys_paired;  // [words, key_tile] twice, [key_tile / step, width]
    A *dk, *dv;                                       // [key_tile, width]
  };
  struct Work {
    KeyWork keys[most_tiles];
    Entry *unpacked, *q, *g;              // [key_tile, width]; queries and output gradient [capacity, width]
    Word *q_paired, *g_paired;            // [capacity / step, width]
    Word *probabilities, *dscores;        // paired [capacity / step, key_tile]
    A *row_lse, *delta, *dq;              // [capacity] twice, [capacity, width]
    A *score_block, *dprobability_block;  // [chunk, key_tile]
    Entry* dscore_block;                  // [chunk, key_tile]

    Work(const Backward& b, Pieces& pieces) {
      for (KeyWork& k : std::span(keys, static_cast<size_t>(b.strip_tiles))) {
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

  // Whether a query tile meets some of the key tiles [begin, end).
  bool meets_some(const Tile& tile, int64_t begin, int64_t end) const {
    return std::any_of(this->keys.tiles.begin() + begin, this->keys.tiles.begin() + end,
                       [&](const Tile& key) { return meets(tile, key, shape.window); });
  }

  void prefetch_queries(const Tile& tile, int64_t kv_head, int64_t r, int64_t all) const {
    const int64_t column = kv_head * group * head_dim, count = group * head_dim;
    this->prefetch(qkv, this->qkv_pitch(), tile, column, count, r, all);
    this->prefetch(dout, this->out_pitch(), tile, column, count, r, all);
    this->prefetch(out, this->out_pitch(), tile, column, count, r, all);
  }

  // One strip of one key/value head: dK and dV of its key tiles, its share of dQ.
  void run(Pieces pieces, const Strip& strip, int64_t kv_head) const {
    Work w(*this, pieces);
    for (int64_t k = strip.begin; k < strip.end; ++k)
      begin_keys(w, w.keys[k - strip.begin], this->keys.tiles[k], kv_head);
    const int64_t first = this->queries.first[strip.segment];
    for (int64_t i = this->queries.first[strip.segment + 1] - 1; i >= first; --i) {
      const Tile& tile = this->queries.tiles[i];
      if (!meets_some(tile, strip.begin, strip.end)) continue;
      unpack_query_tile(w, tile, kv_head);
      const Word* q_paired = pair_rows(w.q_paired, w.q, this->rows_of(tile), width);
      const Word* g_paired = pair_rows(w.g_paired, w.g, this->rows_of(tile), width);
      const int32_t before = strips_that_meet(tile, this->keys.first[strip.segment], strip.begin),
                    after = strips_that_meet(tile, strip.end, this->keys.first[strip.segment + 1]);
      std::atomic<int32_t>& turn = done[static_cast<size_t>(i * shape.kv_heads + kv_head)];
      for (int32_t now; (now = turn.load(std::memory_order_acquire)) != before;)
        turn.wait(now, std::memory_order_acquire);
      take_dq(w.dq, tile, kv_head, before == 0);
      for (int64_t k = strip.begin; k < strip.end; ++k) {
        const Tile& key = this->keys.tiles[k];
        if (!meets(tile, key, shape.window)) continue;
        meet(w, w.keys[k - strip.begin], q_paired, g_paired, tile, key);
        prefetch_queries(this->queries.tiles[std::max(i - 1, first)], kv_head, (k - strip.begin) * G::chunk,
                         (strip.end - strip.begin) * G::chunk);
      }
      give_dq(w.dq, tile, kv_head, after == 0);
      turn.store(before + 1, std::memory_order_release);
      turn.notify_all();
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

  // Unpacks a key tile into the layouts that meet() reads; dK = dV = 0.
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

  // Q and dout of a query tile; delta, and lse to base 2, of its rows.
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

  // Strips of key tiles [begin, end) that meet a query tile.
  int32_t strips_that_meet(const Tile& tile, int64_t begin, int64_t end) const {
    int32_t count = 0;
    for (int64_t k = begin; k < end; k += strip_tiles) count += meets_some(tile, k, std::min(k + strip_tiles, end));
    return count;
  }

  // Where dQ of a row waits for the next strip: in its place where that has the precision.
  A* waiting_dq(int64_t row, int64_t column) const {
    if constexpr (std::is_same_v<T, A>)
      return dqkv + row * this->qkv_pitch() + column;
    else
      return dq + row * this->out_pitch() + column;
  }

  void take_dq(A* to, const Tile& tile, int64_t kv_head, bool first) const {
    if (first) return std::fill(to, to + capacity * width, A(0));
    for (int64_t r = 0; r < this->rows_of(tile); ++r) {
      const A* from = waiting_dq(tile.row + r / group, (kv_head * group + r % group) * head_dim);
      for_vectors<A>(head_dim, [&](int64_t i, auto n) { store(to + r * width + i, load(from + i, n)); });
    }
  }

  void give_dq(const A* from, const Tile& tile, int64_t kv_head, bool last) const {
    for (int64_t r = 0; r < this->rows_of(tile); ++r) {
      const int64_t row = tile.row + r / group, column = (kv_head * group + r % group) * head_dim;
      T* to = dqkv + row * this->qkv_pitch() + column;
      A* waiting = waiting_dq(row, column);
      for_vectors<A>(head_dim, [&](int64_t i, auto n) {
        const Vector<A> x = load(from + r * width + i);
        if (last)
          store(to + i, x * A(shape.scale), n);
        else
          store(waiting + i, x, n);
      });
    }
  }
};

}  // namespace orpo::cpu
