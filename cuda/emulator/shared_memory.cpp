// A block's shared memory: filled with 0xff before each block (NaN in fp32 and bf16, -1 in integers), so that what is
// read before it is written shows; AddressSanitizer sees the gaps between variables.
#include <sys/mman.h>

#include <algorithm>

#include "cuda/emulator/engine.h"
#include "cuda/emulator/sanitizers.h"
#include "src/fail.h"

namespace orpo::emulator {

namespace {

constexpr size_t alignment = 128, order_bytes = 4096;

void* map(void* at, size_t bytes) {
  void* memory = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (at ? MAP_FIXED : 0), -1, 0);
  if (memory == MAP_FAILED) fail_machine("the emulator has no memory for a block's shared memory");
  return memory;
}

}  // namespace

Engine::Engine()
    : lanes_(most_threads),
      warps_(most_threads / 32),
      shared_(static_cast<char*>(map(nullptr, shared_capacity + order_bytes))),
      orders_(shared_ + shared_capacity) {
  free_.reserve(most_fibers), fibers_.reserve(most_fibers);
}

// Under ThreadSanitizer the pages are new for each block: it must not take this block's shared memory, or its barriers,
// for the last one's. They are filled here, before a CUDA thread runs, as it would see a thread fill them.
void Engine::clear_shared_memory() {
  if (thread_sanitizer) {
    map(shared_, shared_capacity + order_bytes);
    std::fill(shared_, orders_, static_cast<char>(0xff));
  }
  permit(shared_, carved_);
  std::fill(std::begin(variables_), std::end(variables_), nullptr);
  carved_ = 0;
  dynamic_ = launch->dynamic_shared_bytes ? carve(launch->dynamic_shared_bytes) : nullptr;
}

// 128-byte aligned, with at least 128 bytes behind it that nobody may touch.
char* Engine::carve(size_t bytes) {
  char* begin = shared_ + carved_;
  const size_t end = (carved_ + bytes + alignment - 1) / alignment * alignment + alignment;
  if (end > shared_capacity) fail(Where(), "a block's shared memory exceeds %zu bytes", shared_capacity);
  if (!thread_sanitizer) std::fill(begin, shared_ + end, static_cast<char>(0xff));
  permit(begin, bytes);
  forbid(begin + bytes, static_cast<size_t>(shared_ + end - begin) - bytes);
  carved_ = end;
  return begin;
}

void* Engine::shared_variable(int site, size_t bytes) {
  if (site >= most_variables) fail(Where(), "a program has more than %d SHARED declarations", most_variables);
  char*& variable = variables_[site];
  if (!variable) variable = carve(bytes);
  return variable;
}

void* Engine::dynamic_shared(Where where) {
  if (!dynamic_) fail(where, "DYN_SHARED in a launch with no dynamic shared memory");
  return dynamic_;
}

}  // namespace orpo::emulator
