// Rows by a list of indices: the embedding's tokens and positions, the head's target rows.
#pragma once

#include <bit>

namespace orpo {

inline constexpr int row_threads = 128, sort_threads = 1024;

// Rows of a table by indices in [0, limit), and what to say of others; without indices row i is row i.
template <class T> struct PickedRows {
  const T* table;
  const int32_t* indices;
  int64_t limit;
  Refused::Kind kind;

  // The table's row for row i of the list; -1, said once a block, where there is none.
  __device__ int64_t of(int64_t i, Refused* refused) const {
    const int64_t index = indices ? indices[i] : i;
    if (index >= 0 && index < limit) return index;
    if (threadIdx.x == 0) refuse(refused, kind, {i, index, limit});
    return -1;
  }
};

// out[i] = the picked row, plus the added one where `adding`; a block a row. A refused row is left alone.
template <bool aligned, bool adding, class T>
__global__ void copy_rows_kernel(T* out, PickedRows<T> picked, PickedRows<T> added, int64_t width, Refused* refused) {
  constexpr int N = wide<T>;
  const int64_t row = blockIdx.x, index = picked.of(row, refused), other = adding ? added.of(row, refused) : 0;
  if (index < 0 || other < 0) return;
  for (int64_t i = threadIdx.x * N; i < width; i += blockDim.x * N) {
    float v[N];
    load<aligned>(v, picked.table + index * width + i, width - i);
    if constexpr (adding) {
      float w[N];
      load<aligned>(w, added.table + other * width + i, width - i);
#pragma unroll
      for (int e = 0; e < N; ++e) v[e] += w[e];
    }
    store<aligned>(out + row * width + i, v, width - i);
  }
}

// A row whose index is `left_out` or not in [0, limit) is added nowhere.
struct AddedRows {
  const int32_t* indices;
  int32_t count;
  int64_t left_out, limit;
  __device__ bool has(int64_t index) const { return index >= 0 && index < limit && index != left_out; }
};

// order[count] = the rows by their index, rows of an index in the order of the list, those added nowhere last: a stable
// radix sort, eight bits a pass, by one block. Its work grows with count, and integers alone are counted, so nothing
// depends on who comes first. spare[count]: memory for every other pass.
static __global__ void __launch_bounds__(sort_threads)
    sort_rows_kernel(int32_t* order, int32_t* spare, AddedRows list, int passes, Refused* refused, Refused::Kind kind) {
  constexpr int digits = 256;
  SHARED(int32_t, counts, [digits]);
  SHARED(int32_t, places, [digits]);                       // where the next row with a digit goes
  SHARED(int32_t, shares, [sort_threads / 32][digits]);    // a turn's rows of each warp, then where they go
  const int threads = blockDim.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  for (int i = thread; i < list.count; i += threads) {
    const int32_t index = list.indices[i];
    if (index < 0 || index >= list.limit) refuse(refused, kind, {i, index, list.limit});
  }
  for (int pass = 0; pass < passes; ++pass) {
    int32_t* to = (passes - pass) % 2 ? order : spare;
    const int32_t* from = (passes - pass) % 2 ? spare : order;  // the list itself in the first pass
    const auto row_at = [&](int i) { return pass == 0 ? i : from[i]; };
    const auto digit_of = [&](int row) {
      const int64_t index = list.indices[row];
      return static_cast<unsigned>((list.has(index) ? index : list.limit) >> (8 * pass)) % digits;
    };
    for (int d = thread; d < digits; d += threads) counts[d] = 0;
    __syncthreads();
    for (int i = thread; i < list.count; i += threads) atomicAdd(&counts[digit_of(row_at(i))], 1);
    __syncthreads();
    for (int d = thread; d < digits; d += threads) {
      int32_t before = 0;
      for (int smaller = 0; smaller < d; ++smaller) before += counts[smaller];
      places[d] = before;
    }
    for (int64_t turn = 0; turn < list.count; turn += threads) {
      for (int i = thread; i < threads / 32 * digits; i += threads) shares[i / digits][i % digits] = 0;
      __syncthreads();
      const int64_t i = turn + thread;
      const bool there = i < list.count;
      const int row = there ? row_at(static_cast<int>(i)) : 0;
      const unsigned digit = there ? digit_of(row) : digits;
      const uint32_t same = __match_any_sync(0xffffffffu, digit);
      const int earlier = __popc(same & ((1u << lane) - 1));
      if (there && earlier == 0) shares[warp][digit] = __popc(same);
      __syncthreads();
      for (int d = thread; d < digits; d += threads) {
        int32_t place = places[d];
        for (int w = 0; w < threads / 32; ++w) {
          const int32_t share = shares[w][d];
          shares[w][d] = place;
          place += share;
        }
        places[d] = place;
      }
      __syncthreads();
      if (there) to[shares[warp][digit] + earlier] = row;
      __syncthreads();
    }
  }
}

// table[index] += rows of that index, in the order of the list, each sum rounded to To. The block of an index's first
// row in `order` adds them all; blockIdx.y: columns.
template <bool aligned, class To, class From>
__global__ void add_rows_kernel(To* table, const From* rows, const int32_t* order, AddedRows list, int64_t width) {
  constexpr int N = wide<From>, at_once = 4;  // rows whose loads do not wait for one another
  const int64_t at = blockIdx.x, i = (int64_t{blockIdx.y} * row_threads + threadIdx.x) * N;
  const int64_t index = list.indices[order[at]];
  if (!list.has(index) || (at > 0 && list.indices[order[at - 1]] == index) || i >= width) return;
  float sum[N];
  load<aligned>(sum, table + index * width + i, width - i);
  bool more = true;
  for (int64_t turn = at; more; turn += at_once) {
    float v[at_once][N];
    bool same[at_once];
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      const int64_t row = turn + u < list.count ? order[turn + u] : -1;
      same[u] = row >= 0 && list.indices[row] == index;
      load<aligned>(v[u], rows + row * width + i, same[u] ? width - i : 0);
    }
#pragma unroll
    for (int u = 0; u < at_once; ++u) {
      if (!same[u]) break;
#pragma unroll
      for (int e = 0; e < N; ++e) sum[e] = to_float(from_float<To>(sum[e] + v[u][e]));
    }
    more = same[at_once - 1];
  }
  store<aligned>(table + index * width + i, sum, width - i);
}

// The launches that embedding and head share. A list has less than 2^31 rows.

// added (may be absent): a second table, whose rows are added to the first one's, or, without that, to what is there.
template <class T> void copy_rows(GpuStream stream, const Tensor& out, const Tensor& table, const Tensor& indices,
                                  Refused::Kind kind, const Tensor& added, const Tensor& added_indices,
                                  Refused::Kind added_kind, Refused* refused) {
  if (out.elements() == 0) return;
  PickedRows<T> first{out.as<const T>(), nullptr, out.rows(), kind}, second{};
  if (table) first = {table.as<const T>(), indices.as<const int32_t>(), table.rows(), kind};
  if (added) second = {added.as<const T>(), added_indices.as<const int32_t>(), added.rows(), added_kind};
  with_constant(rows_aligned({&out, &table, &added}), [&](auto aligned) {
    with_constant(static_cast<bool>(added), [&](auto adding) {
      launch(copy_rows_kernel<aligned(), adding(), T>, blocks_for(out.rows()), row_threads, 0, stream, out.as<T>(),
             first, second, out.columns(), refused);
    });
  });
}

// sorted: scratch of two int32 a row.
template <class To, class From> void add_rows(GpuStream stream, const Tensor& table, const Tensor& rows,
                                              const Tensor& indices, int64_t left_out, int32_t* sorted,
                                              Refused* refused, Refused::Kind kind) {
  const int64_t count = rows.rows(), width = rows.columns(), limit = table.rows();
  if (rows.elements() == 0) return;
  const AddedRows list{indices.as<const int32_t>(), static_cast<int32_t>(count), left_out, limit};
  const int passes = (std::bit_width(static_cast<uint64_t>(limit)) + 7) / 8;
  launch(sort_rows_kernel, 1, static_cast<unsigned>(std::min<int64_t>((count + 31) / 32 * 32, sort_threads)), 0, stream,
         sorted, sorted + count, list, passes, refused, kind);
  with_constant(rows_aligned({&table, &rows}), [&](auto aligned) {
    launch(add_rows_kernel<aligned(), To, From>, dim3(blocks_for(count), blocks_for(width, row_threads * wide<From>)),
           row_threads, 0, stream, table.as<To>(), rows.as<const From>(), sorted, list, width);
  });
}

}  // namespace orpo
