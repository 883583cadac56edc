// The benchmark's models: a folder with a config.json, weights drawn by seed, so that nothing has to be fetched.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "src/bench/rows.h"

namespace orpo::bench {

struct BenchModel {
  std::string name;
  std::filesystem::path folder;
  int64_t vocab, positions;
  bool has_weights;  // else --init random
};

// Writes FOLDER/config.json.
BenchModel smollm2_shape(const std::filesystem::path& folder);
BenchModel gpt2_shape(const std::filesystem::path& folder);
// The demonstration's model, in the repository.
BenchModel demonstration_model();
// --model DIR.
BenchModel real_model(const std::filesystem::path& folder);

}  // namespace orpo::bench
