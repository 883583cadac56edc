#include "cuda/emulator/launch.h"

#include <omp.h>

#include "cuda/emulator/sanitizers.h"

namespace orpo::emulator {

void check_launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > most_threads || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || dynamic_shared_bytes > most_shared_bytes)
    fail_machine("launch: grid (", grid.x, ", ", grid.y, ", ", grid.z, "), block (", block.x, ", ", block.y, ", ",
                 block.z, "), ", dynamic_shared_bytes, " bytes of shared memory: no GPU runs this");
}

void run(Launch& launch) {
  const auto work = [&launch] {
    thread_local const auto own = std::make_unique<Engine>();  // too large for a plugin's thread-local memory
    own->run(launch);
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

}  // namespace orpo::emulator
