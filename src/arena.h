// Memory, planned before it is used: an arena is one allocation from which named tensors are taken in order. A counting
// arena hands out tensors without memory and adds up; the same code that runs on it once (the rehearsal) then runs on a
// real one of exactly that size.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "src/backend.h"
#include "src/tensor.h"

namespace orpo {

class Arena {
 public:
  static Arena counting(std::string name);
  Arena(std::string name, Backend& backend, int64_t bytes);  // throws MachineError when the device has no such memory
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&&) = delete;
  ~Arena();

  // A tensor of this shape, 64-byte aligned, contents undefined. Throws MachineError, naming what, when the arena is
  // full.
  Tensor allocate(std::string_view what, DType dtype, std::initializer_list<int64_t> shape);

  int64_t used() const { return used_; }              // bytes
  int64_t high_water() const { return high_water_; }  // the most that were ever in use

  // Scratch: everything allocated while a Scope lives is given back when it ends.
  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), mark_(arena.used_) {}
    ~Scope() { arena_.used_ = mark_; }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Arena& arena_;
    int64_t mark_;
  };

 private:
  explicit Arena(std::string name) : name_(std::move(name)) {}

  std::string name_;
  Backend* backend_ = nullptr;  // none: counting
  char* memory_ = nullptr;
  int64_t capacity_ = 0, used_ = 0, high_water_ = 0;
};

}  // namespace orpo
