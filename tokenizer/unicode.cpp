#include "tokenizer/unicode.h"

#include <algorithm>
#include <unordered_map>
#include <vector>

namespace orpo::unicode {
namespace {

struct ClassRange {
  uint32_t first, last;
  uint8_t value;
};
struct Decomposition {
  uint32_t code, first, second;  // second is 0 for a single character
  uint8_t composes;              // the pair composes back to `code`
};
#include "tokenizer/unicode_tables.inc"

constexpr uint32_t code_points = 0x110000;

template <size_t N>
std::vector<uint8_t> expand(const ClassRange (&ranges)[N]) {
  std::vector<uint8_t> table(code_points, 0);
  for (const ClassRange& r : ranges) std::fill(table.begin() + r.first, table.begin() + r.last + 1, r.value);
  return table;
}

const uint8_t* build_classes() {
  static const std::vector<uint8_t> table = expand(class_ranges);
  return table.data();
}

// Hangul syllables compose by arithmetic (The Unicode Standard, section 3.12).
constexpr uint32_t hangul_s = 0xAC00, hangul_l = 0x1100, hangul_v = 0x1161, hangul_t = 0x11A7;
constexpr uint32_t hangul_ls = 19, hangul_vs = 21, hangul_ts = 28, hangul_count = hangul_ls * hangul_vs * hangul_ts;

struct Composer {
  std::vector<uint8_t> combining = expand(combining_ranges);
  std::unordered_map<uint32_t, const Decomposition*> parts;
  std::unordered_map<uint64_t, uint32_t> whole;

  Composer() {
    for (const Decomposition& d : decompositions) {
      parts[d.code] = &d;
      if (d.composes) whole[uint64_t{d.first} << 32 | d.second] = d.code;
    }
  }

  void decompose(uint32_t code, std::vector<uint32_t>& out) const {
    if (code >= hangul_s && code < hangul_s + hangul_count) {
      const uint32_t s = code - hangul_s, t = s % hangul_ts;
      out.push_back(hangul_l + s / (hangul_vs * hangul_ts));
      out.push_back(hangul_v + s % (hangul_vs * hangul_ts) / hangul_ts);
      if (t) out.push_back(hangul_t + t);
      return;
    }
    const auto found = parts.find(code);
    if (found == parts.end()) return out.push_back(code);
    decompose(found->second->first, out);
    if (found->second->second) decompose(found->second->second, out);
  }

  uint32_t compose(uint32_t a, uint32_t b) const {  // 0: they do not compose
    if (a >= hangul_l && a < hangul_l + hangul_ls && b >= hangul_v && b < hangul_v + hangul_vs)
      return hangul_s + ((a - hangul_l) * hangul_vs + (b - hangul_v)) * hangul_ts;
    if (a >= hangul_s && a < hangul_s + hangul_count && (a - hangul_s) % hangul_ts == 0 && b > hangul_t &&
        b < hangul_t + hangul_ts)
      return a + (b - hangul_t);
    const auto found = whole.find(uint64_t{a} << 32 | b);
    return found == whole.end() ? 0 : found->second;
  }

  // One run of characters between invalid bytes: decompose, order the marks, compose.
  void run(const std::vector<uint32_t>& in, std::string& out) const {
    std::vector<uint32_t> text;
    for (const uint32_t code : in) decompose(code, text);
    for (size_t i = 0; i < text.size();) {
      if (!combining[text[i]]) {
        ++i;
        continue;
      }
      const size_t begin = i;
      while (i < text.size() && combining[text[i]]) ++i;
      std::stable_sort(text.begin() + begin, text.begin() + i,
                       [&](uint32_t a, uint32_t b) { return combining[a] < combining[b]; });
    }
    constexpr size_t none = static_cast<size_t>(-1);
    size_t starter = none, size = 0;
    uint8_t last = 0;  // class of the last character kept after the starter
    for (const uint32_t code : text) {
      const uint8_t rank = combining[code];
      const bool adjacent = starter != none && starter + 1 == size;
      if (starter != none && (adjacent || (last != 0 && last < rank)))
        if (const uint32_t whole_code = compose(text[starter], code)) {
          text[starter] = whole_code;
          continue;
        }
      if (rank == 0) starter = size;
      last = rank;
      text[size++] = code;
    }
    for (size_t i = 0; i < size; ++i) append(out, text[i]);
  }
};

}  // namespace

namespace detail {
const uint8_t* const class_table = build_classes();
}

Character decode(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[at + i]); };
  const auto follows = [&](size_t i) { return at + i < text.size() && (byte(i) & 0xC0) == 0x80; };
  const uint8_t b = byte(0);
  if (b < 0x80) return {b, 1, true};
  if (b >= 0xC2 && b < 0xE0 && follows(1)) return {(b & 0x1Fu) << 6 | (byte(1) & 0x3Fu), 2, true};
  if (b >= 0xE0 && b < 0xF0 && follows(1) && follows(2)) {
    const char32_t code = (b & 0x0Fu) << 12 | (byte(1) & 0x3Fu) << 6 | (byte(2) & 0x3Fu);
    if (code >= 0x800 && (code < 0xD800 || code > 0xDFFF)) return {code, 3, true};
  }
  if (b >= 0xF0 && b < 0xF5 && follows(1) && follows(2) && follows(3)) {
    const char32_t code = (b & 0x07u) << 18 | (byte(1) & 0x3Fu) << 12 | (byte(2) & 0x3Fu) << 6 | (byte(3) & 0x3Fu);
    if (code >= 0x10000 && code < code_points) return {code, 4, true};
  }
  return {0xFFFD, 1, false};
}

size_t previous(std::string_view text, size_t at) {
  for (size_t back = 1; back <= 4 && back <= at; ++back) {
    if ((static_cast<uint8_t>(text[at - back]) & 0xC0) == 0x80) continue;
    if (decode(text, at - back).size == back) return at - back;
    break;
  }
  return at - 1;
}

void append(std::string& out, char32_t code) {
  if (code < 0x80) {
    out += static_cast<char>(code);
  } else if (code < 0x800) {
    out += static_cast<char>(0xC0 | code >> 6);
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    out += static_cast<char>(0xE0 | code >> 12);
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | code >> 18);
    out += static_cast<char>(0x80 | (code >> 12 & 0x3F));
    out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (code & 0x3F));
  }
}

std::string compose(std::string_view text) {
  bool changes = false;
  for (size_t i = 0; i < text.size() && !changes;) {
    if (static_cast<uint8_t>(text[i]) < 0x80) {
      ++i;
      continue;
    }
    const Character c = decode(text, i);
    changes = c.valid && (class_of(c.code) & nfc_check);
    i += c.size;
  }
  if (!changes) return std::string(text);
  static const Composer composer;
  std::string out;
  std::vector<uint32_t> run;
  for (size_t i = 0; i < text.size();) {
    const Character c = decode(text, i);
    if (c.valid) {
      run.push_back(c.code);
    } else {
      composer.run(run, out);
      run.clear();
      out += text[i];
    }
    i += c.size;
  }
  composer.run(run, out);
  return out;
}

std::string replace_invalid(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const Character c = decode(text, i);
    if (c.valid) {
      out.append(text.substr(i, c.size));
      i += c.size;
      continue;
    }
    // A cut sequence is as long as it is the beginning of some character.
    const auto byte = [&](size_t k) { return i + k < text.size() ? static_cast<uint8_t>(text[i + k]) : 0; };
    const uint8_t b = byte(0);
    size_t wanted = b >= 0xC2 && b < 0xE0 ? 2 : b >= 0xE0 && b < 0xF0 ? 3 : b >= 0xF0 && b < 0xF5 ? 4 : 1, size = 1;
    const uint8_t low = b == 0xE0 ? 0xA0 : b == 0xF0 ? 0x90 : 0x80, high = b == 0xED ? 0x9F : b == 0xF4 ? 0x8F : 0xBF;
    while (size < wanted && byte(size) >= (size == 1 ? low : 0x80) && byte(size) <= (size == 1 ? high : 0xBF)) ++size;
    append(out, 0xFFFD);
    i += size;
  }
  return out;
}

}  // namespace orpo::unicode
