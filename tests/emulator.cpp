// The emulator itself: every function of cuda/gpu.cuh does what CUDA's manuals say, in every order of threads.
#include "cuda/gpu.cuh"
#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

using emulator::Order;

template <class Body> void each_order(Body&& body) {
  const std::pair<const char*, emulator::Settings> orders[] = {{"forward", {.order = Order::forward}},
                                                               {"reverse", {.order = Order::reverse}},
                                                               {"random 1", {.order = Order::random, .seed = 1}},
                                                               {"random 2", {.order = Order::random, .seed = 2}},
                                                               {"two threads", {.threads = 2}}};
  for (const auto& [name, settings] : orders) {
    INFO(std::string(name));
    emulator::settings = settings;
    body();
  }
  emulator::settings = {};
}

// Device memory that the host may touch; what was asked for is done when it does.
template <class T> struct Memory {
  T* data;
  int64_t count;
  explicit Memory(int64_t n) : data(static_cast<T*>(gpu_allocate(n * static_cast<int64_t>(sizeof(T))))), count(n) {}
  Memory(const Memory&) = delete;
  ~Memory() {
    gpu_wait(nullptr);
    gpu_release(data);
  }
  T& operator[](int64_t i) {
    gpu_wait(nullptr);
    return data[i];
  }
  operator T*() { return data; }

 private:
  emulator::HostAccess access_;
};

// ---- kernels

__global__ void indices_kernel(uint32_t* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block << 16 | thread;
}

// Neighbours through shared memory, round after round.
__global__ void rotate_kernel(int* out, int rounds) {
  SHARED(int, ring, [96]);
  int value = static_cast<int>(threadIdx.x);
  for (int r = 0; r < rounds; ++r) {
    ring[threadIdx.x] = value;
    __syncthreads();
    value = ring[(threadIdx.x + 1) % 96];
    __syncthreads();
  }
  out[blockIdx.x * 96 + threadIdx.x] = value;
}

__global__ void shuffles_kernel(int* out) {
  const int lane = threadIdx.x % 32, value = 100 + static_cast<int>(threadIdx.x);
  int* row = out + threadIdx.x * 8;
  row[0] = __shfl_sync(0xffffffffu, value, lane * 7 + 3);
  row[1] = __shfl_sync(0xffffffffu, value, 5, 8);
  row[2] = __shfl_xor_sync(0xffffffffu, value, 9);
  row[3] = __shfl_down_sync(0xffffffffu, value, 3);
  row[4] = __shfl_up_sync(0xffffffffu, value, 3, 16);
  row[5] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  row[6] = __any_sync(0xffffffffu, value == 107) * 2 + __all_sync(0xffffffffu, value >= 100);
  // Halves of a warp meet apart, each on its own line.
  if (lane < 16)
    row[7] = __shfl_xor_sync(0x0000ffffu, value, 1);
  else
    row[7] = __shfl_xor_sync(0xffff0000u, value, 2);
}

__global__ void reductions_kernel(float* out, const float* in) {
  const float v = in[threadIdx.x];
  float* row = out + threadIdx.x * 8;
  row[0] = warp_sum(v), row[2] = warp_max(v), row[4] = quad_sum(v), row[6] = quad_max(v);
  float sum = v, most = v;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  row[1] = sum, row[3] = most;
  sum = v + __shfl_xor_sync(0xffffffffu, v, 1), row[5] = sum + __shfl_xor_sync(0xffffffffu, sum, 2);
  most = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1)), row[7] = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
}

__global__ void block_reductions_kernel(double* out, const float* in) {
  const float v = in[threadIdx.x];
  const double sum = block_sum<160>(v), twice = block_sum<160>(2 * v), most = block_max<160>(v);
  const double exact = block_sum<160>(static_cast<double>(v));
  double* row = out + threadIdx.x * 4;
  row[0] = sum, row[1] = twice, row[2] = most, row[3] = exact;
}

// Fragments by the formulas of the PTX ISA, section "Matrix fragments for mma.m16n8k16": group = lane / 4, thread in
// group = lane % 4.
__global__ void product_kernel(float* c, const bf16* a, const bf16* b) {
  const int group = threadIdx.x / 4, in_group = threadIdx.x % 4;
  uint32_t fa[2][4], fb[2][2];
  float fc[2][2][4], single[4];
  const auto pair = [](bf16 x, bf16 y) { return uint32_t{x.bits} | uint32_t{y.bits} << 16; };
  for (int m = 0; m < 2; ++m)
    for (int r = 0; r < 4; ++r) {
      const int row = m * 16 + group + (r == 1 || r == 3 ? 8 : 0), column = in_group * 2 + (r >= 2 ? 8 : 0);
      fa[m][r] = pair(a[row * 16 + column], a[row * 16 + column + 1]);
    }
  for (int n = 0; n < 2; ++n)
    for (int r = 0; r < 2; ++r) {
      const int row = in_group * 2 + r * 8, column = n * 8 + group;
      fb[n][r] = pair(b[row * 16 + column], b[(row + 1) * 16 + column]);
    }
  const auto at = [&](int m, int n, int e) {
    return (m * 16 + group + (e < 2 ? 0 : 8)) * 16 + n * 8 + in_group * 2 + e % 2;
  };
  for (int m = 0; m < 2; ++m)
    for (int n = 0; n < 2; ++n)
      for (int e = 0; e < 4; ++e) fc[m][n][e] = c[at(m, n, e)];
  for (int e = 0; e < 4; ++e) single[e] = fc[1][0][e];
  mma_tile(fc, fa, fb);
  mma_m16n8k16(single, fa[1], fb[0]);
  for (int m = 0; m < 2; ++m)
    for (int n = 0; n < 2; ++n)
      for (int e = 0; e < 4; ++e) c[at(m, n, e)] = m == 1 && n == 0 ? single[e] : fc[m][n][e];
}

__global__ void matrices_kernel(uint32_t* out, const bf16* in) {
  SHARED(bf16, rows, [32][8]);
  for (int i = 0; i < 8; ++i) rows[threadIdx.x][i] = in[threadIdx.x * 8 + i];
  __syncthreads();
  uint32_t plain[4], turned[4], first[2], second[2];
  ldmatrix_x4(plain, rows[threadIdx.x]);
  ldmatrix_x4_trans(turned, rows[threadIdx.x]);
  ldmatrix_x4(first, second, rows[threadIdx.x]);
  for (int m = 0; m < 4; ++m) {
    out[threadIdx.x * 12 + m] = plain[m];
    out[threadIdx.x * 12 + 4 + m] = turned[m];
    out[threadIdx.x * 12 + 8 + m] = m < 2 ? first[m] : second[m - 2];
  }
}

// Three groups; what the second one brings is looked at before and after its wait.
__global__ void copies_kernel(float* out, const float* in) {
  SHARED(float, stage, [3][128]);
  const int at = static_cast<int>(threadIdx.x) * 4;
  for (int g = 0; g < 3; ++g) {
    cp_async_16(&stage[g][at], in + g * 128 + at, g == 2 ? 4 * static_cast<int>(threadIdx.x % 5) : 16);
    cp_async_commit();
  }
  cp_async_wait<2>();
  const float first = stage[0][at], early = stage[1][at];
  cp_async_wait<0>();
  out[threadIdx.x * 8] = first, out[threadIdx.x * 8 + 1] = early, out[threadIdx.x * 8 + 2] = stage[1][at + 3];
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 8 + 3 + i] = stage[2][at + i];
}

__global__ void unwritten_kernel(float* out) {
  SHARED(float, fixed, [32]);
  DYN_SHARED(float, dynamic);
  out[threadIdx.x * 2] = fixed[threadIdx.x], out[threadIdx.x * 2 + 1] = dynamic[threadIdx.x];
}

__global__ void count_kernel(int* total, float* sum) {
  atomicAdd(total, static_cast<int>(threadIdx.x));
  atomicAdd(sum, 1.0f);
}

// The order in which threads pass, by block.
__global__ void passing_kernel(int* passed, int* log) {
  log[atomicAdd(passed, 1)] = static_cast<int>(blockIdx.x * 64 + threadIdx.x);
}

}  // namespace

TEST_CASE("emulator: bf16 rounds to nearest even, as the hardware does") {
  for (uint64_t u = 0; u < 1u << 31; u += 4099)
    for (uint32_t sign : {0u, 1u << 31}) {
      const float x = std::bit_cast<float>(static_cast<uint32_t>(u) | sign);
      const uint16_t bits = to_bf16(x).bits;
      if (x != x) {
        CHECK(bits == 0x7fff);
        continue;
      }
      const double below = to_float(bf16{bf16(x)}), magnitude = std::abs(double{x});
      if (std::isfinite(below)) REQUIRE(std::abs(below - double{x}) <= magnitude * 0x1p-8 + 0x1p-134);
      REQUIRE(bits == bf16(x).bits);
    }
  for (uint32_t low : {0x7fffu, 0x8000u, 0x8001u})  // below, at and above the middle of two values, even and odd
    for (uint32_t high : {0x3f80u, 0x3f81u})
      CHECK(to_bf16(std::bit_cast<float>(high << 16 | low)).bits ==
            high + (low > 0x8000 || (low == 0x8000 && high % 2)));
  CHECK(pack_bf16(1.0f, -2.0f) == 0xc0003f80u);
}

TEST_CASE("emulator: blocks and threads in three dimensions, each once") {
  each_order([] {
    Memory<uint32_t> out(3 * 4 * 2 * 8 * 3 * 2);
    launch(indices_kernel, dim3(3, 4, 2), dim3(8, 3, 2), 0, nullptr, out);
    for (int64_t i = 0; i < out.count; ++i) REQUIRE(out[i] == (static_cast<uint32_t>(i / 48) << 16 | i % 48));
  });
}

TEST_CASE("emulator: barriers separate rounds") {
  each_order([] {
    Memory<int> out(5 * 96);
    launch(rotate_kernel, 5, 96, 0, nullptr, out, 131);
    for (int64_t i = 0; i < out.count; ++i) REQUIRE(out[i] == (i % 96 + 131) % 96);
  });
}

TEST_CASE("emulator: shuffles, votes, halves of a warp apart") {
  each_order([] {
    Memory<int> out(64 * 8);
    launch(shuffles_kernel, 1, 64, 0, nullptr, out);
    for (int t = 0; t < 64; ++t) {
      const int lane = t % 32, base = 100 + t - lane;
      CHECK(out[t * 8] == base + (lane * 7 + 3) % 32);
      CHECK(out[t * 8 + 1] == base + lane / 8 * 8 + 5);
      CHECK(out[t * 8 + 2] == base + (lane ^ 9));
      CHECK(out[t * 8 + 3] == base + (lane + 3 < 32 ? lane + 3 : lane));
      CHECK(out[t * 8 + 4] == base + (lane % 16 >= 3 ? lane - 3 : lane));
      CHECK(out[t * 8 + 5] == 0x49249249);
      CHECK(out[t * 8 + 6] == (t < 32 ? 3 : 1));
      CHECK(out[t * 8 + 7] == base + (lane ^ (lane < 16 ? 1 : 2)));
    }
  });
}

TEST_CASE("emulator: sums and maxima of a warp are those of the device's shuffles, bit by bit") {
  each_order([] {
    Memory<float> in(160), out(160 * 8);
    Memory<double> block(160 * 4);
    const Values x = random_values(160, 3, -100, 100);
    double sum = 0;
    for (int i = 0; i < 160; ++i) in[i] = static_cast<float>(x[i]), sum += double{in[i]};
    launch(reductions_kernel, 1, 160, 0, nullptr, out, in);
    for (int i = 0; i < 160 * 8; i += 2)
      REQUIRE(std::bit_cast<uint32_t>(out[i]) == std::bit_cast<uint32_t>(out[i + 1]));
    launch(block_reductions_kernel, 1, 160, 0, nullptr, block, in);
    for (int i = 0; i < 160; ++i) {
      CHECK(block[i * 4] == block[0]);
      CHECK(block[i * 4 + 1] == 2 * block[0]);
      CHECK(block[i * 4 + 2] == *std::max_element(in.data, in.data + 160));
      CHECK(block[i * 4 + 3] == doctest::Approx(sum).epsilon(1e-13));
    }
    CHECK(block[0] == doctest::Approx(sum).epsilon(1e-5));
  });
}

TEST_CASE("emulator: mma by the fragments of the PTX ISA is the matrix product") {
  each_order([] {
    Memory<bf16> a(32 * 16), b(16 * 16);
    Memory<float> c(32 * 16);
    const Values x = random_values(512, 1), y = random_values(256, 2), z = random_values(512, 3);
    for (int i = 0; i < 512; ++i) a[i] = bf16(float(x[i])), c[i] = float(z[i]);
    for (int i = 0; i < 256; ++i) b[i] = bf16(float(y[i]));
    launch(product_kernel, 1, 32, 0, nullptr, c, a, b);
    for (int row = 0; row < 32; ++row)
      for (int column = 0; column < 16; ++column) {
        double sum = double{float(z[row * 16 + column])};
        for (int k = 0; k < 16; ++k) sum += double{float(a[row * 16 + k])} * double{float(b[k * 16 + column])};
        CHECK(std::abs(double{c[row * 16 + column]} - sum) < 2e-6);
      }
  });
}

TEST_CASE("emulator: ldmatrix gives each lane its pair, transposed its column's") {
  each_order([] {
    Memory<bf16> in(256);
    Memory<uint32_t> out(32 * 12);
    for (int i = 0; i < 256; ++i) in[i].bits = static_cast<uint16_t>(i);
    launch(matrices_kernel, 1, 32, 0, nullptr, out, in);
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        const uint32_t row = lane / 4, column = lane % 4 * 2, first = m * 64;
        CHECK(out[lane * 12 + m] == ((first + row * 8 + column) | (first + row * 8 + column + 1) << 16));
        CHECK(out[lane * 12 + 4 + m] == ((first + column * 8 + row) | (first + (column + 1) * 8 + row) << 16));
        CHECK(out[lane * 12 + 8 + m] == out[lane * 12 + m]);
      }
  });
}

TEST_CASE("emulator: copies land at the wait for their group, tails as zeros") {
  each_order([] {
    Memory<float> in(3 * 128), out(32 * 8);
    for (int i = 0; i < 384; ++i) in[i] = static_cast<float>(i + 1);
    launch(copies_kernel, 1, 32, 0, nullptr, out, in);
    for (int t = 0; t < 32; ++t) {
      CHECK(out[t * 8] == t * 4 + 1);
      CHECK(std::isnan(out[t * 8 + 1]));
      CHECK(out[t * 8 + 2] == 128 + t * 4 + 4);
      for (int i = 0; i < 4; ++i) CHECK(out[t * 8 + 3 + i] == (i < t % 5 ? 256 + t * 4 + i + 1 : 0));
    }
  });
}

TEST_CASE("emulator: memory nobody wrote is NaN") {
  each_order([] {
    Memory<float> out(64), unwritten(3);
    launch(unwritten_kernel, 1, 32, 32 * sizeof(float), nullptr, out);
    for (int i = 0; i < 64; ++i) CHECK(std::isnan(out[i]));
    for (int i = 0; i < 3; ++i) CHECK(std::isnan(unwritten[i]));
  });
}

TEST_CASE("emulator: atomics add up over blocks") {
  each_order([] {
    Memory<int> total(1);
    Memory<float> sum(1);
    gpu_zero(total, sizeof(int), nullptr), gpu_zero(sum, sizeof(float), nullptr);
    launch(count_kernel, 50, 64, 0, nullptr, total, sum);
    CHECK(total[0] == 50 * 64 * 63 / 2);
    CHECK(sum[0] == 50 * 64);
  });
}

TEST_CASE("emulator: orders differ from each other, and each is the same every time") {
  const auto passing = [](Order order, uint64_t seed) {
    emulator::settings = {.order = order, .seed = seed};
    Memory<int> passed(1), log(7 * 64);
    gpu_zero(passed, sizeof(int), nullptr);
    launch(passing_kernel, 7, 64, 0, nullptr, passed, log);
    gpu_wait(nullptr);
    emulator::settings = {};
    return std::vector<int>(log.data, log.data + log.count);
  };
  const std::vector<int> forward = passing(Order::forward, 1), reverse = passing(Order::reverse, 1),
                         random = passing(Order::random, 1), other = passing(Order::random, 2);
  for (int i = 0; i < 7 * 64; ++i) {
    CHECK(forward[i] == i);
    CHECK(reverse[i] == 7 * 64 - 1 - i);
  }
  CHECK(random != other);
  CHECK(random == passing(Order::random, 1));
  for (std::vector<int> seen : {random, other}) {
    std::sort(seen.begin(), seen.end());
    CHECK(seen == forward);
  }
}

TEST_CASE("emulator: refuses launches that no GPU runs") {
  Memory<float> out(64);
  const auto refused = [&](dim3 grid, dim3 block, size_t shared) {
    CHECK_THROWS_AS(launch(unwritten_kernel, grid, block, shared, nullptr, out), MachineError);
  };
  refused(0, 32, 128), refused(1, 0, 128), refused(1, 1025, 128), refused(dim3(1, 65536), 32, 128),
      refused(1, 32, 228 << 10);
}
