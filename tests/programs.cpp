// The programs from outside: exit status, what they leave behind, what a stopped or resumed run is worth.
#include "tests/programs.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <thread>

#include "src/files.h"
#include "tests/check.h"

namespace orpo::test {
namespace {

using Words = std::vector<std::string>;

struct Workplace {
  TemporaryFolder folder;
  fs::path rows = folder.path() / "rows.jsonl", out = folder.path() / "out";
  Workplace() { write_rows(rows, 24, 1); }

  Words words(const Words& more) const {
    Words all{"--model", tiny_model_folder, "--data", rows,        "--output", out, "--batch-pairs",
              "5",       "--learning-rate", "0.003",  "--threads", "2"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  Outcome train(const Words& more) const { return run("orpo_train", words(more), folder.path()); }
};

void check_same_lines(const std::vector<Json>& a, const std::vector<Json>& b) {
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i)
    for (const char* name : {"step", "epoch", "loss", "nll_loss", "log_odds_chosen", "logps/chosen", "logps/rejected",
                             "grad_norm", "learning_rate"})
      CHECK_MESSAGE(a[i].at(name) == b[i].at(name), name, " at line ", i);
}

TEST_CASE("twenty steps lower the loss, and the model folder is written") {
  const Workplace work;
  const Outcome outcome = work.train({"--max-steps", "20", "--dtype", "fp32"});
  CHECK_MESSAGE(outcome.status == 0, outcome.err);
  const std::vector<Json> steps = metrics_of(work.out);
  REQUIRE(steps.size() == 20);
  CHECK(steps[19].at("loss").get<double>() < 0.9 * steps[0].at("loss").get<double>());
  for (const char* file : {"config.json", "model.safetensors", "options.toml"}) CHECK(fs::exists(work.out / file));
  CHECK(outcome.err.find("loss: NLL(prompt + chosen) + 0.1 * mean softplus(-log odds ratio)\n") != std::string::npos);
  CHECK(outcome.err.find('\033') == std::string::npos);  // no terminal, no colour, no cursor
}

TEST_CASE("fp32 is chosen where oneDNN may not multiply in bf16") {
  const Workplace work;
  const char* before = std::getenv("ONEDNN_MAX_CPU_ISA");
  const std::string kept = before ? before : "";
  setenv("ONEDNN_MAX_CPU_ISA", "AVX2", 1);
  const Outcome outcome = work.train({"--max-steps", "1"});
  before ? setenv("ONEDNN_MAX_CPU_ISA", kept.c_str(), 1) : unsetenv("ONEDNN_MAX_CPU_ISA");
  CHECK(outcome.status == 0);
  CHECK_MESSAGE(outcome.err.find("dtype: fp32; ") != std::string::npos, outcome.err);
}

TEST_CASE("a resumed run is the straight run, bit for bit") {
  for (const char* dtype : {"fp32", "bf16"}) {
    CAPTURE(dtype);
    const Workplace work;
    const Words schedule{"--max-steps",   "7",      "--dtype",        dtype, "--save-every",   "3",  "--keep", "5",
                         "--lr-schedule", "cosine", "--warmup-steps", "2",   "--weight-decay", "0.1"};
    REQUIRE(work.train(schedule).status == 0);
    const fs::path resumed = work.folder.path() / "resumed";
    fs::create_directory(resumed);
    fs::copy(work.out / "checkpoint-3", resumed / "checkpoint-3", fs::copy_options::recursive);
    const Outcome outcome = run("orpo_train", {"--resume", "--output", resumed}, work.folder.path());
    REQUIRE_MESSAGE(outcome.status == 0, outcome.err);
    std::vector<Json> straight = metrics_of(work.out);
    CHECK(straight[0].at("learning_rate") == 0);  // the first of two steps of warm-up
    CHECK(straight[1].at("learning_rate") == 0.0015);
    CHECK(straight[2].at("learning_rate") == 0.003);
    const fs::path state = resumed / "checkpoint-6/trainer_state.json";
    CHECK(parse_json(text_of(state), state.string()).at("log_history").size() == 6);
    straight.erase(straight.begin(), straight.begin() + 3);
    check_same_lines(straight, metrics_of(resumed));
    CHECK(text_of(work.out / "model.safetensors") == text_of(resumed / "model.safetensors"));
    for (const char* file : {"optimizer", "masters"}) {
      const std::string name = concat("checkpoint-6/state/", file, ".safetensors");
      CHECK(fs::exists(work.out / name) == fs::exists(resumed / name));
      if (fs::exists(work.out / name)) CHECK(text_of(work.out / name) == text_of(resumed / name));
    }
  }
}

TEST_CASE("a checkpoint named by its folder goes on in the run's own folder, or in an empty one") {
  const Workplace work, other;
  REQUIRE(work.train({"--max-steps", "2", "--save-every", "1", "--dtype", "fp32"}).status == 0);
  const std::string checkpoint = work.out / "checkpoint-1";
  std::optional<FolderLock> writer(std::in_place, work.out);  // as a process that still trains there
  Outcome outcome = run("orpo_train", {"--resume", checkpoint, "--max-steps", "3"}, work.folder.path());
  CHECK(outcome.last_error_line().find("another process is writing there") != std::string::npos);
  CHECK(outcome.err.find('\n') + 1 == outcome.err.size());  // before anything is read
  writer.reset();
  outcome = run("orpo_train", {"--resume", checkpoint, "--max-steps", "3"}, work.folder.path());
  CHECK_MESSAGE(outcome.status == 0, outcome.err);
  CHECK(metrics_of(work.out).size() == 3);
  REQUIRE(other.train({"--max-steps", "1", "--dtype", "fp32"}).status == 0);
  outcome = run("orpo_train", {"--resume", checkpoint, "--output", other.out}, work.folder.path());
  CHECK(outcome.status == 2);
  CHECK(outcome.last_error_line().find("holds another run than") != std::string::npos);
  CHECK(metrics_of(other.out).size() == 1);
}

TEST_CASE("what a resumed run must share cannot be changed, what it may is taken") {
  const Workplace work;
  REQUIRE(work.train({"--max-steps", "2", "--save-every", "1", "--dtype", "fp32"}).status == 0);
  Outcome outcome = run("orpo_train", {"--resume", "--output", work.out, "--batch-pairs", "4"}, work.folder.path());
  CHECK(outcome.status == 2);
  CHECK(outcome.last_error_line().find("--batch-pairs: this run was started with '5'") != std::string::npos);
  outcome = run("orpo_train", {"--resume", "--output", work.out, "--max-steps", "4", "--learning-rate", "0.001"},
                work.folder.path());
  CHECK_MESSAGE(outcome.status == 0, outcome.err);
  const std::vector<Json> steps = metrics_of(work.out);
  REQUIRE(steps.size() == 4);
  CHECK(steps[1].at("learning_rate") == 0.003);
  CHECK(steps[3].at("learning_rate") == 0.001);
}

TEST_CASE("SIGTERM finishes the step, saves and exits 75; the run goes on as if nothing had been") {
  const Workplace work;
  const Words long_run{"--max-steps", "1000000", "--dtype", "fp32"};
  const Process process("orpo_train", work.words(long_run), work.folder.path());
  while (metrics_of(work.out).size() < 3) std::this_thread::sleep_for(std::chrono::milliseconds(20));
  process.signal(SIGTERM);
  const Outcome stopped = process.wait();
  CHECK_MESSAGE(stopped.status == 75, stopped.err);
  CHECK(stopped.err.find("SIGTERM: stopping after step ") != std::string::npos);
  const std::vector<Json> before = metrics_of(work.out);
  const auto step = before.back().at("step").get<int64_t>();
  CHECK(fs::is_directory(work.out / ("checkpoint-" + std::to_string(step))));

  const std::string more = std::to_string(step + 2);
  REQUIRE(run("orpo_train", {"--resume", "--output", work.out, "--max-steps", more}, work.folder.path()).status == 0);
  Workplace straight;
  REQUIRE(straight.train({"--max-steps", more, "--dtype", "fp32"}).status == 0);
  check_same_lines(metrics_of(work.out), metrics_of(straight.out));
  CHECK(text_of(work.out / "model.safetensors") == text_of(straight.out / "model.safetensors"));
}

TEST_CASE("an evaluation that is stopped is resumable too") {
  const Workplace work;
  const fs::path many = work.folder.path() / "many.jsonl";
  write_rows(many, 60000, 2);
  const Outcome outcome =
      work.train({"--eval-data", many, "--max-steps", "1000000", "--stop-after-seconds", "1", "--dtype", "fp32"});
  CHECK_MESSAGE(outcome.status == 75, outcome.err);
  CHECK(outcome.err.find("--stop-after-seconds: stopping after step 0\n") != std::string::npos);
  CHECK(fs::is_directory(work.out / "checkpoint-0"));
}

TEST_CASE("evaluations stand in the metrics at their steps, and change nothing") {
  const Workplace work, without;
  REQUIRE(work.train({"--eval-data", work.rows, "--eval-every", "2", "--max-steps", "5", "--dtype", "fp32"}).status ==
          0);
  REQUIRE(without.train({"--max-steps", "5", "--dtype", "fp32"}).status == 0);
  std::vector<int64_t> at;
  for (const Json& line : metrics_of(work.out, true)) at.push_back(line.at("step").get<int64_t>());
  CHECK(at == std::vector<int64_t>{0, 2, 4, 5});
  check_same_lines(metrics_of(work.out), metrics_of(without.out));
}

TEST_CASE("a checkpoint is written after steps, never before the first; stopped there, no line is lost") {
  const Workplace work, straight;
  const Words words{"--eval-data", work.rows, "--save-every", "1", "--max-steps", "2", "--dtype", "fp32"};
  REQUIRE(straight.train(words).status == 0);
  CHECK_FALSE(fs::exists(straight.out / "checkpoint-0"));
  CHECK(fs::exists(straight.out / "checkpoint-1"));
  fs::copy(straight.out, work.out, fs::copy_options::recursive);
  fs::remove_all(work.out / "checkpoint-2");
  fs::remove_all(work.out / "model.safetensors");
  const Outcome outcome = run("orpo_train", {"--resume", "--output", work.out}, work.folder.path());
  CHECK_MESSAGE(outcome.status == 0, outcome.err);
  CHECK(metrics_of(work.out, true).size() == metrics_of(straight.out, true).size());
}

TEST_CASE("--resume removes nothing: neither a finished model nor broken checkpoints") {
  const Workplace finished, broken;
  REQUIRE(finished.train({"--max-steps", "1", "--dtype", "fp32"}).status == 0);
  const std::string model = text_of(finished.out / "model.safetensors");
  Outcome outcome = finished.train({"--max-steps", "1", "--dtype", "fp32", "--resume"});
  CHECK(outcome.status == 2);
  CHECK(outcome.last_error_line().find("holds a finished run without a checkpoint") != std::string::npos);
  CHECK(text_of(finished.out / "model.safetensors") == model);

  REQUIRE(broken.train({"--max-steps", "2", "--save-every", "1", "--keep", "1", "--dtype", "fp32"}).status == 0);
  std::ofstream(broken.out / "checkpoint-2/model.safetensors", std::ios::app) << "x";
  outcome = broken.train({"--max-steps", "2", "--dtype", "fp32", "--resume"});
  CHECK(outcome.status == 2);
  CHECK(outcome.last_error_line().find("has no whole checkpoint; --overwrite starts anew") != std::string::npos);
  CHECK(fs::exists(broken.out / "checkpoint-2"));
}

TEST_CASE("a resumed run has the same rows, wherever they lie, and ends after its checkpoint") {
  const Workplace work, other;
  REQUIRE(work.train({"--max-steps", "2", "--save-every", "2", "--dtype", "fp32"}).status == 0);
  const fs::path moved = work.folder.path() / "moved.jsonl";
  fs::rename(work.rows, moved);
  const auto resume = [&](const Words& more) {
    Words words{"--resume", "--output", work.out};
    words.insert(words.end(), more.begin(), more.end());
    return run("orpo_train", words, work.folder.path());
  };
  Outcome outcome = resume({"--data", moved, "--max-steps", "3"});
  CHECK_MESSAGE(outcome.status == 0, outcome.err);
  write_rows(other.rows, 24, 5);
  outcome = resume({"--data", other.rows, "--max-steps", "4"});
  CHECK(outcome.status == 2);
  CHECK(outcome.last_error_line().find("--data: the rows are not those") != std::string::npos);
  outcome = resume({"--data", moved, "--max-steps", "1"});
  CHECK(outcome.status == 2);
  CHECK(outcome.last_error_line().find("--max-steps: the run would end at step 1, and its checkpoint is of step 2") !=
        std::string::npos);
}

TEST_CASE("the size of a micro-batch changes the numbers by rounding only") {
  const Workplace one, many;
  REQUIRE(one.train({"--max-steps", "3", "--dtype", "fp32"}).status == 0);
  REQUIRE(many.train({"--max-steps", "3", "--dtype", "fp32", "--micro-tokens", "20"}).status == 0);
  const std::vector<Json> a = metrics_of(one.out), b = metrics_of(many.out);
  for (size_t i = 0; i < 3; ++i) {
    CHECK(a[i].at("micro_batches") == 1);
    CHECK(b[i].at("micro_batches").get<int>() > 2);
    CHECK(a[i].at("loss").get<double>() == doctest::Approx(b[i].at("loss").get<double>()).epsilon(1e-5));
    CHECK(a[i].at("grad_norm").get<double>() == doctest::Approx(b[i].at("grad_norm").get<double>()).epsilon(1e-4));
  }
}

TEST_CASE("--recompute takes less memory and gives the same model") {
  const Workplace keeps, recomputes;
  REQUIRE(keeps.train({"--max-steps", "3"}).status == 0);
  REQUIRE(recomputes.train({"--max-steps", "3", "--recompute"}).status == 0);
  check_same_lines(metrics_of(keeps.out), metrics_of(recomputes.out));
  CHECK(text_of(recomputes.out / "model.safetensors") == text_of(keeps.out / "model.safetensors"));
  CHECK(keeps.train({"--plan"}).out != keeps.train({"--plan", "--recompute"}).out);
}

TEST_CASE("steps that are not finite are skipped, counted, and end the run with its weights untouched") {
  const Workplace work;
  const Outcome outcome =
      work.train({"--max-steps", "20", "--learning-rate", "1e30", "--max-bad-steps", "3", "--dtype", "fp32"});
  CHECK(outcome.status == 2);
  CHECK(outcome.last_error_line().find(
            "not finite in 3 steps in a row; the weights still are what they were after step ") != std::string::npos);
  const std::vector<Json> steps = metrics_of(work.out);
  REQUIRE(steps.size() >= 4);
  CHECK(steps.back().at("skipped_steps") == 3);
  CHECK(steps.back().at("grad_norm").is_null());
  CHECK_FALSE(fs::exists(work.out / "model.safetensors"));
}

TEST_CASE("a skipped step counts as none for AdamW: the others go as if it had not been") {
  const Workplace work;
  const fs::path model = work.folder.path() / "model", weights = model / "model.safetensors";
  fs::copy("tests/fixtures/reference_grouped", model);
  fs::permissions(weights, fs::perms::owner_write, fs::perm_options::add);
  // Token 20 has no finite embedding, so that the one step that reads it is not finite.
  std::string bytes = text_of(weights);
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), sizeof header);
  const Json place = parse_json(bytes.substr(8, header), "header").at("model.embed_tokens.weight");
  const size_t row = place.at("shape")[1].get<size_t>() * (place.at("dtype") == "F32" ? 4 : 2);
  std::fill_n(bytes.begin() + static_cast<int64_t>(8 + header + place.at("data_offsets")[0].get<size_t>() + 20 * row),
              row, '\xff');
  std::ofstream(weights, std::ios::binary) << bytes;

  const std::string first = R"({"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10, 11]})",
                    bad = R"({"prompt_ids": [20, 6], "chosen_ids": [7], "rejected_ids": [10, 11]})",
                    last = R"({"prompt_ids": [12, 6], "chosen_ids": [13, 14], "rejected_ids": [15, 8, 9]})";
  const auto trained = [&](const std::string& rows, const char* out) {
    std::ofstream(work.rows) << rows;
    const Outcome outcome =
        run("orpo_train",
            {"--model", model, "--data", work.rows, "--output", work.folder.path() / out, "--batch-pairs", "1",
             "--no-shuffle", "--learning-rate", "0.01", "--dtype", "fp32", "--threads", "2"},
            work.folder.path());
    CHECK_MESSAGE(outcome.status == 0, outcome.err);
    return metrics_of(work.folder.path() / out);
  };
  const std::vector<Json> with = trained(first + "\n" + bad + "\n" + last + "\n", "with"),
                          without = trained(first + "\n" + last + "\n", "without");
  REQUIRE(with.size() == 3);
  CHECK(with[2].at("skipped_steps") == 1);
  CHECK(with[2].at("loss") == without[1].at("loss"));
  CHECK(text_of(work.folder.path() / "with/model.safetensors") ==
        text_of(work.folder.path() / "without/model.safetensors"));
}

TEST_CASE("a resumed run goes on with the metrics file that it was given") {
  const Workplace work;
  const fs::path file = work.folder.path() / "numbers.jsonl";
  REQUIRE(work.train({"--max-steps", "2", "--save-every", "1", "--dtype", "fp32", "--metrics", file}).status == 0);
  const Outcome outcome = run("orpo_train", {"--resume", "--output", work.out, "--max-steps", "4"}, work.folder.path());
  CHECK_MESSAGE(outcome.status == 0, outcome.err);
  CHECK(lines_of(text_of(file)).size() == 4);
  CHECK_FALSE(fs::exists(work.out / "metrics.jsonl"));
}

TEST_CASE("a run in which no step was finite is no finished run") {
  const Workplace work;
  const fs::path model = work.folder.path() / "model", weights = model / "model.safetensors";
  fs::copy(tiny_model_folder, model);
  fs::permissions(weights, fs::perms::owner_write, fs::perm_options::add);
  std::string bytes = text_of(weights);
  std::fill(bytes.end() - 400, bytes.end(), '\xff');  // NaN in every dtype
  std::ofstream(weights, std::ios::binary) << bytes;
  const Outcome outcome =
      run("orpo_train", {"--model", model, "--data", work.rows, "--output", work.out, "--max-steps", "2"},
          work.folder.path());
  CHECK(outcome.status == 2);
  CHECK(outcome.last_error_line().find("not finite in any of 2 steps") != std::string::npos);
  CHECK_FALSE(fs::exists(work.out / "model.safetensors"));
}

TEST_CASE("a folder that holds a run is kept unless told otherwise") {
  const Workplace work;
  REQUIRE(work.train({"--max-steps", "2", "--save-every", "1", "--dtype", "fp32"}).status == 0);
  const std::string metrics = text_of(work.out / "metrics.jsonl");
  const Outcome refused = work.train({"--max-steps", "2"});
  CHECK(refused.status == 2);
  CHECK(refused.last_error_line().find("holds a run; go on with it by --resume, replace it by --overwrite") !=
        std::string::npos);
  CHECK(text_of(work.out / "metrics.jsonl") == metrics);
  std::ofstream(work.out / "notes.txt") << "mine";
  CHECK(work.train({"--max-steps", "1", "--overwrite", "--dtype", "fp32"}).status == 0);
  CHECK(metrics_of(work.out).size() == 1);
  CHECK_FALSE(fs::exists(work.out / "checkpoint-1"));
  CHECK(fs::exists(work.out / "notes.txt"));
}

TEST_CASE("the model a run starts from is never its output") {
  const Workplace work;
  fs::copy(tiny_model_folder, work.out);
  const std::string before = text_of(work.out / "model.safetensors");
  const Outcome outcome =
      run("orpo_train", {"--model", work.out, "--data", work.rows, "--output", work.out, "--overwrite"},
          work.folder.path());
  CHECK(outcome.status == 2);
  CHECK(outcome.last_error_line().find("is the --model folder itself") != std::string::npos);
  CHECK(text_of(work.out / "model.safetensors") == before);
}

TEST_CASE("--save-gradients writes gradients and nothing else") {
  const Workplace work;
  const fs::path file = work.folder.path() / "gradients.safetensors";
  CHECK(work.train({"--save-gradients", file, "--dtype", "fp32"}).status == 0);
  CHECK(fs::exists(file));
  CHECK_FALSE(fs::exists(work.out));
}

TEST_CASE("--plan works from config.json alone and refuses what does not fit") {
  const TemporaryFolder folder;
  fs::copy(fs::path(tiny_model_folder) / "config.json", folder.path() / "config.json");
  const Outcome plan = run("orpo_train", {"--model", folder.path(), "--plan", "--device-memory", "80G"}, folder.path());
  CHECK_MESSAGE(plan.status == 0, plan.err);
  CHECK(plan.out.find("high-water mark") != std::string::npos);
  const Outcome refused =
      run("orpo_train", {"--model", folder.path(), "--plan", "--device-memory", "3M", "--micro-tokens", "100000"},
          folder.path());
  CHECK(refused.status == 2);
  CHECK(refused.last_error_line().find("and there are 3.00 MiB; the largest --micro-tokens that fits is ") !=
        std::string::npos);
}

TEST_CASE("mistakes are one line and exit status 2, and leave nothing behind") {
  const Workplace work;
  const auto check = [&](const Words& words, const std::string& line) {
    const Outcome outcome = run("orpo_train", words, work.folder.path());
    CHECK(outcome.status == 2);
    CHECK(outcome.last_error_line().find(line) != std::string::npos);
    CHECK_FALSE(fs::exists(work.out));
  };
  const std::string model = tiny_model_folder, rows = work.rows, out = work.out;
  check({"--model", model, "--data", rows, "--output", out, "--batch-pairs", "0"},
        "orpo_train: error: --batch-pairs: 0 is too small; the least is 1");
  check({"--model", model, "--data", "no.jsonl", "--output", out}, "no.jsonl");
  check({"--model", "nowhere", "--data", rows, "--output", out}, "nowhere");
  const std::string gone = work.folder.path() / "gone/file";
  for (const char* option : {"--metrics", "--save-gradients"})
    check({"--model", model, "--data", rows, "--output", out, option, gone}, concat(option, ": ", gone));
  check({"--model", model, "--data", rows, "--output", rows}, "--output: " + rows + " is a file");
  check({"--model", model, "--data", rows, "--output", out, "--max-length", "100000"},
        "--max-length: 100000 is more than the ");
  check({"--resume", "--output", out}, "has no whole checkpoint; give --model and --data");
}

TEST_CASE("orpo_eval writes one line a row, in file order") {
  const Workplace work;
  const fs::path lines = work.folder.path() / "pairs.jsonl";
  const Outcome outcome = run("orpo_eval",
                              {"--model", tiny_model_folder, "--data", work.rows, "--per-pair", lines, "--dtype",
                               "fp32", "--micro-tokens", "40"},
                              work.folder.path());
  CHECK_MESSAGE(outcome.status == 0, outcome.err);
  const std::vector<std::string> rows = lines_of(text_of(lines));
  REQUIRE(rows.size() == 24);
  double wins = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const Json row = parse_json(rows[i], "pairs.jsonl");
    size_t at = 0;
    for (const char* name : {"row", "logps/chosen", "logps/rejected", "tokens/prompt", "tokens/chosen",
                             "tokens/rejected", "nll", "log_odds", "loss"}) {
      const size_t found = rows[i].find(concat('"', name, "\": "));
      CHECK_MESSAGE((found != std::string::npos && found >= at), name);
      at = found;
    }
    CHECK(row.size() == 9);
    CHECK(row.at("row") == i + 1);
    const double odds = row.at("log_odds").get<double>(), nll = row.at("nll").get<double>();
    CHECK(row.at("loss").get<double>() == doctest::Approx(nll + 0.1 * std::log1p(std::exp(-odds))));
    wins += row.at("logps/chosen").get<double>() > row.at("logps/rejected").get<double>();
  }
  CHECK(outcome.out.find("rewards/accuracies " + concat(wins / 24).substr(0, 5)) != std::string::npos);

  const fs::path more = work.folder.path() / "more \"rows\".jsonl";
  write_rows(more, 3, 2);
  REQUIRE(run("orpo_eval",
              {"--model", tiny_model_folder, "--data", work.rows, more, "--per-pair", lines, "--dtype", "fp32"},
              work.folder.path())
              .status == 0);
  const std::vector<std::string> both = lines_of(text_of(lines));
  REQUIRE(both.size() == 27);
  CHECK(both[0].starts_with(concat("{\"file\": ", Json(work.rows.string()).dump(), ", \"row\": 1, ")));
  CHECK(both[26].starts_with(concat("{\"file\": ", Json(more.string()).dump(), ", \"row\": 3, ")));
}

}  // namespace
}  // namespace orpo::test
