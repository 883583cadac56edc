#include "src/model_folder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "src/fail.h"
#include "src/json.h"
#include "src/stored_values.h"

namespace fs = std::filesystem;

namespace orpo {
namespace {

constexpr const char* partial_name = ".model.partial";

std::string shape_text(const std::vector<int64_t>& shape) { return brief(Json(shape)); }

std::string and_more(size_t others, const char* what) {
  return others ? concat(" (and ", others, " more ", what, ")") : "";
}

// A folder may store the output matrix although it is tied to the embedding: the same values, or the file contradicts
// the config.
void check_tied_output(const StoredTensor& output, const StoredTensor& embedding) {
  if (output.shape != embedding.shape || output.dtype_text != embedding.dtype_text ||
      !std::ranges::equal(output.data, embedding.data))
    fail(output.file.string(), ": '", output.name, "' differs from '", embedding.name,
         "', but config.json says that they are one (tie_word_embeddings true); set it to false to train both");
}

// Every tensor of the model is in the folder, with its shape and a dtype that can be read, and nothing else is.
void check_tensors(const StoredWeights& stored, const std::vector<TensorPlace>& places, const Config& config,
                   const fs::path& folder) {
  std::vector<const TensorPlace*> missing;
  std::set<std::string_view> known;
  for (const TensorPlace& place : places) {
    const StoredTensor* tensor = find_place(stored, place);
    if (tensor) known.insert(tensor->name);
    if (!tensor)
      missing.push_back(&place);
    else if (tensor->shape != place.shape)
      fail(tensor->file.string(), ": tensor '", tensor->name, "' has shape ", shape_text(tensor->shape),
           "; config.json asks for ", shape_text(place.shape));
    else if (!tensor->dtype)
      fail(tensor->file.string(), ": tensor '", tensor->name, "' is stored as ", tensor->dtype_text,
           "; F32, BF16 and F16 can be read");
  }
  if (!missing.empty())
    fail(folder.string(), ": tensor '", missing[0]->name, "' ", shape_text(missing[0]->shape), " is missing",
         and_more(missing.size() - 1, "tensors"), "; config.json describes ", config.layers, " layers of the ",
         config.family, " family");

  std::vector<const StoredTensor*> unexpected;
  for (const StoredTensor& t : stored.tensors()) {
    if (known.contains(t.name) || is_derived_tensor(config, t.name)) continue;
    if (config.tied_embeddings && t.name == tied_output_name(config))
      check_tied_output(t, *find_place(stored, places[0]));
    else
      unexpected.push_back(&t);
  }
  if (!unexpected.empty())
    fail(unexpected[0]->file.string(), ": tensor '", unexpected[0]->name, "' ", shape_text(unexpected[0]->shape),
         " has no place in the model of config.json (", config.layers, " layers of the ", config.family, " family)",
         and_more(unexpected.size() - 1, "unexpected tensors"));
}

StoredDType widest(StoredDType a, StoredDType b) { return a == b ? a : StoredDType::f32; }

// Consecutive places whose tensors fit a file of shard_bytes, at least one a file.
std::vector<std::vector<TensorPlace>> cut_into_shards(const std::vector<TensorPlace>& places, StoredDType dtype,
                                                      int64_t shard_bytes) {
  std::vector<std::vector<TensorPlace>> shards(1);
  int64_t filled = 0;
  for (const TensorPlace& place : places) {
    const int64_t bytes = SafetensorsWriter::Entry{place.name, dtype, place.shape}.bytes();
    if (filled + bytes > shard_bytes && !shards.back().empty()) shards.emplace_back(), filled = 0;
    shards.back().push_back(place);
    filled += bytes;
  }
  return shards;
}

std::vector<FilePart> write_places(const fs::path& file, const std::vector<TensorPlace>& places,
                                   const std::vector<Parameter>& list, StoredDType dtype, Backend& backend) {
  std::vector<SafetensorsWriter::Entry> entries;
  for (const TensorPlace& place : places) entries.push_back({place.name, dtype, place.shape});
  SafetensorsWriter writer(file, entries);
  for (const TensorPlace& place : places)
    write_values(writer, list[place.parameter].master().slice(place.first_row, place.rows), place.transposed, dtype,
                 place.name, backend);
  writer.finish();
  return writer.parts();
}

std::string shard_index(const std::vector<std::pair<std::string, std::string>>& tensor_files, int64_t total_bytes,
                        int64_t parameters) {
  Json index;
  index["metadata"] = {{"total_parameters", parameters}, {"total_size", total_bytes}};
  for (const auto& [tensor, file] : tensor_files) index["weight_map"][tensor] = file;
  return index.dump(2) + "\n";
}

void append(std::vector<FilePart>& parts, std::vector<FilePart> more) {
  parts.insert(parts.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
}

}  // namespace

bool is_weights_file(const std::string& name) {
  return name == "model.safetensors" || name == "model.safetensors.index.json" ||
         (name.starts_with("model-") && name.ends_with(".safetensors"));
}

StoredDType load_weights(const fs::path& folder, const Config& config, const Masters& masters, Backend& backend,
                         bool zeros) {
  const StoredWeights stored = StoredWeights::of_folder(folder);
  const std::vector<TensorPlace> places = tensor_places(config);
  check_tensors(stored, places, config, folder);
  const std::vector<Parameter> list = parameters(config, masters);
  StoredDType dtype = *find_place(stored, places[0])->dtype;
  for (const TensorPlace& place : places) {
    const StoredTensor& tensor = *find_place(stored, place);
    read_values(list[place.parameter].master().slice(place.first_row, place.rows), tensor, place.transposed, backend,
                zeros);
    dtype = widest(dtype, *tensor.dtype);
  }
  backend.synchronize();
  return dtype;
}

StoredDType stored_dtype(const fs::path& folder, const ModelDescription& description) {
  if (!fs::exists(folder / "model.safetensors") && !fs::exists(folder / "model.safetensors.index.json"))
    return description.dtype;
  const StoredWeights stored = StoredWeights::of_folder(folder);
  const std::vector<TensorPlace> places = tensor_places(description.config);
  check_tensors(stored, places, description.config, folder);
  StoredDType dtype = *find_place(stored, places[0])->dtype;
  for (const TensorPlace& place : places) dtype = widest(dtype, *find_place(stored, place)->dtype);
  return dtype;
}

std::vector<FilePart> save_weights(const fs::path& folder, const Config& config, const Masters& masters,
                                   StoredDType dtype, Backend& backend, int64_t shard_bytes) {
  const std::vector<Parameter> list = parameters(config, masters);
  const std::vector<std::vector<TensorPlace>> shards = cut_into_shards(tensor_places(config), dtype, shard_bytes);
  if (shards.size() == 1) return write_places(folder / "model.safetensors", shards[0], list, dtype, backend);

  std::vector<FilePart> parts;
  std::vector<std::pair<std::string, std::string>> tensor_files;
  int64_t elements = 0;
  for (size_t i = 0; i < shards.size(); ++i) {
    char name[64];
    std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, shards.size());
    append(parts, write_places(folder / name, shards[i], list, dtype, backend));
    for (const TensorPlace& place : shards[i]) {
      tensor_files.emplace_back(place.name, name);
      elements += SafetensorsWriter::Entry{place.name, dtype, place.shape}.bytes() / stored_dtype_bytes(dtype);
    }
  }
  parts.push_back(write_file(folder / "model.safetensors.index.json",
                             shard_index(tensor_files, elements * stored_dtype_bytes(dtype), elements)));
  return parts;
}

void save_gradients(const fs::path& file, const Config& config, const Weights& gradients, Backend& backend) {
  replace_file(file, [&](const fs::path& beside) {
    write_places(beside, tensor_places(config), parameters(config, gradients), StoredDType::f32, backend);
  });
}

std::vector<std::string> side_files(const fs::path& folder) {
  static const std::set<std::string> listed = {
      "generation_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
      "chat_template.json"};
  const auto belongs = [](const fs::path& p) {
    const std::string name = p.filename().string(), ending = p.extension().string();
    if (name.starts_with(".") || std::any_of(name.begin(), name.end(), [](unsigned char c) { return c < ' '; }))
      return false;
    return listed.contains(name) || name.find("tokenizer") != std::string::npos || ending == ".jinja" ||
           ending == ".model" || ending == ".tiktoken";
  };
  std::vector<std::string> names;
  std::error_code error;
  for (const char* inside : {"", "additional_chat_templates"})  // where transformers puts the named templates
    for (const fs::directory_entry& entry : fs::directory_iterator(folder / inside, error))
      if (entry.is_regular_file() && belongs(entry.path()))
        names.push_back((fs::path(inside) / entry.path().filename()).string());
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<FilePart> fill_model_folder(const fs::path& folder, const ModelSource& source, const Masters& masters,
                                        Backend& backend) {
  std::vector<FilePart> parts;
  for (const std::string& name : side_files(source.folder)) {
    const fs::path inner = fs::path(name).parent_path();
    if (!inner.empty()) make_folder(folder / inner);
    parts.push_back(duplicate_file(source.folder / name, folder / name));
    parts.back().file = name;
    if (!inner.empty()) sync_folder(folder / inner);
  }
  parts.push_back(write_file(folder / "config.json", config_json_with_dtype(source.description, source.dtype)));
  append(parts, save_weights(folder, source.description.config, masters, source.dtype, backend));
  return parts;
}

void save_model(const fs::path& out, const ModelSource& source, const Masters& masters, Backend& backend) {
  make_folder(out);
  const fs::path partial = out / partial_name;
  std::vector<std::string> names;  // in the order of their renaming: weights last, their index at the very end
  try {
    remove_tree(partial);
    make_folder(partial);
    for (const FilePart& part : fill_model_folder(partial, source, masters, backend))
      if (names.empty() || names.back() != part.file) names.push_back(part.file);
    sync_folder(partial);
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(partial, ignored);
    throw;
  }
  for (const std::string& name : names) {
    make_folder((out / name).parent_path());
    rename_path(partial / name, out / name);
  }
  remove_tree(partial);
  // Weights of an earlier run in the other form would be read in place of these, or beside them.
  for (const fs::directory_entry& entry : fs::directory_iterator(out)) {
    const std::string name = entry.path().filename();
    if (is_weights_file(name) && std::find(names.begin(), names.end(), name) == names.end()) remove_tree(entry.path());
  }
  sync_folder(out);
}

}  // namespace orpo
