#include "data/lines.h"

#include <zlib.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "src/fail.h"

namespace orpo {
namespace {

constexpr int64_t padding = 64;               // readable bytes after the last line
constexpr int64_t longest_line = int64_t{1} << 30;

}  // namespace

LineReader::LineReader(const std::filesystem::path& file, int64_t block_bytes)
    : path_(file), block_bytes_(block_bytes) {
  if (std::filesystem::is_directory(file)) fail(file.string(), ": is a folder; a JSON Lines file is needed");
  errno = 0;
  file_ = gzopen(file.c_str(), "rb");
  if (!file_) fail(file.string(), ": cannot be read: ", std::strerror(errno ? errno : ENOMEM));
  gzbuffer(static_cast<gzFile>(file_), 1 << 18);
}

LineReader::~LineReader() { gzclose(static_cast<gzFile>(file_)); }

int64_t LineReader::fill(char* to, int64_t bytes) {
  int64_t got = 0;
  while (got < bytes) {
    const unsigned part = static_cast<unsigned>(std::min<int64_t>(bytes - got, 1 << 30));
    const int n = gzread(static_cast<gzFile>(file_), to + got, part);
    int status = Z_OK;
    if (n < static_cast<int>(part)) gzerror(static_cast<gzFile>(file_), &status);
    if (status == Z_ERRNO) fail_machine(path_.string(), ": reading failed: ", std::strerror(errno));
    if (n < 0 || status != Z_OK) fail(path_.string(), ": the gzip file is cut off or damaged; make or copy it again");
    got += n;
    if (n == 0) break;
  }
  at_end_ = got < bytes;
  return got;
}

void LineReader::refuse_other_formats(std::string_view start) const {
  // zlib passes through what is no gzip; rows that something unpacked under their old name are welcome.
  if (path_.extension() == ".gz" && gzdirect(static_cast<gzFile>(file_)) && !start.empty() &&
      std::string_view("{ \t\r\n\xef").find(start.front()) == std::string_view::npos)
    fail(path_.string(), ": is named .gz and is no gzip file; make or copy it again");
  static constexpr std::pair<std::string_view, const char*> formats[] = {
      {"PAR1", "a Parquet file"}, {"\x28\xb5\x2f\xfd", "a zstd file"}, {"PK\x03\x04", "a zip file"},
      {"BZh", "a bzip2 file"},    {"\xfd" "7zXZ", "an xz file"},       {"ARROW1", "an Arrow file"},
      {"\xff\xfe", "UTF-16 text"}, {"\xfe\xff", "UTF-16 text"}};
  for (const auto& [magic, what] : formats)
    if (start.starts_with(magic))
      fail(path_.string(), ": is ", what, "; convert it to JSON Lines in UTF-8, one object a line (.gz is fine)");
}

bool LineReader::read(LineBlock& block) {
  block.lines.clear();
  block.first_line = next_line_;
  if (at_end_ && rest_.empty()) return false;
  int64_t used = static_cast<int64_t>(rest_.size()), complete = 0;  // bytes read, and of them up to the last line feed
  block.memory.resize(std::max(used + block_bytes_, static_cast<int64_t>(block.memory.size()) - padding) + padding);
  std::copy(rest_.begin(), rest_.end(), block.memory.begin());
  rest_.clear();
  while (!at_end_ && complete == 0) {
    if (used > longest_line) fail(path_.string(), ":", next_line_, ": the line is longer than 1 GiB");
    const int64_t space = static_cast<int64_t>(block.memory.size()) - padding - used;
    if (space < block_bytes_) block.memory.resize(2 * used + block_bytes_ + padding);
    const int64_t got = fill(block.memory.data() + used, block_bytes_);
    const auto* end = static_cast<const char*>(memrchr(block.memory.data() + used, '\n', got));
    if (end) complete = end + 1 - block.memory.data();
    used += got;
  }
  int64_t begin = 0;
  if (at_start_) {
    refuse_other_formats({block.memory.data(), static_cast<size_t>(used)});
    if (std::string_view(block.memory.data(), used).starts_with("\xef\xbb\xbf")) begin = 3;
    at_start_ = false;
  }
  if (at_end_) {
    complete = used;
  } else {
    rest_.assign(block.memory.data() + complete, block.memory.data() + used);
  }
  while (begin < complete) {
    const char* line = block.memory.data() + begin;
    const auto* end = static_cast<const char*>(std::memchr(line, '\n', complete - begin));
    const int64_t length = end ? end - line : complete - begin;
    block.lines.emplace_back(line, length);
    begin += length + 1;
  }
  next_line_ += static_cast<int64_t>(block.lines.size());
  return !block.lines.empty();
}

}  // namespace orpo
