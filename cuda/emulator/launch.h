// Launches, and the device's memory.
#pragma once

#include <tuple>
#include <utility>

#include "cuda/backend.h"
#include "cuda/emulator/engine.h"
#include "src/fail.h"

namespace orpo {

namespace emulator {

void run(Launch& launch);

}  // namespace emulator

// Runs the kernel; returns when it is done. MachineError where the configuration is not one that a GPU accepts, or the
// kernel did something wrong.
template <class... Parameters, class... Arguments> void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                                               size_t dynamic_shared_bytes, GpuStream,
                                                               Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, std::tuple<Parameters...>(Parameters(std::forward<Arguments>(arguments))...)};
  emulator::Launch l{[](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->arguments); },
                     &call, grid, block, dynamic_shared_bytes};
  emulator::run(l);
}

// Device memory starts as NaN; AddressSanitizer sees its ends. gpu_allocate: MachineError where there is none left.
void* gpu_allocate(int64_t bytes);
void gpu_release(void* memory);
void gpu_upload(void* device, const void* host, int64_t bytes, GpuStream stream);
void gpu_download(void* host, const void* device, int64_t bytes, GpuStream stream);  // done when gpu_wait() returns
void gpu_zero(void* device, int64_t bytes, GpuStream stream);
void gpu_wait(GpuStream stream);

}  // namespace orpo
