// Launches.
#pragma once

#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda/emulator/engine.h"
#include "cuda/emulator/stream.h"
#include "cuda/runtime.h"

namespace orpo {

namespace emulator {

// Throws MachineError where no GPU accepts the configuration.
void check_launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes);
void run(Launch& launch);

// A pointer among a kernel's arguments is null or points to the device's memory, or right behind an allocation.
template <class T> void check_argument(const T& argument) {
  if constexpr (std::is_pointer_v<T>)
    if (argument) check_device_memory(argument, 0);
}

}  // namespace emulator

// Asks for the kernel to run. MachineError where the configuration is not one that a GPU accepts; what the kernel does
// wrong becomes the device's error.
template <class... Parameters, class... Arguments> void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                                               size_t dynamic_shared_bytes, LaunchStream stream,
                                                               Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  if (rehearses(stream.stream)) return;
  last_operations.note(stream.where);
  emulator::check_launch(grid, block, dynamic_shared_bytes);
  const auto call = std::make_shared<Call>(Call{kernel, {Parameters(std::forward<Arguments>(arguments))...}});
  const auto check = [](const auto&... each) { (emulator::check_argument(each), ...); };
  std::apply(check, call->arguments);
  emulator::enqueue(
      stream.stream,
      [=] {
        std::apply(check, call->arguments);
        emulator::Launch l{[](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->arguments); },
                           call.get(), grid, block, dynamic_shared_bytes};
        emulator::run(l);
      },
      operation_name(stream.where));
}

}  // namespace orpo
