#include "data/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "src/fail.h"
#include "src/rng.h"

namespace orpo {

Sampler::Sampler(int64_t pairs, int64_t batch_pairs, uint64_t seed, bool shuffle)
    : pairs_(pairs), batch_pairs_(batch_pairs), seed_(seed), shuffle_(shuffle) {
  if (pairs < 1 || batch_pairs < 1) fail_machine("sampler: needs at least one pair and one pair a batch");
}

int64_t Sampler::steps(double epochs) const {
  return static_cast<int64_t>(std::ceil(epochs * static_cast<double>(steps_per_epoch())));
}

std::vector<int64_t> Sampler::batch(int64_t step) {
  if (step < 0) fail_machine("sampler: step ", step);
  const int64_t epoch = step / steps_per_epoch(), begin = step % steps_per_epoch() * batch_pairs_;
  if (epoch != epoch_) {
    order_.resize(pairs_);
    std::iota(order_.begin(), order_.end(), int64_t{0});
    if (shuffle_) Random(seed_, RandomStream::order, static_cast<uint32_t>(epoch)).shuffle(std::span(order_));
    epoch_ = epoch;
  }
  return {order_.begin() + begin, order_.begin() + std::min(begin + batch_pairs_, pairs_)};
}

double Sampler::epoch_at(int64_t step) const {
  return static_cast<double>(step) / static_cast<double>(steps_per_epoch());
}

}  // namespace orpo
