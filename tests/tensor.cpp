// Views, bf16 rounding, the arena.
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "src/arena.h"
#include "src/tensor.h"

using namespace orpo;

TEST_CASE("tensor: bf16 rounds to nearest, ties to even, and keeps NaN and infinity") {
  const float one = 1, step = 0x1p-7f;  // bf16 has 7 fraction bits
  CHECK(static_cast<float>(bf16(one)) == one);
  CHECK(static_cast<float>(bf16(one + step * 0.51f)) == one + step);
  CHECK(static_cast<float>(bf16(one + step * 0.49f)) == one);
  CHECK(static_cast<float>(bf16(one + step * 0.5f)) == one);             // tie to even: down
  CHECK(static_cast<float>(bf16(one + step * 1.5f)) == one + 2 * step);  // tie to even: up
  CHECK(std::isnan(static_cast<float>(bf16(std::bit_cast<float>(0x7f800001u)))));
  CHECK(static_cast<float>(bf16(std::numeric_limits<float>::infinity())) == std::numeric_limits<float>::infinity());
  CHECK(static_cast<float>(bf16(std::numeric_limits<float>::max())) == std::numeric_limits<float>::infinity());
  CHECK(std::signbit(static_cast<float>(bf16(-0.0f))));
}

TEST_CASE("tensor: slices of matrices with a row pitch, and refusals") {
  float memory[24];
  Tensor t(memory, DType::f32, {4, 6});
  CHECK(t.slice(1, 2).as<float>() == memory + 6);
  t.shape[1] = 3, t.row_pitch = 6;
  CHECK(t.slice(1, 2).as<float>() == memory + 6);
  CHECK(t.slice(1, 2).pitch() == 6);
  CHECK_THROWS_WITH_AS(t.slice(3, 2), "slice [3, 5) of a tensor with 4 rows", MachineError);
  CHECK_THROWS_WITH_AS(t.as<bf16>(), "tensor of fp32 read as bf16", MachineError);
}

TEST_CASE("arena: what the rehearsal counts is what the run takes") {
  const auto backend = make_cpu_backend(1);
  const auto use = [](Arena& arena) {
    arena.allocate("kept", DType::f32, {3, 5});
    for (int i = 0; i < 3; ++i) {
      const Arena::Scope scope(arena);
      arena.allocate("scratch", DType::bf16, {i + 1, 100});
    }
    arena.allocate("last", DType::f64, {1});
  };
  Arena counting = Arena::counting("plan");
  use(counting);
  CHECK(counting.high_water() == 64 + 640);  // kept, and the largest scratch: 600 bytes in steps of 64
  CHECK(counting.used() == 64 + 64);
  Arena real("run", *backend, counting.high_water());
  use(real);
  CHECK(real.high_water() == counting.high_water());
  CHECK_THROWS_AS(real.allocate("too much", DType::f32, {1000}), MachineError);
}

TEST_CASE("cpu: fresh memory is zero, whatever stood there before") {
  const auto backend = make_cpu_backend(2);
  REQUIRE(backend->allocates_zeros());
  for (const int64_t bytes : {int64_t{1}, int64_t{1000}, int64_t{100'000}, (int64_t{4} << 20) + 1})
    for (int repeat = 0; repeat < 3; ++repeat) {
      auto* memory = static_cast<unsigned char*>(backend->allocate(bytes));
      CHECK(std::all_of(memory, memory + bytes, [](unsigned char byte) { return byte == 0; }));
      std::fill(memory, memory + bytes, static_cast<unsigned char>(255));
      backend->release(memory, bytes);
    }
}
