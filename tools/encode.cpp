// Ids of texts, for tools/compare_tokenizers.py: FOLDER on the command line, one JSON string a line on stdin; out: a
// JSON list of ids, a tab, the decoded text as a JSON string. With a file of such lines as second argument: megabytes a
// second on one thread. With --template, for tools/make_template_fixtures.py: {"jinja", "bos", "eos", "conversations"}
// on stdin; out: the named template that it is and what that renders.
#include <chrono>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "src/fail.h"
#include "tokenizer/template.h"
#include "tokenizer/tokenizer.h"

namespace {

void measure(const orpo::Tokenizer& tokenizer, const char* file) {
  std::ifstream in(file);
  std::vector<std::string> texts;
  size_t bytes = 0, ids = 0;
  for (std::string line; std::getline(in, line); bytes += texts.back().size())
    texts.push_back(nlohmann::json::parse(line));
  const auto begin = std::chrono::steady_clock::now();
  for (const std::string& text : texts) ids += tokenizer.encode(text).size();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::printf("%.1f MB/s (%zu bytes, %zu ids)\n", bytes / seconds / 1e6, bytes, ids);
}

void render(const nlohmann::json& request) {
  const auto found = orpo::recognise_template(request["jinja"], {request["bos"], request["eos"]});
  nlohmann::json out = {{"name", nullptr}, {"rendered", nlohmann::json::array()}};
  if (found) out["name"] = found->name();
  for (const auto& conversation : request["conversations"]) {
    std::vector<orpo::Message> messages;
    for (const auto& m : conversation["messages"]) messages.push_back({m["role"], m["content"]});
    nlohmann::json row;
    try {
      if (found) row = {found->prompt(messages), found->response(messages, conversation["answer"].get<std::string>())};
    } catch (const orpo::UserError&) {
    }
    out["rendered"].push_back(row);
  }
  std::cout << out.dump() << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  return orpo::run_program("encode", [&] {
    if (argc < 2) orpo::fail("usage: encode FOLDER [FILE-TO-TIME] < strings.jsonl");
    if (argv[1] == std::string("--template")) {
      render(nlohmann::json::parse(std::cin));
      return 0;
    }
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
