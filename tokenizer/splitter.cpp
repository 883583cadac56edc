#include "tokenizer/splitter.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "src/fail.h"
#include "tokenizer/unicode.h"

namespace orpo {
namespace {

constexpr const char* gpt2_pattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// The pattern of Qwen2 (one number a word) and Llama-3 (up to three), which differ in this one place.
constexpr const char* modern_head = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})";
constexpr const char* modern_tail = R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

constexpr int any_class = unicode::letter | unicode::number | unicode::space;

// A reading position in one text.
struct Cursor {
  std::string_view text;
  size_t at = 0;

  bool done() const { return at >= text.size(); }
  unicode::Character peek() const {
    const auto byte = static_cast<unsigned char>(text[at]);
    return byte < 0x80 ? unicode::Character{byte, 1, true} : unicode::decode(text, at);
  }
  int kind() const { return done() ? -1 : unicode::class_of(peek().code) & any_class; }  // -1 at the end
  // Moves over characters of this kind (0: none of letter, number, space), at most `most`.
  void run(int wanted, size_t most = static_cast<size_t>(-1)) {
    while (most-- > 0 && !done()) {
      const unicode::Character c = peek();
      if ((unicode::class_of(c.code) & any_class) != wanted) break;
      at += c.size;
    }
  }
  bool newline() const { return !done() && (text[at] == '\r' || text[at] == '\n'); }
};

// The length of 's 't 're 've 'm 'll 'd at `at` (an apostrophe), 0 if none. fold: in either case, U+017F being an s.
size_t contraction(std::string_view text, size_t at, bool fold) {
  const auto letter = [&](size_t i) {
    const char c = at + i < text.size() ? text[at + i] : '\0';
    return fold && c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  };
  const char first = letter(1), second = letter(2);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
  if ((first == 'r' || first == 'v') && second == 'e') return 3;
  if (first == 'l' && second == 'l') return 3;
  return fold && text.substr(at + 1, 2) == "\u017F" ? 3 : 0;
}

// \s+(?!\S)|\s+ : white space, less its last character where something follows.
void space_run(Cursor& c) {
  size_t last = c.at;
  const size_t begin = c.at;
  while (c.kind() == unicode::space) {
    last = c.at;
    c.at += c.peek().size;
  }
  if (!c.done() && last > begin) c.at = last;
}

// Words one after the other: word(cursor) moves over the next.
template <class Word>
void split_words(std::string_view text, std::vector<std::string_view>& words, Word&& word) {
  for (Cursor c{text}; !c.done();) {
    const size_t begin = c.at;
    word(c);
    words.push_back(text.substr(begin, c.at - begin));
  }
}

class Gpt2Splitter : public Splitter {
 public:
  void split(std::string_view text, std::vector<std::string_view>& words) const override {
    split_words(text, words, word);
  }

 private:
  static void word(Cursor& c) {
    if (c.text[c.at] == '\'')
      if (const size_t size = contraction(c.text, c.at, false)) {
        c.at += size;
        return;
      }
    const size_t begin = c.at;
    if (c.text[begin] == ' ') ++c.at;
    const int kind = c.kind();
    if (kind >= 0 && kind != unicode::space) return c.run(kind);
    c.at = begin;
    space_run(c);
  }
};

// Qwen2's and Llama-3's words; numbers: digits a word may have.
class ModernSplitter : public Splitter {
 public:
  explicit ModernSplitter(size_t numbers) : numbers_(numbers) {}

  void split(std::string_view text, std::vector<std::string_view>& words) const override {
    split_words(text, words, [this](Cursor& c) { word(c); });
  }

 private:
  void word(Cursor& c) const {
    if (c.text[c.at] == '\'')
      if (const size_t size = contraction(c.text, c.at, true)) {
        c.at += size;
        return;
      }
    const size_t begin = c.at;
    const int kind = c.kind();
    if (kind == unicode::letter) return c.run(kind);
    if (kind == unicode::number) return c.run(kind, numbers_);
    if (!c.newline()) {  // one other character may lead a word
      c.at += c.peek().size;
      if (c.kind() == unicode::letter) return c.run(unicode::letter);
      c.at = begin;
    }
    if (c.text[begin] == ' ') ++c.at;
    if (c.kind() == 0) {
      c.run(0);
      while (c.newline()) ++c.at;
      return;
    }
    c.at = begin;
    lines(c);
  }

  // \s*[\r\n]+|\s+(?!\S)|\s+ : white space up to its last line end, if it has one.
  static void lines(Cursor& c) {
    const size_t begin = c.at;
    size_t end = begin;
    while (c.kind() == unicode::space) {
      const bool line_end = c.newline();
      c.at += c.peek().size;
      if (line_end) end = c.at;
    }
    c.at = end > begin ? end : begin;
    if (end == begin) space_run(c);
  }

  size_t numbers_;
};

// Matches of some pattern, and what becomes of them.
class MatchSplitter : public Splitter {
 public:
  MatchSplitter(MatchBehavior behavior, bool invert) : behavior_(behavior), invert_(invert) {}

  void split(std::string_view text, std::vector<std::string_view>& words) const override {
    struct Piece {
      size_t begin, end;
      bool match;
    };
    std::vector<Piece> pieces;
    size_t done = 0, from = 0;
    while (const auto found = find(text, from)) {
      const auto [begin, end] = *found;
      if (done < begin) pieces.push_back({done, begin, invert_});
      pieces.push_back({begin, end, !invert_});
      done = end;
      from = end > begin ? end : end + (end < text.size() ? unicode::decode(text, end).size : 1);
      if (from > text.size()) break;
    }
    if (done < text.size()) pieces.push_back({done, text.size(), invert_});

    const size_t first = words.size();
    const auto put = [&](const Piece& p) { words.push_back(text.substr(p.begin, p.end - p.begin)); };
    const auto extend = [&](const Piece& p) {
      words.back() = std::string_view(words.back().data(), words.back().size() + (p.end - p.begin));
    };
    for (size_t i = 0; i < pieces.size(); ++i) {
      const Piece& p = pieces[i];
      const bool follows = words.size() > first;
      if (behavior_ == MatchBehavior::removed) {
        if (!p.match) put(p);
      } else if (behavior_ == MatchBehavior::contiguous && follows && pieces[i - 1].match == p.match) {
        extend(p);
      } else if (behavior_ == MatchBehavior::merged_with_previous && follows && p.match && !pieces[i - 1].match) {
        extend(p);
      } else if (behavior_ == MatchBehavior::merged_with_next && follows && !p.match && pieces[i - 1].match) {
        extend(p);
      } else {
        put(p);
      }
    }
    words.erase(std::remove_if(words.begin() + first, words.end(), [](std::string_view w) { return w.empty(); }),
                words.end());
  }

 protected:
  // The first match that begins at `from` or later; from <= text.size().
  virtual std::optional<std::pair<size_t, size_t>> find(std::string_view text, size_t from) const = 0;

 private:
  MatchBehavior behavior_;
  bool invert_;
};

class DigitsSplitter : public MatchSplitter {
 public:
  explicit DigitsSplitter(bool individual)
      : MatchSplitter(individual ? MatchBehavior::isolated : MatchBehavior::contiguous, false) {}

 protected:
  std::optional<std::pair<size_t, size_t>> find(std::string_view text, size_t from) const override {
    for (Cursor c{text, from}; !c.done();) {
      const unicode::Character character = c.peek();
      if (unicode::class_of(character.code) & unicode::numeric) return std::pair{c.at, c.at + character.size};
      c.at += character.size;
    }
    return std::nullopt;
  }
};

class LiteralSplitter : public MatchSplitter {
 public:
  LiteralSplitter(std::string literal, MatchBehavior behavior, bool invert)
      : MatchSplitter(behavior, invert), literal_(std::move(literal)) {}

 protected:
  std::optional<std::pair<size_t, size_t>> find(std::string_view text, size_t from) const override {
    const size_t begin = text.find(literal_, from);
    if (literal_.empty() || begin == std::string_view::npos) return std::nullopt;
    return std::pair{begin, begin + literal_.size()};
  }

 private:
  std::string literal_;
};

// White space of PCRE2's \s has U+180E besides; here it is spelled out. (\S in a set would need the set's complement
// and stays.)
std::string with_exact_space(const std::string& pattern) {
  constexpr const char* spaces = R"(\t-\r \x85\xA0\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";
  std::string out;
  bool in_set = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] != '\\' || i + 1 == pattern.size()) {
      if (pattern[i] == '[') in_set = true;
      if (pattern[i] == ']') in_set = false;
      out += pattern[i];
      continue;
    }
    const char escaped = pattern[++i];
    if (escaped == 's') out += in_set ? spaces : concat("[", spaces, "]");
    else if (escaped == 'S' && !in_set) out += concat("[^", spaces, "]");
    else out += {'\\', escaped};
  }
  return out;
}

struct FreeCode {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};
struct FreeMatch {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};

class PatternSplitter : public MatchSplitter {
 public:
  PatternSplitter(const std::string& pattern, MatchBehavior behavior, bool invert, const std::string& where)
      : MatchSplitter(behavior, invert) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    // MULTILINE: ^ and $ match at line ends in the syntax that Hugging Face patterns are written in.
    constexpr uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_MATCH_INVALID_UTF;
    const std::string exact = with_exact_space(pattern);
    code_.reset(
        pcre2_compile(reinterpret_cast<PCRE2_SPTR>(exact.data()), exact.size(), options, &error, &offset, nullptr));
    if (!code_) {
      char reason[128] = "";
      pcre2_get_error_message(error, reinterpret_cast<PCRE2_UCHAR*>(reason), sizeof reason);
      fail(where, ": the regular expression ", pattern, " does not compile: ", reason);
    }
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // without JIT it is slower, not wrong
  }

 protected:
  std::optional<std::pair<size_t, size_t>> find(std::string_view text, size_t from) const override {
    thread_local const std::unique_ptr<pcre2_match_data, FreeMatch> match(pcre2_match_data_create(1, nullptr));
    const int found =
        pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from, 0, match.get(), nullptr);
    if (found == PCRE2_ERROR_NOMATCH) return std::nullopt;
    if (found < 0)
      fail("a text of ", text.size(), " bytes is too much for the tokenizer's regular expression (PCRE2 error ", found,
           "); shorten it");
    const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(match.get());
    return std::pair{ends[0], ends[1]};
  }

 private:
  std::unique_ptr<pcre2_code, FreeCode> code_;
};

}  // namespace

std::unique_ptr<Splitter> make_gpt2_splitter() { return std::make_unique<Gpt2Splitter>(); }

std::unique_ptr<Splitter> make_qwen2_splitter() { return std::make_unique<ModernSplitter>(1); }

std::unique_ptr<Splitter> make_digits_splitter(bool individual) { return std::make_unique<DigitsSplitter>(individual); }

std::unique_ptr<Splitter> make_literal_splitter(std::string literal, MatchBehavior behavior, bool invert) {
  return std::make_unique<LiteralSplitter>(std::move(literal), behavior, invert);
}

std::unique_ptr<Splitter> make_pattern_splitter(const std::string& pattern, MatchBehavior behavior, bool invert,
                                                const std::string& where) {
  // The matchers cover every character with matches, so that any behaviour that keeps them gives the same words.
  if (!invert && behavior == MatchBehavior::isolated) {
    if (pattern == gpt2_pattern) return make_gpt2_splitter();
    for (const auto& [digits, count] : {std::pair{"", 1}, std::pair{"{1,3}", 3}})
      if (pattern == concat(modern_head, digits, modern_tail)) return std::make_unique<ModernSplitter>(count);
  }
  for (const char* escape : {"\\h", "\\H", "\\R", "\\X", "\\K", "\\g", "\\k"})
    if (pattern.find(escape) != std::string::npos)
      fail(where, ": ", escape, " in the regular expression ", pattern, " is not supported");
  return std::make_unique<PatternSplitter>(pattern, behavior, invert, where);
}

}  // namespace orpo
