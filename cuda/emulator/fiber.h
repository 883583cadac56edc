// A fiber: a stack of its own and the place where it stopped. The emulator runs each CUDA thread on one.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(EMULATOR_PORTABLE_FIBERS)
#define EMULATOR_PORTABLE_FIBERS  // any other processor: ucontext, about ten times slower
#endif
#ifdef EMULATOR_PORTABLE_FIBERS
#include <ucontext.h>
#endif

namespace orpo::emulator {

struct Fiber {
  char* stack = nullptr;  // null for the fiber that stands for the operating system's thread
  size_t bytes = 0;
  size_t offset = 0;  // stack tops are staggered, or all fibers compete for the same cache sets
#ifdef EMULATOR_PORTABLE_FIBERS
  ucontext_t context;
#else
  void* stopped_at = nullptr;
#endif
  void* thread_sanitizer = nullptr;   // its idea of a thread
  void* address_sanitizer = nullptr;  // its fake stack while this fiber is away
};

// A fiber whose stack of `bytes` ends in a page that faults; `number` staggers it. It starts in fiber_entry(), which
// the engine provides and which never returns. MachineError where the system has no memory left.
Fiber* make_fiber(size_t bytes, int number);
void destroy(Fiber* fiber);
void rewind(Fiber& fiber);                   // forgets what was on the stack: starts anew
void adopt_current_thread(Fiber& fiber);     // `fiber` stands for the stack that runs now
void switch_fibers(Fiber& from, Fiber& to);  // returns when somebody switches back to `from`
void fiber_entry();

}  // namespace orpo::emulator
