// Time by operation: the parts of a step are the whole of it, and a timed run computes what an untimed one does.
#include "src/profile.h"

#include <thread>

#include "tests/check.h"
#include "tests/programs.h"

namespace orpo::test {
namespace {

double share_of(const Json& profile, const std::string& name) {
  for (const Json& operation : profile.at("operations"))
    if (operation.at("name") == name) return operation.at("share").get<double>();
  FAIL("no operation ", name);
  return -1;
}

TEST_CASE("the fastest step after the first is kept, the first one where it is alone") {
  Profile profile;
  const auto step = [&](int milliseconds, double flops) {
    profile.begin_step();
    const auto start = Profile::Clock::now();
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
    profile.add(Part::norm, start, 0, 1);
    profile.end_step(1, 1, flops);
    return profile.fastest().flops;
  };
  CHECK(step(1, 1000) == 1000);
  CHECK(step(20, 7) == 7);  // slower than the first, which does not count any more
  CHECK(step(1, 8) == 8);
  CHECK(step(40, 9) == 8);
  CHECK(profile.steps() == 4);
}

TEST_CASE("host and data time lie between the operations, and all parts add up to the step") {
  Profile profile;
  const auto pause = [] { std::this_thread::sleep_for(std::chrono::milliseconds(5)); };
  const auto begin = Profile::Clock::now();
  profile.begin_step();
  pause();
  profile.add(Part::data, Profile::Clock::now(), 0, 1, Part::data);
  pause();
  profile.add(ProductShape{false, false, false, 2, 3, 4, false, 3, true}, Profile::Clock::now(), 48, 1);
  profile.add(ProductShape{false, false, false, 2, 3, 4, false, 3, false}, Profile::Clock::now(), 48, 1);
  pause();
  profile.end_step(1, 1, 1);
  const double seconds = std::chrono::duration<double>(Profile::Clock::now() - begin).count();
  const StepProfile& step = profile.fastest();
  CHECK(step[Part::data].seconds >= 0.005);
  CHECK(step[Part::host].seconds >= 0.010);
  CHECK(step[Part::head_products].flops == 48);
  CHECK(step[Part::layer_products].flops == 48);
  CHECK(step.products.size() == 2);
  CHECK(step.seconds <= seconds);
  CHECK(step.seconds >= 0.015);
}

TEST_CASE("--profile: shares add up to 1, and the run is the same run") {
  for (const char* dtype : {"fp32", "bf16"}) {
    CAPTURE(dtype);
    const TemporaryFolder folder;
    const fs::path rows = folder.path() / "rows.jsonl", out = folder.path() / "out", plain = folder.path() / "plain";
    write_rows(rows, 24, 1);
    const std::vector<std::string> words{"--model", tiny_model_folder, "--data",  rows,      "--max-steps", "3",
                                         "--dtype", dtype,             "--threads", "2", "--batch-pairs", "5"};
    const auto train = [&](std::vector<std::string> more) {
      more.insert(more.end(), words.begin(), words.end());
      return run("orpo_train", more, folder.path());
    };
    const Outcome timed = train({"--output", out, "--profile"}), untimed = train({"--output", plain});
    REQUIRE_MESSAGE(timed.status == 0, timed.err);
    REQUIRE_MESSAGE(untimed.status == 0, untimed.err);
    CHECK(timed.out.find("products of the layers") != std::string::npos);
    CHECK(untimed.out.empty());
    CHECK(text_of(out / "model.safetensors") == text_of(plain / "model.safetensors"));
    CHECK(!fs::exists(plain / "profile.json"));

    const Json profile = parse_json(text_of(out / "profile.json"), "profile.json");
    double sum = 0, products = 0;
    for (const Json& operation : profile.at("operations")) {
      CHECK(operation.at("seconds").get<double>() >= 0);
      sum += operation.at("share").get<double>();
    }
    CHECK(sum == doctest::Approx(1));
    for (const char* name : {"products of the layers", "products of the head", "attention", "norm", "activation",
                             "head", "embedding", "optimizer", "data", "host"})
      CHECK_MESSAGE(share_of(profile, name) > 0, name);
    for (const Json& product : profile.at("products")) products += product.at("seconds").get<double>();
    CHECK(products / profile.at("seconds").get<double>() ==
          doctest::Approx(share_of(profile, "products of the layers") + share_of(profile, "products of the head")));
    CHECK(profile.at("pairs") == 5);
    CHECK(profile.at("useful_flops").get<double>() > 0);
    CHECK(profile.at("peak_memory_bytes").get<int64_t>() > 0);
    CHECK(profile.at("memory").size() >= 5);
  }
}

}  // namespace
}  // namespace orpo::test
