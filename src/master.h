// An fp32 master weight in four bytes together with the bf16 weight that the forward pass reads: the weight is the
// master rounded to nearest even, and a signed 16-bit correction says what the rounding took.
//
//   bits(master) = (bits(weight) << 16) + correction
//
// The correction runs from -32768 (halfway, rounded up) to 32767. Halfway rounded down would be 32768: such a master is
// taken as the next fp32 value towards zero, an fp32 ulp away, which is what fp32 itself may be off by at each update.
// Every other float comes back bit for bit, -0, subnormals, infinities and those that round to infinity among them; a
// NaN comes back as a NaN.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "src/tensor.h"

namespace orpo {

struct SplitMaster {
  bf16 weight;
  int16_t correction;
};

inline SplitMaster split_master(float master) {
  const bf16 weight(master);
  const auto difference = static_cast<int32_t>(std::bit_cast<uint32_t>(master) - (uint32_t{weight.bits} << 16));
  return {weight, static_cast<int16_t>(std::min(difference, 32767))};
}

inline float join_master(SplitMaster split) {
  return std::bit_cast<float>((uint32_t{split.weight.bits} << 16) + static_cast<uint32_t>(split.correction));
}

// The masters of one tensor: weights in fp32 (or fp64), or in bf16 with their corrections.
struct MasterTensor {
  Tensor weight;
  Tensor correction;  // int16, of the weight's shape; absent: the weight is the master

  MasterTensor(const Tensor& weight, const Tensor& correction = {}) : weight(weight), correction(correction) {}
  // Rows [begin, begin + count), or entries of a vector, as Tensor::slice.
  MasterTensor slice(int64_t begin, int64_t count) const {
    return {weight.slice(begin, count), correction ? correction.slice(begin, count) : correction};
  }
};

}  // namespace orpo
