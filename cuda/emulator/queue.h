// What stream.cpp and runtime.cpp share: the device's state.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "cuda/backend.h"

struct CUevent_st;

namespace orpo::emulator {

struct Queue;

// A place in a queue: what was asked for up to there.
struct Mark {
  std::shared_ptr<Queue> queue;  // none: never recorded, nothing to wait for
  uint64_t position = 0;
};

struct Operation {
  std::string name;
  std::function<void()> work;
  Mark after;  // where it has a queue: no work, but a wait for this
};

struct Queue {
  std::deque<Operation> pending;
  uint64_t issued = 0, done = 0;
};

struct Device {
  Device();
  std::recursive_mutex mutex;
  std::shared_ptr<Queue> default_queue;
  std::vector<std::weak_ptr<Queue>> queues;
  std::string error;
  int64_t allocations = 0, waits = 0;
  std::set<CUstream_st*> streams;
  std::set<CUevent_st*> events;
  std::unique_lock<std::recursive_mutex> locked() { return std::unique_lock(mutex); }
};
Device& device();
Queue& queue_of(GpuStream stream);

// Runs the queue up to this place, and before each wait what it waits for. The device locked.
void run_until(Queue& queue, uint64_t position);
// One operation nearer; whether the mark is reached now.
bool run_one_towards(const Mark& mark);

}  // namespace orpo::emulator

// What cudaStream_t and cudaEvent_t point to.
struct CUstream_st {
  std::shared_ptr<orpo::emulator::Queue> queue = std::make_shared<orpo::emulator::Queue>();
};
struct CUevent_st {
  orpo::emulator::Mark mark;  // of the last record
};
