#include "cuda/emulator/device_memory.h"

#include <sys/mman.h>
#include <sys/sysinfo.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>

#include "cuda/emulator/sanitizers.h"
#include "cuda/emulator/settings.h"
#include "src/fail.h"
#include "src/host_memory.h"

namespace orpo::emulator {

namespace {

constexpr size_t page = 4096, alignment = 256;

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// An allocation ends where its pages end; a page that nobody may touch follows.
struct Block {
  char* pages;
  size_t page_bytes, bytes;
};

struct Memory {
  std::recursive_mutex mutex;
  std::map<const char*, Block> device;   // by begin
  std::map<const char*, size_t> pinned;  // bytes by begin
  int64_t device_bytes = 0;
  int running = 0;  // DeviceRuns that live
};

Memory& memory() {
  static Memory& all = *new Memory;  // outlives every static object that frees in its destructor
  return all;
}
std::lock_guard<std::recursive_mutex> locked() { return std::lock_guard(memory().mutex); }

void protect(const Block& block) {
  mprotect(block.pages, block.page_bytes, memory().running ? PROT_READ | PROT_WRITE : PROT_NONE);
}

// The allocation with the last begin at or before p, if there is one.
const std::pair<const char* const, Block>* block_before(const char* p) {
  auto next = memory().device.upper_bound(p);
  return next == memory().device.begin() ? nullptr : &*--next;
}

}  // namespace

void* allocate_device_memory(size_t bytes) {
  const auto lock = locked();
  if (settings.device_bytes && static_cast<int64_t>(bytes) > device_bytes_free()) return nullptr;
  const size_t used = round_up(std::max<size_t>(bytes, 1), alignment);
  Block block{nullptr, round_up(used, page), bytes};
  void* pages = mmap(nullptr, block.page_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
  madvise(pages, block.page_bytes, MADV_HUGEPAGE);  // protection changes with every operation: 512 times fewer entries
  block.pages = static_cast<char*>(pages);
  char *end = block.pages + block.page_bytes, *begin = end - used;
  std::fill(begin, end, static_cast<char>(0xff));
  mprotect(end, page, PROT_NONE);
  forbid(begin + bytes, used - bytes);
  forbid(block.pages, static_cast<size_t>(begin - block.pages));
  protect(block);
  memory().device_bytes += static_cast<int64_t>(bytes);
  memory().device.emplace(begin, block);
  return begin;
}

void release_device_memory(void* begin) {
  const auto lock = locked();
  const auto found = memory().device.find(static_cast<const char*>(begin));
  const Block block = found->second;
  memory().device.erase(found);
  memory().device_bytes -= static_cast<int64_t>(block.bytes);
  permit(block.pages, block.page_bytes);
  munmap(block.pages, block.page_bytes + page);
}

bool is_device_memory(const void* p, size_t bytes) {
  const auto lock = locked();
  const char* begin = static_cast<const char*>(p);
  const auto* found = block_before(begin);
  return found && begin + bytes <= found->first + found->second.bytes;
}

bool touches_device_memory(const void* p, size_t bytes) {
  const auto lock = locked();
  const char* begin = static_cast<const char*>(p);
  const auto* last = block_before(begin + (bytes ? bytes - 1 : 0));
  return last && begin < last->first + last->second.bytes;
}

bool is_allocation(const void* begin) {
  const auto lock = locked();
  return memory().device.contains(static_cast<const char*>(begin));
}

void check_device_memory(const void* p, int64_t bytes) {
  if (bytes < 0 || !is_device_memory(p, static_cast<size_t>(bytes)))
    fail_machine(p, " and the ", bytes, " bytes from there on are not memory of the device");
}

void* allocate_pinned_memory(size_t bytes) {
  const auto lock = locked();
  void* begin = std::malloc(bytes);
  if (!begin) return nullptr;
  std::fill_n(static_cast<char*>(begin), bytes, static_cast<char>(0xff));
  memory().pinned.emplace(static_cast<const char*>(begin), bytes);
  return begin;
}

bool release_pinned_memory(void* begin) {
  const auto lock = locked();
  if (!memory().pinned.erase(static_cast<const char*>(begin))) return false;
  std::free(begin);
  return true;
}

bool is_pinned_memory(const void* p, size_t bytes) {
  const auto lock = locked();
  const char* begin = static_cast<const char*>(p);
  auto next = memory().pinned.upper_bound(begin);
  if (next == memory().pinned.begin()) return false;
  --next;
  return begin + bytes <= next->first + next->second;
}

int64_t device_bytes_in_use() {
  const auto lock = locked();
  return memory().device_bytes;
}

int64_t device_bytes_total() {
  if (settings.device_bytes) return settings.device_bytes;
  struct sysinfo machine {};
  sysinfo(&machine);
  return static_cast<int64_t>(machine.totalram) * machine.mem_unit;
}

int64_t device_bytes_free() {
  if (!settings.device_bytes) return available_memory();
  return std::max<int64_t>(0, settings.device_bytes - device_bytes_in_use());
}

DeviceRuns::DeviceRuns() {
  const auto lock = locked();
  if (memory().running++ == 0)
    for (const auto& [begin, block] : memory().device) protect(block);
}

DeviceRuns::~DeviceRuns() {
  const auto lock = locked();
  if (--memory().running == 0)
    for (const auto& [begin, block] : memory().device) protect(block);
}

}  // namespace orpo::emulator
