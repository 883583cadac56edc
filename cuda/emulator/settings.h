// How the emulator runs kernels. No result of a correct kernel depends on it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace orpo::emulator {

// In which order CUDA threads start, and go on after they waited:
//   forward   all warps advance abreast, blocks from the first on
//   reverse   one warp runs as far ahead as barriers let it, from the last thread of the last block on
//   random    anything that barriers allow, by a seed
enum class Order { forward, reverse, random };

struct Settings {
  Order order = Order::forward;
  uint64_t seed = 1;
  int threads = 1;                 // of the operating system; blocks are dealt to them
  size_t stack_bytes = 128 << 10;  // of a CUDA thread
  int64_t device_bytes = 0;        // memory of the device; 0: what the host has free
};
inline Settings settings;

}  // namespace orpo::emulator
