// What a person sees while a program works, on stderr: lines that stay, and one progress line that is overwritten.
// Where stderr is no terminal everything is a plain line, progress at most every few seconds. NO_COLOR and FORCE_COLOR
// are honoured.
#pragma once

#include <chrono>
#include <cstdio>
#include <string>

#include "src/fail.h"

namespace orpo {

enum class Style { plain, bold };

class Console {
 public:
  Console();
  ~Console() { finish(); }

  template <class... Parts>
  void say(const Parts&... parts) {
    line(concat(parts...));
  }
  void line(const std::string& text);
  // The current state of the work; last: keep it on the screen, however recent the one before.
  void progress(const std::string& text, bool last = false);
  void finish();  // ends an open progress line

  std::string styled(const std::string& text, Style style) const;  // plain where stderr shows no styles

 private:
  bool terminal_, colour_, open_ = false;
  std::chrono::steady_clock::time_point shown_{};
};

// The one console of the process.
Console& console();

std::string seconds_text(double seconds);  // "42 s", "3:07", "2:10:05"
std::string bytes_text(int64_t bytes);     // "1.4 GiB"
std::string number_text(double value, int decimals);  // "0.250"
std::string number_text(double value);                // the shortest that reads back as the same: "0.25"

}  // namespace orpo
