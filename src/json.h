// JSON from outside: strict, and with errors that fit one line.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace orpo {

using Json = nlohmann::json;

// Throws UserError naming where: no JSON (with the byte where it stops being some), a key given twice, nested deeper
// than 64 levels.
Json parse_json(std::string_view text, const std::string& where);

// A value as it fits an error line: its JSON, cut after 60 characters.
std::string brief(const Json& value);

}  // namespace orpo
