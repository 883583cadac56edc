// The safetensors format (8-byte header length, JSON header, tensors back to back), single files and sharded folders,
// and the one table that knows Hugging Face's tensor names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/files.h"
#include "src/model.h"

namespace orpo {

// Dtypes of weights on disk.
enum class StoredDType : uint8_t { f32, bf16, f16 };
const char* stored_dtype_name(StoredDType dtype);  // "F32", as in a safetensors header
inline int64_t stored_dtype_bytes(StoredDType dtype) { return dtype == StoredDType::f32 ? 4 : 2; }

// A tensor inside a mapped file.
struct StoredTensor {
  std::string name;
  std::string dtype_text;            // any of the format's dtypes
  std::optional<StoredDType> dtype;  // where it is one that weights may have
  std::vector<int64_t> shape;
  std::span<const std::byte> data;  // row-major, little-endian
  std::filesystem::path file;
  int64_t elements() const;
};

// Reads the header of a safetensors file held in memory: names, dtypes, shapes, and data offsets that cover the file
// without gap or overlap. Tensors come in the order of their data. Throws UserError naming file and tensor.
std::vector<StoredTensor> parse_safetensors(std::span<const std::byte> file, const std::filesystem::path& path);

// model.safetensors.index.json: tensor -> file of the same folder. Throws UserError.
std::map<std::string, std::string> parse_shard_index(std::string_view json, const std::filesystem::path& path);

// All tensors of a file, or of a model folder: model.safetensors, or the shards that model.safetensors.index.json
// names.
class StoredWeights {
 public:
  static StoredWeights of_file(const std::filesystem::path& file);
  static StoredWeights of_folder(const std::filesystem::path& folder);  // throws UserError: missing shard, tensor in
                                                                        // two shards, index and shard disagree

  const std::vector<StoredTensor>& tensors() const { return tensors_; }
  const StoredTensor* find(std::string_view name) const;  // nullptr: absent

 private:
  void add_file(const std::filesystem::path& file);
  void sort();
  std::vector<MappedFile> files_;
  std::vector<StoredTensor> tensors_;  // by name
};

// Writes one safetensors file: shapes first, then the data of each tensor in the same order. The data starts at a
// multiple of 64 bytes.
class SafetensorsWriter {
 public:
  struct Entry {
    std::string name;
    StoredDType dtype;
    std::vector<int64_t> shape;
    int64_t bytes() const;
  };
  SafetensorsWriter(const std::filesystem::path& path, const std::vector<Entry>& entries);
  void write(std::span<const std::byte> data);  // the next bytes of the entries, in order
  void finish();  // fsync; MachineError where fewer bytes were written than the entries have

  // Header and tensors with their checksums; they cover the file. After finish().
  const std::vector<FilePart>& parts() const { return parts_; }

 private:
  OutputFile file_;
  std::vector<FilePart> parts_;
  size_t current_ = 0;   // the part that the next byte belongs to
  int64_t written_ = 0;  // bytes of it
  Hasher hasher_;
};

// One tensor of a Hugging Face checkpoint and the rows of ours that it fills.
struct TensorPlace {
  std::string name;            // "model.layers.3.self_attn.k_proj.weight"
  size_t parameter;            // index in parameters(config, weights)
  int64_t first_row, rows;     // along out: our qkv holds query, key and value heads, gate_up holds gate and up
  std::vector<int64_t> shape;  // as stored: [rows], [rows, in], or [in, rows] where it is transposed
  bool transposed;             // GPT-2's Conv1D
  size_t base;                 // length of the decoder's own prefix ("model."), which a folder may leave out
};
// In the order of parameters(): the embedding first.
std::vector<TensorPlace> tensor_places(const Config& config);
// The tensor of this place, by its name or by its name without the decoder's prefix; nullptr: absent.
const StoredTensor* find_place(const StoredWeights& stored, const TensorPlace& place);
// Tensors that a folder may hold although the model has no place for them: buffers that follow from the config. A tied
// output is checked by the loader.
bool is_derived_tensor(const Config& config, std::string_view name);
// The name of the output matrix in folders that store it although it is tied to the embedding.
std::string_view tied_output_name(const Config& config);

}  // namespace orpo
