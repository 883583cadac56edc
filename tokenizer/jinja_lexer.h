// A chat template's text into tags, and a tag into words. Internal to jinja.cpp.
#pragma once

#include <string>
#include <vector>

namespace orpo::jinja {

// Text between tags, or what stands in a tag.
struct Token {
  enum Kind { text, print, block } kind;
  std::string content;
};

// The template's pieces, with the white space around tags that Jinja drops (-, trim_blocks, lstrip_blocks) already
// gone.
std::vector<Token> cut(std::string text);
// Words of a tag: names, numbers, texts (led by a quote), operators.
std::vector<std::string> words_of(const std::string& tag);

}  // namespace orpo::jinja
