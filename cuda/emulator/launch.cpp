#include "cuda/emulator/launch.h"

#include <omp.h>

#include <cstdlib>
#include <new>

#include "cuda/emulator/sanitizers.h"

namespace orpo {

namespace emulator {

void run(Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > most_threads || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || launch.dynamic_shared_bytes > most_shared_bytes)
    fail_machine("launch: grid (", grid.x, ", ", grid.y, ", ", grid.z, "), block (", block.x, ", ", block.y, ", ",
                 block.z, "), ", launch.dynamic_shared_bytes, " bytes of shared memory: no GPU runs this");
  const auto work = [&launch] {
    thread_local Engine own;
    own.run(launch);
  };
  release(&launch.started);
  if (settings.threads <= 1 || thread_sanitizer) {  // OpenMP's own synchronisation is hidden from ThreadSanitizer
    work();
  } else {
#pragma omp parallel num_threads(settings.threads)
    work();
  }
  acquire(&launch.ended);
  if (launch.failed) fail_machine(static_cast<const char*>(launch.error));
}

}  // namespace emulator

namespace {

constexpr int64_t alignment = 256;

int64_t round_up(int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

}  // namespace

// What is asked for, between two units that nobody may touch; NaN all over.
void* gpu_allocate(int64_t bytes) {
  const int64_t whole = round_up(bytes) + 2 * alignment;
  char* memory = static_cast<char*>(std::aligned_alloc(alignment, static_cast<size_t>(whole)));
  if (!memory) fail_machine("the device has no ", bytes, " bytes left");
  char* begin = memory + alignment;
  std::fill(begin, memory + whole, static_cast<char>(0xff));
  emulator::forbid(memory, alignment);
  emulator::forbid(begin + bytes, static_cast<size_t>(memory + whole - begin) - bytes);
  return begin;
}

void gpu_release(void* memory) {
  if (memory) std::free(static_cast<char*>(memory) - alignment);
}

void gpu_upload(void* device, const void* host, int64_t bytes, GpuStream) {
  if (bytes) std::memcpy(device, host, static_cast<size_t>(bytes));
}
void gpu_download(void* host, const void* device, int64_t bytes, GpuStream) {
  if (bytes) std::memcpy(host, device, static_cast<size_t>(bytes));
}
void gpu_zero(void* device, int64_t bytes, GpuStream) { std::memset(device, 0, static_cast<size_t>(bytes)); }
void gpu_wait(GpuStream) {}

}  // namespace orpo
