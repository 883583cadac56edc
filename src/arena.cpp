#include "src/arena.h"

#include <algorithm>
#include <utility>

namespace orpo {
namespace {

constexpr int64_t alignment = 64;

int64_t aligned(int64_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

}  // namespace

Arena Arena::counting(std::string name) { return Arena(std::move(name)); }

Arena::Arena(std::string name, Backend& backend, int64_t bytes)
    : name_(std::move(name)), backend_(&backend), capacity_(aligned(bytes)) {
  memory_ = static_cast<char*>(backend.allocate(capacity_));
}

Arena::Arena(Arena&& other) noexcept
    : name_(std::move(other.name_)),
      backend_(std::exchange(other.backend_, nullptr)),
      memory_(std::exchange(other.memory_, nullptr)),
      capacity_(std::exchange(other.capacity_, 0)),
      used_(other.used_),
      high_water_(other.high_water_) {}

Arena::~Arena() {
  if (memory_) backend_->release(memory_, capacity_);
}

Tensor Arena::allocate(std::string_view what, DType dtype, std::initializer_list<int64_t> shape) {
  Tensor t(nullptr, dtype, shape);
  const int64_t bytes = aligned(t.bytes());
  if (backend_) {
    if (used_ + bytes > capacity_)
      fail_machine("arena '", name_, "' is full: ", what, " needs ", bytes, " bytes, ", capacity_ - used_, " of ",
                   capacity_, " are left");
    t.data = memory_ + used_;
  }
  used_ += bytes;
  high_water_ = std::max(high_water_, used_);
  return t;
}

}  // namespace orpo
