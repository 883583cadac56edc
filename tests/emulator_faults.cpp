// Kernels with one fault each, and what notices it: the emulator's own checks, a result that is wrong in some order of
// threads, AddressSanitizer or ThreadSanitizer. A fault that goes unnoticed where the table says otherwise fails the
// test.
#include <sys/wait.h>
#include <unistd.h>

#include "cuda/gpu.cuh"
#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

constexpr int threads = 64, blocks = 3;

// Every kernel: out[blocks * threads] and x[4 * threads + 4]; without its fault it would write what `expected` says.
using Kernel = void (*)(float* out, const float* x);

__device__ int place() { return static_cast<int>(blockIdx.x * threads + threadIdx.x); }
float own_place(int i) { return static_cast<float>(i); }
float one(int) { return 1; }
float neighbour(int i) { return static_cast<float>(i % threads ^ 1); }
float mirrored(int i) { return static_cast<float>(threads - 1 - i % threads); }

// ---- barriers and collectives

__global__ void divergent_barrier(float* out, const float*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[place()] = 1;
}
__global__ void missing_thread(float* out, const float*) {
  if (threadIdx.x != 5) __syncthreads();
  out[place()] = 1;
}
__global__ void early_return(float* out, const float*) {
  if (threadIdx.x >= 50) return;
  out[place()] = warp_sum(1.0f);
}
__global__ void split_warp(float* out, const float*) {
  float v = 1;
  if (threadIdx.x % 32 < 16)
    v = __shfl_xor_sync(0xffffffffu, v, 1);
  else
    v = __shfl_xor_sync(0xffffffffu, v, 2);
  out[place()] = v;
}
__global__ void foreign_mask(float* out, const float*) { out[place()] = __shfl_xor_sync(0x0000ffffu, 1.0f, 1); }
__global__ void lane_outside(float* out, const float*) {
  float v = 1;
  if (threadIdx.x % 32 < 16) v = __shfl_xor_sync(0x0000ffffu, v, 16);
  out[place()] = v;
}

// ---- races

__global__ void read_too_early(float* out, const float*) {
  SHARED(float, s, [threads]);
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[place()] = s[threads - 1 - threadIdx.x];
}
__global__ void overwritten_too_early(float* out, const float*) {
  SHARED(float, s, [threads]);
  float v = static_cast<float>(threadIdx.x);
  for (int round = 0; round < 2; ++round) {
    s[threadIdx.x] = v;
    __syncthreads();
    v = s[threads - 1 - threadIdx.x];  // a barrier is missing after this
  }
  out[place()] = threads - 1 - v;
}
__global__ void no_syncwarp(float* out, const float*) {
  SHARED(float, s, [threads]);
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[place()] = s[threadIdx.x ^ 1];
}
__global__ void tail_barrier(float* out, const float* x) {  // the next copy overwrites a stage that is still read
  SHARED(float, s, [4 * threads]);
  float v = 0;
  for (int round = 0; round < 2; ++round) {
    cp_async_16(&s[threadIdx.x * 4], x + (round == 0 ? threadIdx.x : threads - 1 - threadIdx.x) * 4);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (round == 0) v = s[(threads - 1 - threadIdx.x) * 4];
  }
  out[place()] = v / 4;
}
__global__ void plain_add(float* out, const float*) { out[threadIdx.x] += 1; }  // between blocks

// ---- asynchronous copies

__global__ void never_waited(float* out, const float* x) {
  SHARED(float, s, [4 * threads]);
  cp_async_16(&s[threadIdx.x * 4], x + threadIdx.x * 4);
  cp_async_commit();
  out[place()] = 1;
}
__global__ void one_group_short(float* out, const float* x) {
  SHARED(float, s, [2][4 * threads]);
  for (int g = 0; g < 2; ++g) {
    cp_async_16(&s[g][threadIdx.x * 4], x + threadIdx.x * 4);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncthreads();
  const float v = s[1][(threads - 1 - threadIdx.x) * 4] / 4;
  cp_async_wait<0>();
  out[place()] = v;
}
__global__ void misaligned_copy(float* out, const float* x) {
  SHARED(float, s, [4 * threads + 1]);
  cp_async_16(&s[threadIdx.x * 4 + 1], x + threadIdx.x * 4);
  out[place()] = 1;
}
__global__ void misaligned_source(float* out, const float* x) {
  SHARED(float, s, [4 * threads]);
  cp_async_16(&s[threadIdx.x * 4], x + threadIdx.x * 4 + 1);
  out[place()] = 1;
}
__global__ void misaligned_row(float* out, const float*) {
  SHARED(bf16, s, [32][9]);
  uint32_t r[4];
  ldmatrix_x4(r, s[threadIdx.x % 32]);
  out[place()] = 1;
}
__global__ void row_in_global_memory(float* out, const float* x) {
  uint32_t r[4];
  ldmatrix_x4(r, x + threadIdx.x % 32 * 4);
  out[place()] = 1;
}

// ---- memory

__global__ void shared_past_end(float* out, const float*) {
  SHARED(float, s, [threads - 1]);
  float* entries = s;
  entries[threadIdx.x] = 1;
  out[place()] = entries[threadIdx.x];
}
__global__ void unwritten_shared(float* out, const float*) {
  SHARED(float, s, [threads]);
  if (threadIdx.x != 7) s[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  out[place()] = s[threads - 1 - threadIdx.x];
}
__global__ void read_past_end(float* out, const float* x) { out[place()] = x[4 * threads + 4] * 0 + 1; }
__global__ void stack_overflow(float* out, const float*) {
  volatile float big[100000];
  for (int i = 99999; i >= 0; i -= 100) big[i] = 1;
  out[place()] = big[99];
}

struct Fault {
  const char* name;
  Kernel kernel;
  float (*expected)(int);
  const char *plain, *address, *thread;  // must be in the output of a build without, and with each sanitizer
};
#define FAULT(name) #name, name
const char* const asan_poison = "AddressSanitizer: use-after-poison";
const char* const tsan_race = "ThreadSanitizer: data race";
const char* const unnoticed = "right in every order";
const Fault faults[] = {
    {FAULT(divergent_barrier), one, "divergent __syncthreads: others wait at", "others wait at", "others wait at"},
    {FAULT(missing_thread), one, "a thread returned while others wait in __syncthreads", "a thread returned",
     "a thread returned"},
    {FAULT(early_return), one, "deadlock: thread 32 on in warp_sum", "deadlock: thread 32", "deadlock: thread 32"},
    {FAULT(split_warp), one, "divergent warp: __shfl_xor_sync here", "divergent warp", "divergent warp"},
    {FAULT(foreign_mask), one, "the calling lane is not in its mask", "not in its mask", "not in its mask"},
    {FAULT(lane_outside), one, "reads a lane outside the mask", "outside the mask", "outside the mask"},
    {FAULT(read_too_early), mirrored, "wrong in forward reverse random 1 random 2", "wrong in forward", tsan_race},
    {FAULT(overwritten_too_early), own_place, "wrong in", "wrong in", tsan_race},
    {FAULT(no_syncwarp), neighbour, "wrong in forward reverse", "wrong in forward", tsan_race},
    {FAULT(tail_barrier), mirrored, "wrong in forward reverse random 1 random 2", "wrong in forward", tsan_race},
    {FAULT(plain_add), nullptr, unnoticed, unnoticed, tsan_race},
    {FAULT(never_waited), one, "cp.async copies that it never waited for", "never waited for", "never waited for"},
    {FAULT(one_group_short), mirrored, "wrong in forward reverse random 1 random 2", "wrong in forward",
     "wrong in forward"},
    {FAULT(misaligned_copy), one, "cp.async: an address is not 16-byte aligned", "not 16-byte aligned",
     "not 16-byte aligned"},
    {FAULT(misaligned_source), one, "cp.async: an address is not 16-byte aligned", "not 16-byte aligned",
     "not 16-byte aligned"},
    {FAULT(misaligned_row), one, "ldmatrix: a row's address is not 16-byte aligned", "not 16-byte aligned",
     "not 16-byte aligned"},
    {FAULT(row_in_global_memory), one, "ldmatrix: a row is not in shared memory", "not in shared memory",
     "not in shared memory"},
    {FAULT(shared_past_end), one, unnoticed, asan_poison, unnoticed},
    {FAULT(unwritten_shared), mirrored, "wrong in forward reverse random 1 random 2", "wrong in forward",
     "wrong in forward"},
    {FAULT(read_past_end), one, "wrong in forward", asan_poison, "wrong in forward"},
    {FAULT(stack_overflow), one, "signal 11", "AddressSanitizer: SEGV", "ThreadSanitizer: SEGV"},
};

// What the child process says: a diagnosis, the orders in which the result is wrong, or that there is none.
void run_fault(const Fault& fault) {
  const std::pair<const char*, emulator::Settings> orders[] = {
      {"forward", {.order = emulator::Order::forward}},
      {"reverse", {.order = emulator::Order::reverse}},
      {"random 1", {.order = emulator::Order::random, .seed = 1}},
      {"random 2", {.order = emulator::Order::random, .seed = 2}},
  };
  auto* out = static_cast<float*>(gpu_allocate(blocks * threads * 4));
  auto* x = static_cast<float*>(gpu_allocate((4 * threads + 4) * 4));
  const emulator::HostAccess access;
  for (int i = 0; i < 4 * threads + 4; ++i) x[i] = static_cast<float>(i);
  std::string wrong;
  bool diagnosed = false;
  for (const auto& [name, settings] : orders) {
    emulator::settings = settings;
    gpu_zero(out, blocks * threads * 4, nullptr);
    try {
      launch(fault.kernel, blocks, threads, 0, nullptr, out, x);
      emulator::wait_for_everything();
    } catch (const MachineError& e) {
      std::printf("%s: %s\n", name, e.what());
      emulator::restart_device();
      diagnosed = true;
      continue;
    }
    bool right = true;
    for (int i = 0; fault.expected && i < blocks * threads; ++i)
      right = right && (fault.expected == own_place ? out[i] == own_place(i % threads) : out[i] == fault.expected(i));
    if (!right) wrong += std::string(" ") + name;
  }
  if (!wrong.empty()) std::printf("wrong in%s\n", wrong.c_str());
  if (wrong.empty() && !diagnosed) std::printf("%s\n", unnoticed);
  // The engine outlives what went wrong.
  emulator::settings = {};
  launch(
      +[](float* y, const float*) { y[place()] = warp_sum(1.0f); }, blocks, threads, 0, nullptr, out, x);
  emulator::wait_for_everything();
  std::printf("%s\n", out[9] == 32 ? "the engine lives" : "the engine is broken");
}

// Runs the fault in a process of its own; what it said, and the signal that ended it.
std::string outcome(const Fault& fault) {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  std::fflush(stdout);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    dup2(ends[1], 1), dup2(ends[1], 2), close(ends[0]);
    run_fault(fault);
    std::fflush(stdout);
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) said.append(buffer, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) said += concat("signal ", WTERMSIG(status), "\n");
  return said;
}

}  // namespace

TEST_CASE("emulator: every seeded fault is noticed") {
#if defined(__SANITIZE_ADDRESS__)
  const auto expected = [](const Fault& f) { return f.address; };
#elif defined(__SANITIZE_THREAD__)
  const auto expected = [](const Fault& f) { return f.thread; };
#else
  const auto expected = [](const Fault& f) { return f.plain; };
#endif
  for (const Fault& fault : faults) {
    const std::string said = outcome(fault), looked_for = expected(fault);
    INFO(std::string(fault.name), " looked for: ", looked_for, "\nsaid: ", said.substr(0, 1500));
    CHECK(said.find(looked_for) != std::string::npos);
    if (looked_for != "signal 11" && looked_for.find("AddressSanitizer") == std::string::npos &&
        looked_for.find("ThreadSanitizer: SEGV") == std::string::npos)
      CHECK(said.find("the engine lives") != std::string::npos);
    // A diagnosis names the place.
    if (looked_for.find("wrong") == std::string::npos && said.find("forward: ") == 0) {
      CHECK(said.find("tests/emulator_faults.cpp:") != std::string::npos);
      CHECK(said.find("[block (") != std::string::npos);
    }
  }
}
