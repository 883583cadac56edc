#include "src/toml.h"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <iterator>

#include "src/fail.h"

namespace orpo {
namespace {

class Reader {
 public:
  Reader(std::string_view text, const std::string& name) : text_(text), name_(name) {}

  std::vector<TomlEntry> read() {
    std::vector<TomlEntry> entries;
    for (skip_lines(); !at_end(); skip_lines()) {
      TomlEntry entry = read_entry();
      for (const TomlEntry& other : entries)
        if (other.key == entry.key) error("'", entry.key, "' was set already on line ", other.line);
      entries.push_back(std::move(entry));
    }
    return entries;
  }

 private:
  template <class... Parts>
  [[noreturn]] void error(const Parts&... parts) const {
    fail(name_, ":", line_, ": ", parts...);
  }

  bool at_end() const { return at_ == text_.size(); }
  char peek() const { return at_end() ? '\n' : text_[at_]; }
  char next() {
    if (at_end()) error("the file ends in the middle of a value");
    if (text_[at_] == '\n') ++line_;
    return text_[at_++];
  }
  void skip_blanks() {
    while (!at_end() && (peek() == ' ' || peek() == '\t' || peek() == '\r')) ++at_;
    if (!at_end() && peek() == '#')
      while (!at_end() && peek() != '\n') ++at_;
  }
  void skip_lines() {
    for (skip_blanks(); !at_end() && peek() == '\n'; skip_blanks()) next();
  }

  TomlEntry read_entry() {
    TomlEntry entry;
    entry.line = line_;
    if (peek() == '[') error("tables such as [optimizer] are not used here; write the options one below the other");
    entry.key = peek() == '"' || peek() == '\'' ? read_string() : read_bare();
    if (entry.key.empty()) error("expected an option's name, found '", peek(), "'");
    skip_blanks();
    if (peek() != '=') error("expected '=' after '", entry.key, "'");
    next();
    skip_blanks();
    if (peek() == '[')
      read_array(entry);
    else
      entry.values.push_back(read_value(entry.key));
    skip_blanks();
    if (!at_end() && peek() != '\n') error("unexpected text after the value of '", entry.key, "'");
    return entry;
  }

  void read_array(TomlEntry& entry) {
    entry.is_array = true;
    next();
    for (skip_lines(); peek() != ']' || at_end(); skip_lines()) {
      entry.values.push_back(read_value(entry.key));
      skip_lines();
      if (peek() == ',')
        next();
      else if (at_end() || peek() != ']')
        error("expected ',' or ']' in the array of '", entry.key, "'");
    }
    next();
  }

  std::string read_value(const std::string& key) {
    if (peek() == '"' || peek() == '\'') return read_string();
    std::string value = read_bare();
    if (value.empty()) error("'", key, "' has no value");
    if (value == "true" || value == "false") return value;
    if (!std::isdigit(static_cast<unsigned char>(value[value[0] == '-' || value[0] == '+'])))
      error("text needs quotation marks: ", key, " = \"", value, "\"");
    value.erase(std::remove(value.begin(), value.end(), '_'), value.end());
    if (value[0] == '+') value.erase(0, 1);
    return value;
  }

  std::string read_bare() {
    const size_t begin = at_;
    while (!at_end() && (std::isalnum(static_cast<unsigned char>(peek())) || peek() == '_' || peek() == '-' ||
                         peek() == '.' || peek() == '+'))
      ++at_;
    return std::string(text_.substr(begin, at_ - begin));
  }

  std::string read_string() {
    const char quote = next();
    std::string value;
    while (peek() != quote || at_end()) {
      if (at_end() || peek() == '\n') error("a string is not closed");
      char c = next();
      if (c == '\\' && quote == '"') {
        c = next();
        switch (c) {
          case 'n':
            c = '\n';
            break;
          case 't':
            c = '\t';
            break;
          case 'r':
            c = '\r';
            break;
          case '"':
          case '\\':
            break;
          default:
            error("unknown escape '\\", c, "' in a string");
        }
      }
      value += c;
    }
    next();
    return value;
  }

  std::string_view text_;
  const std::string& name_;
  size_t at_ = 0;
  int line_ = 1;
};

}  // namespace

std::vector<TomlEntry> parse_toml(std::string_view text, const std::string& name) { return Reader(text, name).read(); }

std::vector<TomlEntry> read_toml(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  if (!in.is_open() || in.bad()) fail(file.string(), ": cannot be read as an options file (--config)");
  return parse_toml(text, file.string());
}

}  // namespace orpo
