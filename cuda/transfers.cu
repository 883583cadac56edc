#include <algorithm>
#include <cstring>

#include "cuda/transfers.h"

namespace orpo {

namespace {

constexpr int64_t alignment = 256;  // of what lies side by side in a half

void copy_async(void* to, const void* from, int64_t bytes, cudaMemcpyKind kind, GpuStream stream) {
  gpu_check("a copy", cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), kind, stream));
}

}  // namespace

void Uploads::copy(void* device, const void* host, int64_t bytes) {
  char* to = static_cast<char*>(device);
  const char* from = static_cast<const char*>(host);
  while (bytes > 0) {
    if (halves_[current_].used == half_bytes) take_turns();
    Half& half = halves_[current_];
    const int64_t n = std::min(bytes, half_bytes - half.used);
    std::memcpy(half.pinned.data() + half.used, from, static_cast<size_t>(n));
    copy_async(half.device.data() + half.used, half.pinned.data() + half.used, n, cudaMemcpyHostToDevice, copies_);
    half.landed.mark(copies_);
    half.landed.make_wait(compute_);
    copy_async(to, half.device.data() + half.used, n, cudaMemcpyDeviceToDevice, compute_);
    half.used = std::min(half_bytes, (half.used + n + alignment - 1) / alignment * alignment);
    to += n, from += n, bytes -= n;
  }
}

// The host waits only where the other half's last copy has still not crossed.
void Uploads::take_turns() {
  halves_[current_].taken.mark(compute_);
  current_ = 1 - current_;
  Half& half = halves_[current_];
  half.landed.wait();
  half.taken.make_wait(copies_);
  half.used = 0;
}

Refused Downloads::copy(void* host, const void* device, int64_t bytes) {
  if (bytes == 0) return {};
  const std::lock_guard lock(mutex_);
  char* to = static_cast<char*>(host);
  const char* from = static_cast<const char*>(device);
  asked_.mark(compute_);
  asked_.make_wait(copies_);
  copy_async(note_.data(), refused_, sizeof(Refused), cudaMemcpyDeviceToHost, copies_);
  // While one half is read, the other one fills.
  const int64_t chunks = (bytes + half_bytes - 1) / half_bytes;
  const auto length = [&](int64_t chunk) { return std::min(half_bytes, bytes - chunk * half_bytes); };
  for (int64_t chunk = 0; chunk <= chunks; ++chunk) {
    if (chunk < chunks) {
      Half& half = halves_[chunk % 2];
      copy_async(half.pinned.data(), from + chunk * half_bytes, length(chunk), cudaMemcpyDeviceToHost, copies_);
      half.landed.mark(copies_);
    }
    if (chunk > 0) {
      Half& half = halves_[(chunk - 1) % 2];
      half.landed.wait();
      std::memcpy(to + (chunk - 1) * half_bytes, half.pinned.data(), static_cast<size_t>(length(chunk - 1)));
    }
  }
  Refused refused;
  std::memcpy(&refused, note_.data(), sizeof refused);
  return refused;
}

}  // namespace orpo
