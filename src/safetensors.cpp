#include "src/safetensors.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>

#include "src/fail.h"
#include "src/json.h"

namespace fs = std::filesystem;

namespace orpo {
namespace {

constexpr size_t length_bytes = 8;
constexpr uint64_t most_header_bytes = 100'000'000;  // as the reference reader

// Bytes of an element of each dtype of the format; 0: not one of them.
int64_t element_bytes(std::string_view dtype) {
  static const std::map<std::string_view, int64_t> sizes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
      {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},     {"U32", 4},
      {"F32", 4},  {"I64", 8}, {"U64", 8}, {"F64", 8},     {"C64", 8}};
  const auto found = sizes.find(dtype);
  return found == sizes.end() ? 0 : found->second;
}

std::optional<StoredDType> weight_dtype(std::string_view text) {
  for (const StoredDType d : {StoredDType::f32, StoredDType::bf16, StoredDType::f16})
    if (text == stored_dtype_name(d)) return d;
  return std::nullopt;
}

// A count from the header: an integer, not negative, small enough to add two of them.
std::optional<int64_t> count_in(const Json& value) {
  if (!value.is_number_integer()) return std::nullopt;
  const bool fits =
      value.is_number_unsigned() ? value.get<uint64_t>() <= (uint64_t{1} << 62) : value.get<int64_t>() >= 0;
  return fits ? std::optional(value.get<int64_t>()) : std::nullopt;
}

// The shape's product, or nothing where it passes 2^62.
std::optional<int64_t> product(const std::vector<int64_t>& shape, int64_t unit) {
  int64_t n = unit;
  for (const int64_t d : shape)
    if (__builtin_mul_overflow(n, d, &n)) return std::nullopt;
  return n;
}

StoredTensor parse_entry(const std::string& name, const Json& entry, std::span<const std::byte> data,
                         const fs::path& path) {
  const auto refuse = [&](const auto&... what) { fail(path.string(), ": tensor '", name, "' ", what...); };
  if (!entry.is_object() || !entry.contains("dtype") || !entry.contains("shape") || !entry.contains("data_offsets"))
    refuse("lacks its dtype, shape or data_offsets");
  const Json &dtype = entry["dtype"], &shape = entry["shape"], &offsets = entry["data_offsets"];
  if (!dtype.is_string() || element_bytes(dtype.get_ref<const std::string&>()) == 0)
    refuse("has the dtype ", brief(dtype), ", which is none of the format's");
  StoredTensor tensor{name, dtype.get<std::string>(), weight_dtype(dtype.get_ref<const std::string&>()), {}, {}, path};
  if (!shape.is_array()) refuse("has a shape that is no list");
  for (const Json& d : shape) {
    if (!count_in(d)) refuse("has ", brief(d), " in its shape");
    tensor.shape.push_back(*count_in(d));
  }
  if (!offsets.is_array() || offsets.size() != 2 || !count_in(offsets[0]) || !count_in(offsets[1]))
    refuse("has data_offsets ", brief(offsets), ", not two byte counts");
  const int64_t begin = *count_in(offsets[0]), end = *count_in(offsets[1]),
                available = static_cast<int64_t>(data.size());
  if (begin > end) refuse("ends at byte ", end, " of the data, before it begins at ", begin);
  if (end > available)
    refuse("ends at byte ", end, " of the data, but the file holds ", available, ": it is truncated; fetch it again");
  const std::optional<int64_t> bytes = product(tensor.shape, element_bytes(tensor.dtype_text));
  if (!bytes || *bytes != end - begin)
    refuse("of shape ", brief(shape), " ", tensor.dtype_text, " takes ",
           bytes ? std::to_string(*bytes) : "far too many", " bytes, but its data_offsets hold ", end - begin);
  tensor.data = data.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
  return tensor;
}

// Tensors in the order of their data cover it without gap or overlap: nothing hides in a file, nothing is read twice.
void check_cover(const std::vector<StoredTensor>& tensors, std::span<const std::byte> data, const fs::path& path) {
  const std::byte* at = data.data();
  for (const StoredTensor& t : tensors) {
    if (t.data.data() != at)
      fail(path.string(), ": tensor '", t.name, "' begins at byte ", t.data.data() - data.data(), " of the data, ",
           t.data.data() < at ? "inside the tensor before it, which ends at " : "after a gap that starts at ",
           at - data.data());
    at += t.data.size();
  }
  const int64_t left = data.data() + data.size() - at;
  if (left > 0) fail(path.string(), ": ", left, " bytes follow its last tensor; it is not what its header says");
}

}  // namespace

const char* stored_dtype_name(StoredDType dtype) {
  return dtype == StoredDType::f32 ? "F32" : dtype == StoredDType::bf16 ? "BF16" : "F16";
}

int64_t StoredTensor::elements() const {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

std::vector<StoredTensor> parse_safetensors(std::span<const std::byte> file, const fs::path& path) {
  uint64_t length = 0;
  if (file.size() < length_bytes)
    fail(path.string(), ": ", file.size(), " bytes are no safetensors file; fetch it again");
  std::memcpy(&length, file.data(), length_bytes);
  if (length > most_header_bytes) fail(path.string(), ": is no safetensors file (a header of ", length, " bytes)");
  if (length > file.size() - length_bytes)
    fail(path.string(), ": its header of ", length, " bytes does not fit the ", file.size(),
         " bytes of the file: it is truncated; fetch it again");
  const std::string_view header(reinterpret_cast<const char*>(file.data()) + length_bytes, length);
  const std::span<const std::byte> data = file.subspan(length_bytes + length);

  const Json json = parse_json(header, path.string() + " (header)");
  if (!json.is_object()) fail(path.string(), ": its header is no JSON object");
  std::vector<StoredTensor> tensors;
  for (const auto& [name, entry] : json.items())
    if (name != "__metadata__") tensors.push_back(parse_entry(name, entry, data, path));
  // Empty tensors stand before the one that begins where they do.
  std::stable_sort(tensors.begin(), tensors.end(), [](const StoredTensor& a, const StoredTensor& b) {
    return std::pair(a.data.data(), a.data.size()) < std::pair(b.data.data(), b.data.size());
  });
  check_cover(tensors, data, path);
  return tensors;
}

void StoredWeights::add_file(const fs::path& file) {
  files_.emplace_back(file);
  for (StoredTensor& t : parse_safetensors(files_.back().bytes(), file)) tensors_.push_back(std::move(t));
}

void StoredWeights::sort() {
  std::sort(tensors_.begin(), tensors_.end(),
            [](const StoredTensor& a, const StoredTensor& b) { return a.name < b.name; });
  for (size_t i = 1; i < tensors_.size(); ++i)
    if (tensors_[i].name == tensors_[i - 1].name)
      fail(tensors_[i].file.string(), ": tensor '", tensors_[i].name, "' stands in ",
           tensors_[i - 1].file.filename().string(), " as well");
}

StoredWeights StoredWeights::of_file(const fs::path& file) {
  StoredWeights weights;
  weights.add_file(file);
  weights.sort();
  return weights;
}

std::map<std::string, std::string> parse_shard_index(std::string_view text, const fs::path& path) {
  const Json json = parse_json(text, path.string());
  if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object())
    fail(path.string(), ": has no weight_map");
  std::map<std::string, std::string> places;
  for (const auto& [tensor, file] : json["weight_map"].items()) {
    const fs::path name = file.is_string() ? file.get<std::string>() : "";
    if (name.empty() || name != name.filename() || name == "." || name == "..")
      fail(path.string(), ": weight_map gives tensor '", tensor, "' no file name of this folder");
    places[tensor] = name;
  }
  return places;
}

StoredWeights StoredWeights::of_folder(const fs::path& folder) {
  const fs::path single = folder / "model.safetensors", index = folder / "model.safetensors.index.json";
  if (fs::exists(single)) return of_file(single);
  if (!fs::exists(index)) {
    const bool pickled =
        fs::exists(folder / "pytorch_model.bin") || fs::exists(folder / "pytorch_model.bin.index.json");
    fail(folder.string(), ": holds no model.safetensors and no model.safetensors.index.json",
         pickled ? "; its pytorch_model.bin has to be converted first: load it in transformers and call save_pretrained"
                 : "");
  }
  const std::map<std::string, std::string> places = parse_shard_index(MappedFile(index).text(), index);
  std::map<std::string, std::vector<std::string>> shards;  // file -> tensors
  for (const auto& [tensor, file] : places) shards[file].push_back(tensor);
  StoredWeights weights;
  for (const auto& [file, names] : shards) {
    if (!fs::exists(folder / file))
      fail((folder / file).string(), ": this shard is missing; ", index.filename().string(), " puts ", names.size(),
           " tensors there, '", names[0], "' among them");
    weights.add_file(folder / file);
  }
  weights.sort();
  for (const auto& [file, names] : shards)
    for (const std::string& name : names)
      if (const StoredTensor* t = weights.find(name); !t || t->file.filename() != file)
        fail((folder / file).string(), ": tensor '", name, "' is missing; ", index.filename().string(),
             " says that it is here");
  for (const StoredTensor& t : weights.tensors_)
    if (!places.contains(t.name))
      fail(t.file.string(), ": tensor '", t.name, "' is not in ", index.filename().string());
  return weights;
}

const StoredTensor* StoredWeights::find(std::string_view name) const {
  const auto found = std::lower_bound(tensors_.begin(), tensors_.end(), name,
                                      [](const StoredTensor& t, std::string_view n) { return t.name < n; });
  return found == tensors_.end() || found->name != name ? nullptr : &*found;
}

int64_t SafetensorsWriter::Entry::bytes() const {
  return std::accumulate(shape.begin(), shape.end(), stored_dtype_bytes(dtype), std::multiplies<>());
}

SafetensorsWriter::SafetensorsWriter(const fs::path& path, const std::vector<Entry>& entries) : file_(path) {
  const std::string name = path.filename();
  nlohmann::ordered_json header;
  header["__metadata__"] = {{"format", "pt"}};
  int64_t end = 0;
  for (const Entry& e : entries) {
    const int64_t begin = end;
    end += e.bytes();
    // A list, not [] on the object: ordered objects search for every key.
    header.get_ref<nlohmann::ordered_json::object_t&>().emplace_back(
        e.name, nlohmann::ordered_json{
                    {"dtype", stored_dtype_name(e.dtype)}, {"shape", e.shape}, {"data_offsets", {begin, end}}});
  }
  std::string text = header.dump();
  constexpr size_t alignment = 64;
  text.append((alignment - (length_bytes + text.size()) % alignment) % alignment, ' ');
  const uint64_t length = text.size();
  text.insert(0, reinterpret_cast<const char*>(&length), length_bytes);
  file_.write(bytes_of(text));

  const int64_t header_bytes = static_cast<int64_t>(text.size());
  parts_.push_back({name, "header", 0, header_bytes, xxh64(bytes_of(text))});
  end = header_bytes;
  for (const Entry& e : entries) {
    parts_.push_back({name, e.name, end, e.bytes(), 0});
    end += e.bytes();
  }
  current_ = 1;
}

void SafetensorsWriter::write(std::span<const std::byte> data) {
  file_.write(data);
  while (!data.empty()) {
    if (current_ == parts_.size()) fail_machine(parts_[0].file, ": more bytes written than its tensors have");
    FilePart& part = parts_[current_];
    const size_t taken = std::min(data.size(), static_cast<size_t>(part.bytes - written_));
    hasher_.add(data.first(taken));
    data = data.subspan(taken);
    written_ += static_cast<int64_t>(taken);
    if (written_ < part.bytes) break;
    part.hash = std::exchange(hasher_, Hasher()).value();
    ++current_, written_ = 0;
  }
}

void SafetensorsWriter::finish() {
  for (; current_ < parts_.size() && parts_[current_].bytes == 0; ++current_) parts_[current_].hash = Hasher().value();
  if (current_ != parts_.size())
    fail_machine(parts_[0].file, ": tensor ", parts_[current_].what, " was not written in full");
  file_.finish();
}

}  // namespace orpo
