// Decoding's attention: new rows look back over cached keys and values. Bounded by reading the cache, so each key and
// value is read once for all query heads that share it, and positions are cut into chunks that threads take (flash
// decoding, Dao et al. 2023).
#include <algorithm>

#include "src/cpu/backend.h"
#include "src/cpu/few_rows.h"
#include "src/cpu/rows.h"
#include "src/cpu/scratch.h"
#include "src/cpu/tile.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

struct CpuBackend::DecodingChunks {
  Scratch partials;
};

namespace {

constexpr int64_t chunk_positions = 256;                       // a chunk depends on the row alone: so do the results
constexpr int64_t heads_at_once = 4;                           // query heads whose sums stay in registers together
constexpr int positions_at_once = vector_bytes == 64 ? 4 : 2;  // keys that they meet at a time

void require_cached(const char* op, const Tensor& keys, const Tensor& sequences, const Tensor& positions) {
  require_below(op, "sequence", sequences, keys.shape[0]);
  const int32_t* position = positions.as<const int32_t>();
  for (int64_t r = 0; r < positions.elements(); ++r)
    REQUIRE_SHAPE(op, position[r] >= 0 && position[r] < keys.shape[2], "the cache is full: position ", position[r],
                  " of sequence ", sequences.as<const int32_t>()[r], " where there is room for ", keys.shape[2]);
}

// Positions [begin, end) of one row's sequence, for one key/value head.
struct Chunk {
  int64_t row, kv_head, begin, end;
};

template <class T> struct Decode {
  using A = Accumulator<T>;
  using Entry = typename Operand<T>::Entry;  // of a weight: what products with values read (tile.h)
  using Word = typename Operand<T>::Word;
  static constexpr int step = Operand<T>::step;
  static constexpr int64_t tile_positions = 128 / sizeof(T);  // two tiles of keys and values in the first cache
  const AttentionShape& shape;
  T* out;
  const T *qkv, *keys, *values;
  int64_t capacity, head_dim, group, width;
  std::vector<Chunk> chunks;
  std::vector<int64_t> first;  // [rows * kv_heads + 1] first chunk of a row's key/value head
  // For each chunk: [group, width] the values weighed by 2^(score - most), [group, 2] those weights' sum and most.
  A* partials = nullptr;

  Decode(const AttentionShape& s, const Tensor& o, const Tensor& x, const Tensor& k, const Tensor& v,
         const Tensor& positions)
      : shape(s),
        out(o.as<T>()),
        qkv(x.as<const T>()),
        keys(k.as<const T>()),
        values(v.as<const T>()),
        capacity(k.shape[2]),
        head_dim(s.head_dim),
        group(s.heads / s.kv_heads),
        width(round_up(head_dim, lanes<A>)) {
    for (int64_t row = 0; row < x.rows(); ++row) {
      const int64_t end = positions.as<const int32_t>()[row] + int64_t{1};
      const int64_t begin = s.window ? std::max<int64_t>(0, end - s.window) : 0;
      for (int64_t kv_head = 0; kv_head < s.kv_heads; ++kv_head) {
        first.push_back(static_cast<int64_t>(chunks.size()));
        for (int64_t at = begin; at < end; at += chunk_positions)
          chunks.push_back({row, kv_head, at, std::min(end, at + chunk_positions)});
      }
    }
    first.push_back(static_cast<int64_t>(chunks.size()));
  }

  int64_t partial_entries() const { return round_up(group * (width + 2), lanes<A>); }
  A* weighed(int64_t chunk, int64_t head) const { return partials + chunk * partial_entries() + head * width; }
  A* statistics(int64_t chunk, int64_t head) const { return weighed(chunk, group) + 2 * head; }

  void run(int64_t index, int32_t sequence) const {
    const Chunk& chunk = chunks[index];
    for (int64_t head = 0; head < group;) {
      const auto heads = [&]<int Heads>(std::integral_constant<int, Heads> count) {
        attend(index, chunk, sequence, head, count);
        return Heads;
      };
      const int64_t left = group - head;
      head += left >= heads_at_once ? heads(std::integral_constant<int, heads_at_once>{})
              : left == 3           ? heads(std::integral_constant<int, 3>{})
              : left == 2           ? heads(std::integral_constant<int, 2>{})
                                    : heads(std::integral_constant<int, 1>{});
    }
  }

  // Online softmax of query heads [head, head + Heads) of the group over the chunk, a tile of positions at a time.
  template <int Heads>
  void attend(int64_t index, const Chunk& chunk, int32_t sequence, int64_t head,
              std::integral_constant<int, Heads>) const {
    const int64_t first_position = (sequence * shape.kv_heads + chunk.kv_head) * capacity + chunk.begin;
    const T *key = keys + first_position * head_dim, *value = values + first_position * head_dim;
    const T* query =
        qkv + chunk.row * (shape.heads + 2 * shape.kv_heads) * head_dim + (chunk.kv_head * group + head) * head_dim;
    alignas(vector_bytes) A scores[Heads][tile_positions];
    alignas(vector_bytes) Entry weights[Heads][tile_positions];
    A* o = weighed(index, head);
    A most[Heads];
    Vector<A> sums[Heads] = {};
    std::fill(o, o + Heads * width, A(0));
    std::fill(most, most + Heads, -std::numeric_limits<A>::infinity());
    for (int64_t at = chunk.begin; at < chunk.end; at += tile_positions) {
      const int64_t count = std::min(tile_positions, chunk.end - at);
      for (int64_t j = 0; j < count; j += lanes<A>)
        score<Heads>(&scores[0][j], query, key + j * head_dim, std::min<int64_t>(lanes<A>, count - j));
      for (int h = 0; h < Heads; ++h) soften(weights[h], scores[h], sums[h], most[h], o + h * width, count);
      int64_t i = 0;
      for (; i + 4 * lanes<A> <= head_dim; i += 4 * lanes<A>)
        add_values<Heads, 4>(o + i, weights[0], value + i, count, Full<A>{});
      for (; i + lanes<A> <= head_dim; i += lanes<A>)
        add_values<Heads, 1>(o + i, weights[0], value + i, count, Full<A>{});
      if (i < head_dim) add_values<Heads, 1>(o + i, weights[0], value + i, count, static_cast<int>(head_dim - i));
      key += count * head_dim, value += count * head_dim;
    }
    for (int h = 0; h < Heads; ++h) {
      statistics(index, head)[2 * h] = sum_lanes<A>(sums[h]);
      statistics(index, head)[2 * h + 1] = most[h];
    }
  }

  // sums[h][p] = query head h * key p, in the lanes of a vector. The keys of the next tile are asked for meanwhile: no
  // hardware foresees runs as short as a tile's.
  template <int Heads, int Positions>
  void multiply_keys(Vector<A> (*sums)[lanes<A>], int64_t p, const T* query, const T* key) const {
    Vector<A> partial[Heads][Positions] = {};
    const auto add = [&](int64_t i, auto n) {
      decltype(Terms<T>::read(key, n)) k[Positions];
#pragma GCC unroll 4
      for (int j = 0; j < Positions; ++j) {
        k[j] = Terms<T>::read(key + j * head_dim + i, n);
        __builtin_prefetch(key + (tile_positions + j) * head_dim + i);
      }
#pragma GCC unroll 4
      for (int h = 0; h < Heads; ++h) {
        const auto q = Terms<T>::read(query + h * head_dim + i, n);
#pragma GCC unroll 4
        for (int j = 0; j < Positions; ++j) partial[h][j] = Terms<T>::add(partial[h][j], q, k[j]);
      }
    };
    constexpr int wide = Terms<T>::count;
    int64_t i = 0;
    for (; i + wide <= head_dim; i += wide) add(i, std::integral_constant<int, wide>{});
    if (i < head_dim) add(i, static_cast<int>(head_dim - i));
#pragma GCC unroll 4
    for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
      for (int j = 0; j < Positions; ++j) sums[h][p + j] = partial[h][j];
  }

  // scores[h, count] = log2(e) scale query head h . key, for as many positions as a vector has lanes; -infinity past
  // count.
  template <int Heads> void score(A* scores, const T* query, const T* key, int64_t count) const {
    Vector<A> sums[Heads][lanes<A>];
    int64_t p = 0;
    for (; p + positions_at_once <= count; p += positions_at_once)
      multiply_keys<Heads, positions_at_once>(sums, p, query, key + p * head_dim);
    for (; p < count; ++p) multiply_keys<Heads, 1>(sums, p, query, key + p * head_dim);
    for (int h = 0; h < Heads; ++h) {
      std::fill(sums[h] + count, sums[h] + lanes<A>, Vector<A>{});
      store(scores + h * tile_positions, sum_each<A>(sums[h]) * (A(shape.scale) * A(1.44269504088896340736)));
      std::fill(scores + h * tile_positions + count, scores + h * tile_positions + lanes<A>,
                -std::numeric_limits<A>::infinity());
    }
  }

  // A tile's scores, -infinity past count, -> weights 2^(score - most). Where the running maximum rises, sum and output
  // are rescaled.
  void soften(Entry* weights, const A* scores, Vector<A>& sum, A& most, A* o, int64_t count) const {
    constexpr int terms = step == 1 ? 6 : 4;  // of a power that bf16 rounds (tile.h's pairs) few are enough
    const int64_t padded = round_up(count, lanes<A>);
    Vector<A> largest = load(scores);
    for (int64_t i = lanes<A>; i < padded; i += lanes<A>) largest = maximum(load(scores + i), largest);
    const A highest = std::max(most, maximum_of_lanes<A>(largest));
    if (highest > most) {
      const A shrink = std::exp2(most - highest);
      most = highest;
      sum *= shrink;
      for (int64_t i = 0; i < width; i += lanes<A>) store(o + i, load(o + i) * shrink);
    }
    for (int64_t i = 0; i < padded; i += lanes<A>) {
      const Vector<A> p = power_of_two<terms>(load(scores + i) - most);
      sum += p;
      store(weights + i, p);
    }
  }

  // A vector of `Rows` (at most step) neighbouring values as products read them: absent ones count as 0.
  template <int Rows, class Count> WordVector<Word> read_values(const T* value, Count n) const {
    if constexpr (step == 1)
      return load(value, n);
    else
      return paired(value, Rows == 2 ? value + head_dim : nullptr, n);
  }

  // o[h, Vectors vectors] += sum over the tile's positions of weights[h] * value, n entries of each vector.
  template <int Heads, int Vectors, class Count>
  void add_values(A* o, const Entry* weights, const T* value, int64_t positions, Count n) const {
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));  // entries
    Vector<A> sums[Heads][Vectors] = {};
    const auto add = [&]<int Rows>(int64_t p, std::integral_constant<int, Rows>) {
      WordVector<Word> v[Vectors];
#pragma GCC unroll 4
      for (int i = 0; i < Vectors; ++i) v[i] = read_values<Rows>(value + p * head_dim + i * lanes<A>, n);
#pragma GCC unroll 2
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < Vectors * lanes<A>; i += line)
          __builtin_prefetch(value + (tile_positions + p + r) * head_dim + i);
#pragma GCC unroll 4
      for (int h = 0; h < Heads; ++h) {
        const Word* word = reinterpret_cast<const Word*>(weights + h * tile_positions + p);
#pragma GCC unroll 4
        for (int i = 0; i < Vectors; ++i) multiply_add(sums[h][i], *word - WordVector<Word>{}, v[i]);
      }
    };
    int64_t p = 0;
    for (; p + step <= positions; p += step) add(p, std::integral_constant<int, step>{});
    if (p < positions) add(p, std::integral_constant<int, 1>{});
    for (int h = 0; h < Heads; ++h)
      for (int i = 0; i < Vectors; ++i) {
        A* to = o + h * width + i * lanes<A>;
        store(to, load(to) + sums[h][i]);
      }
  }

  // The chunks of one row's key/value head, in order: out = sum of 2^(most_c - most) values_c / sum of 2^(..) sum_c.
  void join(int64_t index) const {
    const int64_t begin = first[index], end = first[index + 1];
    const Chunk& chunk = chunks[begin];
    for (int64_t head = 0; head < group; ++head) {
      A *o = weighed(begin, head), *sum = statistics(begin, head), *most = sum + 1;
      for (int64_t c = begin + 1; c < end; ++c) {
        const A *more = weighed(c, head), *more_sum = statistics(c, head), *more_most = more_sum + 1;
        const A highest = std::max(*most, *more_most), a = std::exp2(*most - highest),
                b = std::exp2(*more_most - highest);
        for (int64_t i = 0; i < width; i += lanes<A>) store(o + i, load(o + i) * a + load(more + i) * b);
        *sum = *sum * a + *more_sum * b;
        *most = highest;
      }
      T* to = out + (chunk.row * shape.heads + chunk.kv_head * group + head) * head_dim;
      for_vectors<A>(head_dim, [&](int64_t i, auto n) { store(to + i, load(o + i) / *sum, n); });
    }
  }
};

}  // namespace

void CpuBackend::keep_keys_values(const Tensor& keys, const Tensor& values, const Tensor& qkv, const Tensor& sequences,
                                  const Tensor& positions, const AttentionShape& shape) {
  shapes::cached_rows("keep_keys_values", qkv, keys, values, sequences, positions, shape);
  require_cached("keep_keys_values", keys, sequences, positions);
  const int64_t bytes = shape.head_dim * dtype_bytes(qkv.dtype), capacity = keys.shape[2];
  for_rows(qkv.rows(), [&](int64_t row) {
    const char* key = static_cast<const char*>(qkv.data) +
                      row * qkv.columns() * dtype_bytes(qkv.dtype) + shape.heads * bytes;
    for (int64_t head = 0; head < shape.kv_heads; ++head, key += bytes) {
      const int64_t at = (sequences.as<const int32_t>()[row] * int64_t{shape.kv_heads} + head) * capacity +
                         positions.as<const int32_t>()[row];
      std::memcpy(static_cast<char*>(keys.data) + at * bytes, key, static_cast<size_t>(bytes));
      std::memcpy(static_cast<char*>(values.data) + at * bytes, key + shape.kv_heads * bytes,
                  static_cast<size_t>(bytes));
    }
  });
}

void CpuBackend::attention_decode(const Tensor& out, const Tensor& qkv, const Tensor& keys, const Tensor& values,
                                  const Tensor& sequences, const Tensor& positions, const AttentionShape& shape) {
  shapes::attention_decode(out, qkv, keys, values, sequences, positions, shape);
  require_cached("attention_decode", keys, sequences, positions);
  if (!chunks_) chunks_ = std::make_shared<DecodingChunks>();
  with_dtype("attention_decode", qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    Decode<T> decode(shape, out, qkv, keys, values, positions);
    const auto chunks = static_cast<int64_t>(decode.chunks.size());
    decode.partials =
        chunks_->partials.reserve<Accumulator<T>>(static_cast<size_t>(chunks * decode.partial_entries()));
    const int32_t* sequence = sequences.as<const int32_t>();
#pragma omp parallel if (chunks > 1)
    {
#pragma omp for schedule(static)
      for (int64_t c = 0; c < chunks; ++c) decode.run(c, sequence[decode.chunks[c].row]);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < qkv.rows() * shape.kv_heads; ++i) decode.join(i);
    }
  });
}

}  // namespace orpo
