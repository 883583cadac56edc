// Streams and events as queues. Work asked for runs as late as the program permits: when somebody waits for it, with
// what it must follow and nothing else. So a missing cudaStreamWaitEvent, a staging buffer written over too early or a
// result read before its wait give a wrong result, every time.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "cuda/backend.h"
#include "cuda/emulator/device_memory.h"

namespace orpo::emulator {

// Asks for work on a stream (null: the default stream, which waits for no other here). It runs with the device's memory
// in reach. What it throws is the device's error from then on, under this name. MachineError where the device has
// failed already.
void enqueue(GpuStream stream, std::function<void()> work, std::string name = "work");

// The device's error, if it has one: the first that work threw. Nothing runs any more, every call fails.
std::string device_error();
// As if the process were a new one: what was asked for is dropped, the error forgotten, memory kept. For tests.
void restart_device();

void wait_for_everything();  // runs all that was asked for; throws MachineError where the device fails
bool has_pending_work();
int64_t allocations_made();  // by cudaMalloc and cudaHostAlloc, so far
int64_t waits_made();        // calls that made the host wait for work, so far
int64_t live_streams();
int64_t live_events();

// Lets the host touch the device's memory while it lives; everything asked for so far is done first. For tests.
class HostAccess {
 public:
  HostAccess() { wait_for_everything(); }

 private:
  DeviceRuns reachable_;
};

}  // namespace orpo::emulator
