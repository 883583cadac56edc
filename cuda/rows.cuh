// Rows by a list of indices: the embedding's tokens, the head's target rows.
#pragma once

namespace orpo {

inline constexpr int row_threads = 128;

// out[i] = table[indices[i]], or += where `adding`; a block a row. A row whose index is not in [0, limit) is refused and
// left alone.
template <bool aligned, bool adding, class T>
__global__ void copy_rows_kernel(T* out, const T* table, const int32_t* indices, int64_t width, int64_t limit,
                                 Refused* refused, Refused::Kind kind) {
  constexpr int N = wide<T>;
  const int64_t row = blockIdx.x, index = indices[row];
  if (index < 0 || index >= limit) {
    if (threadIdx.x == 0) refuse(refused, kind, {row, index, limit});
    return;
  }
  for (int64_t i = threadIdx.x * N; i < width; i += blockDim.x * N) {
    float v[N];
    load<aligned>(v, table + index * width + i, width - i);
    if constexpr (adding) {
      float old[N];
      load<aligned>(old, out + row * width + i, width - i);
#pragma unroll
      for (int e = 0; e < N; ++e) v[e] += old[e];
    }
    store<aligned>(out + row * width + i, v, width - i);
  }
}

// Which rows of the list name the same index: next[i] is the next row after i with i's index, or -1; first[i] says that
// no row before has it. Rows of the index `left_out`, and those out of range, are nobody's first. A warp a row.
static __global__ void chain_rows_kernel(int32_t* next, int32_t* first, const int32_t* indices, int32_t count,
                                         int64_t left_out, int64_t limit, Refused* refused, Refused::Kind kind) {
  const int lane = threadIdx.x % 32, row = static_cast<int>(blockIdx.x) * (row_threads / 32) + threadIdx.x / 32;
  if (row >= count) return;  // a whole warp
  const int32_t index = indices[row];
  const bool bad = index < 0 || index >= limit;
  if (bad && lane == 0) refuse(refused, kind, {row, index, limit});
  bool earlier = bad || index == left_out;
  for (int i = 0; i < row && !earlier; i += 32)
    earlier = __any_sync(0xffffffffu, i + lane < row && indices[i + lane] == index);
  int found = -1;
  for (int i = row + 1; i < count && found < 0; i += 32) {
    const uint32_t same = __ballot_sync(0xffffffffu, i + lane < count && indices[i + lane] == index);
    if (same) found = i + __ffs(same) - 1;
  }
  if (lane == 0) next[row] = found, first[row] = !earlier;
}

// table[indices[i]] += rows[i], rows of an index added in the order of the list by the block of the first of them, each
// sum rounded to To. blockIdx.y: columns.
template <bool aligned, class To, class From>
__global__ void add_rows_kernel(To* table, const From* rows, const int32_t* indices, const int32_t* next,
                                const int32_t* first, int64_t width) {
  constexpr int N = wide<From>;
  const int row = blockIdx.x;
  const int64_t i = (int64_t{blockIdx.y} * row_threads + threadIdx.x) * N;
  if (!first[row] || i >= width) return;
  To* to = table + int64_t{indices[row]} * width + i;
  float sum[N];
  load<aligned>(sum, to, width - i);
  for (int from = row; from >= 0; from = next[from]) {
    float v[N];
    load<aligned>(v, rows + int64_t{from} * width + i, width - i);
#pragma unroll
    for (int e = 0; e < N; ++e) sum[e] = to_float(from_float<To>(sum[e] + v[e]));
  }
  store<aligned>(to, sum, width - i);
}

// The launches that embedding and head share. A list has less than 2^31 rows.

template <class T, bool adding = false>
void copy_rows(GpuStream stream, const Tensor& out, const Tensor& table, const Tensor& indices, Refused* refused,
               Refused::Kind kind) {
  if (out.elements() == 0) return;
  with_constant(rows_aligned({&out, &table}), [&](auto aligned) {
    launch(copy_rows_kernel<aligned(), adding, T>, static_cast<unsigned>(out.rows()), row_threads, 0, stream,
           out.as<T>(), table.as<const T>(), indices.as<const int32_t>(), out.columns(), table.rows(), refused, kind);
  });
}
template <class T> void add_to_rows(GpuStream stream, const Tensor& out, const Tensor& table, const Tensor& indices,
                                    Refused* refused, Refused::Kind kind) {
  copy_rows<T, true>(stream, out, table, indices, refused, kind);
}

// chains: scratch of two int32 a row.
template <class To, class From> void add_rows(GpuStream stream, const Tensor& table, const Tensor& rows,
                                              const Tensor& indices, int64_t left_out, int32_t* chains,
                                              Refused* refused, Refused::Kind kind) {
  const int64_t count = rows.rows(), width = rows.columns();
  if (rows.elements() == 0) return;
  int32_t *next = chains, *first = chains + count;
  launch(chain_rows_kernel, blocks_for(count, row_threads / 32), row_threads, 0, stream, next, first,
         indices.as<const int32_t>(), static_cast<int32_t>(count), left_out, table.rows(), refused, kind);
  with_constant(rows_aligned({&table, &rows}), [&](auto aligned) {
    launch(add_rows_kernel<aligned(), To, From>,
           dim3(static_cast<unsigned>(count), blocks_for(width, row_threads * wide<From>)), row_threads, 0, stream,
           table.as<To>(), rows.as<const From>(), indices.as<const int32_t>(), next, first, width);
  });
}

}  // namespace orpo
