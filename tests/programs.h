// Runs the programs as a user does and keeps what they say.
#pragma once

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "src/json.h"
#include "tests/temporary_folder.h"

namespace orpo::test {

namespace fs = std::filesystem;

inline std::string text_of(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

inline std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

struct Outcome {
  int status = -1;  // -1: did not exit by itself
  std::string out, err;
  std::string last_error_line() const { return err.empty() ? "" : lines_of(err).back(); }
};

// A program's process. The programs lie beside the tests, or, built for release, at the top of the repository.
class Process {
 public:
  Process(const std::string& program, const std::vector<std::string>& arguments, const fs::path& folder)
      : folder_(folder) {
    std::error_code unknown;  // where /proc is not mounted; then the programs are those of the working folder
    const fs::path tests = fs::read_symlink("/proc/self/exe", unknown).parent_path();
    fs::path path = tests / program;
    if (!fs::exists(path)) path = fs::current_path() / program;
    process_ = fork();
    if (process_ != 0) return;
    const auto redirect = [&](const char* name, int to) {
      dup2(open((folder_ / name).c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), to);
    };
    redirect("stdout", STDOUT_FILENO);
    redirect("stderr", STDERR_FILENO);
    setenv("ORPO_CACHE", (folder_ / "cache").c_str(), 1);
    std::vector<char*> words{const_cast<char*>(program.c_str())};
    for (const std::string& a : arguments) words.push_back(const_cast<char*>(a.c_str()));
    words.push_back(nullptr);
    execv(path.c_str(), words.data());
    _exit(127);
  }
  void signal(int number) const { kill(process_, number); }
  Outcome wait() const {
    Outcome outcome;
    int status = 0;
    waitpid(process_, &status, 0);
    if (WIFEXITED(status)) outcome.status = WEXITSTATUS(status);
    outcome.out = text_of(folder_ / "stdout");
    outcome.err = text_of(folder_ / "stderr");
    return outcome;
  }

 private:
  fs::path folder_;
  pid_t process_ = -1;
};

inline Outcome run(const std::string& program, const std::vector<std::string>& arguments, const fs::path& folder) {
  return Process(program, arguments, folder).wait();
}

inline const char* tiny_model_folder = "tests/fixtures/reference_odd";  // vocabulary 123

// Pre-tokenised rows, seeded; ids of 3 ... 122.
inline void write_rows(const fs::path& file, int rows, unsigned seed) {
  std::mt19937 random(seed);
  const auto list = [&](int least, int most) {
    std::string text = "[";
    for (int n = std::uniform_int_distribution<int>(least, most)(random); n > 0; --n)
      text += std::to_string(std::uniform_int_distribution<int>(3, 122)(random)) + (n > 1 ? ", " : "");
    return text + "]";
  };
  std::ofstream out(file);
  for (int i = 0; i < rows; ++i)
    out << "{\"prompt_ids\": " << list(1, 12) << ", \"chosen_ids\": " << list(2, 9)
        << ", \"rejected_ids\": " << list(2, 9) << "}\n";
}

// The lines of metrics.jsonl; training lines alone unless evaluations are asked for.
inline std::vector<Json> metrics_of(const fs::path& out, bool evaluations = false) {
  std::vector<Json> result;
  for (const std::string& line : lines_of(text_of(out / "metrics.jsonl"))) {
    Json object = parse_json(line, "metrics.jsonl");
    if (object.contains("eval_loss") == evaluations) result.push_back(std::move(object));
  }
  return result;
}

}  // namespace orpo::test
