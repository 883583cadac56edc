// Where threads run. A scheduler that finds two threads of a team on one core can leave them there for seconds, each
// sleeping while the other works, and the second core idle.
#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <vector>

namespace orpo::cpu {

// Threads that share a core with another of the team move to one that has none. Nothing stays fixed: the scheduler
// may move them on, and what the user said about cores holds.
inline void spread_threads() {
  std::vector<int> cores(static_cast<size_t>(omp_get_max_threads()), -1), moves = cores;
#pragma omp parallel
  cores[static_cast<size_t>(omp_get_thread_num())] = sched_getcpu();

  cpu_set_t taken, shared;
  CPU_ZERO(&taken);
  CPU_ZERO(&shared);
  bool moved = false;
  for (const int core : cores)
    if (core >= 0 && core < CPU_SETSIZE) CPU_SET(core, &taken);
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  for (size_t t = 0, next = 0; t < cores.size(); ++t) {
    if (cores[t] < 0 || cores[t] >= CPU_SETSIZE) return;
    if (!CPU_ISSET(cores[t], &shared)) {
      CPU_SET(cores[t], &shared);
      continue;
    }
    while (next < CPU_SETSIZE && (!CPU_ISSET(next, &allowed) || CPU_ISSET(next, &taken))) ++next;
    if (next == CPU_SETSIZE) break;  // more threads than cores
    moves[t] = static_cast<int>(next++), moved = true;
  }
  if (!moved) return;
#pragma omp parallel
  {
    const int core = moves[static_cast<size_t>(omp_get_thread_num())];
    cpu_set_t own, one;
    CPU_ZERO(&one);
    if (core >= 0 && sched_getaffinity(0, sizeof own, &own) == 0 && CPU_ISSET(core, &own)) {
      CPU_SET(core, &one);
      if (sched_setaffinity(0, sizeof one, &one) == 0) sched_setaffinity(0, sizeof own, &own);
    }
  }
}

}  // namespace orpo::cpu
