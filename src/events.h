// TensorBoard's events file: a TFRecord stream of Event messages (tensorflow/core/util/event.proto) with scalar
// summaries.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace orpo {

// CRC-32C (Castagnoli) of bytes, as TFRecord frames carry it.
uint32_t crc32c(std::string_view bytes);

class EventsFile {
 public:
  // A new file in the folder, named after the time; steps of earlier files from first_step on are withdrawn (a resumed
  // run repeats them). Throws MachineError where it cannot be written, as scalars() does.
  EventsFile(const std::filesystem::path& folder, int64_t first_step);
  ~EventsFile();
  EventsFile(const EventsFile&) = delete;
  EventsFile& operator=(const EventsFile&) = delete;

  // Values that are not finite are left out.
  void scalars(int64_t step, const std::vector<std::pair<std::string, double>>& values);

 private:
  void record(const std::string& event);

  std::filesystem::path path_;
  std::FILE* file_ = nullptr;
};

}  // namespace orpo
