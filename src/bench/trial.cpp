#include "src/bench/trial.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>

#include "src/fail.h"
#include "src/files.h"

namespace orpo::bench {
namespace {

namespace fs = std::filesystem;

// Beside this program, or, built for release, at the top of the repository.
fs::path train_program() {
  std::error_code unknown;  // where /proc is not mounted
  const fs::path beside = fs::read_symlink("/proc/self/exe", unknown).parent_path() / "orpo_train";
  if (fs::exists(beside)) return beside;
  if (const fs::path here = fs::current_path() / "orpo_train"; fs::exists(here)) return here;
  fail("orpo_train is neither beside this program nor in this folder; `make bench` builds both");
}

std::string last_line(const std::string& text) {
  const size_t end = text.find_last_not_of('\n');
  if (end == std::string::npos) return "no word";
  const size_t newline = text.rfind('\n', end);
  const size_t begin = newline == std::string::npos ? 0 : newline + 1;
  return text.substr(begin, end + 1 - begin);
}

}  // namespace

Workplace::Workplace() {
  std::string name = (fs::temp_directory_path() / "orpo_bench_XXXXXX").string();
  if (!mkdtemp(name.data())) fail_machine("no folder for temporary files in ", fs::temp_directory_path().string());
  path_ = name;
}

Workplace::~Workplace() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

Trial run_trial(const Workplace& work, std::vector<std::string> arguments) {
  const fs::path program = train_program(), out = work.path() / "out", said = work.path() / "stdout",
                 complained = work.path() / "stderr";
  arguments.insert(arguments.begin(), program.string());
  for (const char* word : {"--profile", "--overwrite", "--output"}) arguments.push_back(word);
  arguments.push_back(out.string());
  std::vector<char*> words;
  for (std::string& a : arguments) words.push_back(a.data());
  words.push_back(nullptr);

  const pid_t child = fork();
  if (child < 0) fail_machine("no process for ", program.string());
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);  // a trial does not outlive the benchmark
    dup2(open(said.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), STDOUT_FILENO);
    dup2(open(complained.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), STDERR_FILENO);
    setenv("ORPO_CACHE", (work.path() / "cache").c_str(), 1);
    execv(program.c_str(), words.data());
    _exit(127);
  }
  int status = 0;
  rusage usage{};
  wait4(child, &status, 0, &usage);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
    fail_machine("a trial failed: ", last_line(read_file(complained)));
  Trial trial;
  const fs::path file = out / "profile.json";
  trial.profile = parse_json(read_file(file), file.string());
  trial.table = read_file(said);
  trial.peak_bytes = static_cast<int64_t>(usage.ru_maxrss) * 1024;
  return trial;
}

}  // namespace orpo::bench
