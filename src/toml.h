// The part of TOML that a recipe needs: `key = value` lines with strings, numbers, booleans and arrays of these;
// comments. Tables are refused.
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

// Throws UserError "name:line: ..." where the text is not what the first line of this file says. A key may stand once.
std::vector<TomlEntry> parse_toml(std::string_view text, const std::string& name);
std::vector<TomlEntry> read_toml(const std::filesystem::path& file);

}  // namespace orpo
