#include "cuda/emulator/fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include "cuda/emulator/sanitizers.h"
#include "src/fail.h"

#ifndef EMULATOR_PORTABLE_FIBERS
// Saves what the calling convention asks a function to keep, changes stacks, restores it. Floating-point modes are the
// process's.
extern "C" void orpo_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl orpo_emulator_switch
.type orpo_emulator_switch,@function
orpo_emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; popq %rcx
  jmpq *%rcx
.size orpo_emulator_switch,.-orpo_emulator_switch
)");
#endif

namespace orpo::emulator {

namespace {

constexpr size_t page = 4096;

// The first thing that runs on a fresh stack.
void first_entry() {
  ADDRESS_SANITIZER_ONLY(__sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr));
  fiber_entry();
}

}  // namespace

Fiber* make_fiber(size_t bytes, int number) {
  void* memory =
      mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail_machine("the emulator has no memory for the stack of CUDA thread ", number);
  mprotect(memory, page, PROT_NONE);
  Fiber* fiber = new Fiber;
  fiber->stack = static_cast<char*>(memory) + page;
  fiber->bytes = bytes;
  fiber->offset = static_cast<size_t>(number) * 448 % 8192;
  rewind(*fiber);
  return fiber;
}

void destroy(Fiber* fiber) {
  permit(fiber->stack, fiber->bytes);
  THREAD_SANITIZER_ONLY(__tsan_destroy_fiber(fiber->thread_sanitizer));
  munmap(fiber->stack - page, fiber->bytes + page);
  delete fiber;
}

void rewind(Fiber& fiber) {
  permit(fiber.stack, fiber.bytes);
  fiber.address_sanitizer = nullptr;
  THREAD_SANITIZER_ONLY(if (fiber.thread_sanitizer) __tsan_destroy_fiber(fiber.thread_sanitizer);
                        fiber.thread_sanitizer = __tsan_create_fiber(0));
#ifdef EMULATOR_PORTABLE_FIBERS
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, first_entry, 0);
#else
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.bytes - fiber.offset);
  *--top = nullptr;  // stands for a return address: ends a backtrace, and aligns the stack
  *--top = reinterpret_cast<void*>(&first_entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the six saved registers
  fiber.stopped_at = top;
#endif
}

void adopt_current_thread([[maybe_unused]] Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  pthread_attr_t attributes;
  void* stack;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &fiber.bytes);
  pthread_attr_destroy(&attributes);
  fiber.stack = static_cast<char*>(stack);
#endif
  THREAD_SANITIZER_ONLY(fiber.thread_sanitizer = __tsan_get_current_fiber());
}

void switch_fibers(Fiber& from, Fiber& to) {
  // Switching orders nothing: only barriers and collectives do.
  THREAD_SANITIZER_ONLY(__tsan_switch_to_fiber(to.thread_sanitizer, __tsan_switch_to_fiber_no_sync));
  ADDRESS_SANITIZER_ONLY(__sanitizer_start_switch_fiber(&from.address_sanitizer, to.stack, to.bytes));
#ifdef EMULATOR_PORTABLE_FIBERS
  swapcontext(&from.context, &to.context);
#else
  orpo_emulator_switch(&from.stopped_at, to.stopped_at);
#endif
  ADDRESS_SANITIZER_ONLY(__sanitizer_finish_switch_fiber(from.address_sanitizer, nullptr, nullptr));
}

}  // namespace orpo::emulator
