// Model families: a Hugging Face config.json becomes a Config. A field that would change the result and that this
// trainer does not compute is an error that names it; so is a field it does not know. A family is a reader and its row
// in the table of family.cpp; its tensors' names are safetensors_names.cpp's.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "src/model.h"
#include "src/safetensors.h"

namespace orpo {

struct ModelDescription {
  Config config;
  StoredDType dtype = StoredDType::f32;  // `dtype` or `torch_dtype`; fp32 where neither is given
  std::string json;                      // config.json as it came
  std::vector<std::string> notes;        // to be said once: "attention_dropout 0.1 is taken as 0"
};

// Reads FOLDER/config.json, both generations of it. Throws UserError: one line with file, field, value and what is
// supported.
ModelDescription read_model_config(const std::filesystem::path& folder);
// The same from text; where names it in errors.
ModelDescription parse_model_config(std::string_view json, const std::string& where);

// The JSON as it came, but for its dtype field where the saved weights have another dtype.
std::string config_json_with_dtype(const ModelDescription& description, StoredDType dtype);

}  // namespace orpo
