// Recipes for --config: TOML read by toml++, of which options need `key = value` with strings, numbers, booleans and
// arrays of these. Tables are refused.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace orpo {

struct TomlEntry {
  std::string key;
  std::vector<std::string> values;  // one, or an array's; text as the command line would hold it
  bool is_array = false;
  int line = 0;  // 1-based
};

// Throws UserError "name:line: ..." where the text is no such TOML. Entries come in the order of their keys.
std::vector<TomlEntry> parse_toml(std::string_view text, const std::string& name);
std::vector<TomlEntry> read_toml(const std::filesystem::path& file);

}  // namespace orpo
