// Tensor cores: mma.m16n8k16 on bf16 with fp32 sums, and ldmatrix, by the fragment layouts of the PTX ISA ("Matrix
// fragments for mma.m16n8k16 with floating point type", "ldmatrix").
#pragma once

#include "cuda/emulator/engine.h"

namespace orpo {

namespace emulator {

struct Fragments {
  const uint32_t* a;  // [I][4]
  const uint32_t* b;  // [J][2]
};
void multiply_fragments(const Fragments& own, float* sums, int i, int j, const char* operation, Where where);
void load_matrices(uint32_t* const (&registers)[4], const void* row, bool transposed, Where where);

}  // namespace emulator

// c[16, 8] += a[16, 16] . b[16, 8], each lane holding its fragments.
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_WHERE) {
  emulator::multiply_fragments({a, b}, c, 1, 1, "mma", where);
}
// c[i][j] += a[i] . b[j]
template <int I, int J>
void mma_tile(float (&c)[I][J][4], const uint32_t (&a)[I][4], const uint32_t (&b)[J][2], EMULATOR_WHERE) {
  static_assert(I * J <= 32);
  emulator::multiply_fragments({a[0], b[0]}, c[0][0], I, J, "mma_tile", where);
}

// Four 8 x 8 matrices of bf16 in shared memory; lane l passes the address of row l % 8 of matrix l / 8.
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMULATOR_WHERE) {
  emulator::load_matrices({&r[0], &r[1], &r[2], &r[3]}, row, false, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, EMULATOR_WHERE) {
  emulator::load_matrices({&r[0], &r[1], &r[2], &r[3]}, row, true, where);
}
// The same as two pairs: two B fragments at once.
inline void ldmatrix_x4(uint32_t (&r)[2], uint32_t (&s)[2], const void* row, EMULATOR_WHERE) {
  emulator::load_matrices({&r[0], &r[1], &s[0], &s[1]}, row, false, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[2], uint32_t (&s)[2], const void* row, EMULATOR_WHERE) {
  emulator::load_matrices({&r[0], &r[1], &s[0], &s[1]}, row, true, where);
}

}  // namespace orpo
