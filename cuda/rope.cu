// Rotary position embedding, in place on the query and key heads: a block a row. Its cosines and sines are made anew,
// from angles in double; a row has few of them and many heads.
#include "cuda/gpu.cuh"

namespace orpo {

namespace {

constexpr int threads = 128;

// (a, b) -> (a cos - b sin, b cos + a sin) for each pair (i, i + half) of a head; direction -1 rotates back.
template <bool aligned, class T> __global__ void __launch_bounds__(threads)
    rotate_kernel(T* qkv, const int32_t* positions, RopeShape shape, int64_t row_width, float direction,
                  Refused* refused, Refused::Kind kind) {
  constexpr int N = wide<T>;
  DYN_SHARED(float, table);  // [half] cosines, [half] sines
  const int64_t row = blockIdx.x;
  const int half = shape.rotary_dim / 2, rotated_heads = shape.heads + shape.kv_heads;
  const int position = positions[row];
  if (position < 0 && threadIdx.x == 0) refuse(refused, kind, {row, position});
  for (int i = threadIdx.x; i < half; i += threads) {
    const double angle = position * rope_frequency(shape, i);
    table[i] = static_cast<float>(cos(angle));
    table[half + i] = direction * static_cast<float>(sin(angle));
  }
  __syncthreads();
  const int groups = (half + N - 1) / N;
  for (int index = threadIdx.x; index < rotated_heads * groups && position >= 0; index += threads) {
    const int i = index % groups * N;
    T* pair = qkv + row * row_width + int64_t{index / groups} * shape.head_dim + i;
    float a[N], b[N];
    load<aligned>(a, pair, half - i), load<aligned>(b, pair + half, half - i);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (i + e >= half) break;
      const float cosine = table[i + e], sine = table[half + i + e], u = a[e], v = b[e];
      a[e] = u * cosine - v * sine;
      b[e] = v * cosine + u * sine;
    }
    store<aligned>(pair, a, half - i), store<aligned>(pair + half, b, half - i);
  }
}

void rotate(const char* op, GpuStream stream, const Tensor& qkv, const Tensor& positions, const RopeShape& shape,
            float direction, Refused* refused, Refused::Kind kind) {
  shapes::rope(op, qkv, positions, shape);
  const int half = shape.rotary_dim / 2;
  if (qkv.rows() == 0 || half == 0) return;
  with_gpu_dtype(op, qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool aligned = rows_aligned({&qkv}) && shape.head_dim % wide<T> == 0 && half % wide<T> == 0;
    launch(aligned ? rotate_kernel<true, T> : rotate_kernel<false, T>, blocks_for(qkv.rows()), threads,
           2 * half * sizeof(float), stream, qkv.as<T>(), positions.as<const int32_t>(), shape, qkv.columns(),
           direction, refused, kind);
  });
}

}  // namespace

void CudaBackend::rope_forward(const Tensor& qkv, const Tensor& positions, const RopeShape& shape) {
  rotate("rope_forward", compute_, qkv, positions, shape, 1, refused_, Refused::rope_forward);
}

void CudaBackend::rope_backward(const Tensor& dqkv, const Tensor& positions, const RopeShape& shape) {
  rotate("rope_backward", compute_, dqkv, positions, shape, -1, refused_, Refused::rope_backward);
}

}  // namespace orpo
