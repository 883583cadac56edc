#include "src/checkpoint.h"

#include <algorithm>
#include <charconv>
#include <optional>

#include "src/fail.h"
#include "src/files.h"
#include "src/stored_values.h"
#include "src/training_state.h"

namespace fs = std::filesystem;

namespace orpo {
namespace {

constexpr const char *optimizer_file = "state/optimizer.safetensors", *masters_file = "state/masters.safetensors",
                     *trainer_file = "state/trainer.json", *trainer_state_file = "trainer_state.json",
                     *checksums_file = "state/checksums";

std::string checkpoint_name(int64_t step) { return "checkpoint-" + std::to_string(step); }
fs::path hidden(const fs::path& out, int64_t step, const char* fate) {
  return out / ("." + checkpoint_name(step) + fate);
}

std::optional<int64_t> step_of(std::string_view name) {
  constexpr std::string_view prefix = "checkpoint-";
  int64_t step = 0;
  if (!name.starts_with(prefix)) return std::nullopt;
  name.remove_prefix(prefix.size());
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), step);
  if (error != std::errc() || end != name.data() + name.size() || std::to_string(step) != name || step < 0)
    return std::nullopt;
  return step;
}

// Our own tensors in one file: names and fused shapes as in parameters().
std::vector<FilePart> write_state(const fs::path& folder, const char* file, const Config& config,
                                  const std::vector<std::pair<std::string, Masters>>& groups, Backend& backend) {
  std::vector<SafetensorsWriter::Entry> entries;
  std::vector<Parameter> list;
  for (const auto& [group, masters] : groups)
    for (const Parameter& p : parameters(config, masters)) {
      entries.push_back(
          {group + p.name, StoredDType::f32, {p.tensor.shape.begin(), p.tensor.shape.begin() + p.tensor.rank}});
      list.push_back(p);
    }
  SafetensorsWriter writer(folder / file, entries);
  for (const Parameter& p : list) write_values(writer, p.master(), false, StoredDType::f32, p.name, backend);
  writer.finish();
  std::vector<FilePart> parts = writer.parts();
  for (FilePart& part : parts) part.file = file;
  return parts;
}

void read_state(const fs::path& folder, const char* file, const Config& config,
                const std::vector<std::pair<std::string, Masters>>& groups, Backend& backend) {
  const StoredWeights stored = StoredWeights::of_file(folder / file);
  size_t expected = 0;
  for (const auto& [group, masters] : groups)
    for (const Parameter& p : parameters(config, masters)) {
      const StoredTensor* tensor = stored.find(group + p.name);
      const std::vector<int64_t> shape(p.tensor.shape.begin(), p.tensor.shape.begin() + p.tensor.rank);
      if (!tensor || tensor->shape != shape || tensor->dtype != StoredDType::f32)
        fail((folder / file).string(), ": tensor '", group + p.name, "' ", shape_text(p.tensor),
             tensor ? " has another shape or dtype" : " is missing", "; the checkpoint is of another model");
      read_values(p.master(), *tensor, false, backend);
      ++expected;
    }
  if (stored.tensors().size() != expected)
    fail((folder / file).string(), ": holds ", stored.tensors().size(), " tensors, not ", expected,
         "; the checkpoint is of another model");
}

// One line a part, tab-separated: hash, first byte, bytes, file, what. The last line is the hash of all before it.
std::string checksums_text(const std::vector<FilePart>& parts) {
  std::string text;
  for (const FilePart& p : parts)
    text += concat(hash_text(p.hash), '\t', p.begin, '\t', p.bytes, '\t', p.file, '\t', p.what, '\n');
  return text + hash_text(xxh64(bytes_of(text))) + "\tend\n";
}

// Every file of the list is there, has the size that its parts cover, and every part has its checksum.
void verify(const fs::path& folder) {
  const fs::path list = folder / checksums_file;
  if (!fs::is_directory(folder)) fail(folder.string(), ": is no folder");
  if (!fs::exists(list))
    fail(folder.string(), ": has no ", checksums_file, ", so it is no whole checkpoint of this trainer");
  const std::vector<FilePart> parts = parse_checksums(read_file(list), folder.string());
  std::map<std::string, int64_t> covered;
  for (const FilePart& p : parts) {
    if (covered[p.file] != p.begin) fail(list.string(), ": leaves a gap before byte ", p.begin, " of ", p.file);
    covered[p.file] += p.bytes;
  }
  for (const char* needed : {optimizer_file, trainer_file, trainer_state_file, "config.json"})
    if (!covered.contains(needed)) fail(list.string(), ": does not list ", needed);
  for (const auto& [file, bytes] : covered) {
    std::error_code error;
    const auto size = fs::file_size(folder / file, error);
    if (error) fail((folder / file).string(), ": is missing or unreadable (", error.message(), ")");
    if (static_cast<int64_t>(size) != bytes) fail((folder / file).string(), ": has ", size, " bytes, not ", bytes);
  }
  std::vector<std::string> complaints(parts.size());
#pragma omp parallel for schedule(dynamic)
  for (size_t i = 0; i < parts.size(); ++i) {
    const FilePart& p = parts[i];
    try {
      if (hash_file_part(folder / p.file, p.begin, p.bytes) != p.hash)
        complaints[i] =
            concat((folder / p.file).string(), ": ", p.what == "file" ? "its bytes have" : "'" + p.what + "' has",
                   " changed since it was saved (checksum)");
    } catch (const std::exception& e) {
      complaints[i] = e.what();
    }
  }
  for (const std::string& complaint : complaints)
    if (!complaint.empty()) fail(complaint);
}

void write_checkpoint(const fs::path& folder, const TrainingState& state, const ModelSource& source,
                      const OptimizerTensors& tensors, Backend& backend, const std::function<void()>& tensors_read) {
  const Config& config = source.description.config;
  make_folder(folder / "state");
  std::vector<FilePart> parts = fill_model_folder(folder, source, tensors.masters, backend);
  const auto add = [&](const std::vector<FilePart>& more) { parts.insert(parts.end(), more.begin(), more.end()); };
  add(write_state(folder, optimizer_file, config, {{"first.", tensors.first}, {"second.", tensors.second}}, backend));
  if (source.dtype != StoredDType::f32)
    add(write_state(folder, masters_file, config, {{"", tensors.masters}}, backend));
  if (tensors_read) tensors_read();
  for (const auto& [file, text] :
       {std::pair(trainer_file, trainer_json(state)), std::pair(trainer_state_file, trainer_state_json(state))}) {
    parts.push_back(write_file(folder / file, text));
    parts.back().file = file;
  }
  write_file(folder / checksums_file, checksums_text(parts));
  sync_folder(folder / "state");
  sync_folder(folder);
}

// What the device holds is what was meant: the kernel's copy is dropped first, so the bytes come from the device.
void prove(const fs::path& folder) {
  for (const fs::directory_entry& entry : fs::recursive_directory_iterator(folder))
    if (entry.is_regular_file()) forget_cached(entry.path());
  try {
    verify(folder);
  } catch (const UserError& e) {
    fail_machine("read back: ", e.what());
  }
}

// checkpoint-N appears in one rename. One of the same step steps aside first and is removed last; sweep_leftovers()
// puts it back if the process is killed between.
void publish(const fs::path& partial, const fs::path& out, int64_t step) {
  const fs::path folder = out / checkpoint_name(step), aside = hidden(out, step, ".replaced");
  if (!fs::exists(folder)) return rename_path(partial, folder);
  remove_tree(aside);
  rename_path(folder, aside);
  try {
    rename_path(partial, folder);
  } catch (...) {
    rename_path(aside, folder);
    throw;
  }
  remove_tree(aside);
}

// A removal that is cut off must not leave something that looks like a checkpoint.
void remove_checkpoint(const fs::path& out, int64_t step) {
  const fs::path doomed = hidden(out, step, ".removed");
  remove_tree(doomed);
  rename_path(out / checkpoint_name(step), doomed);
  remove_tree(doomed);
}

}  // namespace

fs::path save_checkpoint(const fs::path& out, const TrainingState& state, const ModelSource& source,
                         const OptimizerTensors& tensors, int64_t keep, Backend& backend,
                         const std::function<void()>& tensors_read) {
  const fs::path partial = hidden(out, state.step, ".partial");
  try {
    make_folder(out);
    remove_tree(partial);
    write_checkpoint(partial, state, source, tensors, backend, tensors_read);
    prove(partial);
    publish(partial, out, state.step);
  } catch (const MachineError& e) {
    std::error_code ignored;
    fs::remove_all(partial, ignored);
    fail_machine(checkpoint_name(state.step), " was not saved: ", e.what(), "; older checkpoints are untouched");
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(partial, ignored);
    throw;
  }
  // The one just proven is the first to keep, whatever its number.
  std::vector<std::pair<int64_t, fs::path>> others = list_checkpoints(out);
  std::erase_if(others, [&](const auto& c) { return c.first == state.step; });
  for (int64_t i = 0; i + std::max<int64_t>(keep, 1) - 1 < static_cast<int64_t>(others.size()); ++i)
    remove_checkpoint(out, others[i].first);
  return out / checkpoint_name(state.step);
}

std::vector<std::pair<int64_t, fs::path>> list_checkpoints(const fs::path& out) {
  std::vector<std::pair<int64_t, fs::path>> found;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(out, error))
    if (const auto step = step_of(entry.path().filename().string()); step && entry.is_directory())
      found.emplace_back(*step, entry.path());
  std::sort(found.begin(), found.end());
  return found;
}

void sweep_leftovers(const fs::path& out) {
  std::vector<fs::path> leftovers;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(out, error)) {
    const std::string ending = entry.path().extension(), stem = entry.path().stem();
    const bool ours = stem == ".model" || (stem.starts_with(".") && step_of(stem.substr(1)));
    if (ours && (ending == ".partial" || ending == ".removed" || ending == ".replaced"))
      leftovers.push_back(entry.path());
  }
  for (const fs::path& path : leftovers) {
    const fs::path place = out / path.stem().string().substr(1);
    if (path.extension() == ".replaced" && !fs::exists(place))
      rename_path(path, place);
    else
      remove_tree(path);
  }
}

Checkpoint open_checkpoint(const fs::path& folder) {
  verify(folder);
  return {folder, parse_training_state(read_file(folder / trainer_file), read_file(folder / trainer_state_file),
                                       folder.string())};
}

std::optional<Checkpoint> find_resumable(const fs::path& out, const std::function<void(const std::string&)>& report) {
  sweep_leftovers(out);
  std::vector<std::pair<int64_t, fs::path>> found = list_checkpoints(out);
  for (auto newest = found.rbegin(); newest != found.rend(); ++newest) {
    try {
      return open_checkpoint(newest->second);
    } catch (const UserError& e) {
      report(concat(checkpoint_name(newest->first), " is broken and passed over: ", e.what()));
    }
  }
  return std::nullopt;
}

void load_checkpoint(const Checkpoint& checkpoint, const Config& config, const OptimizerTensors& tensors,
                     Backend& backend) {
  const fs::path& folder = checkpoint.folder;
  read_state(folder, optimizer_file, config, {{"first.", tensors.first}, {"second.", tensors.second}}, backend);
  if (fs::exists(folder / masters_file))
    read_state(folder, masters_file, config, {{"", tensors.masters}}, backend);
  else
    load_weights(folder, config, tensors.masters, backend);
  backend.synchronize();
}

std::vector<FilePart> parse_checksums(std::string_view text, const std::string& where) {
  const auto refuse = [&](const auto&... what) { fail(where, "/", checksums_file, ": ", what...); };
  const auto number = [&](std::string_view field, int base, auto& value) {
    const auto [end, error] = std::from_chars(field.data(), field.data() + field.size(), value, base);
    if (error != std::errc() || end != field.data() + field.size()) refuse("'", field, "' is no number");
  };
  std::vector<FilePart> parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    if (end == text.npos) refuse("is truncated");
    std::vector<std::string_view> fields;
    for (size_t at = begin; at <= end;) {
      const size_t stop = std::min(text.find('\t', at), end);
      fields.push_back(text.substr(at, stop - at));
      at = stop + 1;
    }
    if (fields.size() == 2 && fields[1] == "end") {
      uint64_t hash = 0;
      number(fields[0], 16, hash);
      if (hash != xxh64(bytes_of(text.substr(0, begin))) || end + 1 != text.size())
        refuse("does not have its own checksum");
      return parts;
    }
    if (fields.size() != 5) refuse("line ", parts.size() + 1, " has ", fields.size(), " fields, not 5");
    FilePart p{std::string(fields[3]), std::string(fields[4]), 0, 0, 0};
    number(fields[0], 16, p.hash);
    number(fields[1], 10, p.begin);
    number(fields[2], 10, p.bytes);
    const fs::path file(p.file);
    if (p.begin < 0 || p.bytes < 0 || file.empty() || file.is_absolute() ||
        std::find(file.begin(), file.end(), "..") != file.end())
      refuse("line ", parts.size() + 1, " names no part of a file in the checkpoint");
    parts.push_back(std::move(p));
    begin = end + 1;
  }
  refuse("is truncated");
  return parts;
}

}  // namespace orpo
