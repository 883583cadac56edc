// Barriers, shuffles, votes and the warp's sums and maxima as a kernel calls them.
#pragma once

#include "cuda/emulator/engine.h"

inline void __syncthreads(EMULATOR_WHERE) { orpo::emulator::engine->barrier(where); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, EMULATOR_WHERE) {
  orpo::emulator::engine->collective(mask, "__syncwarp", where, nullptr, nullptr, nullptr, nullptr);
}

namespace orpo::emulator {

// compute(meeting) once for the warp; in and out are the calling lane's operands.
template <class In, class Out, class Body>
inline void meet(uint32_t mask, const char* operation, Where where, const In* in, Out* out, const Body& body) {
  engine->collective(
      mask, operation, where, in, out,
      [](const Collective& meeting, const void* context) { (*static_cast<const Body*>(context))(meeting); }, &body);
}

template <class Body> inline void each_arrived(const Collective& meeting, Body&& body) {
  for (int i = 0; i < 32; ++i)
    if (meeting.arrived >> i & 1) body(i);
}

// source(lane, first lane of its group of `width`, operand) names the lane whose value is taken; outside the group: its
// own.
template <class T> struct Shuffled {
  T value;
  int operand;
};
template <class T, class Source>
inline T shuffle(uint32_t mask, T value, int operand, int width, const char* operation, Where where, Source source) {
  const Shuffled<T> in{value, operand};
  T result;
  meet(mask, operation, where, &in, &result, [&](const Collective& meeting) {
    each_arrived(meeting, [&](int i) {
      const auto* given = static_cast<const Shuffled<T>*>(meeting.in[i]);
      const int first = i / width * width;
      int from = source(i, first, given->operand);
      if (from < first || from >= first + width) from = i;
      if (!(meeting.arrived >> from & 1)) engine->fail(where, "%s: reads a lane outside the mask", operation);
      *static_cast<T*>(meeting.out[i]) = static_cast<const Shuffled<T>*>(meeting.in[from])->value;
    });
  });
  return result;
}

}  // namespace orpo::emulator

template <class T> T __shfl_sync(uint32_t mask, T value, int from, int width = 32, EMULATOR_WHERE) {
  return orpo::emulator::shuffle(mask, value, from, width, "__shfl_sync", where,
                                 [width](int, int first, int source) { return first + (source & (width - 1)); });
}
template <class T> T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, EMULATOR_WHERE) {
  return orpo::emulator::shuffle(mask, value, bits, width, "__shfl_xor_sync", where,
                                 [](int i, int, int x) { return i ^ x; });
}
template <class T> T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32, EMULATOR_WHERE) {
  return orpo::emulator::shuffle(mask, value, static_cast<int>(by), width, "__shfl_down_sync", where,
                                 [](int i, int, int d) { return i + d; });
}
template <class T> T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32, EMULATOR_WHERE) {
  return orpo::emulator::shuffle(mask, value, static_cast<int>(by), width, "__shfl_up_sync", where,
                                 [](int i, int, int d) { return i - d; });
}

inline uint32_t __ballot_sync(uint32_t mask, bool vote, EMULATOR_WHERE) {
  uint32_t result;
  orpo::emulator::meet(mask, "__ballot_sync", where, &vote, &result, [](const orpo::emulator::Collective& meeting) {
    uint32_t votes = 0;
    each_arrived(meeting, [&](int i) { votes |= uint32_t{*static_cast<const bool*>(meeting.in[i])} << i; });
    each_arrived(meeting, [&](int i) { *static_cast<uint32_t*>(meeting.out[i]) = votes; });
  });
  return result;
}
inline bool __any_sync(uint32_t mask, bool vote, EMULATOR_WHERE) { return __ballot_sync(mask, vote, where) != 0; }
inline bool __all_sync(uint32_t mask, bool vote, EMULATOR_WHERE) { return __ballot_sync(mask, vote, where) == mask; }
// Which lanes passed the same value.
inline uint32_t __match_any_sync(uint32_t mask, unsigned value, EMULATOR_WHERE) {
  uint32_t result;
  orpo::emulator::meet(mask, "__match_any_sync", where, &value, &result, [](const orpo::emulator::Collective& meeting) {
    const auto given = [&](int i) { return *static_cast<const unsigned*>(meeting.in[i]); };
    each_arrived(meeting, [&](int i) {
      uint32_t same = 0;
      each_arrived(meeting, [&](int j) { same |= uint32_t{given(j) == given(i)} << j; });
      *static_cast<uint32_t*>(meeting.out[i]) = same;
    });
  });
  return result;
}
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

namespace orpo {

namespace emulator {

// A butterfly of shuffles as one meeting, steps in the device's order, so with the same bits.
template <class T, class Op>
inline T butterfly(T value, const char* operation, Where where, std::initializer_list<int> steps, Op op) {
  T result;
  meet(0xffffffffu, operation, where, &value, &result, [&](const Collective& meeting) {
    T a[32], b[32];
    for (int i = 0; i < 32; ++i) a[i] = *static_cast<const T*>(meeting.in[i]);
    for (int step : steps) {
      for (int i = 0; i < 32; ++i) b[i] = op(a[i], a[i ^ step]);
      std::copy(b, b + 32, a);
    }
    for (int i = 0; i < 32; ++i) *static_cast<T*>(meeting.out[i]) = a[i];
  });
  return result;
}

}  // namespace emulator

template <class T> T warp_sum(T value, EMULATOR_WHERE) {
  return emulator::butterfly(value, "warp_sum", where, {16, 8, 4, 2, 1}, [](T a, T b) { return a + b; });
}
inline float warp_max(float value, EMULATOR_WHERE) {
  return emulator::butterfly(value, "warp_max", where, {16, 8, 4, 2, 1}, [](float a, float b) { return fmaxf(a, b); });
}
// Over the four lanes that share a row of an mma accumulator.
inline float quad_sum(float value, EMULATOR_WHERE) {
  return emulator::butterfly(value, "quad_sum", where, {1, 2}, [](float a, float b) { return a + b; });
}
inline float quad_max(float value, EMULATOR_WHERE) {
  return emulator::butterfly(value, "quad_max", where, {1, 2}, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace orpo
