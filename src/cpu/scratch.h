// Working memory of a room: grows to the most that was asked for and stays, so that no step allocates.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace orpo::cpu {

class Scratch {
 public:
  // Room for count entries of A, 64-byte aligned; contents finite but otherwise undefined. Invalidates what was handed
  // out before.
  template <class A> A* reserve(size_t count) {
    const size_t bytes = (count * sizeof(A) + 63) / 64 * 64;
    if (bytes > bytes_ || sizeof(A) != entry_bytes_) {
      bytes_ = bytes > bytes_ ? bytes : bytes_;
      entry_bytes_ = sizeof(A);
      memory_.reset();
      memory_.reset(std::aligned_alloc(64, bytes_));
      if (!memory_) throw std::bad_alloc();
      std::memset(memory_.get(), 0, bytes_);
    }
    return static_cast<A*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t bytes_ = 0, entry_bytes_ = 0;
};

}  // namespace orpo::cpu
