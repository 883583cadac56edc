// Which pairs a step trains on: a pure function of the seed and the step, so a run resumes from the step's number alone
// and every rank, in a world of any size, knows the same global batch.
#pragma once

#include <cstdint>
#include <vector>

namespace orpo {

// Epochs pass through all pairs, shuffled anew each time (Fisher-Yates on the seed and the epoch) or in file order. A
// batch does not cross an epoch's end: the last one of an epoch is smaller where the pairs do not divide, as with
// transformers' Trainer (drop_last false).
class Sampler {
 public:
  // pairs >= 1, batch_pairs >= 1 (pairs of a whole optimiser step, all ranks).
  Sampler(int64_t pairs, int64_t batch_pairs, uint64_t seed, bool shuffle);

  int64_t steps_per_epoch() const { return (pairs_ + batch_pairs_ - 1) / batch_pairs_; }
  // Steps of `epochs` epochs, a part of one rounded up.
  int64_t steps(double epochs) const;
  // Indices of the pairs of a step, counted from 0 over the whole run. Not thread-safe: the current epoch's order is
  // kept.
  std::vector<int64_t> batch(int64_t step);
  // Epochs done before a step, with the fraction of the current one: the logs' `epoch`.
  double epoch_at(int64_t step) const;

 private:
  int64_t pairs_, batch_pairs_;
  uint64_t seed_;
  bool shuffle_;
  int64_t epoch_ = -1;          // whose order is in order_
  std::vector<int64_t> order_;  // [pairs]
};

}  // namespace orpo
