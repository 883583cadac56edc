// Where to compute: what --device chooses, and the plugin behind it.
#pragma once

#include <memory>
#include <string>

#include "src/backend.h"
#include "src/config.h"

namespace orpo {

struct Plugin;

class Device {
 public:
  // auto takes a GPU where there is one, else the CPU: silently where no GPU is to be seen, with a line on stderr where
  // one is and cannot be used. CPU start-up loads no CUDA library: a GPU is looked for by its driver alone. Throws
  // UserError where the plugin of an explicit choice is missing; planning needs no more than it.
  static const Device& open(DeviceChoice choice);

  bool is_gpu() const { return plugin_ != nullptr; }
  // Throws UserError, naming what is missing and what to do, where driver or GPU cannot be used.
  std::unique_ptr<Backend> make_backend(int threads) const;
  // Goes through the motions on tensors without memory; needs no GPU.
  std::unique_ptr<Backend> make_rehearsal_backend() const;

 private:
  explicit Device(const Plugin* plugin) : plugin_(plugin) {}
  const Plugin* plugin_;  // none: the CPU, which is built in
};

}  // namespace orpo
