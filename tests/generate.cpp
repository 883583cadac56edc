// ./orpo_generate: what it reads and writes, and how tokens are chosen.
#include <algorithm>
#include <cmath>
#include <set>

#include "src/prompts.h"
#include "src/sampling.h"
#include "tests/model_folders.h"
#include "tests/programs.h"

using namespace orpo;
using namespace orpo::test;

namespace {

std::string refusal(const std::string& text) {
  const TemporaryFolder folder;
  std::ofstream(folder.path() / "p") << text;
  return error_line<UserError>([&] { read_prompts(folder.path() / "p"); });
}
PromptFile read(const std::string& text) {
  const TemporaryFolder folder;
  std::ofstream(folder.path() / "p") << text;
  return read_prompts(folder.path() / "p");
}

// How often each of `count` sequences of one token draws each token.
std::vector<double> shares(const SamplingSettings& settings, const std::vector<float>& logits, int64_t count) {
  std::vector<Tokens> prompts(static_cast<size_t>(count), Tokens{0});
  Sampler sampler(settings, prompts, 0);
  std::vector<double> drawn(logits.size());
  for (int64_t i = 0; i < count; ++i) drawn[sampler(logits, i)] += 1.0 / static_cast<double>(count);
  return drawn;
}

}  // namespace

TEST_CASE("generate: prompts are read in each form, and answers written in it") {
  const PromptFile plain =
      read("{\"prompt\": \"a\", \"key\": 7}\n\n{\"prompt\": [{\"role\": \"user\", \"content\": \"b\"}]}\n");
  CHECK(plain.form == PromptForm::prompt);
  CHECK(plain.prompts[1].messages[0].content == "b");
  CHECK(answers_text(plain, {{"x"}, {"y\n"}}, "m") ==
        "{\"prompt\":\"a\",\"response\":\"x\"}\n"
        "{\"prompt\":[{\"content\":\"b\",\"role\":\"user\"}],\"response\":\"y\\n\"}\n");

  const PromptFile alpaca =
      read(R"([{"instruction": "a", "dataset": "koala", "output": "old"}, {"instruction": "b"}])");
  CHECK(alpaca.form == PromptForm::alpaca_eval);
  const Json list = Json::parse(answers_text(alpaca, {{"x"}, {"y"}}, "m"));
  CHECK(list == Json::parse(R"([{"instruction": "a", "output": "x", "generator": "m", "dataset": "koala"},
                                {"instruction": "b", "output": "y", "generator": "m"}])"));

  const PromptFile bench = read(R"({"question_id": 81, "category": "writing", "turns": ["a", "b"]})");
  CHECK(bench.form == PromptForm::mt_bench);
  CHECK(bench.prompts[0].more == std::vector<std::string>{"b"});
  const Json line = Json::parse(answers_text(bench, {{"x", "y"}}, "m"));
  CHECK(line["question_id"] == 81);
  CHECK(line["model_id"] == "m");
  CHECK(line["choices"] == Json::parse(R"([{"index": 0, "turns": ["x", "y"]}])"));
  CHECK(line["tstamp"].is_number());
  CHECK(line["answer_id"].is_string());
}

TEST_CASE("generate: a prompt that cannot be read is named") {
  CHECK(holds(refusal(""), "holds no prompts"));
  CHECK(holds(refusal("{\"prompt\": \"a\"}\n{\"text\": 1}"), "p:2: has no prompt"));
  CHECK(
      holds(refusal("{\"prompt\": \"a\"}\n{\"instruction\": \"b\"}"), "p:2: is of another form than the first prompt"));
  CHECK(holds(refusal("[{\"prompt\": 3}]"), "p: entry 1: prompt is no text"));
  CHECK(holds(refusal("{\"prompt\": [{\"role\": \"assistant\", \"content\": \"a\"}]}"),
              "the last message is not the user's"));
  CHECK(holds(refusal("{\"prompt\": [{\"role\": \"user\"}]}"), "a message is no object with role and content"));
  CHECK(holds(refusal("{\"turns\": [\"a\"]}"), "question_id is missing"));
  CHECK(holds(refusal("{\"question_id\": 1, \"turns\": []}"), "turns is no list of texts"));
  CHECK(holds(refusal("{\"prompt\": \"a\""), "p:1: is not valid JSON"));
}

TEST_CASE("generate: tokens are drawn as often as they are probable") {
  const std::vector<float> logits = {0, 1, 2, -1};
  const auto probability = [&](double temperature) {
    std::vector<double> p;
    double sum = 0;
    for (const float x : logits) p.push_back(std::exp(x / temperature)), sum += p.back();
    for (double& x : p) x /= sum;
    return p;
  };
  for (const double temperature : {0.5, 1.0, 2.0}) {
    const std::vector<double> drawn = shares({.temperature = temperature}, logits, 20000), p = probability(temperature);
    for (size_t i = 0; i < p.size(); ++i) CHECK(std::abs(drawn[i] - p[i]) < 4 * std::sqrt(p[i] * (1 - p[i]) / 20000));
  }
  CHECK(shares({.temperature = 0}, logits, 100)[2] == doctest::Approx(1));
  CHECK(shares({.temperature = 1, .seed = 1}, logits, 100) != shares({.temperature = 1, .seed = 2}, logits, 100));
  CHECK(shares({.temperature = 1, .seed = 1}, logits, 100) == shares({.temperature = 1, .seed = 1}, logits, 100));
}

TEST_CASE("generate: top-p keeps the fewest tokens that hold so much") {
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.3f)};
  const auto drawn = [&](double top_p) { return shares({.temperature = 1, .top_p = top_p}, logits, 4000); };
  CHECK(drawn(0.49)[1] == doctest::Approx(1));
  const std::vector<double> two = drawn(0.7);
  CHECK(two[0] == 0);
  CHECK(two[1] == doctest::Approx(0.625).epsilon(0.05));
  CHECK(drawn(0.85)[0] > 0);
  CHECK(drawn(1e-6)[1] == doctest::Approx(1));
}

TEST_CASE("generate: the repetition penalty counts prompt and answer, and turns the right way for either sign") {
  const std::vector<Tokens> prompts = {{0}, {3}};
  Sampler sampler({.repetition_penalty = 2}, prompts, 0);
  const std::vector<float> positive = {3, 2, 1, 1};
  CHECK(sampler(positive, 1) == 0);
  CHECK(sampler(positive, 0) == 1);  // 3 / 2 < 2
  CHECK(sampler(positive, 0) == 0);  // 1.5, 1, 1, 1
  const std::vector<float> negative = {-1, -1.5f, -4, -9};
  CHECK(sampler(negative, 1) == 1);  // token 0 has occurred: -2
  CHECK_THROWS_AS(sampler(std::vector<float>(4, std::nanf("")), 0), MachineError);
}

TEST_CASE("generate: what a sequence draws depends on its number alone") {
  const std::vector<float> logits(50, 0.0f);
  const std::vector<Tokens> six(6, Tokens{1}), two(2, Tokens{1});
  Sampler all({.temperature = 1}, six, 0), part({.temperature = 1}, two, 4);
  std::vector<Tokens> drawn(6);
  std::set<int32_t> different;
  for (int step = 0; step < 5; ++step)
    for (int64_t s = 0; s < 6; ++s) drawn[s].push_back(all(logits, s));
  for (int step = 0; step < 5; ++step)
    for (int64_t s = 0; s < 2; ++s) CHECK(part(logits, s) == drawn[4 + s][step]);
  for (const Tokens& d : drawn) different.insert(d.begin(), d.end());
  CHECK(different.size() > 10);
}

TEST_CASE("generate: the program answers, alike whatever is answered beside, and refuses what it must") {
  const TemporaryFolder folder;
  const std::string model = folder.path() / "model";
  const Outcome made = run("orpo_train",
                           {"--model", "data/demonstration/model", "--init", "random", "--data",
                            "data/demonstration/train.jsonl", "--max-steps", "2", "--output", model, "--threads", "2"},
                           folder.path());
  REQUIRE_MESSAGE(made.status == 0, made.err);
  std::string lines;
  for (const char* text : {"Who is there?", "Tell me about the harbour.", "What?", "Say something long and nice."})
    lines += Json{{"prompt", text}}.dump() + "\n";
  std::ofstream(folder.path() / "prompts.jsonl") << lines;
  const auto generate = [&](std::vector<std::string> more) {
    std::vector<std::string> words{"--model", model, "--max-new-tokens", "9", "--dtype", "fp32", "--threads", "2"};
    words.insert(words.end(), more.begin(), more.end());
    return run("orpo_generate", words, folder.path());
  };
  const std::string file = folder.path() / "prompts.jsonl";
  for (const std::vector<std::string>& how :
       {std::vector<std::string>{}, {"--temperature", "1.5", "--top-p", "0.9", "--repetition-penalty", "1.2"}}) {
    std::vector<std::string> together = how, alone = how;
    together.insert(together.end(), {"--prompts", file, "--output", folder.path() / "answers.jsonl"});
    alone.insert(alone.end(), {"--prompts", file, "--batch-prompts", "1"});
    const Outcome first = generate(together), second = generate(alone);
    REQUIRE_MESSAGE(first.status == 0, first.err);
    CHECK(first.out.empty());
    CHECK(lines_of(text_of(folder.path() / "answers.jsonl")).size() == 4);
    CHECK(text_of(folder.path() / "answers.jsonl") == second.out);
  }
  const Outcome one = generate({"--prompt", "What?"});
  CHECK(one.status == 0);
  CHECK(Json::parse(lines_of(text_of(folder.path() / "answers.jsonl"))[2])["prompt"] == "What?");
  CHECK(!one.out.empty());

  std::ofstream(folder.path() / "bench.jsonl") << R"({"question_id": 5, "turns": ["One?", "Two?", "Three?"]})";
  const Outcome turns = generate({"--prompts", folder.path() / "bench.jsonl", "--model-id", "tiny"});
  REQUIRE_MESSAGE(turns.status == 0, turns.err);
  CHECK(Json::parse(turns.out)["choices"][0]["turns"].size() == 3);
  CHECK(Json::parse(turns.out)["model_id"] == "tiny");

  // What the second turn has no room for is left out, and the rest is kept.
  std::ofstream(folder.path() / "long.jsonl")
      << Json{{"question_id", 6}, {"turns", {"One?", std::string(20000, 'w')}}}.dump();
  const Outcome endless = generate({"--prompts", folder.path() / "long.jsonl"});
  REQUIRE_MESSAGE(endless.status == 0, endless.err);
  CHECK(holds(endless.err, "turn 2: prompt 1 has"));
  CHECK(Json::parse(endless.out)["choices"][0]["turns"][1] == "");

  const auto refused = [&](std::vector<std::string> more) {
    const Outcome o = generate(more);
    CHECK(o.status == 2);
    return o.last_error_line();
  };
  CHECK(holds(refused({}), "--prompt: give either one text, or a file of them with --prompts"));
  CHECK(holds(refused({"--prompt", "a", "--prompts", file}), "--prompt: give either"));
  CHECK(holds(refused({"--prompts", folder.path() / "absent"}), "absent"));
  CHECK(holds(refused({"--prompt", "a", "--top-p", "1.5"}), "--top-p: 1.5 is more than 1"));
  CHECK(holds(refused({"--prompt", std::string(20000, 'w')}), "positions leave none for an answer"));
  CHECK(holds(refused({"--prompt", "a", "--output", folder.path() / "absent/answers"}), "there is no folder"));
}
