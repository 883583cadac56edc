// Checkpoints: bitwise resume, broken ones passed over, what a failed or killed save leaves behind.
#include "src/checkpoint.h"

#include <omp.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <thread>

#include "src/checkpoint_writer.h"
#include "src/fail.h"
#include "src/files.h"
#include "src/json.h"
#include "src/stored_values.h"
#include "tests/model_folders.h"
#include "tests/temporary_folder.h"

using namespace orpo;
using namespace orpo::test;
namespace fs = std::filesystem;

namespace {

// A run's tensors and its output folder.
struct Run {
  Run(const fs::path& folder, StoredDType dtype, int threads = 2)
      : out(folder / "out"),
        masters(config(), DType::f32, 1, threads),
        first(config(), DType::f32, 2, threads),
        second(config(), DType::f32, 3, threads),
        source{folder, parse_model_config(llama_json(), "config.json"), dtype} {
    state.epoch = 0.1 + 0.2;
    state.max_steps = 1000, state.epochs = 3, state.batch_pairs = 16, state.eval_every = 5, state.save_every = 10;
    state.seed = 0xfedcba9876543210u;
    state.counters = {{"skipped_steps", 2}, {"data_hash", -5}};
    state.options = {{"data", "a.jsonl\nb.jsonl"}, {"lambda", "0.1"}};
    state.log_history = {R"({"epoch":0.1,"loss":1.25,"step":1})",
                         R"({"epoch":0.2,"grad_norm":null,"loss":0.30000000000000004,"step":2})"};
  }
  static Config config() { return parse_model_config(llama_json(), "config.json").config; }
  void fill(int64_t step) {
    state.step = step;
    masters.fill(step * 3), first.fill(step * 3 + 1), second.fill(step * 3 + 2);
  }
  OptimizerTensors tensors() const { return {masters.weights, first.weights, second.weights}; }
  fs::path save(int64_t step, int64_t keep = 2) {
    fill(step);
    return save_checkpoint(out, state, source, tensors(), keep, *masters.backend);
  }
  void load(const Checkpoint& checkpoint) { load_checkpoint(checkpoint, config(), tensors(), *masters.backend); }
  std::string bytes() const { return masters.bytes() + first.bytes() + second.bytes(); }
  std::optional<Checkpoint> find() {
    reports.clear();
    return find_resumable(out, [&](const std::string& line) { reports.push_back(line); });
  }
  std::vector<std::string> names() const {
    std::vector<std::string> all;
    for (const auto& entry : fs::directory_iterator(out)) all.push_back(entry.path().filename());
    std::sort(all.begin(), all.end());
    return all;
  }

  fs::path out;
  FilledWeights masters, first, second;
  ModelSource source;
  TrainingState state;
  std::vector<std::string> reports;
};

using Names = std::vector<std::string>;

void flip_byte(const fs::path& file, size_t at) {
  std::string text = read_file(file);
  text[at] = static_cast<char>(text[at] ^ 1);
  write_file(file, text);
}

}  // namespace

TEST_CASE("checkpoint: masters, moments and state come back bit for bit") {
  for (const StoredDType dtype : {StoredDType::f32, StoredDType::bf16, StoredDType::f16}) {
    CAPTURE(stored_dtype_name(dtype));
    TemporaryFolder folder;
    write_file(folder.path() / "tokenizer.json", "tokenizer");
    Run run(folder.path(), dtype);
    CHECK(run.save(7) == run.out / "checkpoint-7");
    const std::string before = run.bytes();
    run.fill(8);
    REQUIRE(run.bytes() != before);

    const std::optional<Checkpoint> found = run.find();
    REQUIRE(found);
    CHECK(run.reports.empty());
    run.load(*found);
    CHECK(run.bytes() == before);
    const TrainingState &a = found->state, &b = run.state;
    CHECK(a.step == 7);
    CHECK(a.epoch == b.epoch);
    CHECK(std::tuple(a.max_steps, a.epochs, a.batch_pairs, a.eval_every, a.save_every, a.seed) ==
          std::tuple(b.max_steps, b.epochs, b.batch_pairs, b.eval_every, b.save_every, b.seed));
    CHECK(a.counters == b.counters);
    CHECK(a.options == b.options);
    CHECK(a.log_history == b.log_history);

    // It is a model folder as well, in the dtype asked for; the masters are kept apart only where that rounds them.
    CHECK(read_file(found->folder / "tokenizer.json") == "tokenizer");
    CHECK(read_model_config(found->folder).dtype == dtype);
    CHECK(load_weights(found->folder, run.config(), run.masters.weights, *run.masters.backend) == dtype);
    CHECK(fs::exists(found->folder / "state/masters.safetensors") == (dtype != StoredDType::f32));
  }
}

TEST_CASE("checkpoint: bf16 weights with corrections are saved as fp32 masters and come back bit for bit") {
  for (const StoredDType dtype : {StoredDType::f32, StoredDType::bf16, StoredDType::f16}) {
    CAPTURE(stored_dtype_name(dtype));
    TemporaryFolder folder;
    Run run(folder.path(), dtype);
    run.fill(7);
    const Config config = run.config();
    Backend& backend = *run.masters.backend;
    FilledWeights weights(config, DType::bf16, 0), corrections(config, DType::i16, 0);
    const Masters split{weights.weights, corrections.weights};
    const auto list = parameters(config, split), wide = parameters(config, run.masters.weights);
    for (size_t i = 0; i < list.size(); ++i) {
      std::vector<float> values(wide[i].tensor.elements());
      backend.download(values.data(), wide[i].tensor);
      upload_values(list[i].master(), values, backend);
      for (float& v : values) v = join_master(split_master(v));  // one that lies halfway moves
      backend.upload(wide[i].tensor, values.data());
    }
    const std::string masters = run.masters.bytes(), parts = weights.bytes() + corrections.bytes();
    const OptimizerTensors tensors{split, run.first.weights, run.second.weights};
    const Checkpoint saved = open_checkpoint(save_checkpoint(run.out, run.state, run.source, tensors, 2, backend));

    run.fill(8);
    run.load(saved);  // as fp32 training would
    CHECK(run.masters.bytes() == masters);
    for (const Parameter& p : list) backend.zero(p.tensor), backend.zero(p.correction);
    load_checkpoint(saved, config, tensors, backend);
    CHECK(weights.bytes() + corrections.bytes() == parts);

    const FilledWeights model(config, DType::bf16, 0);
    load_weights(saved.folder, config, model.weights, backend);
    if (dtype != StoredDType::f16) CHECK(model.bytes() == weights.bytes());

    // A checkpoint of fp32 masters, as an older trainer wrote them.
    const Checkpoint older =
        open_checkpoint(save_checkpoint(run.out, run.state, run.source, run.tensors(), 2, backend));
    for (const Parameter& p : list) backend.zero(p.tensor), backend.zero(p.correction);
    load_checkpoint(older, config, tensors, backend);
    CHECK(weights.bytes() + corrections.bytes() == parts);
  }
}

TEST_CASE("checkpoint: trainer_state.json is what transformers writes") {
  TemporaryFolder folder;
  Run run(folder.path(), StoredDType::bf16);
  const Json json = parse_json(read_file(run.save(2) / "trainer_state.json"), "trainer_state.json");
  CHECK(json["global_step"] == 2);
  CHECK(json["epoch"] == 0.1 + 0.2);
  CHECK(json["max_steps"] == 1000);
  CHECK(json["num_train_epochs"] == 3);
  CHECK(json["train_batch_size"] == 16);
  CHECK(json["log_history"].size() == 2);
  CHECK(json["log_history"][0]["loss"] == 1.25);
  CHECK(json["is_world_process_zero"] == true);
  CHECK(json["best_metric"].is_null());
}

TEST_CASE("checkpoint: the newest are kept, the oldest go after the new one stands") {
  TemporaryFolder folder;
  Run run(folder.path(), StoredDType::bf16);
  for (const int64_t step : {5, 10, 15}) run.save(step, 2);
  CHECK(run.names() == Names{"checkpoint-10", "checkpoint-15"});
  run.save(20, 1);
  CHECK(run.names() == Names{"checkpoint-20"});
  run.save(100, 3);
  CHECK(run.names() == Names{"checkpoint-100", "checkpoint-20"});
  CHECK(list_checkpoints(run.out)[1].first == 100);  // by number, not by name
  run.save(50, 1);                                   // a run that went back: what it just saved is never the one to go
  CHECK(run.names() == Names{"checkpoint-50"});
}

TEST_CASE("checkpoint: one of the same step is replaced") {
  TemporaryFolder folder;
  Run run(folder.path(), StoredDType::bf16);
  run.save(5);
  run.state.counters["skipped_steps"] = 77;
  run.save(5);
  CHECK(run.names() == Names{"checkpoint-5"});
  CHECK(run.find()->state.counters.at("skipped_steps") == 77);
}

TEST_CASE("checkpoint: a broken one is reported and passed over") {
  TemporaryFolder folder;
  Run run(folder.path(), StoredDType::bf16);
  run.save(1);
  const std::string whole = run.bytes();
  const fs::path broken = run.save(2);
  const std::string place = broken.string(), start = "checkpoint-2 is broken and passed over: " + place;
  std::string expected;
  SUBCASE("a flipped bit in a moment") {
    flip_byte(broken / "state/optimizer.safetensors", fs::file_size(broken / "state/optimizer.safetensors") - 5);
    expected = start + "/state/optimizer.safetensors: 'second.output' has changed since it was saved (checksum)";
  }
  SUBCASE("a flipped bit in a weight") {
    flip_byte(broken / "model.safetensors", fs::file_size(broken / "model.safetensors") - 5);
    expected = start + "/model.safetensors: 'lm_head.weight' has changed since it was saved (checksum)";
  }
  SUBCASE("a flipped bit in the log") {
    flip_byte(broken / "trainer_state.json", 40);
    expected = start + "/trainer_state.json: its bytes have changed since it was saved (checksum)";
  }
  SUBCASE("a flipped bit in the checksums") {
    flip_byte(broken / "state/checksums", 3);
    expected = start + "/state/checksums: does not have its own checksum";
  }
  SUBCASE("a truncated file") {
    fs::resize_file(broken / "state/masters.safetensors", 1000);
    expected = start + "/state/masters.safetensors: has 1000 bytes, not ";
  }
  SUBCASE("a missing file") {
    fs::remove(broken / "state/trainer.json");
    expected = start + "/state/trainer.json: is missing or unreadable (No such file or directory)";
  }
  SUBCASE("another program's folder") {
    remove_tree(broken / "state");
    expected = start + ": has no state/checksums, so it is no whole checkpoint of this trainer";
  }
  const std::optional<Checkpoint> found = run.find();
  REQUIRE(found);
  CHECK(found->state.step == 1);
  REQUIRE(run.reports.size() == 1);
  CHECK(run.reports[0].substr(0, expected.size()) == expected);
  CHECK_THROWS_AS(open_checkpoint(broken), UserError);
  run.load(*found);
  CHECK(run.bytes() == whole);
}

TEST_CASE("checkpoint: none to find") {
  TemporaryFolder folder;
  Run run(folder.path(), StoredDType::bf16);
  CHECK(!run.find());
  make_folder(run.out / "checkpoint-abc");
  make_folder(run.out / "checkpoint-007");
  CHECK(!run.find());
  CHECK(run.reports.empty());
  CHECK(holds(error_line<UserError>([&] { open_checkpoint(run.out / "checkpoint-9"); }), "checkpoint-9: is no folder"));
}

TEST_CASE("checkpoint: of another model") {
  TemporaryFolder folder;
  Run run(folder.path(), StoredDType::bf16);
  const Checkpoint checkpoint = open_checkpoint(run.save(1));
  Config wider = run.config();
  wider.intermediate = 18;
  const FilledWeights masters(wider, DType::f32, 1), first(wider, DType::f32, 1), second(wider, DType::f32, 1);
  CHECK(holds(
      error_line<UserError>([&] {
        load_checkpoint(checkpoint, wider, {masters.weights, first.weights, second.weights}, *masters.backend);
      }),
      "tensor 'first.layers.0.gate_up' [36, 12] fp32 has another shape or dtype; the checkpoint is of another model"));
}

TEST_CASE("checkpoint: what a killed run leaves half-done is swept") {
  TemporaryFolder folder;
  Run run(folder.path(), StoredDType::bf16);
  run.save(5);
  make_folder(run.out / ".checkpoint-6.partial/state");
  make_folder(run.out / ".model.partial");
  make_folder(run.out / ".other.partial");
  fs::rename(run.save(4), run.out / ".checkpoint-4.removed");  // a removal cut off
  sweep_leftovers(run.out);
  CHECK(run.names() == Names{".other.partial", "checkpoint-5"});

  // A replacement cut off before the new one took the place, and after.
  fs::rename(run.out / "checkpoint-5", run.out / ".checkpoint-5.replaced");
  CHECK(run.find()->state.step == 5);
  CHECK(run.names() == Names{".other.partial", "checkpoint-5"});
  make_folder(run.out / ".checkpoint-5.replaced");
  CHECK(run.find()->state.step == 5);
  CHECK(run.names() == Names{".other.partial", "checkpoint-5"});
}

TEST_CASE("checkpoint: a save that fails leaves the older ones and no partial folder") {
  TemporaryFolder folder;
  Run run(folder.path(), StoredDType::bf16);
  run.save(1);
  const std::string whole = run.bytes();
  rlimit before;
  REQUIRE(getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto old_action = std::signal(SIGXFSZ, SIG_IGN);
  for (const rlim_t limit :
       {rlim_t{10}, rlim_t{9000}, rlim_t{20000}}) {  // the config, the weights, the moments do not fit
    CAPTURE(limit);
    const rlimit small{limit, before.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
    std::string line;
    try {
      run.save(2, 1);
    } catch (const MachineError& e) {
      line = e.what();
    }
    setrlimit(RLIMIT_FSIZE, &before);
    CHECK(holds(line, "checkpoint-2 was not saved: " + (run.out / ".checkpoint-2.partial").string() + "/"));
    CHECK(holds(line, "cannot be written (File too large); older checkpoints are untouched"));
    CHECK(run.names() == Names{"checkpoint-1"});
  }
  std::signal(SIGXFSZ, old_action);
  run.load(*run.find());
  CHECK(run.bytes() == whole);

  run.out = folder.path() / "file/inside";
  write_file(folder.path() / "file", "x");
  CHECK_THROWS_AS(run.save(1), MachineError);
}

TEST_CASE("checkpoint: SIGKILL at any moment never loses the last whole one") {
  TemporaryFolder folder;
  const Random random(3, RandomStream::test);
  Run parent(folder.path(), StoredDType::bf16);
  int64_t last = 0, kills_inside_a_save = 0;
  for (int round = 0; round < 20; ++round) {
    int channel[2];
    REQUIRE(pipe(channel) == 0);
    const pid_t child = fork();
    if (child == 0) {
      omp_set_num_threads(1);  // the threads of the parent's team did not come along
      Run run(folder.path(), StoredDType::bf16, 1);
      for (int64_t step = last + 1;; step += round % 2) {  // every other round replaces one and the same
        run.save(step, 1);
        if (write(channel[1], &step, sizeof step) != sizeof step) _exit(1);
      }
    }
    close(channel[1]);
    int64_t reported = last;
    const auto next_report = [&] { return read(channel[0], &reported, sizeof reported) == sizeof reported; };
    // A save takes what this machine takes: some of that time after the second one, and in every fourth round before
    // the first.
    std::chrono::microseconds one_save(5000);
    if (round % 4 != 0) {
      REQUIRE(next_report());
      const auto begin = std::chrono::steady_clock::now();
      REQUIRE(next_report());
      one_save = std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - begin);
    }
    usleep(static_cast<useconds_t>(random.below(static_cast<uint64_t>(one_save.count()) * 3 / 2 + 1, round)));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    while (next_report()) continue;
    close(channel[0]);
    if (fs::exists(parent.out))
      for (const std::string& name : parent.names()) kills_inside_a_save += name.starts_with(".");

    const std::optional<Checkpoint> found = parent.find();
    CHECK(parent.reports.empty());
    if (reported == 0 && !found) continue;
    REQUIRE(found);
    CHECK(found->state.step >= reported);
    for (const std::string& name : parent.names()) CHECK(!name.starts_with("."));
    parent.load(*found);
    const std::string loaded = parent.bytes();
    parent.fill(found->state.step);
    CHECK(loaded == parent.bytes());
    last = found->state.step;
  }
  CHECK(last > 0);
  CHECK(kills_inside_a_save > 0);
}

TEST_CASE("checkpoint: written beside training, it holds the tensors as they were when it began") {
  TemporaryFolder folder;
  Run run(folder.path(), StoredDType::bf16);
  run.fill(1);
  const std::string before = run.bytes();
  CheckpointWriter writer;
  CHECK_FALSE(writer.collect(true));
  writer.wait_until_read();  // nothing to wait for
  std::atomic<bool> go = false, read = false;
  writer.start([&](const std::function<void()>& tensors_read) {
    while (!go) std::this_thread::yield();
    return save_checkpoint(run.out, run.state, run.source, run.tensors(), 2, *run.masters.backend, [&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      read = true;
      tensors_read();
    });
  });
  CHECK_FALSE(writer.collect(false));
  CHECK_THROWS_AS(writer.start({}), MachineError);
  go = true;
  writer.wait_until_read();
  CHECK(read);
  run.masters.fill(8), run.first.fill(9), run.second.fill(10);
  CHECK(writer.collect(true) == run.out / "checkpoint-1");
  CHECK_FALSE(writer.collect(true));
  run.load(*run.find());
  CHECK(run.bytes() == before);

  writer.start([](const auto&) -> fs::path { fail_machine("no space"); });
  writer.wait_until_read();
  CHECK(error_line<MachineError>([&] { writer.collect(true); }) == "no space");
  CHECK_FALSE(writer.collect(true));

  bool ended = false;
  {
    CheckpointWriter left;
    left.start([&](const auto&) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      ended = true;
      return fs::path();
    });
  }
  CHECK(ended);
}

TEST_CASE("checkpoint: state files that are not what they should be") {
  const std::string good =
      R"({"step": 1, "epoch": 0.5, "max_steps": 2, "epochs": 1, "batch_pairs": 1, "eval_every": 0, "save_every": 0, "seed": 7,
                               "counters": {}, "options": []})";
  const std::string log = R"({"global_step": 1, "log_history": []})";
  CHECK(parse_training_state(good, log, "x").seed == 7);
  const auto refusal = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    text.replace(text.find(from), from.size(), to);
    return error_line<UserError>([&] { parse_training_state(text, log, "x"); });
  };
  CHECK(refusal("\"step\": 1, ", "") == "x/state/trainer.json: step is missing");
  CHECK(refusal("\"step\": 1", "\"step\": -1") == "x/state/trainer.json: step -1 is negative");
  CHECK(refusal("\"step\": 1", "\"step\": 2") == "x/trainer_state.json: is of step 1, state/trainer.json of step 2");
  CHECK(refusal("0.5", "\"a\"") == "x/state/trainer.json: epoch \"a\" is no number");
  CHECK(refusal("[]", "[[1, \"a\"]]") == "x/state/trainer.json: options hold [1,\"a\"], not a name and its value");
  CHECK(refusal("\"counters\": {}", "\"counters\": {\"a\": 18446744073709551615}") ==
        "x/state/trainer.json: counters: a 18446744073709551615 is no whole number");
}
