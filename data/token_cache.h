// The token cache: tokenised rows as one memory-mapped file, so that a second start tokenises nothing and a data set
// may be larger than memory. Rows are kept at their full length and cut or dropped when they are read: one file serves
// every --max-length and every program.
//
//   header (64 bytes) | tokens, int32 | StoredPair per row | report, JSON
//
// The key is a hash of all that decides the tokens: the files' contents (never their names or times), the tokenizer's
// files, what it and the template make of a probe text, which rows are welcome, and this format. A file is written
// beside and renamed; every byte is under a checksum, and a broken or truncated file counts as absent. Files not used
// for 30 days are removed when a new one is written.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/pairs.h"
#include "src/fail.h"
#include "src/files.h"

namespace orpo {

struct CacheKey {
  uint64_t value = 0;
};

// Reads every file once (at memory or disk speed, on all threads). Nothing where a file is not a regular one (a pipe):
// no cache then.
std::optional<CacheKey> token_cache_key(const std::vector<std::filesystem::path>& files, const Tokenizer* tokenizer,
                                        const ChatTemplate* chat_template, const DataSettings& settings);

// $ORPO_CACHE, $XDG_CACHE_HOME/orpo or ~/.cache/orpo; empty where none of the three variables (HOME last) is set.
std::filesystem::path token_cache_folder();

struct StoredPair {
  int64_t first, row;  // first: index of the trunk's first token; chosen and rejected follow it
  uint32_t file : 31, prompt_merged : 1;
  int32_t trunk, chosen, rejected;  // tokens
  int64_t tokens() const { return int64_t{trunk} + chosen + rejected; }
};
static_assert(sizeof(StoredPair) == 32);

// A mapped file as a set: all its rows until fit() has applied the limits.
class StoredPairs : public PairSet {
 public:
  // A file whose checksum was verified or that this process wrote. files: names for the report's messages.
  StoredPairs(MappedFile file, const std::vector<std::filesystem::path>& files, bool from_cache);

  int64_t size() const override { return all_whole_ ? count_ : static_cast<int64_t>(kept_.size()); }
  TokenPair operator[](int64_t index) const override;
  // Once: leaves the rows that fit_to_limits keeps, and completes the report.
  void fit(const DataSettings& settings);
  void add_note(std::string note) { report_.note = std::move(note); }

 private:
  struct Kept {
    int64_t index;
    int32_t trunk, chosen, rejected;  // of its tokens: the trunk's last, the branches' first
  };
  TokenPair whole_pair(int64_t index) const;

  MappedFile file_;
  const int32_t* tokens_;
  const StoredPair* pairs_;
  int64_t count_;
  bool all_whole_ = true;
  std::vector<Kept> kept_;  // where not every row is whole
};

// The set of a key, its checksum verified; null where there is none that is whole.
std::unique_ptr<StoredPairs> open_token_cache(CacheKey key, const std::vector<std::filesystem::path>& files,
                                              int threads);

// A cache file that cannot be written (no such folder, read-only, disk full): the caller keeps the tokens in memory
// instead.
struct CacheTrouble : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a bad row was; with the file's name only when it is shown, for a cache outlives names.
struct BadPlace {
  int32_t file;
  int64_t line;
  std::string text;
};

// Collects pairs, in order, and ends as a mapped set.
class TokenWriter {
 public:
  // Into the cache under a key, or (no key) into memory. Throws CacheTrouble.
  explicit TokenWriter(std::optional<CacheKey> key);
  ~TokenWriter();  // an unfinished file is removed
  TokenWriter(const TokenWriter&) = delete;

  // Throws CacheTrouble; in memory, MachineError.
  void append(const TokenPair& pair, bool prompt_merged);
  // report: rows, bad and bad_reasons.
  std::unique_ptr<StoredPairs> finish(const DataReport& report, const std::vector<BadPlace>& bad,
                                  const std::vector<std::filesystem::path>& files);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace orpo
