// Errors. A program ends with exit status 2 for what the user gave and 1 for what the machine did; either way the last
// line on stderr is one sentence: what, where, why, what to do. Library code throws; only the mains catch
// (run_program).
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>

namespace orpo {

enum ExitStatus : int { exit_finished = 0, exit_machine = 1, exit_user = 2, exit_stopped = 75 };

// What the user gave: a file, an option, a row. Exit status 2.
struct UserError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What the machine did: disk full, device lost, a broken promise inside the program. Exit status 1.
struct MachineError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw UserError(concat(parts...));
}

template <class... Parts>
[[noreturn]] void fail_machine(const Parts&... parts) {
  throw MachineError(concat(parts...));
}

// Operations refuse what they cannot compute: REQUIRE_SHAPE("rope_forward", theta > 0,
// "theta is ", theta).
#define REQUIRE_SHAPE(operation, condition, ...)                                                \
  do {                                                                                          \
    if (!(condition)) ::orpo::fail_machine(operation, ": needs " #condition "; ", __VA_ARGS__); \
  } while (0)

// Runs a program's body and turns what it throws into one line on stderr and an exit status.
template <class Body>
int run_program(const char* name, Body&& body) {
  const auto report = [&](const std::string& text, ExitStatus status) {
    std::string line = text;
    for (char& c : line)
      if (c == '\n' || c == '\r') c = ' ';
    std::fprintf(stderr, "%s: error: %s\n", name, line.c_str());
    return static_cast<int>(status);
  };
  try {
    return body();
  } catch (const UserError& e) {
    return report(e.what(), exit_user);
  } catch (const MachineError& e) {
    return report(e.what(), exit_machine);
  } catch (const std::bad_alloc&) {
    return report("the machine is out of memory; use fewer --micro-tokens or a smaller model", exit_machine);
  } catch (const std::exception& e) {
    return report(e.what(), exit_machine);
  }
}

}  // namespace orpo
