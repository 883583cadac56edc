#include "cuda/emulator/stream.h"

#include <algorithm>
#include <exception>

#include "cuda/emulator/queue.h"
#include "src/fail.h"

namespace orpo::emulator {

Device& device() {
  static Device& only = *new Device;  // outlives every static object that waits in its destructor
  return only;
}

Queue& queue_of(GpuStream stream) { return stream ? *stream->queue : *device().default_queue; }

Device::Device() : default_queue(std::make_shared<Queue>()) { queues.push_back(default_queue); }

namespace {

void run_one(Queue& queue) {
  Operation next = std::move(queue.pending.front());
  queue.pending.pop_front();
  if (next.after.queue)
    run_until(*next.after.queue, next.after.position);
  else if (device().error.empty())
    try {
      next.work();
    } catch (const std::exception& e) {
      device().error = next.name + ": " + e.what();
      for (const std::weak_ptr<Queue>& other : device().queues)
        if (const auto q = other.lock()) q->pending.clear(), q->done = q->issued;
      return;
    }
  queue.done += queue.done < queue.issued;
}

}  // namespace

// A mark is older than what waits for it, so no queue comes up again before the place it stands at.
void run_until(Queue& queue, uint64_t position) {
  if (queue.done >= position) return;
  const DeviceRuns reachable;
  while (queue.done < position && !queue.pending.empty()) run_one(queue);
}

bool run_one_towards(const Mark& mark) {
  if (mark.queue->done < mark.position) {
    const DeviceRuns reachable;
    run_one(*mark.queue);
  }
  return mark.queue->done >= mark.position;
}

void enqueue(GpuStream stream, std::function<void()> work, std::string name) {
  const auto lock = device().locked();
  if (!device().error.empty()) fail_machine(device().error);
  Queue& queue = queue_of(stream);
  queue.pending.push_back({std::move(name), std::move(work), {}});
  queue.issued += 1;
}

std::string device_error() {
  const auto lock = device().locked();
  return device().error;
}

void restart_device() {
  const auto lock = device().locked();
  device().error.clear();
  for (const std::weak_ptr<Queue>& other : device().queues)
    if (const auto q = other.lock()) q->pending.clear(), q->done = q->issued;
}

void wait_for_everything() {
  const auto lock = device().locked();
  for (const std::weak_ptr<Queue>& other : device().queues)
    if (const auto q = other.lock()) run_until(*q, q->issued);
  if (!device().error.empty()) fail_machine(device().error);
}

bool has_pending_work() {
  const auto lock = device().locked();
  return std::any_of(device().queues.begin(), device().queues.end(), [](const std::weak_ptr<Queue>& other) {
    const auto q = other.lock();
    return q && q->done < q->issued;
  });
}

int64_t allocations_made() { return device().allocations; }
int64_t waits_made() { return device().waits; }
int64_t live_streams() { return static_cast<int64_t>(device().streams.size()); }
int64_t live_events() { return static_cast<int64_t>(device().events.size()); }

}  // namespace orpo::emulator
