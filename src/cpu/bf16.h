// Whether this machine computes in bf16.
#pragma once

namespace orpo::cpu {

// oneDNN multiplies bf16 here: the CPU has avx512_bf16 and ONEDNN_MAX_CPU_ISA does not forbid it. Elsewhere the linear
// room widens bf16 to fp32 first, which takes longer than fp32 does.
bool multiplies_bf16();

}  // namespace orpo::cpu
