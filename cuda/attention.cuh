// What attention's kernels share: where heads lie in qkv, and sums over a few lanes.
#pragma once

#include "cuda/gpu.cuh"

namespace orpo {

inline constexpr int most_head_dim = 256;

// What a kernel has to know of qkv[rows, (heads + 2 kv_heads) * head_dim].
struct Layout {
  int heads, kv_heads, head_dim, window;
  int64_t rows;
  float scale;

  __device__ int64_t pitch() const { return int64_t{heads + 2 * kv_heads} * head_dim; }
  __device__ int64_t query(int head) const { return int64_t{head} * head_dim; }
  __device__ int64_t key_of(int kv_head) const { return int64_t{heads + kv_head} * head_dim; }
  __device__ int64_t key(int head) const { return key_of(head / (heads / kv_heads)); }
  __device__ int64_t value(int head) const { return key(head) + int64_t{kv_heads} * head_dim; }
};

inline Layout layout_of(const Tensor& qkv, const AttentionShape& shape) {
  return {shape.heads, shape.kv_heads, shape.head_dim, shape.window, qkv.rows(), shape.scale};
}

// Whether every head of every row starts on 16 bytes and ends there.
inline bool heads_aligned(std::initializer_list<const Tensor*> tensors, const AttentionShape& shape) {
  for (const Tensor* x : tensors)
    if (shape.head_dim * dtype_bytes(x->dtype) % 16) return false;
  return starts_aligned(tensors);
}

// Lanes that hold a head's entries together, entries_a_lane each: a power of two, up to a warp.
inline constexpr int entries_a_lane = 8;
static_assert(most_head_dim <= 32 * entries_a_lane);
inline int lanes_for(int head_dim) {
  int lanes = 1;
  while (lanes * entries_a_lane < head_dim) lanes *= 2;
  return lanes;
}
// The sum over each such group of lanes, in each of them.
__device__ __forceinline__ float lanes_sum(float value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

}  // namespace orpo
