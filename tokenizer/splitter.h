// Splitters cut text into the words that a model encodes one by one. Reference: pre_tokenizers of the Hugging Face
// library.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace orpo {

class Splitter {
 public:
  virtual ~Splitter() = default;
  // Appends the words of `text` in order; none is empty. Views into `text`. Thread-safe.
  virtual void split(std::string_view text, std::vector<std::string_view>& words) const = 0;
};

// What happens to the matches of a pattern: words of their own, dropped, or joined to a neighbour.
enum class MatchBehavior { isolated, removed, merged_with_previous, merged_with_next, contiguous };

// GPT-2's words, as written in the ByteLevel pre-tokenizer.
std::unique_ptr<Splitter> make_gpt2_splitter();
// Qwen2's words, as written in its tokenizer's class.
std::unique_ptr<Splitter> make_qwen2_splitter();
// Every numeric character, or every run of them, apart from the rest.
std::unique_ptr<Splitter> make_digits_splitter(bool individual);
// A literal text.
std::unique_ptr<Splitter> make_literal_splitter(std::string literal, MatchBehavior behavior, bool invert);
// A regular expression. The patterns of GPT-2, Qwen2 and Llama-3 have matchers of their own, with exactly the character
// classes of the Hugging Face library. Any other runs in PCRE2, whose Unicode version is that of the installed package:
// letters and numbers younger than it fall into other words there. Throws UserError: the expression does not compile,
// or means something else in PCRE2 than in Oniguruma. `where`: for the message.
std::unique_ptr<Splitter> make_pattern_splitter(const std::string& pattern, MatchBehavior behavior, bool invert,
                                                const std::string& where);

}  // namespace orpo
