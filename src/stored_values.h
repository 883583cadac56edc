// Values between safetensors files and the device, a chunk at a time, rounded once to nearest even.
#pragma once

#include <span>
#include <string>

#include "src/backend.h"
#include "src/master.h"
#include "src/safetensors.h"
#include "src/tensor.h"

namespace orpo {

// IEEE half precision, as weights may be stored in it; nothing is computed in it.
struct f16 {
  uint16_t bits;
  f16() = default;
  explicit f16(float value);
  operator float() const;
};
static_assert(sizeof(f16) == 2);

// target (any floating dtype, or bf16 with corrections, on the device) = the stored values; same number of elements,
// stored.dtype present. A target without corrections is rounded to its dtype, one with them as master.h says.
// transposed: the target is a matrix and its transpose is what is stored. zeros: the target's memory is 0 so far.
void read_values(const MasterTensor& target, const StoredTensor& stored, bool transposed, Backend& backend,
                 bool zeros = false);
// The same from fp32 values in memory.
void upload_values(const MasterTensor& target, std::span<const float> values, Backend& backend);

// The next bytes of the writer = source, rounded to dtype; its transpose where `transposed` says so. Throws UserError,
// naming the tensor, where a finite value passes fp16's largest.
void write_values(SafetensorsWriter& writer, const MasterTensor& source, bool transposed, StoredDType dtype,
                  const std::string& name, Backend& backend);

}  // namespace orpo
