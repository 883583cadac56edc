// Model folders in Hugging Face's layout, in and out: weights between safetensors and the device, tokenizer and
// configuration files beside them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "src/backend.h"
#include "src/family.h"
#include "src/model.h"
#include "src/safetensors.h"

namespace orpo {

// Fills masters (any floating dtype, rounded to nearest even, or bf16 with corrections) from FOLDER. Throws UserError:
// one line naming folder or file, tensor, expected and actual shape or dtype; missing and unexpected tensors. Returns
// the dtype the weights are stored in (the widest where they differ): what --save-dtype auto means. zeros: the masters'
// memory is 0 so far, and is left alone where it stays so.
StoredDType load_weights(const std::filesystem::path& folder, const Config& config, const Masters& masters,
                         Backend& backend, bool zeros = false);
// That dtype without loading, from the headers; as config.json says where the folder has no weights (--init random).
StoredDType stored_dtype(const std::filesystem::path& folder, const ModelDescription& description);

// Writes FOLDER/model.safetensors, or shards of at most shard_bytes and their index. Masters are rounded once to dtype.
// Files are fsynced, the folder is not. Returns what was written, with checksums.
std::vector<FilePart> save_weights(const std::filesystem::path& folder, const Config& config, const Masters& masters,
                                   StoredDType dtype, Backend& backend, int64_t shard_bytes = 5'000'000'000);

// One safetensors file, fp32, names and layouts of transformers' named_parameters(); a tied tensor once. Written beside
// and renamed.
void save_gradients(const std::filesystem::path& file, const Config& config, const Weights& gradients,
                    Backend& backend);

// Whether a file of this name holds a folder's weights, or the index of their shards.
bool is_weights_file(const std::string& name);

// What a saved model folder is made from besides the weights.
struct ModelSource {
  std::filesystem::path folder;  // its tokenizer, template and generation files are copied byte for byte
  ModelDescription description;  // config.json is written as it came, with the dtype below
  StoredDType dtype;             // of the saved tensors
};

// The files of a model folder that are copied as they are: tokenizer, chat template, generation config. Sorted names.
std::vector<std::string> side_files(const std::filesystem::path& folder);

// Fills an existing folder: config.json, side files, weights; every file fsynced.
std::vector<FilePart> fill_model_folder(const std::filesystem::path& folder, const ModelSource& source,
                                        const Masters& masters, Backend& backend);

// OUT becomes a model folder: everything written to a folder inside it, fsynced, and renamed file by file, weights
// last. On failure OUT keeps what it had. Throws MachineError naming path and reason.
void save_model(const std::filesystem::path& out, const ModelSource& source, const Masters& masters, Backend& backend);

}  // namespace orpo
