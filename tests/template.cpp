// Chat templates against what transformers renders from Jinja (tests/fixtures/template_cases.json,
// tools/make_template_fixtures.py).
#include "tokenizer/template.h"

#include <doctest/doctest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "src/fail.h"
#include "tests/temporary_folder.h"

using namespace orpo;
using Json = nlohmann::json;

namespace {

Json cases() {
  std::ifstream in("tests/fixtures/template_cases.json");
  REQUIRE(in);
  return Json::parse(in);
}

std::vector<Message> messages_of(const Json& list) {
  std::vector<Message> out;
  for (const Json& m : list) out.push_back({m["role"], m["content"]});
  return out;
}

const SpecialTexts texts{"<s>", "</s>"};

}  // namespace

TEST_CASE("each template is recognised in its Jinja spellings and renders as they do") {
  const Json all = cases();
  REQUIRE(all["templates"].size() > 10);
  for (const Json& row : all["templates"]) {
    CAPTURE(row["jinja"].get<std::string>());
    const auto found = recognise_template(row["jinja"], texts);
    REQUIRE(found);
    CHECK(found->name() == row["name"].get<std::string>());
    for (size_t i = 0; i < all["conversations"].size(); ++i) {
      const Json &conversation = all["conversations"][i], &expected = row["rendered"][i];
      CAPTURE(conversation.dump());
      const auto messages = messages_of(conversation["messages"]);
      if (expected.is_null()) {
        CHECK_THROWS_AS(found->prompt(messages), UserError);
        continue;
      }
      CHECK(found->prompt(messages) == expected[0].get<std::string>());
      CHECK(found->response(messages, conversation["answer"].get<std::string>()) == expected[1].get<std::string>());
    }
  }
}

TEST_CASE("other Jinja texts are none of the named templates") {
  const Json unknown = cases()["unknown"];
  for (const Json& jinja : unknown) {
    CAPTURE(jinja.dump());
    CHECK(!recognise_template(jinja, texts));
  }
}

TEST_CASE("templates by name") {
  const std::vector<Message> dialogue = {{"user", "How are you?"}};
  for (const std::string& name : template_names()) CHECK(make_template(name, texts)->name() == name);
  const auto zephyr = make_template("zephyr", texts);
  CHECK(zephyr->prompt(dialogue) == "<|user|>\nHow are you?</s>\n<|assistant|>\n");
  CHECK(zephyr->response(dialogue, "Fine.") == "Fine.</s>");
  const auto none = make_template("none", texts);
  CHECK(none->prompt(dialogue) == "How are you?");
  CHECK(none->response(dialogue, "Fine.") == "Fine.");
  CHECK_THROWS_WITH_AS(make_template("nope", texts),
                       doctest::Contains("chatml, zephyr, llama-2, llama-3, mistral, plain, none"), UserError);
  CHECK_THROWS_WITH_AS(make_template("zephyr", {"<s>", ""}), doctest::Contains("eos_token"), UserError);
}

TEST_CASE("a model folder's own template") {
  const Json all = cases();
  const std::string chatml = all["templates"][1]["jinja"], unknown = all["unknown"][0];
  const TemporaryFolder folder;
  const std::vector<Message> dialogue = {{"user", "Hi"}};
  const std::string with_system =
      "<|im_start|>system\nYou answer kindly.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
  const auto configure = [&](const Json& chat_template) {
    std::ofstream(folder.path() / "tokenizer_config.json")
        << Json{{"eos_token", "<end>"}, {"chat_template", chat_template}}.dump();
  };
  CHECK(!choose_template("", folder.path()));
  configure(chatml);
  CHECK(choose_template("", folder.path())->prompt(dialogue) == with_system);
  CHECK(choose_template("chatml", folder.path())->prompt(dialogue) == with_system);
  CHECK(choose_template("zephyr", folder.path())->response(dialogue, "x") == "x<end>");
  configure(Json::array({{{"name", "tool_use"}, {"template", unknown}}, {{"name", "default"}, {"template", chatml}}}));
  CHECK(choose_template("", folder.path())->prompt(dialogue) == with_system);
  configure(unknown);
  CHECK_THROWS_WITH_AS(choose_template("", folder.path()), doctest::Contains("--template: chatml, zephyr"), UserError);
  CHECK(choose_template("chatml", folder.path())->prompt(dialogue) ==
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
  configure(5);
  CHECK_THROWS_WITH_AS(choose_template("", folder.path()), doctest::Contains("chat_template"), UserError);
  std::ofstream(folder.path() / "chat_template.jinja") << chatml;  // counts before the settings
  CHECK(choose_template("", folder.path())->prompt(dialogue) == with_system);
}
