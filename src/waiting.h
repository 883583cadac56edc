// Threads that wait for the others spin for some 50 microseconds, then give their core away. libgomp's default is to
// spin for milliseconds, which on a machine that does anything else at the same time makes a step several times slower;
// not to spin at all costs 40 microseconds for each of the regions that a step has hundreds of, and more than the
// product itself when decoding (tools/PERFORMANCE.md). libgomp reads its environment before main, so the program starts
// itself once more with the setting, unless the user has set one of its variables.
#pragma once

#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace orpo {

inline void spin_briefly(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") || std::getenv("GOMP_SPINCOUNT")) return;
  setenv("GOMP_SPINCOUNT", "1000", 1);  // turns of about 50 ns
  char file[4096];  // the program's own path, so that it keeps its name in lists of processes
  const ssize_t length = readlink("/proc/self/exe", file, sizeof file - 1);
  if (length > 0) file[length] = 0, execv(file, argv);
  // Here only where that failed: /proc is not mounted.
  if (std::strchr(argv[0], '/')) execv(argv[0], argv);
}

}  // namespace orpo
