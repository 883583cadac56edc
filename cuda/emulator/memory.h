// Shared memory, asynchronous copies and atomics as a kernel calls them.
#pragma once

#include <atomic>
#include <type_traits>

#include "cuda/emulator/engine.h"

// SHARED(float, name, [4][32]); every place in the source (and every instance of a template) is a variable of its own,
// told apart by the type of a lambda written there.
#define SHARED(T, name, dimensions) auto& name = ::orpo::emulator::shared_variable<T dimensions>([] {})
// DYN_SHARED(float, name); the launch says how much.
#define DYN_SHARED(T, name) T* name = static_cast<T*>(::orpo::emulator::dynamic_shared())

namespace orpo {

namespace emulator {

inline std::atomic<int> shared_variables{0};

template <class T, class Site> T& shared_variable(Site) {
  static const int site = shared_variables++;
  return *static_cast<T*>(engine->shared_variable(site, sizeof(T)));
}
inline void* dynamic_shared(EMULATOR_WHERE) { return engine->dynamic_shared(where); }

}  // namespace emulator

// 16 bytes from global to shared memory, both 16-byte aligned; only the first `bytes` are read, zeros follow.
inline void cp_async_16(void* to, const void* from, int bytes = 16, EMULATOR_WHERE) {
  emulator::engine->copy_async(to, from, bytes, where);
}
inline void cp_async_commit(EMULATOR_WHERE) { emulator::engine->commit_copies(where); }
template <int groups_left> void cp_async_wait() { emulator::engine->wait_for_copies(groups_left); }

}  // namespace orpo

template <class T> T atomicAdd(T* at, std::type_identity_t<T> value) {
  return std::atomic_ref<T>(*at).fetch_add(value, std::memory_order_relaxed);
}
template <class T> T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  std::atomic_ref<T>(*at).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}
