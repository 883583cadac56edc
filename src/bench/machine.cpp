#include "src/bench/machine.h"

#include <omp.h>

#include <dnnl.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <numeric>
#include <vector>

#include "src/arena.h"
#include "src/console.h"
#include "src/metrics.h"

namespace orpo::bench {
namespace {

// Seconds of the fastest run, after one that warms up; stops repeating after a while.
template <class Run>
double best_seconds(Run&& run, int repetitions, double enough) {
  run();
  double best = 1e30, spent = 0;
  for (int i = 0; i < repetitions && spent < enough; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::min(best, seconds);
    spent += seconds;
  }
  return best;
}

struct Bandwidth {
  double triad, read;  // bytes a second: a = b + s c, and the sum of an array
};

Bandwidth measure_bandwidth(int threads, bool quick) {
  const int64_t n = (quick ? 4 : 64) << 20, block = 1 << 12, blocks = n / block;
  std::vector<float> a(n), b(n), c(n);
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; ++i) a[i] = 0, b[i] = 1, c[i] = 2;
  const double triad = best_seconds(
      [&] {
#pragma omp parallel for simd num_threads(threads)
        for (int64_t i = 0; i < n; ++i) a[i] = b[i] + 3 * c[i];
      },
      5, 2);
  const double read = best_seconds(
      [&] {
#pragma omp parallel for num_threads(threads)
        for (int64_t i = 0; i < blocks; ++i) {
          float sums[64] = {};  // enough side by side to wait for memory alone
          for (const float* p = &b[i * block]; p < &b[i * block] + block; p += 64)
            for (int l = 0; l < 64; ++l) sums[l] += p[l];
          a[i] = std::accumulate(sums, sums + 64, 0.f);  // or the compiler leaves the loop out
        }
      },
      5, 1);
  const double bytes = static_cast<double>(n) * sizeof(float);
  return {3 * bytes / triad, bytes / read};
}

std::string processor_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  return "unknown processor";
}

std::string instruction_set() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) return "avx512_bf16";
  if (__builtin_cpu_supports("avx512f")) return "avx512f";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "generic";
}

// FLOP/s of oneDNN's own 2048^3 product, matrices as they lie: a bound that owes nothing to this program.
double library_rate(DType dtype, bool quick) {
  // Without the instructions the library's bf16 is its reference, which takes minutes.
  if (dtype == DType::bf16 && instruction_set() != "avx512_bf16") return 0;
  using Memory = dnnl::memory;
  constexpr int64_t n = 2048;
  const auto type = dtype == DType::bf16 ? Memory::data_type::bf16 : Memory::data_type::f32;
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  double best = 0;
  for (const bool transposed : {false, true}) {
    const Memory::desc rows({n, n}, type, Memory::dims{n, 1});
    const Memory::desc weight({n, n}, type, transposed ? Memory::dims{1, n} : Memory::dims{n, 1});
    Memory in(rows, engine), weights(weight, engine), out(rows, engine);
    for (const Memory& m : {in, weights}) std::memset(m.get_data_handle(), 0, m.get_desc().get_size());
    const dnnl::matmul product(dnnl::matmul::primitive_desc(dnnl::matmul::desc(rows, weight, rows), engine));
    const double seconds = best_seconds(
        [&] {
          product.execute(stream, {{DNNL_ARG_SRC, in}, {DNNL_ARG_WEIGHTS, weights}, {DNNL_ARG_DST, out}});
          stream.wait();
        },
        quick ? 2 : 10, 0.5);
    best = std::max(best, 2.0 * n * n * n / seconds);
  }
  return best;
}

ProductShape shape_of(const Json& p) {
  const auto flag = [&](const char* name) { return p.at(name).get<bool>(); };
  const auto size = [&](const char* name) { return p.at(name).get<int64_t>(); };
  return {flag("backward"), flag("din"), flag("dweight"), size("rows"), size("n"), size("k"), flag("accumulation_out"),
          size("pitch"), flag("head")};
}

double seconds_alone(Backend& backend, DType dtype, const ProductShape& s) {
  const DType sums = accumulation_dtype(dtype), out_dtype = s.accumulation_out ? sums : dtype;
  const int64_t bytes = (s.rows * s.k * 2 + s.n * s.k) * dtype_bytes(dtype) + s.n * s.k * dtype_bytes(sums) +
                        s.rows * s.pitch * dtype_bytes(out_dtype) + 5 * 64;
  Arena memory("products", backend, bytes);
  const Tensor in = memory.allocate("in", dtype, {s.rows, s.k}), din = memory.allocate("din", dtype, {s.rows, s.k}),
               weight = memory.allocate("weight", dtype, {s.n, s.k}),
               dweight = memory.allocate("dweight", sums, {s.n, s.k}),
               wide = memory.allocate("out", out_dtype, {s.rows, s.pitch});
  for (const Tensor& t : {in, din, weight, dweight, wide}) backend.zero(t);
  Tensor out = wide;
  out.shape[1] = s.n, out.row_pitch = s.pitch;
  return best_seconds(
      [&] {
        if (s.backward)
          backend.linear_backward(s.din ? din : Tensor(), s.dweight ? dweight : Tensor(), {}, out, in, weight);
        else
          backend.linear_forward(out, in, weight, {});
        backend.synchronize();
      },
      50, 0.15);
}

}  // namespace

Machine measure_machine(Backend& backend, int threads, bool quick) {
  Machine m;
  m.processor = processor_name();
  m.instructions = instruction_set();
  m.threads = threads > 0 ? threads : omp_get_num_procs();
  const Bandwidth bandwidth = measure_bandwidth(m.threads, quick);
  m.bandwidth = bandwidth.triad, m.read_bandwidth = bandwidth.read;
  m.bf16_rate = std::max(measure_gemm_rate(backend, DType::bf16), library_rate(DType::bf16, quick));
  m.fp32_rate = std::max(measure_gemm_rate(backend, DType::f32), library_rate(DType::f32, quick));
  return m;
}

Json machine_json(const Machine& m) {
  return {{"processor", m.processor},
          {"instructions", m.instructions},
          {"threads", m.threads},
          {"bandwidth", m.bandwidth},
          {"read_bandwidth", m.read_bandwidth},
          {"gemm_rate", {{"bf16", m.bf16_rate}, {"fp32", m.fp32_rate}}}};
}

std::string machine_text(const Machine& m) {
  return concat("machine: ", m.processor, ", ", m.threads, m.threads == 1 ? " thread, " : " threads, ", m.instructions,
                "; memory ", number_text(m.bandwidth / 1e9, 1), " GB/s, reading alone ",
                number_text(m.read_bandwidth / 1e9, 1), "; 2048^3 products ", number_text(m.bf16_rate / 1e9, 0),
                " GFLOP/s bf16, ", number_text(m.fp32_rate / 1e9, 0), " fp32\n");
}

ProductsAlone products_alone(Backend& backend, DType dtype, const Json& products, bool of_head) {
  ProductsAlone sum;
  for (const Json& p : products) {
    const ProductShape shape = shape_of(p);
    if (shape.head != of_head) continue;
    const double calls = p.at("calls").get<double>();
    sum.add({p.at("seconds").get<double>(), calls * seconds_alone(backend, dtype, shape), p.at("flops").get<double>()});
  }
  return sum;
}

}  // namespace orpo::bench
