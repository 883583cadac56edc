// What a backend's plugin, a shared library beside the programs, offers them: cuda/plugin.cu is the other side.
#pragma once

#include "src/backend.h"

namespace orpo {

struct Plugin {
  // First, so that it can be read whatever else has changed: program and plugin go together where the headers that both
  // were built from (backend.h and what it includes) are the same.
  char build[24];
  // The CUDA version whose runtime it carries, 1000 * major + 10 * minor; the driver's major must be no older. 0: none.
  int cuda_version;

  Backend* (*make_backend)();            // throws UserError where the GPU is none that it can use
  Backend* (*make_rehearsal_backend)();  // needs no GPU
};

// The plugin's one exported function: extern "C" const Plugin* orpo_plugin().
inline constexpr const char* plugin_entry = "orpo_plugin";
using PluginEntry = const Plugin* (*)();

// A sum over those headers, by the Makefile.
#ifdef ORPO_BUILD
inline constexpr char plugin_build[24] = ORPO_BUILD;
#endif

}  // namespace orpo
