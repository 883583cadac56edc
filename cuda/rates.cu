// What GPUs can compute, as NVIDIA publishes it: the rate that mfu is against.
#include <string_view>

#include "cuda/gpu.cuh"

namespace orpo {

namespace {

// Dense rates in TFLOP/s of matrix products with fp32 sums: bf16 on tensor cores, and fp32 outside of them (parity mode
// takes no TF32). Sources: NVIDIA's data sheets of these GPUs, sparse rates halved; for GeForce and RTX boards the
// architecture papers of Ampere GA102 and Ada. The first name of the list that the device's name holds counts.
struct Published {
  std::string_view name;
  double bf16, fp32;
};
constexpr Published published[] = {
    {"H200", 989.4, 66.9},  {"H100 PCIe", 756.0, 51.2}, {"H100 NVL", 835.5, 60.3}, {"H100", 989.4, 66.9},
    {"A100", 312.0, 19.5},  {"A800", 312.0, 19.5},      {"A30", 165.0, 10.3},      {"A10", 125.0, 31.2},
    {"L40S", 362.0, 91.6},  {"L40", 181.0, 90.5},       {"L4", 121.0, 30.3},       {"RTX 4090", 165.2, 82.6},
    {"RTX 3090", 71, 35.6}, {"RTX A6000", 154.8, 38.7}, {"emulated GPU", 1, 1},  // which has none: mfu needs something
                                                                                 // to be against
};

// "A10" is in "NVIDIA A10" and not in "NVIDIA A10G".
bool holds_word(std::string_view text, std::string_view word) {
  const size_t at = text.find(word), end = at + word.size();
  return at != text.npos && (end == text.size() || !std::isalnum(static_cast<unsigned char>(text[end])));
}

}  // namespace

double CudaBackend::published_rate(DType dtype) const {
  if (rehearses(compute_)) return 0;
  for (const Published& p : published)
    if (holds_word(device_name_, p.name)) return 1e12 * (dtype == DType::bf16 ? p.bf16 : p.fp32);
  return 0;
}

}  // namespace orpo
