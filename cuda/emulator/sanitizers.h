// What AddressSanitizer and ThreadSanitizer have to be told: which stack runs, which memory may be touched, what orders
// one thread after another. Nothing, where neither is on.
//
// The emulator's own sources are compiled without ThreadSanitizer, or its bookkeeping would order CUDA threads that are
// not ordered; they speak to its runtime through these calls alone (the Makefile defines EMULATOR_THREAD_SANITIZER).
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ADDRESS_SANITIZER_ONLY(...) __VA_ARGS__
#else
#define ADDRESS_SANITIZER_ONLY(...)
#endif
#if defined(EMULATOR_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_read_range(void* address, unsigned long bytes);
extern "C" void __tsan_write_range(void* address, unsigned long bytes);
#define THREAD_SANITIZER_ONLY(...) __VA_ARGS__
#else
#define THREAD_SANITIZER_ONLY(...)
#endif

namespace orpo::emulator {

#if defined(EMULATOR_THREAD_SANITIZER)
inline constexpr bool thread_sanitizer = true;
#else
inline constexpr bool thread_sanitizer = false;
#endif

// An edge from everyone who released `at` to everyone who acquires it later.
inline void acquire([[maybe_unused]] void* at) { THREAD_SANITIZER_ONLY(__tsan_acquire(at)); }
inline void release([[maybe_unused]] void* at) { THREAD_SANITIZER_ONLY(__tsan_release(at)); }

// An access made on behalf of the running CUDA thread.
inline void note_read([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
  THREAD_SANITIZER_ONLY(__tsan_read_range(const_cast<void*>(p), bytes));
}
inline void note_write([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
  THREAD_SANITIZER_ONLY(__tsan_write_range(p, bytes));
}

inline void forbid([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
  ADDRESS_SANITIZER_ONLY(__asan_poison_memory_region(p, bytes));
}
inline void permit([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
  ADDRESS_SANITIZER_ONLY(__asan_unpoison_memory_region(p, bytes));
}

}  // namespace orpo::emulator
