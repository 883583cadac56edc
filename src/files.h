// Files that are whole or absent: everything the trainer writes goes beside its place, is fsynced, and is renamed into
// it last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace orpo {

// XXH64 with seed 0 (Collet, the xxHash specification), over pieces in order: the checksum of every tensor and file of
// a checkpoint.
class Hasher {
 public:
  Hasher();
  void add(std::span<const std::byte> piece);
  uint64_t value() const;

 private:
  XXH64_state_t state_;
};

uint64_t xxh64(std::span<const std::byte> data);
std::string hash_text(uint64_t hash);  // 16 hexadecimal digits

// A piece of a file that was written, and the checksum of what was meant to be written there.
struct FilePart {
  std::string file;      // name within its folder
  std::string what;      // a tensor's name, "header", or "file" for a whole one
  int64_t begin, bytes;  // where in the file
  uint64_t hash;
};

inline std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

// A file in memory, read-only. Throws UserError naming the file where it is absent, unreadable or no regular file.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  // An open file, which may be closed afterwards; path names it in errors.
  MappedFile(int descriptor, const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// A file being written from start to end. What the machine refuses (no space, no permission, an I/O error) is a
// MachineError naming path and reason. finish() flushes to the device (fsync); without it the file is only closed:
// half-written files live in folders nobody reads.
class OutputFile {
 public:
  explicit OutputFile(const std::filesystem::path& path);
  OutputFile(const OutputFile&) = delete;
  ~OutputFile();

  void write(std::span<const std::byte> data);
  void finish();

 private:
  std::filesystem::path path_;
  int descriptor_;
};

// The whole file as text. Throws UserError like MappedFile.
std::string read_file(const std::filesystem::path& path);
// Writes and fsyncs; the name may show a part of the file until it returns.
FilePart write_file(const std::filesystem::path& path, std::string_view text);
// The name shows the old file or the whole new one, at every moment.
void write_file_atomically(const std::filesystem::path& path, std::string_view text);
// The same for a file that write(beside) makes under another name; nothing of it is left where write throws.
void replace_file(const std::filesystem::path& path, const std::function<void(const std::filesystem::path&)>& write);
// Byte for byte, fsynced.
FilePart duplicate_file(const std::filesystem::path& from, const std::filesystem::path& to);

// The checksum of a part of a file, read and not mapped: an I/O error is then an exception and no signal. Throws
// UserError naming the file where it is unreadable or ends early.
uint64_t hash_file_part(const std::filesystem::path& path, int64_t begin, int64_t bytes);

// Folders. All throw MachineError naming path and reason.
void make_folder(const std::filesystem::path& folder);  // with its parents; one that exists is fine
void sync_folder(const std::filesystem::path& folder);  // fsync: names in it survive a power cut
void remove_tree(const std::filesystem::path& path);    // absent is fine
// Atomic; then both parents are fsynced.
void rename_path(const std::filesystem::path& from, const std::filesystem::path& to);
// Drops what the kernel keeps of a file that was fsynced, so that the next read comes from the device.
void forget_cached(const std::filesystem::path& path);

// One process at a time writes a folder: held from construction to the end of the process or the object. Throws
// UserError when another process holds it. Needs no file: the folder itself is locked (flock).
class FolderLock {
 public:
  explicit FolderLock(const std::filesystem::path& folder);
  FolderLock(const FolderLock&) = delete;
  ~FolderLock();

 private:
  int descriptor_;
};

}  // namespace orpo
