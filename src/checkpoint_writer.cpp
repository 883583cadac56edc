#include "src/checkpoint_writer.h"

#include <omp.h>

#include <chrono>
#include <memory>
#include <utility>

#include "src/fail.h"

namespace orpo {

void CheckpointWriter::start(Save save) {
  if (folder_.valid()) fail_machine("a checkpoint is being written already");
  auto read = std::make_unique<std::promise<void>>();
  tensors_read_ = read->get_future();
  folder_ = std::async(std::launch::async, [save = std::move(save), read = std::move(read)]() mutable {
    omp_set_num_threads(1);  // of this thread: the cores are the step's
    const auto tell = [&] {
      if (const auto promise = std::exchange(read, nullptr)) promise->set_value();
    };
    try {
      std::filesystem::path folder = save(tell);
      tell();
      return folder;
    } catch (...) {
      tell();
      throw;
    }
  });
}

void CheckpointWriter::wait_until_read() {
  if (tensors_read_.valid()) tensors_read_.get();
}

std::optional<std::filesystem::path> CheckpointWriter::collect(bool wait) {
  if (!folder_.valid()) return std::nullopt;
  if (!wait && folder_.wait_for(std::chrono::seconds(0)) != std::future_status::ready) return std::nullopt;
  return folder_.get();
}

}  // namespace orpo
