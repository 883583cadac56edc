// Where a step's time goes: seconds, FLOPs and bytes by operation, which TimedBackend (timed_backend.h) adds up around
// whatever backend computes. What lies between two operations is the host's: data where a batch is handed over next. So
// the parts of a step add up to the whole of it.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>

#include "src/json.h"

namespace orpo {

// Operations as a reader groups them. head: what is done to logits; the products that make and return them are
// head_products. host: everything outside the backend but data.
enum class Part {
  layer_products, head_products, attention, norm, rope, activation, head, embedding, optimizer, data, host
};
inline constexpr int profile_parts = 11;
const char* part_name(Part part);  // "products of the layers"

// A product as Backend::linear_forward or linear_backward was asked for it.
struct ProductShape {
  bool backward;
  bool din, dweight;      // linear_backward was asked for it
  int64_t rows, n, k;     // out[rows, n] = in[rows, k] . weight[n, k]^T
  bool accumulation_out;  // forward: out in the accumulation dtype
  int64_t pitch;          // of out or dout, entries
  bool head;              // the output matrix
  auto operator<=>(const ProductShape&) const = default;
};

struct Amount {
  double seconds = 0, flops = 0, bytes = 0;  // bytes: of a tensor each time it is read or written
  int64_t calls = 0;
  void add(double s, double f, double b) { seconds += s, flops += f, bytes += b, calls += 1; }
};

struct StepProfile {
  Amount amounts[profile_parts];
  std::map<ProductShape, Amount> products;  // the two kinds of products again, by shape
  double seconds = 0;                       // of the step: all parts together
  double tokens = 0, pairs = 0, flops = 0;  // what it worked on; useful FLOPs, as mfu counts them
  const Amount& operator[](Part part) const { return amounts[static_cast<int>(part)]; }
};

class Profile {
 public:
  using Clock = std::chrono::steady_clock;

  // A step begins now; what was added since the last one ended is forgotten.
  void begin_step();
  // An operation ran from `start` to now; the host's time since the operation before it counts as `before`.
  void add(Part part, Clock::time_point start, double flops, double bytes, Part before = Part::host);
  void add(const ProductShape& product, Clock::time_point start, double flops, double bytes);
  void end_step(double tokens, double pairs, double flops);

  // The fastest step, by useful FLOP/s. The first one builds what the later ones find ready: it counts only where it is
  // alone.
  const StepProfile& fastest() const { return fastest_; }
  int64_t steps() const { return steps_; }

 private:
  StepProfile current_, fastest_;
  Clock::time_point last_ = Clock::now();
  int64_t steps_ = 0;
};

// What --profile prints. gemm_rate: the machine's 2048^3 rate, FLOP/s.
std::string profile_table(const StepProfile& step, double gemm_rate);
Json profile_json(const StepProfile& step);

}  // namespace orpo
