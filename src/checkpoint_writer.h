// A checkpoint written beside training. The writing thread reads the run's own tensors, no copy of them: the next step
// computes its gradient meanwhile, and only its update waits until they have been read (wait_until_read). Flushing,
// reading back, renaming and the removal of old ones go on beside the steps that follow.
#pragma once

#include <filesystem>
#include <functional>
#include <future>
#include <optional>

namespace orpo {

class CheckpointWriter {
 public:
  // Writes a checkpoint, calls tensors_read once it needs the tensors no more, and returns the checkpoint's folder.
  using Save = std::function<std::filesystem::path(const std::function<void()>& tensors_read)>;

  // Waits for a save that is under way; its error, if any, goes unheard.
  ~CheckpointWriter() = default;

  // One at a time: the one before must have been collected.
  void start(Save save);
  // Returns when the tensors may change.
  void wait_until_read();
  // The folder of a save that has ended, once; with wait: of the one under way too. Nothing where there is none. Throws
  // what the save threw.
  std::optional<std::filesystem::path> collect(bool wait);

 private:
  std::future<void> tensors_read_;
  std::future<std::filesystem::path> folder_;  // last: its destructor waits for the thread
};

}  // namespace orpo
