// Memory between host and device, beside the kernels: copies run on streams of their own, in two halves of page-locked
// memory that take turns, and meet the compute stream by events.
#pragma once

#include <cstdint>
#include <mutex>

#include "cuda/runtime.h"

namespace orpo {

class OwnedStream {
 public:
  OwnedStream() { gpu_check("a stream", cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~OwnedStream() { cudaStreamDestroy(stream_); }
  OwnedStream(const OwnedStream&) = delete;
  operator GpuStream() const { return stream_; }

 private:
  GpuStream stream_ = nullptr;
};

// A place in a stream that others can wait for: the last one marked; before that there is nothing to wait for.
class OwnedEvent {
 public:
  OwnedEvent() { gpu_check("an event", cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~OwnedEvent() { cudaEventDestroy(event_); }
  OwnedEvent(const OwnedEvent&) = delete;
  void mark(GpuStream stream) { gpu_check("an event", cudaEventRecord(event_, stream)); }
  void make_wait(GpuStream stream) { gpu_check("an event", cudaStreamWaitEvent(stream, event_, 0)); }
  void wait() { gpu_check("a copy", cudaEventSynchronize(event_)); }

 private:
  cudaEvent_t event_ = nullptr;
};

class PinnedMemory {
 public:
  explicit PinnedMemory(int64_t bytes) {
    void* memory = nullptr;
    gpu_check("page-locked memory", cudaHostAlloc(&memory, static_cast<size_t>(bytes), cudaHostAllocDefault));
    data_ = static_cast<char*>(memory);
  }
  ~PinnedMemory() { cudaFreeHost(data_); }
  PinnedMemory(const PinnedMemory&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
};

class DeviceMemory {
 public:
  explicit DeviceMemory(int64_t bytes) : data_(static_cast<char*>(gpu_allocate(bytes))) {}
  ~DeviceMemory() { gpu_release(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
};

// Host to device. What is uploaded crosses while the compute stream still works on what it was given before, and lands
// in a half of its own; the compute stream takes it from there in its turn.
class Uploads {
 public:
  static constexpr int64_t half_bytes = 1 << 20, device_bytes = 2 * half_bytes;

  explicit Uploads(GpuStream compute) : compute_(compute) {}
  // device = host, after what compute was given so far and before what it is given next; host is free on return.
  void copy(void* device, const void* host, int64_t bytes);

 private:
  struct Half {
    PinnedMemory pinned{half_bytes};
    DeviceMemory device{half_bytes};
    int64_t used = 0;
    OwnedEvent landed;  // on the copy stream: pinned may be written again
    OwnedEvent taken;   // on the compute stream: device may be
  };
  void take_turns();

  GpuStream compute_;
  Half halves_[2];
  int current_ = 0;
  OwnedStream copies_;
};

// Device to host, from any thread, one after the other; with each comes what the kernels refused before it.
class Downloads {
 public:
  static constexpr int64_t half_bytes = 1 << 20;

  Downloads(GpuStream compute, const Refused* refused) : compute_(compute), refused_(refused) {}
  // host = device as it is after what compute was given so far; returns when it is there.
  Refused copy(void* host, const void* device, int64_t bytes);

 private:
  struct Half {
    PinnedMemory pinned{half_bytes};
    OwnedEvent landed;
  };

  std::mutex mutex_;
  GpuStream compute_;
  const Refused* refused_;  // on the device
  PinnedMemory note_{sizeof(Refused)};
  OwnedEvent asked_;
  Half halves_[2];
  OwnedStream copies_;
};

}  // namespace orpo
