// What kernels share, written once on top of either side: vectors of 16 bytes with tails, sums and maxima of a block.
#pragma once

namespace orpo {

// How many entries of T a thread takes at a time: 16 bytes. Where rows are not aligned to that it moves them one by
// one, and who computes what, and so every sum, stays the same.
template <class T> inline constexpr int wide = 16 / static_cast<int>(sizeof(T));

inline bool starts_aligned(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* x : tensors)
    if (reinterpret_cast<uintptr_t>(x->data) % 16) return false;
  return true;
}
// Whether every row of every tensor starts on 16 bytes. Absent tensors do.
inline bool rows_aligned(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* x : tensors)
    if (x->rank > 1 && x->pitch() * dtype_bytes(x->dtype) % 16) return false;
  return starts_aligned(tensors);
}

// body(T{}) for the dtypes that a GPU computes in: the one switch of a launcher.
template <class Body> void with_gpu_dtype(const char* op, DType dtype, Body&& body) {
  if (dtype == DType::f32)
    body(float{});
  else if (dtype == DType::bf16)
    body(bf16{});
  else
    fail_machine(op, ": needs fp32 or bf16; got ", dtype_name(dtype));
}
// body(bool constant), for a template argument.
template <class Body> void with_constant(bool value, Body&& body) {
  if (value)
    body(std::true_type{});
  else
    body(std::false_type{});
}

template <class T> __device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return to_bf16(x);
  else
    return x;
}

// N entries at once, from memory aligned to all of them.
__device__ __forceinline__ void load_aligned(float (&v)[4], const float* p) {
  const float4 x = *reinterpret_cast<const float4*>(p);
  v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
}
__device__ __forceinline__ void load_aligned(float (&v)[8], const float* p) {
  const float4 x = *reinterpret_cast<const float4*>(p), y = *reinterpret_cast<const float4*>(p + 4);
  v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w, v[4] = y.x, v[5] = y.y, v[6] = y.z, v[7] = y.w;
}
__device__ __forceinline__ void load_aligned(float (&v)[4], const bf16* p) {
  const uint2 x = *reinterpret_cast<const uint2*>(p);
  v[0] = low_half(x.x), v[1] = high_half(x.x), v[2] = low_half(x.y), v[3] = high_half(x.y);
}
__device__ __forceinline__ void load_aligned(float (&v)[8], const bf16* p) {
  const uint4 x = *reinterpret_cast<const uint4*>(p);
  v[0] = low_half(x.x), v[1] = high_half(x.x), v[2] = low_half(x.y), v[3] = high_half(x.y);
  v[4] = low_half(x.z), v[5] = high_half(x.z), v[6] = low_half(x.w), v[7] = high_half(x.w);
}
__device__ __forceinline__ void store_aligned(float* p, const float (&v)[4]) {
  *reinterpret_cast<float4*>(p) = float4{v[0], v[1], v[2], v[3]};
}
__device__ __forceinline__ void store_aligned(float* p, const float (&v)[8]) {
  *reinterpret_cast<float4*>(p) = float4{v[0], v[1], v[2], v[3]};
  *reinterpret_cast<float4*>(p + 4) = float4{v[4], v[5], v[6], v[7]};
}
__device__ __forceinline__ void store_aligned(bf16* p, const float (&v)[4]) {
  *reinterpret_cast<uint2*>(p) = uint2{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])};
}
__device__ __forceinline__ void store_aligned(bf16* p, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(p) =
      uint4{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
}

// v = p[0, N); entries from `count` on are not touched in memory and are 0 in v. aligned: p is, to N entries.
template <bool aligned, int N, class T> __device__ __forceinline__ void load(float (&v)[N], const T* p, int64_t count) {
  if constexpr (aligned)
    if (count >= N) return load_aligned(v, p);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = i < count ? to_float(p[i]) : 0.0f;
}
// p[0, N) = v, rounded; entries from `count` on are left alone.
template <bool aligned, int N, class T>
__device__ __forceinline__ void store(T* p, const float (&v)[N], int64_t count) {
  if constexpr (aligned)
    if (count >= N) return store_aligned(p, v);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < count) p[i] = from_float<T>(v[i]);
}

// Each values[i] over a block of `threads`, the same in every thread, in a fixed order: over_warp in each warp, then
// over the warps' results. All threads call it. neutral: what changes no result.
template <int threads, int n, class T, class OverWarp>
__device__ __forceinline__ void block_reduce(T (&values)[n], T neutral, OverWarp over_warp) {
  static_assert(threads % 32 == 0 && threads <= 1024);
  SHARED(T, warps, [n][threads / 32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    values[i] = over_warp(values[i]);
    if (lane == 0) warps[i][warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) values[i] = over_warp(lane < threads / 32 ? warps[i][lane] : neutral);
  __syncthreads();  // the next call writes warps again
}
template <int threads, int n, class T> __device__ __forceinline__ void block_sums(T (&values)[n]) {
  block_reduce<threads>(values, T(0), [](T value) { return warp_sum(value); });
}
template <int threads, class T> __device__ __forceinline__ T block_sum(T value) {
  T values[1] = {value};
  block_sums<threads>(values);
  return values[0];
}
template <int threads> __device__ __forceinline__ float block_max(float value) {
  float values[1] = {value};
  block_reduce<threads>(values, -INFINITY, [](float v) { return warp_max(v); });
  return values[0];
}

// Notes that an operation refuses something; of several, one is kept.
__device__ __forceinline__ void refuse(Refused* refused, Refused::Kind kind, const RefusedNumbers& numbers) {
  if (atomicCAS(&refused->kind, Refused::nothing, kind) == Refused::nothing) refused->numbers = numbers;
}

// Blocks of a grid's first dimension, or of one shorter than 65536.
inline unsigned blocks_for(int64_t count, int64_t per_block = 1) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  if (blocks > 0x7fffffff) fail_machine("launch: ", blocks, " blocks, and a grid has less than 2^31");
  return static_cast<unsigned>(blocks);
}

}  // namespace orpo
