// Byte pair encoding: one word to token ids, by joining neighbours in the order of a merge table (Sennrich et al.,
// arXiv 1508.07909). Byte-level (GPT-2): symbols are bytes, spelled as printable characters in the vocabulary.
// Character level (Llama-2, Mistral): symbols are characters; one that the vocabulary lacks becomes its bytes, <0x00>
// to <0xFF>. Reference: models/bpe of the Hugging Face tokenizers library, whose ids it gives.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace orpo {

// Looks std::string keys up by std::string_view.
struct TextHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
};
using TextToId = std::unordered_map<std::string, int32_t, TextHash, std::equal_to<>>;

// What a model is made from.
struct BpeFiles {
  TextToId vocabulary;
  std::vector<std::pair<std::string, std::string>> merges;  // best first
  std::string unknown;                                      // unk_token; empty: unknown symbols are left out
  bool byte_level = false;
  bool byte_fallback = false;
  bool fuse_unknown = false;
  bool ignore_merges = false;  // a word that is in the vocabulary is that token
};

// Ids of words seen before. A thread's own: no locks.
class WordCache {
 public:
  WordCache();
  static constexpr size_t longest = 48;  // bytes of a word worth keeping
  static uint64_t hash(std::string_view word);
  // Ids of the word, or {nullptr, 0}.
  std::pair<const int32_t*, size_t> find(std::string_view word, uint64_t hash) const;
  void put(std::string_view word, uint64_t hash, const int32_t* ids, size_t count);

 private:
  struct Slot {
    uint64_t hash;
    uint32_t text, ids;    // offsets
    uint16_t size, count;  // size 0: free
  };
  static constexpr size_t slots = 1 << 16;
  std::vector<Slot> slots_;
  std::string text_;
  std::vector<int32_t> ids_;
  size_t used_ = 0;
};

// A model turns a word into ids.
class WordModel {
 public:
  virtual ~WordModel() = default;
  // Appends the ids of a word. Thread-safe.
  virtual void encode(std::string_view word, std::vector<int32_t>& ids) const = 0;
};

class Bpe : public WordModel {
 public:
  // Throws UserError (`where` names the file) when a merge or unk_token is not in the vocabulary.
  Bpe(BpeFiles files, const std::string& where);

  void encode(std::string_view word, std::vector<int32_t>& ids) const override;
  const TextToId& vocabulary() const { return files_.vocabulary; }
  // Character level: nothing ever joins over the border between another character and a following U+2581 (the space),
  // so that a text may be cut there into words without changing ids.
  bool cuts_at_spaces() const { return cuts_at_spaces_; }

 private:
  struct Merge {
    uint64_t pair;  // left id << 32 | right id; all ones: free
    uint32_t rank;
    int32_t id;
  };
  const Merge* merge(int32_t left, int32_t right) const;
  void add_merges(const std::string& where);
  void symbols(std::string_view word, std::vector<int32_t>& out) const;
  void join_short(int32_t* ids, size_t& count) const;
  void join_long(std::vector<int32_t>& ids, size_t from) const;

  BpeFiles files_;
  std::vector<Merge> merges_;  // open addressing, a power of two of slots
  TextToId words_;             // ignore_merges: words as encode() gets them
  std::array<int32_t, 256> byte_ids_;
  int32_t unknown_ = -1;
  bool cuts_at_spaces_ = false;
  uint64_t serial_;  // tells a thread's cache which model filled it
};

// Byte-level spelling: the printable character that stands for a byte, and back. -1: the character stands for no byte.
char32_t byte_to_character(uint8_t byte);
int character_to_byte(char32_t character);
// A byte-level token's bytes; nothing where some character stands for no byte.
std::optional<std::string> byte_level_bytes(std::string_view token);

}  // namespace orpo
