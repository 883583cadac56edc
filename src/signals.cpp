#include "src/signals.h"

#include <chrono>
#include <csignal>

namespace orpo {
namespace {

using Clock = std::chrono::steady_clock;
const Clock::time_point process_start = Clock::now();

volatile std::sig_atomic_t caught = 0;
int64_t limit_seconds = 0;

void on_signal(int signal) {
  if (signal == SIGINT && caught == SIGINT) {
    std::signal(SIGINT, SIG_DFL);
    std::raise(SIGINT);
  }
  caught = signal;
}

bool time_is_up() { return limit_seconds > 0 && Clock::now() - process_start >= std::chrono::seconds(limit_seconds); }

}  // namespace

void catch_stop_signals() {
  struct sigaction action = {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;  // a file being written is written to its end
  for (int signal : {SIGTERM, SIGINT, SIGUSR1}) sigaction(signal, &action, nullptr);
}

void stop_after(int64_t seconds) { limit_seconds = seconds; }

bool stop_requested() { return caught != 0 || time_is_up(); }

const char* stop_reason() {
  return caught == SIGTERM   ? "SIGTERM"
         : caught == SIGINT  ? "SIGINT"
         : caught == SIGUSR1 ? "SIGUSR1"
                             : "--stop-after-seconds";
}

}  // namespace orpo
