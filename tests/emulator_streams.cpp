// The CUDA runtime's stand-in: work runs as late as the program permits, and what a GPU would forgive or punish by
// chance is refused or gives a wrong result every time.
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "cuda/gpu.cuh"
#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

__global__ void double_kernel(float* x, int count) {
  if (static_cast<int>(threadIdx.x) < count) x[threadIdx.x] *= 2;
}
__global__ void overrun_kernel(float* x) { x[1 << 8] = 1; }  // in the page that guards the end
__global__ void deadlock_kernel(float* x) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    x[threadIdx.x - 32] = 1;
}

constexpr int count = 32;
constexpr int64_t bytes = count * sizeof(float);

struct Stream {
  GpuStream stream = nullptr;
  Stream() { gpu_check("stream", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream); }
  operator GpuStream() const { return stream; }
};
struct Event {
  cudaEvent_t event = nullptr;
  Event() { gpu_check("event", cudaEventCreateWithFlags(&event, cudaEventDisableTiming)); }
  ~Event() { cudaEventDestroy(event); }
  operator cudaEvent_t() const { return event; }
};
struct Pinned {
  float* data = nullptr;
  explicit Pinned(float value) {
    gpu_check("pinned", cudaHostAlloc(reinterpret_cast<void**>(&data), bytes, cudaHostAllocDefault));
    std::fill_n(data, count, value);
  }
  ~Pinned() { cudaFreeHost(data); }
};
struct OnDevice {
  float* data = static_cast<float*>(gpu_allocate(bytes));
  ~OnDevice() {
    cudaDeviceSynchronize();
    gpu_release(data);
  }
};

// What a copy made now, on a stream of its own that waits for nothing, brings.
float first_of(const float* device, GpuStream stream) {
  std::vector<float> host(count);
  gpu_download(host.data(), device, bytes, stream);
  gpu_wait(stream);
  return host[0];
}

// Refused, and noted with these words.
void check_refused(cudaError_t status, cudaError_t expected, const char* words) {
  CHECK(status == expected);
  INFO(emulator::noted_misuse());
  CHECK(emulator::noted_misuse().find(words) != std::string::npos);
  emulator::forget_misuse();
}

// Whether the body dies of touching what it must not.
template <class Body> bool dies(Body&& body) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    close(2);  // AddressSanitizer has much to say
    for (const int s : {SIGSEGV, SIGBUS}) signal(s, SIG_DFL);
    body();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) || WEXITSTATUS(status) != 0;
}

}  // namespace

TEST_CASE("emulator: nothing runs before somebody waits for it, and then what that needs alone") {
  const Stream a, b;
  const OnDevice x, y;
  int ran = 0;
  emulator::enqueue(a, [&] { ran += 1; });
  emulator::enqueue(b, [&] { ran += 100; });
  CHECK(ran == 0);
  const Event reached;
  gpu_check("record", cudaEventRecord(reached, a));
  emulator::enqueue(a, [&] { ran += 10; });
  CHECK(cudaEventQuery(reached) == cudaSuccess);  // one operation was left to it
  CHECK(ran == 1);
  gpu_wait(a);
  CHECK(ran == 11);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  CHECK(ran == 111);
}

TEST_CASE("emulator: a stream that does not wait for another reads what is not there yet") {
  for (const bool waits : {false, true}) {
    const Stream copy, compute;
    const Pinned one(1);
    const OnDevice x;
    const Event arrived;
    gpu_upload(x.data, one.data, bytes, copy);
    gpu_check("record", cudaEventRecord(arrived, copy));
    if (waits) gpu_check("wait", cudaStreamWaitEvent(compute, arrived));
    launch(double_kernel, 1, count, 0, compute.stream, x.data, count);
    const float seen = first_of(x.data, compute);
    CHECK(waits ? seen == 2 : std::isnan(seen));
  }
}

TEST_CASE("emulator: an event recorded before the work does not stand for it") {
  for (const bool before : {true, false}) {
    const Stream copy, compute;
    const Pinned one(1);
    const OnDevice x;
    const Event arrived;
    if (before) gpu_check("record", cudaEventRecord(arrived, copy));
    gpu_upload(x.data, one.data, bytes, copy);
    if (!before) gpu_check("record", cudaEventRecord(arrived, copy));
    gpu_check("wait", cudaStreamWaitEvent(compute, arrived));
    const float seen = first_of(x.data, compute);
    CHECK(before ? std::isnan(seen) : seen == 1);
  }
}

TEST_CASE("emulator: pinned memory is read and written late, pageable memory read at once") {
  const Stream stream;
  const OnDevice x, y;
  const Pinned staging(1), result(-1);
  std::vector<float> pageable(count, 1.0f);
  gpu_upload(x.data, staging.data, bytes, stream);
  gpu_upload(y.data, pageable.data(), bytes, stream);
  staging.data[0] = pageable[0] = 7;  // too early for the first
  gpu_download(result.data, x.data, bytes, stream);
  CHECK(result.data[0] == -1);
  CHECK(first_of(y.data, stream) == 1);
  CHECK(result.data[0] == 7);
}

TEST_CASE("emulator: memory of the device belongs to it") {
  const OnDevice x;
  std::vector<float> host(count);
  CHECK(dies([&] { x.data[0] = 1; }));
  CHECK(dies([&] { std::printf("%f", static_cast<double>(x.data[3])); }));
  CHECK(dies([&] {  // far behind its end
    launch(overrun_kernel, 1, 1, 0, nullptr, x.data);
    cudaDeviceSynchronize();
  }));
  CHECK_THROWS_WITH_AS(launch(double_kernel, 1, count, 0, nullptr, host.data(), count),
                       doctest::Contains("not memory of the device"), MachineError);
  CHECK_THROWS_AS(emulator::check_device_memory(x.data, bytes + 1), MachineError);
  emulator::check_device_memory(x.data, bytes);
  check_refused(cudaMemcpyAsync(host.data(), x.data, bytes + 4, cudaMemcpyDeviceToHost, nullptr), cudaErrorInvalidValue,
                "from");
  check_refused(cudaMemcpyAsync(x.data, x.data, bytes, cudaMemcpyHostToDevice, nullptr), cudaErrorInvalidValue,
                "is not memory of the host");
  check_refused(cudaMemsetAsync(host.data(), 0, bytes, nullptr), cudaErrorInvalidValue, "is not memory of the device");
  const emulator::HostAccess access;  // for tests
  CHECK(std::isnan(x.data[0]));
}

TEST_CASE("emulator: freeing twice, too early or what is not there is refused") {
  void* x = gpu_allocate(bytes);
  std::vector<float> host(count);
  gpu_zero(x, bytes, nullptr);
  check_refused(cudaFree(x), cudaErrorInvalidValue, "work is pending");
  gpu_wait(nullptr);
  CHECK(cudaFree(x) == cudaSuccess);
  check_refused(cudaFree(x), cudaErrorInvalidValue, "is not allocated");
  check_refused(cudaFree(host.data()), cudaErrorInvalidValue, "is not allocated");
  check_refused(cudaFreeHost(host.data()), cudaErrorInvalidValue, "is not pinned");
  Event event;
  cudaEventDestroy(event.event);
  check_refused(cudaEventRecord(event.event, nullptr), cudaErrorInvalidResourceHandle, "the event does not exist");
  event.event = nullptr;
  gpu_check("event", cudaEventCreateWithFlags(&event.event, cudaEventDisableTiming));
  check_refused(cudaSetDevice(1), cudaErrorInvalidDevice, "no device 1");
  cudaGetLastError();
}

TEST_CASE("emulator: a kernel's failure is the device's, seen by who waits, and stays") {
  {
    const OnDevice x;
    const Stream stream;
    launch(deadlock_kernel, 1, 64, 0, stream.stream, x.data);
    launch(double_kernel, 1, count, 0, stream.stream, x.data, count);
    CHECK_THROWS_WITH_AS(gpu_wait(stream), doctest::Contains("thread returned while others wait"), MachineError);
    CHECK_THROWS_WITH_AS(gpu_zero(x.data, bytes, stream), doctest::Contains("asked for last: "), MachineError);
    CHECK_THROWS_AS(launch(double_kernel, 1, count, 0, stream.stream, x.data, count), MachineError);
    CHECK(cudaGetLastError() == cudaErrorLaunchFailure);
  }
  emulator::restart_device();
  const OnDevice x;
  gpu_zero(x.data, bytes, nullptr);
  CHECK(first_of(x.data, nullptr) == 0);
}

TEST_CASE("emulator: the device's memory ends") {
  emulator::settings.device_bytes = emulator::device_bytes_in_use() + 1000;
  CHECK_THROWS_WITH_AS(gpu_allocate(1001), doctest::Contains("out of memory"), MachineError);
  size_t free = 0, total = 0;
  void* x = gpu_allocate(900);
  CHECK(cudaMemGetInfo(&free, &total) == cudaSuccess);
  CHECK(free == 100);
  gpu_release(x);
  emulator::settings = {};
  cudaGetLastError();
}
