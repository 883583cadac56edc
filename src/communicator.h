// Ranks working on one step together. Only communicator_*.cpp sees a transport library; training sees sums and
// decisions.
#pragma once

#include <memory>
#include <span>

#include "src/tensor.h"

namespace orpo {

struct Communicator {
  virtual ~Communicator() = default;
  virtual int rank() const = 0;  // 0 ... size - 1
  virtual int size() const = 0;
  // x = sum of x over all ranks, in place, the same bits on every rank. x: gradients, fp32.
  virtual void all_reduce(const Tensor& x) = 0;
  // The same for numbers in host memory.
  virtual void all_reduce(std::span<double> values) = 0;
  // Whether any rank says yes: skip, stop and clip decisions are collective.
  virtual bool any(bool here) = 0;
  virtual void barrier() = 0;
};

// One process: every sum is its own.
std::unique_ptr<Communicator> make_single_communicator();

}  // namespace orpo
