// Unicode as the Hugging Face tokenizers see it: UTF-8, character classes and canonical composition. The classes come
// from unicode_tables.inc, measured on that library, so that they agree with it where two Unicode versions do not.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace orpo::unicode {

enum Class : uint8_t {
  letter = 1,      // \p{L} of its regular expressions
  number = 2,      // \p{N} of its regular expressions
  space = 4,       // White_Space
  numeric = 8,     // what its Digits pre-tokenizer isolates (a newer Unicode version than `number`)
  word = 16,       // \w around single_word added tokens
  nfc_check = 32,  // may change under canonical composition
};

struct Character {
  char32_t code;  // U+FFFD where the bytes are no character
  uint32_t size;  // bytes it takes; 1 where the bytes are no character
  bool valid;
};

// The character at text[at]; at < text.size(). Overlong forms, surrogates and cut sequences are not valid.
Character decode(std::string_view text, size_t at);
// Start of the character that ends before `at`; at > 0.
size_t previous(std::string_view text, size_t at);
void append(std::string& out, char32_t code);

namespace detail {
extern const uint8_t* const class_table;  // [0x110000]
}
inline uint8_t class_of(char32_t code) { return detail::class_table[code]; }

// Canonical composition (NFC). Bytes that are no character stay as they are.
std::string compose(std::string_view text);

// Text with each maximal cut sequence of invalid bytes turned into one U+FFFD, as Rust's and Python's lossy decoders
// do.
std::string replace_invalid(std::string_view text);

}  // namespace orpo::unicode
