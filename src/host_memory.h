// The host's memory, in bytes.
#pragma once

#include <cstdint>

namespace orpo {

// What this machine can give a new process now: free memory, or what is left of a container's limit.
int64_t available_memory();

// The most that this process ever held.
int64_t peak_resident_bytes();

}  // namespace orpo
