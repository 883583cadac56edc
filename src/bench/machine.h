// What the machine can do: the bounds that a step is measured against.
#pragma once

#include <string>

#include "src/backend.h"
#include "src/json.h"
#include "src/profile.h"

namespace orpo::bench {

struct Machine {
  std::string processor;     // as the kernel names it
  std::string instructions;  // the widest set that products use
  int threads = 0;
  double bandwidth = 0;                  // bytes a second, all threads: a = b + s c over arrays beyond every cache
  double read_bandwidth = 0;             // the same for the sum of such an array
  double bf16_rate = 0, fp32_rate = 0;   // FLOP/s of the 2048^3 product: the best of ours and oneDNN's own
  double gemm_rate(DType dtype) const { return dtype == DType::bf16 ? bf16_rate : fp32_rate; }
};

// Takes about two seconds. quick: smaller arrays, fewer repetitions.
Machine measure_machine(Backend& backend, int threads, bool quick);
Json machine_json(const Machine& machine);
std::string machine_text(const Machine& machine);  // a line for the page

// A step's products, timed alone: each shape by itself, its memory at rest.
struct ProductsAlone {
  double in_step = 0, alone = 0, flops = 0;  // seconds within the step, seconds alone, FLOPs
  void add(const ProductsAlone& o) { in_step += o.in_step, alone += o.alone, flops += o.flops; }
};
// products: profile.json's list.
ProductsAlone products_alone(Backend& backend, DType dtype, const Json& products, bool of_head);

}  // namespace orpo::bench
