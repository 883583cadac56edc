#include "src/console.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <charconv>
#include <cmath>
#include <cstdlib>

namespace orpo {
namespace {

bool set_in_environment(const char* name) {
  const char* value = std::getenv(name);
  return value && *value;
}

// So that a progress line stays one line.
size_t terminal_columns() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

}  // namespace

Console::Console()
    : terminal_(isatty(STDERR_FILENO) && std::string(std::getenv("TERM") ? std::getenv("TERM") : "") != "dumb"),
      colour_(!set_in_environment("NO_COLOR") && (terminal_ || set_in_environment("FORCE_COLOR"))) {}

void Console::line(const std::string& text) {
  if (open_) std::fputs("\r\033[K", stderr);
  open_ = false;
  std::fprintf(stderr, "%s\n", text.c_str());
}

void Console::progress(const std::string& text, bool last) {
  const auto now = std::chrono::steady_clock::now();
  const auto pause = terminal_ ? std::chrono::milliseconds(80) : std::chrono::seconds(5);
  if (!last && now - shown_ < pause) return;
  shown_ = now;
  if (!terminal_) return line(text);
  std::fprintf(stderr, "\r\033[K%s", text.substr(0, terminal_columns() - 1).c_str());
  open_ = true;
  if (last) finish();
}

void Console::finish() {
  if (open_) std::fputc('\n', stderr);
  open_ = false;
}

std::string Console::styled(const std::string& text, Style style) const {
  if (!colour_ || style == Style::plain) return text;
  return concat("\033[1m", text, "\033[0m");
}

Console& console() {
  static Console instance;
  return instance;
}

std::string number_text(double value) {
  char buffer[40];
  return {buffer, std::to_chars(buffer, buffer + sizeof buffer, value).ptr};
}

std::string number_text(double value, int decimals) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "%.*f", decimals, value);
  return buffer;
}

std::string seconds_text(double seconds) {
  if (seconds < 100) return number_text(seconds, seconds < 10 ? 1 : 0) + " s";
  const int64_t s = std::llround(seconds);
  char buffer[64];
  if (s < 3600)
    std::snprintf(buffer, sizeof buffer, "%d:%02d", static_cast<int>(s / 60), static_cast<int>(s % 60));
  else
    std::snprintf(buffer, sizeof buffer, "%lld:%02d:%02d", static_cast<long long>(s / 3600),
                  static_cast<int>(s / 60 % 60), static_cast<int>(s % 60));
  return buffer;
}

std::string bytes_text(int64_t bytes) {
  const char* unit[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  int power = 0;
  for (; value >= 1000 && power < 4; ++power) value /= 1024;
  return number_text(value, power == 0 || value >= 100 ? 0 : value >= 10 ? 1 : 2) + " " + unit[power];
}

}  // namespace orpo
