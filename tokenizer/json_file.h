// The JSON files of a tokenizer, read as the Hugging Face libraries read them: of a key that is given twice the last
// counts (src/json.h refuses it).
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>

#include "src/fail.h"
#include "src/files.h"

namespace orpo {

// Throws UserError naming the file where it cannot be read or is no JSON.
inline nlohmann::json read_json_file(const std::filesystem::path& file) {
  try {
    return nlohmann::json::parse(MappedFile(file).text());
  } catch (const nlohmann::json::exception& e) {
    fail(file.string(), ": is not whole JSON (", e.what(), "); bring the file again");
  }
}

}  // namespace orpo
