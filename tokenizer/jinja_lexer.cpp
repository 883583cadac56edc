#include "tokenizer/jinja_lexer.h"

#include <cctype>
#include <string_view>

#include "src/fail.h"

namespace orpo::jinja {

std::vector<Token> cut(std::string text) {
  if (text.ends_with('\n')) text.pop_back();
  std::vector<Token> out;
  size_t at = 0;
  bool trim = false, trim_newline = false;  // what the tag before asks of the text that follows
  while (true) {
    size_t open = at;
    while (open + 1 < text.size() &&
           !(text[open] == '{' && (text[open + 1] == '{' || text[open + 1] == '%' || text[open + 1] == '#')))
      ++open;
    const bool end = open + 1 >= text.size();
    std::string piece = text.substr(at, end ? std::string::npos : open - at);
    if (trim) piece.erase(0, piece.find_first_not_of(" \t\r\n\v\f"));
    else if (trim_newline && piece.starts_with('\n')) piece.erase(0, 1);
    if (!end) {
      const char kind = text[open + 1], sign = open + 2 < text.size() ? text[open + 2] : ' ';
      if (sign == '-') {
        piece.erase(piece.find_last_not_of(" \t\r\n\v\f") + 1);
      } else if (kind != '{' && sign != '+') {  // lstrip_blocks: a tag may stand indented on its line
        const size_t line = text.rfind('\n', open) == std::string::npos || open == 0 ? 0 : text.rfind('\n', open) + 1;
        if (text.find_first_not_of(" \t", line) == open) piece.erase(piece.find_last_not_of(" \t") + 1);
      }
    }
    if (!piece.empty()) out.push_back({Token::text, piece});
    if (end) return out;
    const std::string closing = text[open + 1] == '{' ? "}}" : text[open + 1] == '%' ? "%}" : "#}";
    size_t close = open + 2;
    for (char quote = 0; close < text.size() && (quote || text.compare(close, 2, closing) != 0); ++close) {
      if (closing == "#}") continue;
      if (quote && text[close] == '\\') ++close;
      else if (quote) quote = text[close] == quote ? 0 : quote;
      else if (text[close] == '\'' || text[close] == '"') quote = text[close];
    }
    if (close >= text.size()) fail("a chat template has a tag without an end");
    std::string inside = text.substr(open + 2, close - open - 2);
    trim = inside.ends_with('-');
    trim_newline = closing != "}}" && !inside.ends_with('+');
    if (trim || inside.ends_with('+')) inside.pop_back();
    if (inside.starts_with('-') || inside.starts_with('+')) inside.erase(0, 1);
    if (closing != "#}") out.push_back({closing == "}}" ? Token::print : Token::block, inside});
    at = close + 2;
  }
}

std::vector<std::string> words_of(const std::string& tag) {
  std::vector<std::string> words;
  for (size_t i = 0; i < tag.size();) {
    const char c = tag[i];
    if (std::isspace(static_cast<unsigned char>(c))) {
      ++i;
    } else if (c == '\'' || c == '"') {
      std::string text = "'";
      for (++i; i < tag.size() && tag[i] != c; ++i) {
        if (tag[i] != '\\' || i + 1 >= tag.size()) {
          text += tag[i];
          continue;
        }
        const char escaped = tag[++i];
        const size_t known = std::string_view("ntr\\'\"").find(escaped);
        if (known == std::string_view::npos)
          fail("a chat template has the escape \\", escaped, ", which is not supported");
        text += "\n\t\r\\'\""[known];
      }
      ++i;
      words.push_back(text);
    } else if (std::isalnum(static_cast<unsigned char>(c)) || c == '_') {
      const size_t begin = i;
      while (i < tag.size() && (std::isalnum(static_cast<unsigned char>(tag[i])) || tag[i] == '_')) ++i;
      words.push_back(tag.substr(begin, i - begin));
    } else {
      const std::string two = tag.substr(i, 2);
      const bool pair = two == "==" || two == "!=" || two == "<=" || two == ">=" || two == "//";
      words.push_back(pair ? two : std::string(1, c));
      i += words.back().size();
    }
  }
  return words;
}

}  // namespace orpo::jinja
