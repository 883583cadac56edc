// Bytes as tokenizer.json, as tokenizer.model and as a chat template: each is refused by a UserError of one line, or it
// works.
#include <fstream>
#include <string>

#include "src/fail.h"
#include "tests/temporary_folder.h"
#include "tokenizer/template.h"
#include "tokenizer/tokenizer.h"

namespace {

void load_as(const char* name, const std::string& bytes) {
  static const orpo::TemporaryFolder folder;
  const auto file = folder.path() / name;
  std::ofstream(file, std::ios::binary) << bytes;
  try {
    const auto tokenizer = orpo::Tokenizer::load(folder.path());
    for (const std::string& text : {std::string(" Hello  w\u00f6rld 123's\n<s>\xff"), bytes.substr(0, 300)}) {
      const auto ids = tokenizer->encode(text);
      for (const int32_t id : ids)
        if (id < 0 || id >= tokenizer->vocabulary_size()) __builtin_trap();
      tokenizer->decode(ids, true);
    }
  } catch (const orpo::UserError&) {
  }
  std::filesystem::remove(file);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, size_t size) {
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  load_as("tokenizer.json", bytes);
  load_as("tokenizer.model", bytes);
  orpo::recognise_template(bytes, {"<s>", "</s>"});
  return 0;
}
