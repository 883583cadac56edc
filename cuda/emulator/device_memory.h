// The device's memory, told apart from the host's: pages that nobody but running work of the device may touch.
//
// Host code that follows a device pointer dies of a segmentation fault, as does work that leaves an allocation by more
// than its last 256 bytes; AddressSanitizer sees every byte. New memory is NaN all over.
#pragma once

#include <cstddef>
#include <cstdint>

namespace orpo::emulator {

// Null where the device has no more (settings.device_bytes).
void* allocate_device_memory(size_t bytes);
void release_device_memory(void* begin);

// Whether [p, p + bytes) lies in one allocation; its end counts where bytes is 0.
bool is_device_memory(const void* p, size_t bytes);
bool touches_device_memory(const void* p, size_t bytes);
bool is_allocation(const void* begin);  // as allocate_device_memory() returned it
// Throws MachineError where not: what stand-ins of CUDA's libraries ask of every operand, when they are called and
// again when they run.
void check_device_memory(const void* p, int64_t bytes);

// Page-locked host memory: what copies may read and write late.
void* allocate_pinned_memory(size_t bytes);
bool release_pinned_memory(void* begin);  // false: not one of ours
bool is_pinned_memory(const void* p, size_t bytes);

int64_t device_bytes_in_use();
int64_t device_bytes_free();
int64_t device_bytes_total();

// While one lives, device memory may be touched: around what runs on the device.
class DeviceRuns {
 public:
  DeviceRuns();
  ~DeviceRuns();
  DeviceRuns(const DeviceRuns&) = delete;
};

}  // namespace orpo::emulator
