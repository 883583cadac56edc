#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/emulator/queue.h"
#include "cuda/emulator/runtime_api.h"
#include "cuda/emulator/stream.h"
#include "src/fail.h"

using namespace orpo;
using namespace orpo::emulator;

namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_text;
std::string misuse;

// The status of a call that was refused.
template <class... Parts> cudaError_t refuse_call(cudaError_t status, const Parts&... what) {
  last_error = status;
  last_text = concat(what...);
  misuse += last_text + "\n";
  return status;
}

// The status of a call that was accepted: the device's error, if it has one.
cudaError_t status() {
  if (device().error.empty()) return cudaSuccess;
  return last_error = cudaErrorLaunchFailure;
}

bool is_stream(cudaStream_t stream) { return !stream || device().streams.contains(stream); }

// Runs the body with the device locked, on a stream and an event that exist.
template <class Body> cudaError_t call(const char* name, cudaStream_t stream, const cudaEvent_t* event, Body&& body) {
  const auto lock = device().locked();
  if (!is_stream(stream)) return refuse_call(cudaErrorInvalidResourceHandle, name, ": the stream does not exist");
  if (event && !device().events.contains(*event))
    return refuse_call(cudaErrorInvalidResourceHandle, name, ": the event does not exist");
  if (const cudaError_t failed = status(); failed != cudaSuccess) return failed;
  const cudaError_t answer = body();
  return answer != cudaSuccess ? answer : status();
}
template <class Body> cudaError_t call(const char* name, Body&& body) { return call(name, nullptr, nullptr, body); }

// A call that waits for the stream up to here.
void wait_for(Queue& queue, uint64_t position) {
  device().waits += queue.done < position;
  run_until(queue, position);
}

Mark end_of(cudaStream_t stream) {
  const auto& queue = stream ? stream->queue : device().default_queue;
  return {queue, queue->issued};
}

}  // namespace

namespace orpo::emulator {

const std::string& noted_misuse() { return misuse; }
void forget_misuse() { misuse.clear(); }

}  // namespace orpo::emulator

// ---- memory

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  return call("cudaMalloc", [&] {
    device().allocations += 1;
    *memory = bytes ? allocate_device_memory(bytes) : nullptr;
    if (*memory || !bytes) return cudaSuccess;
    last_text = concat("out of memory: ", bytes, " bytes asked for, ", device_bytes_free(), " free");
    return last_error = cudaErrorMemoryAllocation;
  });
}

cudaError_t cudaFree(void* memory) {
  const auto lock = device().locked();  // a device that failed still takes its memory back
  if (!memory) return status();
  if (!is_allocation(memory)) return refuse_call(cudaErrorInvalidValue, "cudaFree: ", memory, " is not allocated");
  if (has_pending_work()) return refuse_call(cudaErrorInvalidValue, "cudaFree: work is pending on the device");
  release_device_memory(memory);
  return status();
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned flags) {
  return call("cudaHostAlloc", [&] {
    if (flags != cudaHostAllocDefault) return refuse_call(cudaErrorInvalidValue, "cudaHostAlloc: flags ", flags);
    device().allocations += 1;
    *memory = allocate_pinned_memory(bytes);
    return *memory ? cudaSuccess : last_error = cudaErrorMemoryAllocation;
  });
}

cudaError_t cudaFreeHost(void* memory) {
  const auto lock = device().locked();
  if (!memory) return status();
  if (has_pending_work()) return refuse_call(cudaErrorInvalidValue, "cudaFreeHost: work is pending on the device");
  if (!release_pinned_memory(memory))
    return refuse_call(cudaErrorInvalidValue, "cudaFreeHost: ", memory, " is not pinned memory");
  return status();
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return call("cudaMemcpyAsync", stream, nullptr, [&] {
    if (bytes == 0) return cudaSuccess;
    const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (!to_device && !from_device)
      return refuse_call(cudaErrorInvalidMemcpyDirection, "cudaMemcpyAsync: from the host to the host");
    const auto right_side = [&](const void* p, bool on_device) {
      return on_device ? is_device_memory(p, bytes) : !touches_device_memory(p, bytes);
    };
    for (const auto& [p, on_device, what] : {std::tuple<const void*, bool, const char*>{to, to_device, "to"},
                                             std::tuple<const void*, bool, const char*>{from, from_device, "from"}})
      if (!right_side(p, on_device))
        return refuse_call(cudaErrorInvalidValue, "cudaMemcpyAsync: ", what, " ", p, ", ", bytes,
                           on_device ? " bytes, is not memory of the device" : " bytes, is not memory of the host");
    if (!from_device && !is_pinned_memory(from, bytes)) {
      const char* begin = static_cast<const char*>(from);
      enqueue(
          stream,
          [to, staged = std::vector<char>(begin, begin + bytes)] { std::memcpy(to, staged.data(), staged.size()); },
          "cudaMemcpyAsync");
      return cudaSuccess;
    }
    enqueue(
        stream, [to, from, bytes] { std::memcpy(to, from, bytes); }, "cudaMemcpyAsync");
    return cudaSuccess;
  });
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  return call("cudaMemsetAsync", stream, nullptr, [&] {
    if (!is_device_memory(memory, bytes))
      return refuse_call(cudaErrorInvalidValue, "cudaMemsetAsync: ", memory, ", ", bytes,
                         " bytes, is not memory of the device");
    enqueue(
        stream, [memory, value, bytes] { std::memset(memory, value, bytes); }, "cudaMemsetAsync");
    return cudaSuccess;
  });
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return call("cudaMemGetInfo", [&] {
    *free = static_cast<size_t>(device_bytes_free()), *total = static_cast<size_t>(device_bytes_total());
    return cudaSuccess;
  });
}

// ---- streams

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return call("cudaStreamCreateWithFlags", [&] {
    if (flags != cudaStreamNonBlocking)
      return refuse_call(cudaErrorInvalidValue, "cudaStreamCreateWithFlags: flags ", flags,
                         ": streams that wait for the default stream are not what this backend uses");
    *stream = new CUstream_st;
    device().streams.insert(*stream);
    std::erase_if(device().queues, [](const auto& queue) { return queue.expired(); });
    device().queues.push_back((*stream)->queue);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const auto lock = device().locked();
  if (!stream || !is_stream(stream))
    return refuse_call(cudaErrorInvalidResourceHandle, "cudaStreamDestroy: the stream does not exist");
  run_until(*stream->queue, stream->queue->issued);  // a GPU lets it end too
  device().streams.erase(stream);
  delete stream;
  return status();
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return call("cudaStreamSynchronize", stream, nullptr, [&] {
    wait_for(queue_of(stream), queue_of(stream).issued);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return call("cudaStreamWaitEvent", stream, &event, [&] {
    if (!event->mark.queue) return cudaSuccess;  // never recorded: nothing to wait for
    Queue& queue = queue_of(stream);
    queue.pending.push_back({"cudaStreamWaitEvent", {}, event->mark});
    queue.issued += 1;
    return cudaSuccess;
  });
}

cudaError_t cudaDeviceSynchronize() {
  return call("cudaDeviceSynchronize", [&] {
    for (const std::weak_ptr<Queue>& other : device().queues)
      if (const auto queue = other.lock()) wait_for(*queue, queue->issued);
    return cudaSuccess;
  });
}

// ---- events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return call("cudaEventCreateWithFlags", [&] {
    if (flags != cudaEventDisableTiming)
      return refuse_call(cudaErrorInvalidValue, "cudaEventCreateWithFlags: flags ", flags,
                         ": events here time nothing");
    *event = new CUevent_st;
    device().events.insert(*event);
    return cudaSuccess;
  });
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const auto lock = device().locked();
  if (!device().events.erase(event))
    return refuse_call(cudaErrorInvalidResourceHandle, "cudaEventDestroy: the event does not exist");
  delete event;
  return status();
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return call("cudaEventRecord", stream, &event, [&] {
    event->mark = end_of(stream);
    return cudaSuccess;
  });
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  return call("cudaEventQuery", nullptr, &event, [&] {
    if (!event->mark.queue || run_one_towards(event->mark)) return cudaSuccess;
    return cudaErrorNotReady;
  });
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return call("cudaEventSynchronize", nullptr, &event, [&] {
    if (event->mark.queue) wait_for(*event->mark.queue, event->mark.position);
    return cudaSuccess;
  });
}

// ---- the device

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }

cudaError_t cudaSetDevice(int number) {
  if (number != 0) return refuse_call(cudaErrorInvalidDevice, "cudaSetDevice: there is no device ", number);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* number) { return *number = 0, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  if (number != 0) return refuse_call(cudaErrorInvalidDevice, "cudaDeviceGetAttribute: there is no device ", number);
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int number) {
  if (number != 0) return refuse_call(cudaErrorInvalidDevice, "cudaGetDeviceProperties: there is no device ", number);
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "emulated GPU");
  properties->major = 9, properties->multiProcessorCount = 4;
  properties->totalGlobalMem = static_cast<size_t>(device_bytes_total());
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) { return *version = 12040, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 12040, cudaSuccess; }

// ---- errors

cudaError_t cudaGetLastError() {
  const auto lock = device().locked();
  const cudaError_t last = device().error.empty() ? last_error : cudaErrorLaunchFailure;
  last_error = cudaSuccess;
  return last;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidMemcpyDirection:
      return "cudaErrorInvalidMemcpyDirection";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  const auto lock = device().locked();
  if (error == cudaErrorLaunchFailure && !device().error.empty()) return device().error.c_str();
  return error == last_error && !last_text.empty() ? last_text.c_str() : cudaGetErrorName(error);
}
