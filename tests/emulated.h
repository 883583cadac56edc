// The CUDA rooms on the emulator, as one more device of the room tests.
#pragma once

#include <memory>
#include <string>

#include "cuda/emulator/settings.h"
#include "src/backend.h"

namespace orpo::test {

// Runs kernels by these settings.
std::unique_ptr<Backend> make_emulated_backend(const emulator::Settings& settings);

// The GPU by its plugin, where ORPO_TEST_DEVICE is cuda in the environment; else null. UserError where there is none.
std::unique_ptr<Backend> make_gpu_backend();
// Which devices the tests of the rooms take: what ORPO_TEST_DEVICE names, or all but the GPU.
bool tests_device(const std::string& name);

// A hash of all that this emulated backend downloaded so far: it must not depend on the settings.
uint64_t downloaded(const Backend& backend);

}  // namespace orpo::test
