// The lines of a JSON Lines file, plain or gzip, in blocks of whole lines, so that a file may be larger than memory.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string_view>
#include <vector>

namespace orpo {

// Whole lines, without their line feeds. simdjson reads up to 64 bytes past a line's end: the block's memory goes on
// that far.
struct LineBlock {
  std::vector<char> memory;
  std::vector<std::string_view> lines;
  int64_t first_line = 1;  // number of lines.front() in the file, from 1
};

class LineReader {
 public:
  // Throws UserError: no such file, a folder, not readable, a kind of file that is not JSON Lines (Parquet, zip, zstd,
  // UTF-16).
  explicit LineReader(const std::filesystem::path& file, int64_t block_bytes = int64_t{16} << 20);
  ~LineReader();
  LineReader(const LineReader&) = delete;

  // The next lines into block, whose memory is used again; false at the end of the file. Lines end with LF, the last
  // one may lack it; a byte-order mark at the file's start is skipped. Throws UserError where a gzip file is cut off or
  // damaged or a line passes 1 GiB; MachineError where reading fails.
  bool read(LineBlock& block);

 private:
  int64_t fill(char* to, int64_t bytes);  // bytes got; fewer than asked at the end of the file only
  void refuse_other_formats(std::string_view start) const;

  std::filesystem::path path_;
  void* file_ = nullptr;  // gzFile: reads plain files as they are
  int64_t block_bytes_, next_line_ = 1;
  std::vector<char> rest_;  // the start of a line whose end is not read yet
  bool at_start_ = true, at_end_ = false;
};

}  // namespace orpo
