#include "src/cpu/backend.h"

#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "src/cpu/threads.h"
#include "src/cpu/vector.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

// Thread counts belong to the process (OpenMP's, which oneDNN follows): the backend made last decides.
CpuBackend::CpuBackend(int threads) {
  omp_set_num_threads(threads > 0 ? threads : omp_get_num_procs());
  spread_threads();
}
CpuBackend::~CpuBackend() = default;

void CpuBackend::begin(int, Pass) { spread_threads(); }

// Large allocations stand on huge pages where the kernel has them: matrix products walk many rows at once.
void* CpuBackend::allocate(int64_t bytes) {
  constexpr int64_t huge_page = int64_t{2} << 20, cache_line = 64;
  const int64_t alignment = bytes >= 2 * huge_page ? huge_page : cache_line;
  const int64_t rounded = std::max(alignment, (bytes + alignment - 1) / alignment * alignment);
  const int64_t physical = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  void* memory =
      rounded > physical ? nullptr : std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(rounded));
  if (!memory)
    fail_machine("the machine has no ", bytes, " bytes of memory (", physical,
                 " in all); use fewer --micro-tokens or a smaller model");
  if (alignment == huge_page) madvise(memory, static_cast<size_t>(rounded), MADV_HUGEPAGE);
  return memory;
}

void CpuBackend::release(void* memory, int64_t) { std::free(memory); }

void CpuBackend::upload(const Tensor& device, const void* host) {
  if (device.elements()) std::memcpy(device.data, host, static_cast<size_t>(device.bytes()));
}

void CpuBackend::download(void* host, const Tensor& device) {
  if (device.elements()) std::memcpy(host, device.data, static_cast<size_t>(device.bytes()));
}

void CpuBackend::zero(const Tensor& x) {
  constexpr int64_t block = 1 << 16;
  for_rows((x.bytes() + block - 1) / block, [&](int64_t b) {
    std::memset(static_cast<char*>(x.data) + b * block, 0, static_cast<size_t>(std::min(block, x.bytes() - b * block)));
  });
}

std::unique_ptr<Backend> make_cpu_backend(int threads) { return std::make_unique<CpuBackend>(threads); }

}  // namespace orpo
