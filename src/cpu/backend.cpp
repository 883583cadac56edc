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

namespace {

constexpr int64_t huge_page = int64_t{2} << 20, cache_line = 64;

bool is_large(int64_t bytes) { return bytes >= 2 * huge_page; }
int64_t rounded_up(int64_t bytes) {
  const int64_t alignment = is_large(bytes) ? huge_page : cache_line;
  return std::max(alignment, (bytes + alignment - 1) / alignment * alignment);
}

// Zeroed pages of the kernel's, aligned to a huge one; null where there are none.
void* map_pages(int64_t bytes) {
  const auto size = static_cast<size_t>(bytes), spare = static_cast<size_t>(huge_page);
  void* mapped = mmap(nullptr, size + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto* begin = static_cast<char*>(mapped);
  const size_t before = (spare - reinterpret_cast<uintptr_t>(begin) % spare) % spare;
  if (before) munmap(begin, before);
  munmap(begin + before + size, spare - before);
  madvise(begin + before, size, MADV_HUGEPAGE);
  return begin + before;
}

// body(begin, count) over bytes in blocks dealt to threads.
template <class Body> void for_blocks(int64_t bytes, Body&& body) {
  constexpr int64_t block = 1 << 16;
  for_rows((bytes + block - 1) / block,
           [&](int64_t b) { body(b * block, static_cast<size_t>(std::min(block, bytes - b * block))); });
}

}  // namespace

// Large allocations stand on huge pages where the kernel has them: matrix products walk many rows at once. The kernel
// brings and clears a page when it is first touched.
void* CpuBackend::allocate(int64_t bytes) {
  const int64_t rounded = rounded_up(bytes),
                physical = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  void* memory = rounded > physical ? nullptr
                 : is_large(bytes)  ? map_pages(rounded)
                                    : std::aligned_alloc(cache_line, static_cast<size_t>(rounded));
  if (!memory)
    fail_machine("the machine has no ", bytes, " bytes of memory (", physical,
                 " in all); use fewer --micro-tokens or a smaller model");
  if (!is_large(bytes)) std::memset(memory, 0, static_cast<size_t>(rounded));
  return memory;
}

void CpuBackend::release(void* memory, int64_t bytes) {
  if (is_large(bytes))
    munmap(memory, static_cast<size_t>(rounded_up(bytes)));
  else
    std::free(memory);
}

void CpuBackend::upload(const Tensor& device, const void* host) {
  for_blocks(device.bytes(), [&](int64_t begin, size_t count) {
    std::memcpy(static_cast<char*>(device.data) + begin, static_cast<const char*>(host) + begin, count);
  });
}

void CpuBackend::download(void* host, const Tensor& device) {
  if (device.elements()) std::memcpy(host, device.data, static_cast<size_t>(device.bytes()));
}

void CpuBackend::zero(const Tensor& x) {
  for_blocks(x.bytes(),
             [&](int64_t begin, size_t count) { std::memset(static_cast<char*>(x.data) + begin, 0, count); });
}

std::unique_ptr<Backend> make_cpu_backend(int threads) { return std::make_unique<CpuBackend>(threads); }

}  // namespace orpo
