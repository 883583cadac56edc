// Any bytes in a checkpoint's own files are either a state or an error for the user. The input is cut in two at its
// first zero byte.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "src/checkpoint.h"
#include "src/fail.h"
#include "src/training_state.h"

using namespace orpo;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const size_t cut = std::min(text.find('\0'), size);
  try {
    const TrainingState state = parse_training_state(text.substr(0, cut), text.substr(std::min(cut + 1, size)), "fuzz");
    const TrainingState again = parse_training_state(trainer_json(state), trainer_state_json(state), "fuzz");
    if (again.step != state.step || again.seed != state.seed || again.options != state.options ||
        again.log_history != state.log_history)
      std::abort();
  } catch (const UserError&) {
  }
  try {
    for (const FilePart& part : parse_checksums(text, "fuzz"))
      if (part.begin < 0 || part.bytes < 0 || part.file.empty() || part.file[0] == '/') std::abort();
  } catch (const UserError&) {
  }
  return 0;
}
