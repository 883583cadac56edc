// Whole files by rename, checksums, copies, locks.
#include "src/files.h"

#include <sys/wait.h>
#include <unistd.h>

#include <numeric>

#include "src/fail.h"
#include "tests/model_folders.h"
#include "tests/temporary_folder.h"

using namespace orpo;
using namespace orpo::test;
namespace fs = std::filesystem;

namespace {

std::vector<std::byte> pattern(size_t n) {
  std::vector<std::byte> data(n);
  for (size_t i = 0; i < n; ++i) data[i] = static_cast<std::byte>(i * 7 + 3);
  return data;
}

}  // namespace

TEST_CASE("files: checksums are XXH64") {
  // python-xxhash 4.1: xxh64(bytes((i * 7 + 3) & 255 for i in range(n)), seed=0)
  const std::vector<std::pair<size_t, uint64_t>> golden = {
      {0, 0xef46db3751d8e999u},   {1, 0x1f25c8d0bc1f4bb6u},  {3, 0x31d2363f52e564c9u},  {4, 0x9bb64b7d66ee9fdau},
      {7, 0x9a7b149959ce60d8u},   {8, 0xdab99d95c6f90092u},  {31, 0xa2aa5f33cc4a6119u}, {32, 0x23c3c17ef790fd97u},
      {33, 0x50a7cfc7ba588784u},  {63, 0x5e3e54b431c7493cu}, {64, 0x0eb64b3ef6eeb01fu}, {100, 0xa61f8d4c170fe531u},
      {1000, 0x5f235fa033f1a3fbu}};
  for (const auto& [n, hash] : golden) {
    CAPTURE(n);
    CHECK(xxh64(pattern(n)) == hash);
    for (const size_t piece :
         {size_t{1}, size_t{5}, size_t{31}, size_t{32}, size_t{40}}) {  // pieces of any size give the same
      Hasher hasher;
      const std::vector<std::byte> data = pattern(n);
      for (size_t at = 0; at < n; at += piece) hasher.add(std::span(data).subspan(at, std::min(piece, n - at)));
      CHECK(hasher.value() == hash);
    }
  }
}

TEST_CASE("files: a file is replaced whole, and its parts can be checked") {
  TemporaryFolder folder;
  const fs::path file = folder.path() / "x.json";
  write_file_atomically(file, "old");
  write_file_atomically(file, "new content");
  CHECK(read_file(file) == "new content");
  CHECK(std::distance(fs::directory_iterator(folder.path()), {}) == 1);  // nothing beside it
  CHECK(hash_file_part(file, 4, 7) == xxh64(bytes_of("content")));
  CHECK(holds(error_line<UserError>([&] { hash_file_part(file, 4, 8); }), "ends at byte 11"));

  const FilePart part = duplicate_file(file, folder.path() / "copy");
  CHECK(read_file(folder.path() / "copy") == "new content");
  CHECK(part.file == "copy");
  CHECK(part.bytes == 11);
  CHECK(part.hash == xxh64(bytes_of("new content")));
  write_file(file, "");
  CHECK(read_file(file).empty());
}

TEST_CASE("files: what the machine refuses names path and reason") {
  TemporaryFolder folder;
  const fs::path file = folder.path() / "file";
  write_file(file, "x");
  CHECK(error_line<MachineError>([&] { write_file("/dev/full", "x"); }) ==
        "/dev/full: cannot be written (No space left on device)");
  CHECK(error_line<MachineError>([&] { write_file(file / "inside", "x"); }) ==
        (file / "inside").string() + ": cannot be written (Not a directory)");
  CHECK(holds(error_line<MachineError>([&] { make_folder(file); }), "cannot be made a folder"));
  CHECK(error_line<UserError>([&] { read_file(folder.path() / "absent"); }) ==
        (folder.path() / "absent").string() + ": cannot be read (No such file or directory)");
  CHECK(holds(error_line<UserError>([&] { read_file(folder.path()); }), "is not a regular file"));

  // A replacement that cannot be finished leaves the old file and nothing beside it.
  const fs::path occupied = folder.path() / "occupied";
  make_folder(occupied / "inner");
  CHECK_THROWS_AS(write_file_atomically(occupied, "text"), MachineError);
  CHECK(fs::is_directory(occupied / "inner"));
  CHECK(!fs::exists(folder.path() / ".occupied.partial"));
}

TEST_CASE("files: one process at a time writes a folder") {
  TemporaryFolder folder;
  const auto other_process_gets_it = [&] {
    const pid_t child = fork();
    if (child == 0) {
      try {
        const FolderLock lock(folder.path());
        _exit(0);
      } catch (const UserError&) {
        _exit(2);
      }
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WEXITSTATUS(status) == 0;
  };
  {
    const FolderLock lock(folder.path());
    CHECK(!other_process_gets_it());
  }
  CHECK(other_process_gets_it());
}
