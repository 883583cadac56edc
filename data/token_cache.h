// The token cache: kept pairs as one memory-mapped file, so that a second start tokenises nothing and a data set may be larger than memory.
//
//   header (64 bytes) | tokens, int32 | StoredPair per pair | report, JSON
//
// The key is a hash of all that decides the tokens: the files' contents (never their names or times), the tokenizer's files, what it and the
// template make of a probe text, the settings and this format. A file is written beside and renamed; every byte is under a checksum, and
// a broken or truncated file counts as absent. Files that were not used for 30 days are removed when a new one is written.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/pairs.h"
#include "src/fail.h"

namespace orpo {

struct CacheKey {
  uint64_t value = 0;
};

// Reads every file once (at memory or disk speed, on all threads). Nothing where a file is not a regular one (a pipe): no cache then.
std::optional<CacheKey> token_cache_key(const std::vector<std::filesystem::path>& files, const Tokenizer* tokenizer,
                                        const ChatTemplate* chat_template, const DataSettings& settings);

// $ORPO_CACHE, $XDG_CACHE_HOME/orpo or ~/.cache/orpo; empty where none of the three variables (HOME last) is set.
std::filesystem::path token_cache_folder();

// The set of a key, its checksum verified; null where there is none that is whole. files: names for the report's messages.
std::unique_ptr<PairSet> open_token_cache(CacheKey key, const std::vector<std::filesystem::path>& files, int threads);

// A cache file that cannot be written (no such folder, read-only, disk full): the caller keeps the tokens in memory instead.
struct CacheTrouble : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a bad row was; with the file's name only when it is shown, for a cache outlives names.
struct BadPlace {
  int32_t file;
  int64_t line;
  std::string text;
};

// Collects kept pairs, in order, and ends as a mapped PairSet.
class TokenWriter {
 public:
  // Into the cache under a key, or (no key) into memory. Throws CacheTrouble.
  explicit TokenWriter(std::optional<CacheKey> key);
  ~TokenWriter();  // an unfinished file is removed
  TokenWriter(const TokenWriter&) = delete;

  // Throws CacheTrouble; in memory, MachineError.
  void append(const TokenPair& pair);
  // report: counts over the rows; what can be summed over the kept pairs is filled in here.
  std::unique_ptr<PairSet> finish(DataReport report, const std::vector<BadPlace>& bad,
                                  const std::vector<std::filesystem::path>& files);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace orpo
