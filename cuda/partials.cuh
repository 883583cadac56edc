// Gradients of vectors in two steps: blocks sum over some rows each, then their partial sums are added up in order.
#pragma once

#include "cuda/gpu.cuh"

namespace orpo {

constexpr int partials_threads = 256;

// blockIdx.y: `first`, then `second`, whose partial sums take turns.
static __global__ void add_partials_kernel(float* first, float* second, const float* partials, int64_t count,
                                           int64_t width, int64_t pitch) {
  const int64_t i = int64_t{blockIdx.x} * partials_threads + threadIdx.x;
  if (i >= width) return;
  float* gradient = blockIdx.y == 0 ? first : second;
  float total = gradient[i];
  for (int64_t p = blockIdx.y; p < count * gridDim.y; p += gridDim.y) total += partials[p * pitch + i];
  gradient[i] = total;
}

// first[width] += the sum of partials[count, width], rows `pitch` apart; with a second gradient (may be null) each of
// the `count` has a row for either.
inline void add_partials(GpuStream stream, float* first, float* second, const float* partials, int64_t count,
                         int64_t width, int64_t pitch) {
  launch(add_partials_kernel, dim3(blocks_for(width, partials_threads), second ? 2 : 1), partials_threads, 0, stream,
         first, second, partials, count, width, pitch);
}

}  // namespace orpo
