#include "src/communicator.h"

namespace orpo {
namespace {

struct SingleCommunicator final : Communicator {
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void all_reduce(const Tensor&) override {}
  void all_reduce(std::span<double>) override {}
  bool any(bool here) override { return here; }
  void barrier() override {}
};

}  // namespace

std::unique_ptr<Communicator> make_single_communicator() { return std::make_unique<SingleCommunicator>(); }

}  // namespace orpo
