#include "src/toml.h"

#include <fstream>
#include <iterator>

#include <toml++/toml.h>

#include "src/console.h"
#include "src/fail.h"

namespace orpo {
namespace {

std::string value_text(const toml::node& node, const std::string& where) {
  if (const auto* text = node.as_string()) return text->get();
  if (const auto* number = node.as_integer()) return std::to_string(number->get());
  if (const auto* number = node.as_floating_point()) return number_text(number->get());
  if (const auto* flag = node.as_boolean()) return flag->get() ? "true" : "false";
  fail(where, "values are strings, numbers, booleans and arrays of these");
}

}  // namespace

std::vector<TomlEntry> parse_toml(std::string_view text, const std::string& name) {
  toml::table table;
  try {
    table = toml::parse(text);
  } catch (const toml::parse_error& e) {
    fail(name, ":", e.source().begin.line, ": ", e.description());
  }
  std::vector<TomlEntry> entries;
  for (const auto& [key, node] : table) {
    TomlEntry entry{std::string(key.str()), {}, node.is_array(), static_cast<int>(key.source().begin.line)};
    const std::string where = concat(name, ":", entry.line, ": ");
    if (node.is_table())
      fail(where, "tables such as [", entry.key, "] are not used here; write the options one below the other");
    if (const toml::array* array = node.as_array())
      for (const toml::node& element : *array) entry.values.push_back(value_text(element, where));
    else
      entry.values.push_back(value_text(node, where));
    entries.push_back(std::move(entry));
  }
  return entries;
}

std::vector<TomlEntry> read_toml(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  if (!in.is_open() || in.bad()) fail(file.string(), ": cannot be read as an options file (--config)");
  return parse_toml(text, file.string());
}

}  // namespace orpo
