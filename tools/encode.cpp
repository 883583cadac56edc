// Ids of texts, for tools/compare_tokenizers.py: FOLDER on the command line, one JSON string a line on stdin; out: a JSON list of ids,
// a tab, the decoded text as a JSON string. With a file of such lines as second argument: megabytes a second on one thread.
#include <chrono>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "src/fail.h"
#include "tokenizer/tokenizer.h"

namespace {

void measure(const orpo::Tokenizer& tokenizer, const char* file) {
  std::ifstream in(file);
  std::vector<std::string> texts;
  size_t bytes = 0, ids = 0;
  for (std::string line; std::getline(in, line); bytes += texts.back().size()) texts.push_back(nlohmann::json::parse(line));
  const auto begin = std::chrono::steady_clock::now();
  for (const std::string& text : texts) ids += tokenizer.encode(text).size();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::printf("%.1f MB/s (%zu bytes, %zu ids)\n", bytes / seconds / 1e6, bytes, ids);
}

}  // namespace

int main(int argc, char** argv) {
  return orpo::run_program("encode", [&] {
    if (argc < 2) orpo::fail("usage: encode FOLDER [FILE-TO-TIME] < strings.jsonl");
    const auto tokenizer = orpo::Tokenizer::load(argv[1]);
    if (argc > 2) {
      for (int pass = 0; pass < 3; ++pass) measure(*tokenizer, argv[2]);
      return 0;
    }
    for (std::string line; std::getline(std::cin, line);) {
      const auto ids = tokenizer->encode(nlohmann::json::parse(line).get<std::string>());
      std::cout << nlohmann::json(ids).dump() << '\t' << nlohmann::json(tokenizer->decode(ids)).dump() << '\n';
    }
    return 0;
  });
}
