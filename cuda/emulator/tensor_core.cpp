#include "cuda/emulator/tensor_core.h"

#include "cuda/emulator/sanitizers.h"

namespace orpo::emulator {

namespace {

typedef float Row __attribute__((vector_size(32)));  // 8 columns
constexpr int most_tiles = 32;

struct Tiles {
  int i, j;
};

// Lane l: g = l / 4, t = l % 4 * 2.
//   a0 (row g, column t)  a1 (g + 8, t)  a2 (g, t + 8)  a3 (g + 8, t + 8), each with its right neighbour
//   b0 (row t, column g)  b1 (t + 8, g), each with the one below
//   c0 c1 (row g, columns t, t + 1)  c2 c3 (g + 8)
void unpack_a(float (&a)[16][16], const Collective& meeting, int i) {
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r) {
      const uint32_t pair = static_cast<const Fragments*>(meeting.in[l])->a[4 * i + r];
      float* at = &a[l / 4 + r % 2 * 8][l % 4 * 2 + r / 2 * 8];
      at[0] = low_half(pair), at[1] = high_half(pair);
    }
}

void unpack_b(Row (&b)[16], const Collective& meeting, int j) {
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 2; ++r) {
      const uint32_t pair = static_cast<const Fragments*>(meeting.in[l])->b[2 * j + r];
      const int row = l % 4 * 2 + r * 8;
      b[row][l / 4] = low_half(pair), b[row + 1][l / 4] = high_half(pair);
    }
}

template <class Body> void each_sum(const Collective& meeting, int tile, Row (&c)[16], Body&& body) {
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < 4; ++e) {
      const int row = l / 4 + e / 2 * 8, column = l % 4 * 2 + e % 2;
      body(c[row], column, static_cast<float*>(meeting.out[l])[4 * tile + e]);
    }
}

void multiply_all(const Collective& meeting, const void* context) {
  const Tiles& tiles = *static_cast<const Tiles*>(context);
  Row b[most_tiles][16];
  for (int j = 0; j < tiles.j; ++j) unpack_b(b[j], meeting, j);
  for (int i = 0; i < tiles.i; ++i) {
    float a[16][16];
    unpack_a(a, meeting, i);
    for (int j = 0; j < tiles.j; ++j) {
      Row c[16];
      each_sum(meeting, i * tiles.j + j, c, [](Row& row, int column, float sum) { row[column] = sum; });
      for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k) c[m] += a[m][k] * b[j][k];
      each_sum(meeting, i * tiles.j + j, c, [](const Row& row, int column, float& sum) { sum = row[column]; });
    }
  }
}

// Register m of lane l: of matrix m, row l / 4, columns l % 4 * 2 and the next; transposed: column and rows.
void load_all(const Collective& meeting, const void* context) {
  const bool transposed = *static_cast<const bool*>(context);
  for (int m = 0; m < 4; ++m) {
    const uint16_t* rows[8];
    for (int r = 0; r < 8; ++r) {
      rows[r] = static_cast<const uint16_t*>(meeting.in[m * 8 + r]);
      note_read(rows[r], 16);
    }
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4 * 2;
      const uint16_t first = transposed ? rows[t][g] : rows[g][t],
                     second = transposed ? rows[t + 1][g] : rows[g][t + 1];
      *static_cast<uint32_t* const*>(meeting.out[l])[m] = first | uint32_t{second} << 16;
    }
  }
}

}  // namespace

void multiply_fragments(const Fragments& own, float* sums, int i, int j, const char* operation, Where where) {
  const Tiles tiles{i, j};
  engine->collective(0xffffffffu, operation, where, &own, sums, multiply_all, &tiles);
}

void load_matrices(uint32_t* const (&registers)[4], const void* row, bool transposed, Where where) {
  if (reinterpret_cast<uintptr_t>(row) % 16) engine->fail(where, "ldmatrix: a row's address is not 16-byte aligned");
  if (!engine->in_shared_memory(row)) engine->fail(where, "ldmatrix: a row is not in shared memory");
  uint32_t* const* out = registers;
  engine->collective(0xffffffffu, transposed ? "ldmatrix.trans" : "ldmatrix", where, row, const_cast<uint32_t**>(out),
                     load_all, &transposed);
}

}  // namespace orpo::emulator
