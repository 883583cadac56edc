// CUDA's vocabulary for a host compiler: qualifiers that mean nothing here, vector types, and rounding to bf16 as the
// hardware does it.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "src/tensor.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned nx = 1, unsigned ny = 1, unsigned nz = 1) : x(nx), y(ny), z(nz) {}
};
constexpr int warpSize = 32;

namespace orpo {

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// cvt.rn.bf16.f32: to nearest, ties to even; any NaN becomes 0x7fff.
inline bf16 to_bf16(float x) {
  bf16 y;
  const uint32_t u = std::bit_cast<uint32_t>(x);
  y.bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  return y;
}

// Two values as the two halves of a register, the first in the low one.
inline uint32_t pack_bf16(float low, float high) {
  return uint32_t{to_bf16(low).bits} | uint32_t{to_bf16(high).bits} << 16;
}
inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float of_bits(uint32_t x) { return std::bit_cast<float>(x); }
inline float low_half(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
inline float high_half(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000u); }

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_exp2(float x) { return std::exp2(x); }

}  // namespace orpo

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
