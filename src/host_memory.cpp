#include "src/host_memory.h"

#include <sys/resource.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>

namespace orpo {

namespace fs = std::filesystem;

int64_t available_memory() {
  int64_t available = INT64_MAX;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string name, unit; meminfo >> name;) {
    int64_t kilobytes = 0;
    if (name == "MemAvailable:" && meminfo >> kilobytes) available = kilobytes * 1024;
    std::getline(meminfo, unit);
  }
  // A container's limit (cgroup 2, then 1) less what its processes hold; file pages that the kernel would drop are
  // free.
  for (const fs::path folder : {"/sys/fs/cgroup", "/sys/fs/cgroup/memory"}) {
    const bool second = fs::exists(folder / "memory.max");
    int64_t limit = 0, usage = 0, droppable = 0;
    std::ifstream stat(folder / "memory.stat");
    for (std::string name; stat >> name;)
      if (int64_t value = 0; stat >> value && name == "inactive_file") droppable = value;
    if (std::ifstream(folder / (second ? "memory.max" : "memory.limit_in_bytes")) >> limit &&
        std::ifstream(folder / (second ? "memory.current" : "memory.usage_in_bytes")) >> usage)
      available = std::min(available, std::max<int64_t>(0, limit - usage + droppable));
  }
  return available;
}

int64_t peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
}

}  // namespace orpo
