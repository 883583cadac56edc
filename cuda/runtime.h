// What the host side of a room asks of the CUDA runtime; nvcc's own or the emulator's stand-in, the same calls.
//
// MachineError where a call fails. A kernel fails long after it was asked for, and the first call that waits gets to
// know: its message then names the operations that were asked for last.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda/emulator/runtime_api.h"
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <source_location>
#include <string>
#include <string_view>

#include "cuda/backend.h"
#include "src/fail.h"

namespace orpo {

// The stream of a backend that rehearses: nothing is asked of it, and so its host code runs without a GPU, on tensors
// without memory, to the sizes that it would ask for.
inline GpuStream rehearsal_stream() {
  static char place;
  return reinterpret_cast<GpuStream>(&place);
}
inline bool rehearses(GpuStream stream) { return stream == rehearsal_stream(); }

// A stream as a launch takes it: notes which operation asks, and where in its source.
struct LaunchStream {
  LaunchStream(GpuStream s, std::source_location w = std::source_location::current()) : stream(s), where(w) {}
  GpuStream stream;
  std::source_location where;
};

// "CudaBackend::norm_forward(const Tensor&, ...)" -> "norm_forward"
inline std::string operation_name(const std::source_location& where) {
  std::string_view text = where.function_name();
  constexpr std::string_view of_class = "CudaBackend::";
  if (const size_t at = text.find(of_class); at != text.npos) text.remove_prefix(at + of_class.size());
  const auto part_of_name = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; };
  const std::string_view before = text.substr(0, text.find('('));
  const auto begin = std::find_if_not(before.rbegin(), before.rend(), part_of_name).base();
  return std::string(begin, before.end());
}

// The operations asked for last, of the thread that asked last; the device works on one of them, or has just ended it.
class LastOperations {
 public:
  void note(const std::source_location& where) {
    places_[count_.fetch_add(1, std::memory_order_relaxed) % places_.size()] = where;
  }
  // "rope_forward, attention_forward (cuda/attention.cu:190)": each once, the newest last
  std::string text() const {
    const unsigned count = count_;
    std::string names, last;
    for (unsigned i = count < places_.size() ? 0 : count - places_.size(); i < count; ++i) {
      const std::source_location& at = places_[i % places_.size()];
      if (const std::string name = operation_name(at); name != last)
        names += (names.empty() ? "" : ", ") + name, last = name;
      if (i + 1 == count) names += concat(" (", at.file_name(), ":", at.line(), ")");
    }
    return names;
  }

 private:
  std::array<std::source_location, 6> places_;
  std::atomic<unsigned> count_{0};
};
inline LastOperations last_operations;

inline void gpu_check(const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  const std::string why = cudaGetErrorString(status), asked = last_operations.text();
  cudaGetLastError();  // reported here, and not once more by the next call
  const bool of_this_call = status == cudaErrorMemoryAllocation || status == cudaErrorInvalidValue ||
                            status == cudaErrorInvalidConfiguration || status == cudaErrorInvalidResourceHandle;
  fail_machine(what, ": ", why, of_this_call || asked.empty() ? "" : concat("; asked for last: ", asked));
}

inline void* gpu_allocate(int64_t bytes) {
  void* memory = nullptr;
  gpu_check("allocate", cudaMalloc(&memory, static_cast<size_t>(bytes)));
  return memory;
}
// Nothing may be pending on the device. What goes wrong was reported by what went wrong before.
inline void gpu_release(void* memory) { cudaFree(memory); }
// Reads pageable host memory before it returns.
inline void gpu_upload(void* device, const void* host, int64_t bytes, GpuStream stream) {
  if (rehearses(stream)) return;
  gpu_check("upload", cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream));
}
// Done when gpu_wait() returns.
inline void gpu_download(void* host, const void* device, int64_t bytes, GpuStream stream) {
  if (rehearses(stream)) return;
  gpu_check("download", cudaMemcpyAsync(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream));
}
inline void gpu_zero(void* device, int64_t bytes, GpuStream stream) {
  if (rehearses(stream)) return;
  gpu_check("zero", cudaMemsetAsync(device, 0, static_cast<size_t>(bytes), stream));
}
inline void gpu_wait(GpuStream stream) {
  if (!rehearses(stream)) gpu_check("synchronize", cudaStreamSynchronize(stream));
}

}  // namespace orpo
