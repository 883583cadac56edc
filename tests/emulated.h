// The CUDA rooms on the emulator, as one more device of the room tests.
#pragma once

#include <memory>

#include "cuda/emulator/settings.h"
#include "src/backend.h"

namespace orpo::test {

// Runs kernels by these settings.
std::unique_ptr<Backend> make_emulated_backend(const emulator::Settings& settings);

// A hash of all that this emulated backend downloaded so far: it must not depend on the settings.
uint64_t downloaded(const Backend& backend);

}  // namespace orpo::test
