#include "src/rng.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "data/sampler.h"

using namespace orpo;

TEST_CASE("philox gives the known answers of its authors' test vectors") {
  using Block = std::array<uint32_t, 4>;
  CHECK(philox({0, 0, 0, 0}, {0, 0}) == Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(philox({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}) == Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("seed, stream, substream and counter all matter") {
  const Random base(7, RandomStream::test, 1);
  CHECK(base.bits(5) == Random(7, RandomStream::test, 1).bits(5));
  CHECK(base.bits(5) != base.bits(6));
  CHECK(base.bits(5) != Random(8, RandomStream::test, 1).bits(5));
  CHECK(base.bits(5) != Random(7 + (uint64_t{1} << 32), RandomStream::test, 1).bits(5));
  CHECK(base.bits(5) != Random(7, RandomStream::order, 1).bits(5));
  CHECK(base.bits(5) != Random(7, RandomStream::test, 2).bits(5));
}

TEST_CASE("uniform, below and normal have their distributions' moments") {
  const Random random(1, RandomStream::test);
  const int n = 200000;
  double sum = 0, normal_sum = 0, normal_squares = 0;
  std::array<int, 7> counts{};
  for (int i = 0; i < n; ++i) {
    const double u = random.uniform(i), z = random.normal(i);
    REQUIRE((u >= 0 && u < 1));
    sum += u, normal_sum += z, normal_squares += z * z;
    ++counts[random.below(7, i)];
  }
  CHECK(sum / n == doctest::Approx(0.5).epsilon(0.005));
  CHECK(std::abs(normal_sum / n) < 0.01);
  CHECK(normal_squares / n == doctest::Approx(1).epsilon(0.02));
  for (const int count : counts) CHECK(count == doctest::Approx(n / 7.0).epsilon(0.03));
}

TEST_CASE("shuffle reaches every order equally often") {
  std::array<int, 6> counts{};
  for (uint64_t seed = 0; seed < 6000; ++seed) {
    std::array<int, 3> order = {0, 1, 2};
    Random(seed, RandomStream::test).shuffle(std::span<int>(order));
    ++counts[order[0] * 2 + (order[1] > order[2])];
  }
  for (const int count : counts) CHECK(count == doctest::Approx(1000).epsilon(0.12));
}

TEST_CASE("an epoch passes through all pairs once, in an order of its own") {
  Sampler sampler(10, 4, 42, true);
  CHECK(sampler.steps_per_epoch() == 3);
  CHECK(sampler.steps(1.5) == 5);
  std::vector<std::vector<int64_t>> epochs(2);
  for (int64_t step = 0; step < 6; ++step) {
    const auto batch = sampler.batch(step);
    CHECK(batch.size() == (step % 3 == 2 ? 2 : 4));
    epochs[step / 3].insert(epochs[step / 3].end(), batch.begin(), batch.end());
  }
  CHECK(epochs[0] != epochs[1]);
  for (auto& epoch : epochs) {
    std::vector<int64_t> all(10);
    std::iota(all.begin(), all.end(), int64_t{0});
    CHECK(epoch != all);
    std::sort(epoch.begin(), epoch.end());
    CHECK(epoch == all);
  }
}

TEST_CASE("a batch depends on seed and step alone") {
  Sampler straight(100, 8, 3, true), resumed(100, 8, 3, true), other(100, 8, 4, true);
  for (int64_t step = 0; step < 20; ++step) straight.batch(step);
  CHECK(straight.batch(20) == resumed.batch(20));
  CHECK(straight.batch(2) == resumed.batch(2));
  CHECK(straight.batch(2) != other.batch(2));
  Sampler in_order(5, 2, 3, false);
  CHECK(in_order.batch(1) == std::vector<int64_t>{2, 3});
  CHECK(in_order.batch(2) == std::vector<int64_t>{4});
  CHECK(in_order.batch(3) == std::vector<int64_t>{0, 1});
}
