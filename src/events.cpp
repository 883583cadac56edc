#include "src/events.h"

#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>

#include "src/fail.h"

namespace orpo {
namespace {

constexpr std::array<uint32_t, 256> castagnoli = [] {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    table[i] = i;
    for (int bit = 0; bit < 8; ++bit) table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0x82f63b78u : 0);
  }
  return table;
}();

static_assert(std::endian::native == std::endian::little,
              "TFRecord and protobuf fields are written as they lie in memory");

template <class T>
std::string raw(T value) {
  std::string bytes(sizeof value, '\0');
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

// The few protobuf encodings that an Event needs.
std::string varint(uint64_t value) {
  std::string bytes;
  for (; value >= 128; value >>= 7) bytes += static_cast<char>(value | 128);
  return bytes + static_cast<char>(value);
}
std::string field_varint(int number, uint64_t value) { return varint(number << 3) + varint(value); }
std::string field_double(int number, double value) { return varint(number << 3 | 1) + raw(value); }
std::string field_float(int number, float value) { return varint(number << 3 | 5) + raw(value); }
std::string field_bytes(int number, const std::string& value) {
  return varint(number << 3 | 2) + varint(value.size()) + value;
}

double wall_time() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

std::string event(int64_t step, const std::string& what) {
  return field_double(1, wall_time()) + field_varint(2, static_cast<uint64_t>(step)) + what;
}

// TFRecord masks its checksums, so that a checksum of data that holds checksums stays sound.
std::string masked_crc(std::string_view bytes) {
  const uint32_t crc = crc32c(bytes);
  return raw((crc >> 15 | crc << 17) + 0xa282ead8u);
}

}  // namespace

uint32_t crc32c(std::string_view bytes) {
  uint32_t crc = ~0u;
  for (const char c : bytes) crc = castagnoli[(crc ^ static_cast<uint8_t>(c)) & 255] ^ crc >> 8;
  return ~crc;
}

EventsFile::EventsFile(const std::filesystem::path& folder, int64_t first_step) {
  char host[256] = "localhost";
  gethostname(host, sizeof host - 1);
  path_ = folder / concat("events.out.tfevents.", static_cast<int64_t>(wall_time()), ".", host, ".", getpid());
  file_ = std::fopen(path_.c_str(), "wb");
  if (!file_) fail_machine(path_.string(), ": cannot be written: ", std::strerror(errno));
  record(field_double(1, wall_time()) + field_bytes(3, "brain.Event:2"));
  const std::string session_start = field_varint(1, 1);
  if (first_step > 1) record(event(first_step, field_bytes(7, session_start)));
}

EventsFile::~EventsFile() {
  if (file_) std::fclose(file_);
}

void EventsFile::record(const std::string& event) {
  const std::string length = raw(static_cast<uint64_t>(event.size()));
  const std::string frame = length + masked_crc(length) + event + masked_crc(event);
  if (std::fwrite(frame.data(), 1, frame.size(), file_) != frame.size() || std::fflush(file_) != 0)
    fail_machine(path_.string(), ": cannot be written: ", std::strerror(errno));
}

void EventsFile::scalars(int64_t step, const std::vector<std::pair<std::string, double>>& values) {
  std::string summary;
  for (const auto& [tag, value] : values)
    if (std::isfinite(value))
      summary += field_bytes(1, field_bytes(1, tag) + field_float(2, static_cast<float>(value)));
  record(event(step, field_bytes(5, summary)));
}

}  // namespace orpo
