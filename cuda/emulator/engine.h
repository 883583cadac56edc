// The emulator's engine: runs the blocks of a launch, each CUDA thread of a block on a fiber, and decides who goes
// next.
//
// A thread gets a fiber only when the one before it waits, so a kernel that never waits runs as a plain loop on one
// stack. Who waits stands in a queue; the order in which threads start and wake is a setting (settings.h).
//
// What a kernel does wrong ends the launch with a MachineError that names block, thread, file and line: barriers or
// collectives that do not match, a thread that leaves while others wait, copies misaligned or never waited for. The
// engine lives on: threads that were under way are abandoned where they stood, so kernels must not own memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <source_location>
#include <vector>

#include "cuda/emulator/fiber.h"
#include "cuda/emulator/settings.h"
#include "cuda/emulator/types.h"

namespace orpo::emulator {

inline constexpr int most_threads = 1024;               // a block
inline constexpr size_t most_shared_bytes = 227 << 10;  // a block, on sm_90

// Where in a kernel's source something happens. Functions that a kernel calls take it as a default argument.
using Where = std::source_location;
#define EMULATOR_WHERE const ::std::source_location where = ::std::source_location::current()

// A cp.async that has not landed.
struct AsyncCopy {
  void* to;
  const void* from;
  int bytes;  // that are read; the rest of 16 becomes zero
};

// One CUDA thread of the running block.
struct Lane {
  enum State : uint8_t { unstarted, running, waiting, finished };
  static constexpr int most_copies = 64, most_groups = 16;

  uint3 index;  // threadIdx
  int linear;
  Fiber* fiber;
  State state;
  const char* waits_for;
  Where where;
  int copy_count, group_count;
  Where copied_at;  // the last copy
  AsyncCopy copies[most_copies];
  int groups[most_groups];  // copies issued when each group was committed
};

// A warp collective being assembled: each lane leaves pointers to its operands, which lie on its stack; the last to
// arrive computes for all.
struct Collective {
  uint32_t mask, arrived;
  const char* operation;
  Where where;
  void* order;  // for ThreadSanitizer
  const void* in[32];
  void* out[32];
};
using Compute = void (*)(const Collective&, const void* context);

struct Warp {
  static constexpr int most_pending = 4;
  // mask 0: free. Never moved: kernels' code reads them, and ThreadSanitizer would see the move.
  Collective pending[most_pending];
  unsigned phase;
};

struct Launch {
  void (*run_thread)(void* arguments);
  void* arguments;
  dim3 grid, block;
  size_t dynamic_shared_bytes;
  std::atomic<uint64_t> next_block{0};
  std::atomic<bool> failed{false};
  char error[1000] = {};
  char started = 0, ended = 0;  // what threads of the operating system are ordered by
};

class Engine {
 public:
  Engine();
  ~Engine();
  Engine(const Engine&) = delete;

  Launch* launch = nullptr;
  uint3 block{};  // blockIdx

  void run(Launch& launch);
  void fiber_loop();  // the body of every fiber

  // Called by the running CUDA thread.
  void barrier(Where where);
  void collective(uint32_t mask, const char* operation, Where where, const void* in, void* out, Compute compute,
                  const void* context);
  void copy_async(void* to, const void* from, int bytes, Where where);
  void commit_copies(Where where);
  void wait_for_copies(int groups_left);
  void* shared_variable(int site, size_t bytes);
  void* dynamic_shared(Where where);
  bool in_shared_memory(const void* p) const { return p >= shared_ && p < shared_ + shared_capacity; }
  [[noreturn]] __attribute__((format(printf, 3, 4))) void fail(Where where, const char* format, ...);

 private:
  static constexpr size_t shared_capacity = 512 << 10;
  static constexpr int most_fibers = 2 * most_threads, most_variables = 1024;

  // engine.cpp: blocks and threads
  void run_block(uint64_t number);
  void place_threads(uint64_t block_number);
  void choose_fibers();
  void abandon_fibers();
  uint64_t block_at(uint64_t turn, uint64_t blocks) const;
  uint32_t random();
  void push(Lane* lane);
  Lane* pop();
  Lane* next(bool& fresh);
  void resume(Lane* lane, bool fresh);
  void wait_here(const char* what, Where where);
  void wake(Lane* const* lanes, int count);
  void let_others_go_first();
  Fiber* take_fiber();
  void finish(Lane* lane);
  void switch_to(Fiber* fiber);
  [[noreturn]] void deadlock();
  // shared_memory.cpp
  void clear_shared_memory();
  char* carve(size_t bytes);

  Fiber main_;
  Fiber* running_ = nullptr;
  std::vector<Fiber*> fibers_, free_;
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  Lane* starting_ = nullptr;
  int count_ = 0, started_ = 0, finished_ = 0;  // threads of this block
  unsigned blocks_run_ = 0;
  int starts_[most_threads];  // the order in which threads start
  Lane* ready_[most_fibers];  // a ring
  unsigned ready_head_ = 0, ready_tail_ = 0;
  Lane* at_barrier_[most_threads];
  int at_barrier_count_ = 0;
  Where barrier_where_;
  unsigned barrier_phase_ = 0;
  uint64_t random_state_ = 1;

  char* shared_ = nullptr;
  char* orders_ = nullptr;  // addresses that stand for barriers and warps in ThreadSanitizer's eyes
  size_t carved_ = 0;       // bytes given out in this block
  char* dynamic_ = nullptr;
  char* variables_[most_variables] = {};  // by site
  char block_started_ = 0;
};

inline constinit thread_local Engine* engine = nullptr;  // of this thread of the operating system
inline constinit thread_local Lane* lane = nullptr;      // the CUDA thread that runs on it

}  // namespace orpo::emulator

#define threadIdx (::orpo::emulator::lane->index)
#define blockIdx (::orpo::emulator::engine->block)
#define blockDim (::orpo::emulator::engine->launch->block)
#define gridDim (::orpo::emulator::engine->launch->grid)
