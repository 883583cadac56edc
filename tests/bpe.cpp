// Token ids against Hugging Face's, on small tokenizers of every kind (tests/fixtures/tokenizer_*,
// tools/make_tokenizer_fixtures.py).
#include <doctest/doctest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "src/fail.h"
#include "tests/temporary_folder.h"
#include "tokenizer/bpe.h"
#include "tokenizer/splitter.h"
#include "tokenizer/tokenizer.h"

using namespace orpo;
using Json = nlohmann::json;
namespace fs = std::filesystem;

namespace {

const fs::path fixtures = "tests/fixtures";

Json cases() {
  std::ifstream in(fixtures / "tokenizer_cases.json");
  REQUIRE(in);
  return Json::parse(in);
}

}  // namespace

TEST_CASE("token ids, decoded text and special tokens are those of Hugging Face") {
  const Json all = cases();
  REQUIRE(all["folders"].size() == 10);
  for (const auto& [folder, expected] : all["folders"].items()) {
    CAPTURE(folder);
    const auto tokenizer = Tokenizer::load(fixtures / folder);
    CHECK(tokenizer->vocabulary_size() == expected["size"].get<int>());
    const auto optional = [](const Json& id) { return id.is_null() ? std::nullopt : std::optional(id.get<int32_t>()); };
    CHECK(tokenizer->begin_of_sequence == optional(expected["bos"]));
    CHECK(tokenizer->end_of_sequence == optional(expected["eos"]));
    CHECK(tokenizer->adds_begin_of_sequence == expected["begins"].get<bool>());
    const Json& texts = expected.contains("texts") ? expected["texts"] : all["texts"];
    REQUIRE(texts.size() > 150);
    for (size_t i = 0; i < texts.size(); ++i) {
      CAPTURE(texts[i].dump());
      const auto ids = tokenizer->encode(texts[i].get<std::string>());
      CHECK(Json(ids) == expected["ids"][i]);
      if (!expected["decoded"].is_null()) CHECK(tokenizer->decode(ids) == expected["decoded"][i].get<std::string>());
    }
  }
}

TEST_CASE("the matchers of known patterns and PCRE2 cut the words that Hugging Face's expressions cut") {
  const Json all = cases();
  REQUIRE(all["patterns"].size() == 3);
  for (const auto& [name, entry] : all["patterns"].items()) {
    const auto pattern = entry["pattern"].get<std::string>();
    const auto own = make_pattern_splitter(pattern, MatchBehavior::isolated, false, "here");
    const auto general = make_pattern_splitter("(?:" + pattern + ")", MatchBehavior::isolated, false, "here");
    for (size_t i = 0; i < all["sample"].size(); ++i) {
      const auto text = all["sample"][i].get<std::string>();
      CAPTURE(name);
      CAPTURE(Json(text).dump());
      std::vector<std::string_view> words, same;
      own->split(text, words);
      general->split(text, same);
      CHECK(Json(words) == entry["words"][i]);
      // U+11DE0 and U+1E4F1 are younger than PCRE2 10.42's Unicode.
      if (text.find("\U00011DE0") == std::string::npos && text.find("\U0001E4F1") == std::string::npos) CHECK(same == words);
    }
  }
}

TEST_CASE("one tokenizer serves many threads, and a thread many tokenizers") {
  const Json all = cases();
  const auto one = Tokenizer::load(fixtures / "tokenizer_qwen2"),
             other = Tokenizer::load(fixtures / "tokenizer_digits");
  std::vector<std::vector<int32_t>> alone, alone_other;
  for (const Json& text : all["texts"]) {
    alone.push_back(one->encode(text.get<std::string>()));
    alone_other.push_back(other->encode(text.get<std::string>()));
  }
  CHECK(alone != alone_other);
  std::vector<int> wrong(4);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (int pass = 0; pass < 5; ++pass)
        for (size_t i = 0; i < alone.size(); ++i) {
          const auto text = all["texts"][i].get<std::string>();
          wrong[t] += one->encode(text) != alone[i] || other->encode(text) != alone_other[i];
        }
    });
  for (auto& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>(4));
}

TEST_CASE("invalid UTF-8 is encoded byte by byte and comes back as replacement characters") {
  const std::string broken = "a\xff\xfe b\xe4\xbd \xed\xa0\x80 c\xf0\x9f\x98";
  for (const char* folder : {"tokenizer_gpt2", "tokenizer_qwen2", "tokenizer_flags", "tokenizer_prepend",
                             "tokenizer_pieces_first", "tokenizer_unigram"}) {
    CAPTURE(folder);
    const auto tokenizer = Tokenizer::load(fixtures / folder);
    const auto ids = tokenizer->encode(broken);
    CHECK(ids.size() > 4);
    CHECK(tokenizer->decode(ids).find("\uFFFD") != std::string::npos);
  }
}

TEST_CASE("long words are joined as short ones are") {
  // The same symbols go through the scan (up to 64) and the queue (more): a long word of equal parts that do not join
  // with each other gives the part's ids again and again.
  BpeFiles files;
  const char* tokens[] = {"a", "b", "c", "ab", "abc", "bc"};
  for (int i = 0; i < 6; ++i) files.vocabulary[tokens[i]] = i;
  files.merges = {{"b", "c"}, {"a", "b"}, {"a", "bc"}, {"ab", "c"}};
  files.byte_level = true;
  const Bpe bpe(files, "here");
  std::vector<int32_t> part, whole;
  bpe.encode("abcaab", part);
  CHECK(part == std::vector<int32_t>{4, 0, 3});
  std::string word;
  for (int i = 0; i < 100; ++i) word += "abcaab";
  bpe.encode(word, whole);
  REQUIRE(whole.size() == 300);
  for (size_t i = 0; i < whole.size(); ++i) CHECK(whole[i] == part[i % 3]);

  // Of equal merges the leftmost comes first: an odd run leaves its last symbol alone.
  BpeFiles run;
  run.vocabulary = {{"a", 0}, {"aa", 1}};
  run.merges = {{"a", "a"}};
  run.byte_level = true;
  const Bpe doubles(run, "here");
  for (const size_t length : {5, 63, 65, 201}) {
    std::vector<int32_t> ids, expected(length / 2, 1);
    expected.push_back(0);
    doubles.encode(std::string(length, 'a'), ids);
    CHECK(ids == expected);
  }
}

TEST_CASE("broken tokenizer files give one line that names the file and the place") {
  std::ifstream in(fixtures / "tokenizer_digits/tokenizer.json");
  const std::string good{std::istreambuf_iterator<char>(in), {}};
  const TemporaryFolder folder;
  const auto refusal = [&](const std::string& text) -> std::string {
    std::ofstream(folder.path() / "tokenizer.json") << text;
    try {
      Tokenizer::load(folder.path());
    } catch (const UserError& e) {
      CHECK(std::string(e.what()).find('\n') == std::string::npos);
      return e.what();
    }
    return "";
  };
  const auto with = [&](auto&& change) {
    Json json = Json::parse(good);
    change(json);
    return refusal(json.dump());
  };
  const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
  CHECK(refusal(good).empty());
  CHECK(has(refusal(good.substr(0, good.size() / 2)), "not whole JSON"));
  CHECK(has(refusal(""), "not whole JSON"));
  CHECK(has(refusal("[]"), "expected an object"));
  CHECK(has(refusal("{}"), "\"model\" is missing"));
  CHECK(has(with([](Json& j) { j["model"]["vocab"] = Json::array(); }), "model.vocab: expected an object"));
  CHECK(has(with([](Json& j) { j["model"]["vocab"]["a"] = -1; }), "whole number"));
  CHECK(has(with([](Json& j) { j["model"]["vocab"]["a"] = 1e9; }), "whole number"));
  CHECK(has(with([](Json& j) { j["model"]["merges"][0] = "abc"; }), "model.merges[0]"));
  CHECK(has(with([](Json& j) { j["model"]["merges"][0] = {"zzz", "q"}; }), "\"zzz\", which is not in the vocabulary"));
  CHECK(has(with([](Json& j) { j["model"]["dropout"] = 0.1; }), "dropout is not supported"));
  CHECK(has(with([](Json& j) { j["model"]["type"] = "WordPiece"; }), "WordPiece"));
  CHECK(has(with([](Json& j) { j["model"]["continuing_subword_prefix"] = "##"; }), "continuing_subword_prefix"));
  CHECK(has(with([](Json& j) { j["model"]["unk_token"] = "<none>"; }), "<none>"));
  CHECK(has(with([](Json& j) { j["normalizer"] = {{"type", "Lowercase"}}; }), "the normalizer Lowercase"));
  CHECK(has(with([](Json& j) { j["pre_tokenizer"] = {{"type", "BertPreTokenizer"}}; }), "BertPreTokenizer"));
  CHECK(has(with([](Json& j) {
              j["pre_tokenizer"]["pretokenizers"][0] = {
                  {"type", "Split"}, {"pattern", {{"Regex", "("}}}, {"behavior", "Isolated"}};
            }),
            "does not compile"));
  CHECK(has(with([](Json& j) { j["added_tokens"][0].erase("content"); }), "added_tokens[0]"));
  CHECK(has(with([](Json& j) { j["added_tokens"][0]["lstrip"] = 1; }), "added_tokens[0].lstrip: expected a boolean"));
  fs::remove(folder.path() / "tokenizer.json");
  CHECK_THROWS_WITH_AS(Tokenizer::load(folder.path()), doctest::Contains("has no tokenizer"), UserError);
  std::ofstream(folder.path() / "tokenizer.model") << "no model";
  CHECK_THROWS_WITH_AS(Tokenizer::load(folder.path()), doctest::Contains("not a whole sentencepiece model"), UserError);
}
