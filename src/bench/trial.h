// A trial: ./orpo_train as a user starts it, with --profile; what it says of itself, and what the system says of it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "src/json.h"

namespace orpo::bench {

struct Trial {
  Json profile;            // OUT/profile.json
  std::string table;       // the printed one
  int64_t peak_bytes = 0;  // resident set
  double seconds() const { return profile.at("seconds").get<double>(); }  // of its fastest step
  double tokens_per_second() const { return profile.at("tokens").get<double>() / seconds(); }
  double pairs_per_second() const { return profile.at("pairs").get<double>() / seconds(); }
  double flops_per_second() const { return profile.at("useful_flops").get<double>() / seconds(); }
};

// Folder for models, rows and outputs, gone with the object.
class Workplace {
 public:
  Workplace();
  ~Workplace();
  Workplace(const Workplace&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// Runs orpo_train with these arguments and --profile; its output lies in work/out until the next trial. Throws
// MachineError with the trial's last line where it fails.
Trial run_trial(const Workplace& work, std::vector<std::string> arguments);

}  // namespace orpo::bench
