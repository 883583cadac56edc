// Masters as bf16 weight and correction: every float comes back, and AdamW's vectors split as the scalars do.
#include "src/master.h"

#include <cstring>

#include "src/stored_values.h"
#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

uint32_t bits(float value) { return std::bit_cast<uint32_t>(value); }
float from_bits(uint32_t value) { return std::bit_cast<float>(value); }

// Halfway between two bf16 numbers, the lower of which is even: the one kind of float that moves.
bool moves(uint32_t u) { return (u & 0x1ffffu) == 0x8000u && (u & 0x7fffffffu) < 0x7f800000u; }

// The low halves at which something turns, and one in between that differs from upper half to upper half.
std::vector<float> awkward_floats() {
  std::vector<float> all;
  for (uint32_t high = 0; high < 0x10000u; ++high)
    for (const uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu, (high * 40503u & 0xffffu) | 1})
      all.push_back(from_bits(high << 16 | low));
  return all;
}

// One tensor's state on a device; bf16 weights with corrections where dtype says so.
struct State {
  State(Backend& backend, DType dtype, const std::vector<float>& masters)
      : n(static_cast<int64_t>(masters.size())),
        backend(backend),
        weight(backend, dtype, {n}),
        correction(backend, DType::i16, {n}),
        first(backend, DType::f32, {n}),
        second(backend, DType::f32, {n}),
        gradient(backend, DType::f32, {n}),
        split(dtype == DType::bf16) {
    set(masters);
  }
  void set(const std::vector<float>& masters) {
    upload_values({weight, split ? *correction : Tensor()}, masters, backend);
  }
  void update(const AdamW& settings) {
    const AdamWTensors one{weight, split ? *correction : Tensor(), first, second, gradient, true};
    backend.adamw({&one, 1}, settings);
  }
  std::vector<SplitMaster> parts() const {
    std::vector<bf16> weights(n);
    std::vector<int16_t> corrections(n);
    backend.download(weights.data(), weight);
    backend.download(corrections.data(), correction);
    std::vector<SplitMaster> all;
    for (int64_t i = 0; i < n; ++i) all.push_back({weights[i], corrections[i]});
    return all;
  }
  std::vector<float> masters() const {
    std::vector<float> all;
    if (split)
      for (const SplitMaster& part : parts()) all.push_back(join_master(part));
    else
      all.resize(n), backend.download(all.data(), weight);
    return all;
  }

  int64_t n;
  Backend& backend;
  DeviceTensor weight, correction, first, second, gradient;
  bool split;
};

// As masters that went through a split: halfway cases moved.
std::vector<float> through_split(std::vector<float> masters) {
  for (float& m : masters) m = join_master(split_master(m));
  return masters;
}

int64_t different(const std::vector<float>& a, const std::vector<float>& b) {
  int64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += bits(a[i]) != bits(b[i]) && !(std::isnan(a[i]) && std::isnan(b[i]));
  return count;
}

}  // namespace

TEST_CASE("master: every float comes back from its weight and correction, halfway cases a place nearer to zero") {
  int64_t moved = 0, wrong = 0;
  for (const float master : awkward_floats()) {
    const SplitMaster split = split_master(master);
    const uint32_t u = bits(master), back = bits(join_master(split));
    const bool right = std::isnan(master) ? std::isnan(from_bits(back)) && std::isnan(float(split.weight))
                                          : back == (moves(u) ? u - 1 : u);
    wrong += !right || split.weight.bits != bf16(master).bits;
    moved += moves(u);
    wrong += !std::isnan(master) && bf16(from_bits(back)).bits != split.weight.bits;
  }
  CHECK(wrong == 0);
  CHECK(moved == 2 * 255 * 64);  // signs x exponents x even upper halves of an exponent
}

TEST_CASE("adamw: masters in two parts are updated as fp32 ones are, special values and halfway results among them") {
  const auto backend = make_cpu_backend(2);
  const std::vector<float> start = through_split(awkward_floats());
  State split(*backend, DType::bf16, start), plain(*backend, DType::f32, start);
  REQUIRE(different(split.masters(), start) == 0);
  const Values gradients = rounded(random_values(split.n, 5), DType::f32);
  split.gradient.set(gradients), plain.gradient.set(gradients);
  const AdamW settings{0.01, 0.9, 0.999, 1e-8, 0.1, 1, 0.5};
  split.update(settings), plain.update(settings);
  CHECK(different(split.masters(), through_split(plain.masters())) == 0);
  CHECK(different(split.masters(), start) > split.n / 2);
  for (const SplitMaster& part : split.parts())
    if (const float m = join_master(part); !std::isnan(m)) REQUIRE(part.weight.bits == bf16(m).bits);

  // Masters that a decay of a quarter takes exactly halfway: t = 2^23 + k 2^17 + 2^15 from 4/3 t.
  std::vector<float> to_halfway, halfway;
  for (uint32_t k = 0; k < 32; ++k)
    for (const float sign : {1.f, -1.f})
      if (const uint32_t t = (1u << 23) + (k << 17) + 0x8000u; t % 3 == 0) {
        to_halfway.push_back(sign * static_cast<float>(t / 3 * 4));
        halfway.push_back(sign * static_cast<float>(t));
      }
  REQUIRE(halfway.size() > 10);
  State decayed(*backend, DType::bf16, to_halfway);
  decayed.update({1, 0.9, 0.999, 1e-8, 0.25, 1, 1});
  for (size_t i = 0; i < halfway.size(); ++i) {
    REQUIRE(moves(bits(halfway[i])));
    CHECK(bits(decayed.masters()[i]) == bits(halfway[i]) - 1);
  }
}

TEST_CASE("adamw: thousands of steps on masters in two parts are those of plain fp32 masters") {
  constexpr int64_t n = 1003, steps = 4000;
  const auto backend = make_cpu_backend(2);
  std::vector<float> start;
  for (const double v : random_values(n, 1)) start.push_back(static_cast<float>(v));
  start = through_split(start);
  // followed: fp32 masters that move where the two parts cannot hold them. plain: untouched fp32 training.
  State split(*backend, DType::bf16, start), followed(*backend, DType::f32, start), plain(*backend, DType::f32, start);
  int64_t moved = 0;
  for (int64_t step = 1; step <= steps; ++step) {
    const Values g = rounded(random_values(n, 100 + step, -1.0 + 0.3 * std::sin(0.01 * step), 1), DType::f32);
    const AdamW settings{1e-3, 0.9, 0.999, 1e-8, 0.01, step, 0.37};
    for (State* s : {&split, &followed, &plain}) s->gradient.set(g), s->update(settings);
    const std::vector<float> before = followed.masters(), after = through_split(before);
    moved += different(before, after);
    followed.set(after);
    REQUIRE(different(split.masters(), after) == 0);
  }
  CHECK(moved > 5);  // 4 million updates, one in 2^17 halfway and down
  CHECK(split.first.values() == plain.first.values());
  CHECK(split.second.values() == plain.second.values());
  const std::vector<float> a = split.masters(), b = plain.masters();
  CHECK(different(a, b) < n / 10);
  for (int64_t i = 0; i < n; ++i) CHECK(std::abs(a[i] - b[i]) <= 4 * 0x1p-24f * std::max(1.f, std::abs(b[i])));
  CHECK(different(a, start) == n);
}
