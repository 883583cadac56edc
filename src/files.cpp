#include "src/files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "src/fail.h"

namespace fs = std::filesystem;

namespace orpo {
namespace {

std::string reason() { return std::strerror(errno); }

class Descriptor {
 public:
  Descriptor(const fs::path& path, int flags) : value_(::open(path.c_str(), flags | O_CLOEXEC)) {}
  Descriptor(const Descriptor&) = delete;
  ~Descriptor() {
    if (value_ >= 0) ::close(value_);
  }
  operator int() const { return value_; }

 private:
  int value_;
};

// Opens a regular file for reading; the user named it, so what is wrong with it is the user's.
int64_t regular_file_size(const fs::path& path, int descriptor) {
  struct stat status;
  if (descriptor < 0 || ::fstat(descriptor, &status) != 0) fail(path.string(), ": cannot be read (", reason(), ")");
  if (!S_ISREG(status.st_mode)) fail(path.string(), ": is not a regular file");
  return status.st_size;
}

fs::path folder_of(const fs::path& path) { return path.has_parent_path() ? path.parent_path() : fs::path("."); }

}  // namespace

Hasher::Hasher() { XXH64_reset(&state_, 0); }

void Hasher::add(std::span<const std::byte> piece) { XXH64_update(&state_, piece.data(), piece.size()); }

uint64_t Hasher::value() const { return XXH64_digest(&state_); }

uint64_t xxh64(std::span<const std::byte> data) { return XXH64(data.data(), data.size(), 0); }

std::string hash_text(uint64_t hash) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

MappedFile::MappedFile(const fs::path& path) : MappedFile(Descriptor(path, O_RDONLY), path) {}

MappedFile::MappedFile(int descriptor, const fs::path& path) {
  size_ = static_cast<size_t>(regular_file_size(path, descriptor));
  if (size_ == 0) return;  // mmap refuses empty files
  void* memory = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
  if (memory == MAP_FAILED) fail_machine(path.string(), ": cannot be mapped (", reason(), ")");
  data_ = static_cast<const std::byte*>(memory);
  ::madvise(memory, size_, MADV_WILLNEED);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

OutputFile::OutputFile(const fs::path& path)
    : path_(path), descriptor_(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
  if (descriptor_ < 0) fail_machine(path.string(), ": cannot be written (", reason(), ")");
}

OutputFile::~OutputFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void OutputFile::write(std::span<const std::byte> data) {
  while (!data.empty()) {
    const ssize_t taken = ::write(descriptor_, data.data(), data.size());
    if (taken < 0 && errno == EINTR) continue;
    if (taken < 0) fail_machine(path_.string(), ": cannot be written (", reason(), ")");
    data = data.subspan(static_cast<size_t>(taken));
  }
}

void OutputFile::finish() {
  // EINVAL: something that cannot be flushed, such as a pipe.
  if (::fsync(descriptor_) != 0 && errno != EINVAL)
    fail_machine(path_.string(), ": cannot be flushed to the device (", reason(), ")");
  if (::close(std::exchange(descriptor_, -1)) != 0) fail_machine(path_.string(), ": cannot be closed (", reason(), ")");
}

std::string read_file(const fs::path& path) { return std::string(MappedFile(path).text()); }

FilePart write_file(const fs::path& path, std::string_view text) {
  OutputFile file(path);
  file.write(bytes_of(text));
  file.finish();
  return {path.filename(), "file", 0, static_cast<int64_t>(text.size()), xxh64(bytes_of(text))};
}

void write_file_atomically(const fs::path& path, std::string_view text) {
  replace_file(path, [&](const fs::path& beside) { write_file(beside, text); });
}

void replace_file(const fs::path& path, const std::function<void(const fs::path&)>& write) {
  const fs::path beside = folder_of(path) / ("." + path.filename().string() + ".partial");
  try {
    write(beside);
    rename_path(beside, path);
  } catch (...) {
    std::error_code ignored;
    fs::remove(beside, ignored);
    throw;
  }
}

FilePart duplicate_file(const fs::path& from, const fs::path& to) { return write_file(to, MappedFile(from).text()); }

uint64_t hash_file_part(const fs::path& path, int64_t begin, int64_t bytes) {
  const Descriptor file(path, O_RDONLY);
  if (file < 0) fail(path.string(), ": cannot be read (", reason(), ")");
  std::vector<std::byte> buffer(static_cast<size_t>(std::min<int64_t>(bytes, 1 << 20)));
  Hasher hasher;
  for (int64_t done = 0; done < bytes;) {
    const ssize_t taken =
        ::pread(file, buffer.data(), static_cast<size_t>(std::min<int64_t>(bytes - done, 1 << 20)), begin + done);
    if (taken < 0 && errno == EINTR) continue;
    if (taken < 0) fail(path.string(), ": cannot be read (", reason(), ")");
    if (taken == 0) fail(path.string(), ": ends at byte ", begin + done, ", ", bytes - done, " bytes too early");
    hasher.add(std::span(buffer).first(static_cast<size_t>(taken)));
    done += taken;
  }
  return hasher.value();
}

void make_folder(const fs::path& folder) {
  std::error_code error;
  const bool made = fs::create_directories(folder, error);
  if (error || !fs::is_directory(folder, error))
    fail_machine(folder.string(), ": cannot be made a folder (", error ? error.message() : "a file of that name exists",
                 ")");
  if (made) sync_folder(folder_of(folder));
}

void sync_folder(const fs::path& folder) {
  const Descriptor handle(folder, O_RDONLY | O_DIRECTORY);
  // EINVAL: a file system that has nothing to flush for a folder.
  if (handle < 0 || (::fsync(handle) != 0 && errno != EINVAL))
    fail_machine(folder.string(), ": cannot be flushed to the device (", reason(), ")");
}

void rename_path(const fs::path& from, const fs::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0)
    fail_machine(from.string(), ": cannot be renamed to ", to.string(), " (", reason(), ")");
  sync_folder(folder_of(to));
  if (folder_of(from) != folder_of(to)) sync_folder(folder_of(from));
}

void remove_tree(const fs::path& path) {
  std::error_code error;
  fs::remove_all(path, error);
  if (error) fail_machine(path.string(), ": cannot be removed (", error.message(), ")");
}

void forget_cached(const fs::path& path) {
  const Descriptor file(path, O_RDONLY);
  if (file >= 0) ::posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);  // a wish; nothing depends on it
}

FolderLock::FolderLock(const fs::path& folder)
    : descriptor_(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  if (descriptor_ < 0) fail_machine(folder.string(), ": cannot be opened (", reason(), ")");
  // Any other error: a file system without locks, where nothing can be checked.
  if (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    ::close(descriptor_);
    fail(folder.string(), ": another process is writing there; wait for it, stop it, or choose another --output");
  }
}

FolderLock::~FolderLock() { ::close(descriptor_); }

}  // namespace orpo
