// Checkpoints: OUT/checkpoint-N is a Hugging Face model folder, trainer_state.json (as transformers writes it) and
// state/:
//   state/trainer.json           step, data position, seed, counters, options
//   state/optimizer.safetensors  first and second moments, fp32, our own parameter names
//   state/masters.safetensors    master weights, where model.safetensors does not hold them exactly
//   state/checksums              XXH64 of every tensor and of every other file; its last line is its own
// A checkpoint is written to OUT/.checkpoint-N.partial, fsynced, read back and verified, and renamed last. A process
// killed at any moment leaves the older ones whole; what it leaves half-done is swept at the next start.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "src/backend.h"
#include "src/model.h"
#include "src/model_folder.h"

namespace orpo {

// Everything about a run that is no tensor. With a counter-based generator the seed and the step are the whole random
// state and, with the sampler, the whole data position; whatever else a run counts goes into counters.
struct TrainingState {
  int64_t step = 0;       // optimiser steps done
  double epoch = 0;       // passes over the data done
  int64_t max_steps = 0;  // of the whole run
  double epochs = 0;      // of the whole run
  int64_t batch_pairs = 0, eval_every = 0, save_every = 0;
  uint64_t seed = 0;
  std::map<std::string, int64_t> counters;  // the trainer's own: skipped steps, tokens seen, pairs of the data set ...
  std::vector<std::pair<std::string, std::string>> options;  // option_values() of the run
  std::vector<std::string> log_history;                      // one JSON object an entry, with "step" and "epoch"
};

// Masters and AdamW's moments: fp32 in the files.
struct OptimizerTensors {
  Masters masters;
  Weights first, second;
};

// Writes OUT/checkpoint-<state.step>, proves it by reading it back, then deletes the oldest ones beyond keep (at least
// 1). An existing checkpoint of the same step is replaced. Throws MachineError naming path and reason (no space, no
// permission, I/O error); older checkpoints are then as they were and no partial folder is left. tensors_read: called
// when the tensors are not read any more. Returns the checkpoint's folder.
std::filesystem::path save_checkpoint(const std::filesystem::path& out, const TrainingState& state,
                                      const ModelSource& source, const OptimizerTensors& tensors, int64_t keep,
                                      Backend& backend, const std::function<void()>& tensors_read = {});

// A checkpoint whose every byte was compared with its checksums.
struct Checkpoint {
  std::filesystem::path folder;
  TrainingState state;
};

// Verifies a checkpoint folder. Throws UserError: one line naming the file and what is wrong with it.
Checkpoint open_checkpoint(const std::filesystem::path& folder);

// The newest whole checkpoint of a run, none if there is none. Broken ones are passed over, each with one line to
// report. Sweeps what a killed run left half-done, so only the process that writes OUT may call it (FolderLock).
std::optional<Checkpoint> find_resumable(const std::filesystem::path& out,
                                         const std::function<void(const std::string&)>& report);

// Removes partial and outdated folders of a killed run, and finishes a replacement that was cut off.
void sweep_leftovers(const std::filesystem::path& out);

// OUT/checkpoint-N by ascending N, whole or not.
std::vector<std::pair<int64_t, std::filesystem::path>> list_checkpoints(const std::filesystem::path& out);

// Fills masters and moments, bit for bit as they were saved (masters of fp32 training, loaded into bf16 weights with
// corrections, as master.h says). Throws UserError where the checkpoint is of another model.
void load_checkpoint(const Checkpoint& checkpoint, const Config& config, const OptimizerTensors& tensors,
                     Backend& backend);

// The parsers of state/trainer.json with trainer_state.json, and of state/checksums. UserError; where is the folder.
TrainingState parse_training_state(std::string_view trainer_json, std::string_view trainer_state_json,
                                   const std::string& where);
std::vector<FilePart> parse_checksums(std::string_view text, const std::string& where);

}  // namespace orpo
