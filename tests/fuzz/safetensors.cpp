// Any bytes are either a safetensors file whose tensors lie within it, or an error for the user. So is any shard index.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "src/fail.h"
#include "src/safetensors.h"

using namespace orpo;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const std::byte> file(reinterpret_cast<const std::byte*>(data), size);
  try {
    size_t covered = 0, read = 0;
    for (const StoredTensor& t : parse_safetensors(file, "fuzz")) {
      covered += t.data.size();
      for (const std::byte b : t.data) read += static_cast<size_t>(b);
      if (t.dtype && t.elements() * stored_dtype_bytes(*t.dtype) != static_cast<int64_t>(t.data.size())) std::abort();
    }
    if (covered > size || read > 255 * covered) std::abort();
  } catch (const UserError&) {
  }
  try {
    for (const auto& [tensor, shard] : parse_shard_index({reinterpret_cast<const char*>(data), size}, "fuzz"))
      if (shard.empty() || shard.find('/') != shard.npos) std::abort();
  } catch (const UserError&) {
  }
  return 0;
}
