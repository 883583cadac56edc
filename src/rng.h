// Counter-based random numbers: a value is a pure function of (seed, stream, counter), so nothing has to be saved to
// resume a run, and any number of threads or ranks may draw the same sequence in any order. Philox4x32-10 of Salmon,
// Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the same bits on every machine.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <span>
#include <utility>

namespace orpo {

// Who draws: sequences of different streams are independent of each other under one seed.
enum class RandomStream : uint32_t { weights = 1, order = 2, test = 4, benchmark = 5, sampling = 6 };

// One Philox block: 128 bits of counter and 64 bits of key to 128 random bits.
constexpr std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0], b = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
  }
  return counter;
}

// The random numbers of one (seed, stream, substream); a substream is what the caller numbers: an epoch, a tensor, a
// prompt.
class Random {
 public:
  constexpr Random(uint64_t seed, RandomStream stream, uint32_t substream = 0)
      : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
        stream_(static_cast<uint32_t>(stream)), substream_(substream) {}

  // 64 random bits.
  constexpr uint64_t bits(uint64_t counter) const {
    const auto r = block(counter);
    return uint64_t{r[1]} << 32 | r[0];
  }

  // Uniform on [0, 1), a multiple of 2^-53.
  constexpr double uniform(uint64_t counter) const { return static_cast<double>(bits(counter) >> 11) * 0x1p-53; }

  // Uniform on 0 ... n - 1 for n >= 1, by the high half of a product (Lemire 2019); off by at most n / 2^64, which
  // nothing here can see.
  constexpr uint64_t below(uint64_t n, uint64_t counter) const {
    __extension__ using Wide = unsigned __int128;
    return static_cast<uint64_t>(static_cast<Wide>(bits(counter)) * n >> 64);
  }

  // Standard normal (Box and Muller); the two uniforms of a counter are 64 random bits each, the first kept above 0.
  double normal(uint64_t counter) const {
    const auto r = block(counter);
    const double u = static_cast<double>(((uint64_t{r[1]} << 32 | r[0]) >> 11) + 1) * 0x1p-53;
    const double v = static_cast<double>((uint64_t{r[3]} << 32 | r[2]) >> 11) * 0x1p-53;
    return std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v);
  }

  // Fisher and Yates: every order equally likely; counters 1 ... size - 1 are used.
  template <class T>
  constexpr void shuffle(std::span<T> values) const {
    for (uint64_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[below(i, i - 1)]);
  }

 private:
  constexpr std::array<uint32_t, 4> block(uint64_t counter) const {
    return philox({static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), stream_, substream_}, key_);
  }

  std::array<uint32_t, 2> key_;
  uint32_t stream_, substream_;
};

}  // namespace orpo
