// Any text is either a config.json of a model whose sizes can be multiplied, or an error for the user.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "src/fail.h"
#include "src/family.h"

using namespace orpo;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const ModelDescription model = parse_model_config({reinterpret_cast<const char*>(data), size}, "fuzz");
    const Config& c = model.config;
    const bool odd_rotation = c.position == Position::rotary && c.head_dim % 2 != 0;
    if (c.parameters() <= 0 || c.heads % c.kv_heads != 0 || odd_rotation || !(c.rope_theta > 0) ||
        !(c.norm_epsilon > 0))
      std::abort();
    // What is written back reads as the same model in the other dtype.
    const StoredDType other = model.dtype == StoredDType::bf16 ? StoredDType::f32 : StoredDType::bf16;
    const ModelDescription again = parse_model_config(config_json_with_dtype(model, other), "fuzz");
    if (again.dtype != other || again.config.parameters() != c.parameters() || again.config.rope_theta != c.rope_theta)
      std::abort();
  } catch (const UserError&) {
  }
  return 0;
}
