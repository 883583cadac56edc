// What the stand-in of cuBLASLt computes, once it has accepted a call.
#pragma once

#include <cstdint>

namespace orpo::emulator {

// A column-major matrix: entry (i, j) at data[i + j * leading], fp32 or bf16; transposed: it stands for its transpose.
struct ColumnMajor {
  void* data;
  bool bf16;
  int64_t rows, columns, leading;
  bool transposed = false;
};

// The order in which an algorithm sums over k.
struct Summation {
  int64_t block;   // sums of so many terms are added up
  int64_t splits;  // k is cut into so many parts, each summed alone, added up at the end (split-K)
  bool in_place;   // the parts meet in D, rounded to its type each time, in whatever order they come
};

// d = alpha * a . b + beta * c + bias, in fp32; c is not read where beta is 0; bias, of d's type: one entry a row of d,
// or null.
struct ColumnMajorProduct {
  ColumnMajor a, b, c, d;
  float alpha, beta;
  const void* bias;
  Summation summation;
  void run() const;
};

}  // namespace orpo::emulator
