// Added tokens: texts that become one id wherever they stand, before any other rule sees them (special tokens among
// them). Reference: AddedVocabulary of the Hugging Face tokenizers library.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace orpo {

struct AddedToken {
  std::string content;
  int32_t id = -1;
  bool single_word = false;  // only where no word character touches it
  bool lstrip = false;       // takes the white space on its left with it
  bool rstrip = false;       // and on its right
  bool normalized = true;    // looked for in the normalised text, by its own normalised form
  bool special = false;      // left out by decode(skip_special)
  std::string pattern;  // what is looked for, and what decoding spells: the content, normalised where that is asked
};

// A stretch of text: an added token, or text for the model (token == nullptr).
struct Stretch {
  std::string_view text;
  const AddedToken* token;
};

// Finds one set of patterns, leftmost first, longest of those that start there.
class PatternSet {
 public:
  void add(std::string_view pattern, int32_t value);
  bool empty() const { return nodes_.size() == 1; }
  // The first match that starts at `from` or later: its start, end and value.
  struct Match {
    size_t begin, end;
    int32_t value;
  };
  std::optional<Match> find(std::string_view text, size_t from) const;

 private:
  struct Node {
    std::unordered_map<unsigned char, uint32_t> next;
    int32_t value = -1;
  };
  std::vector<Node> nodes_ = std::vector<Node>(1);
  std::array<bool, 256> starts_{};
};

class AddedTokens {
 public:
  // Adds a token or replaces the flags of the one with the same content. Empty contents are ignored, as there.
  void set(AddedToken token);
  // After the last set(): builds the pattern sets. `normalize` is the tokenizer's normaliser.
  void finish(const std::function<std::string(std::string_view)>& normalize);

  const AddedToken* find(std::string_view content) const;
  const AddedToken* find(int32_t id) const;
  const std::vector<AddedToken>& all() const { return tokens_; }

  // Appends the stretches of `text` in order; together they cover it. normalized: which of the two sets is looked for.
  void split(std::string_view text, bool normalized, std::vector<Stretch>& out) const;
  bool has_normalized() const { return !normalized_.empty(); }

 private:
  std::vector<AddedToken> tokens_;
  std::unordered_map<std::string, size_t> by_content_;
  std::unordered_map<int32_t, size_t> by_id_;
  PatternSet raw_, normalized_;
};

}  // namespace orpo
