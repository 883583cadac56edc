// The options table behind config.h: one entry an option, whatever program it is of. Its defaults are those of struct
// Options.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "src/config.h"

namespace orpo {

struct Option {
  // What a resumed run does with the checkpoint's copy: takes it unless the option is given anew; insists on it (it
  // fixes what the saved state means, such as the order of the pairs); or asks the command line alone.
  enum class Resume { takes, insists, asks };

  std::string name;   // as echoed: "learning-rate"
  std::string value;  // what --help shows for it: "NUMBER"; empty: a flag
  const char* group = "";
  unsigned programs = 0;  // bits of Program
  std::string help;
  std::vector<std::string> aliases;
  Resume resume = Resume::takes;
  std::string default_text;  // where the default's value does not speak for itself
  bool list = false;         // takes several values; set() is called with each
  std::string implied;       // the value of a flag, or of an optional one that stands alone

  // Throws UserError without the option's name; the parser adds it.
  std::function<void(Options&, const std::string&)> set;
  std::function<std::string(const Options&)> get;
  std::function<void(Options&)> clear;  // lists: forget all values

  // For the table's writer.
  Option& alias(std::string other) { return aliases.push_back(std::move(other)), *this; }
  Option& insists() { return resume = Resume::insists, *this; }
  Option& asks() { return resume = Resume::asks, *this; }
  Option& shown_as(std::string text) { return default_text = std::move(text), *this; }

  bool is_flag() const { return value.empty(); }
  bool concerns(Program program) const { return programs & static_cast<unsigned>(program); }
};

// Every option of every program but --config and --help, in the order of --help.
const std::vector<Option>& option_table();
const char* program_name(Program program);  // "orpo_train"

}  // namespace orpo
