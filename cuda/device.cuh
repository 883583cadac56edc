// The GPU's side of gpu.cuh: thin wrappers of instructions (sm_80 and later), and the launch.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <utility>

#include "cuda/runtime.h"

namespace orpo {

#define SHARED(T, name, dimensions) __shared__ __align__(128) T name dimensions
#define DYN_SHARED(T, name)                                         \
  extern __shared__ __align__(128) unsigned char dynamic_shared_[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared_)

// ---- numbers

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ bf16 to_bf16(float x) {
  bf16 y;
  y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
  return y;
}
// Two values as the two halves of a register, the first in the low one.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float of_bits(uint32_t x) { return __uint_as_float(x); }
__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float fast_exp(float x) { return __expf(x); }
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- the warp

template <class T> __device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  return value;
}
// Over the four lanes that share a row of an mma accumulator.
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}
__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// ---- tensor cores

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// c[16, 8] += a[16, 16] . b[16, 8], each lane holding its fragments.
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c[i][j] += a[i] . b[j]
template <int I, int J>
__device__ __forceinline__ void mma_tile(float (&c)[I][J][4], const uint32_t (&a)[I][4], const uint32_t (&b)[J][2]) {
#pragma unroll
  for (int i = 0; i < I; ++i)
#pragma unroll
    for (int j = 0; j < J; ++j) mma_m16n8k16(c[i][j], a[i], b[j]);
}

#define LDMATRIX_X4(name, instruction)                                                      \
  __device__ __forceinline__ void name(uint32_t(&r)[2], uint32_t(&s)[2], const void* row) { \
    asm volatile(instruction " {%0,%1,%2,%3},[%4];"                                         \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(s[0]), "=r"(s[1])                           \
                 : "r"(shared_address(row))                                                 \
                 : "memory");                                                               \
  }                                                                                         \
  __device__ __forceinline__ void name(uint32_t(&r)[4], const void* row) {                  \
    asm volatile(instruction " {%0,%1,%2,%3},[%4];"                                         \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                           \
                 : "r"(shared_address(row))                                                 \
                 : "memory");                                                               \
  }
// Four 8 x 8 matrices of bf16 in shared memory; lane l passes the address of row l % 8 of matrix l / 8. As four
// registers, or as two pairs: two B fragments at once.
LDMATRIX_X4(ldmatrix_x4, "ldmatrix.sync.aligned.m8n8.x4.shared.b16")
LDMATRIX_X4(ldmatrix_x4_trans, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16")
#undef LDMATRIX_X4

// ---- asynchronous copies

// 16 bytes from global to shared memory, both 16-byte aligned; only the first `bytes` are read, zeros follow.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups_left> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

// ---- the host's side

// Asks for the kernel to run; MachineError where the device refuses it.
template <class... Parameters, class... Arguments> void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                                               size_t dynamic_shared_bytes, LaunchStream stream,
                                                               Arguments&&... arguments) {
  if (rehearses(stream.stream)) return;
  last_operations.note(stream.where);
  if (dynamic_shared_bytes > 48 * 1024)
    gpu_check("launch", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(dynamic_shared_bytes)));
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = grid, configuration.blockDim = block;
  configuration.dynamicSmemBytes = dynamic_shared_bytes, configuration.stream = stream.stream;
  gpu_check("launch", cudaLaunchKernelEx(&configuration, kernel, Parameters(std::forward<Arguments>(arguments))...));
}

}  // namespace orpo
