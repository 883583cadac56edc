// Threads that wait for the others give their core away. libgomp's default is to spin, which on a machine that does
// anything else at the same time makes a step several times slower (tools/PERFORMANCE.md) and on a quiet one gains
// nothing that could be measured. libgomp reads its environment before main, so the program starts itself once more
// with the setting, unless the user has set one of its variables.
#pragma once

#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace orpo {

inline void wait_without_spinning(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") || std::getenv("GOMP_SPINCOUNT")) return;
  setenv("OMP_WAIT_POLICY", "passive", 1);
  execv("/proc/self/exe", argv);  // returns only where it failed: /proc is not mounted
  if (std::strchr(argv[0], '/')) execv(argv[0], argv);
}

}  // namespace orpo
