// --device: the CUDA backend, on the emulator, trains as the CPU does; what is missing for a GPU is named.
#include <dlfcn.h>

#include <cstdlib>

#include "cuda/backend.h"
#include "cuda/emulator/stream.h"
#include "src/plan.h"
#include "tests/check.h"
#include "tests/programs.h"
#include "tests/tiny_model.h"

namespace orpo::test {
namespace {

using Words = std::vector<std::string>;

fs::path tests_folder() { return fs::read_symlink("/proc/self/exe").parent_path(); }

struct Training {
  TemporaryFolder folder;
  Training() { write_rows(folder.path() / "rows.jsonl", 12, 1); }
  Words words(const Words& more) const {
    Words all{"--model",         tiny_model_folder,
              "--data",          folder.path() / "rows.jsonl",
              "--output",        folder.path() / "out",
              "--batch-pairs",   "3",
              "--learning-rate", "0.003",
              "--threads",       "2",
              "--overwrite"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  Outcome train(const Words& more) const { return run("orpo_train", words(more), folder.path()); }
  std::vector<Json> metrics(const Words& more) const {
    const Outcome outcome = train(more);
    REQUIRE_MESSAGE(outcome.status == 0, outcome.err);
    return metrics_of(folder.path() / "out");
  }
};

double number(const Json& line, const char* name) { return line.at(name).get<double>(); }

TEST_CASE("device: the emulated GPU trains as the CPU does, for twenty steps") {
  const Training training;
  for (const auto& [dtype, tolerance] : {std::pair{"fp32", 2e-5}, {"bf16", 0.03}}) {
    CAPTURE(dtype);
    const auto cpu = training.metrics({"--device", "cpu", "--dtype", dtype, "--max-steps", "20"});
    const auto gpu = training.metrics({"--device", "cuda-emulated", "--dtype", dtype, "--max-steps", "20"});
    REQUIRE(gpu.size() == 20);
    for (size_t i = 0; i < gpu.size(); ++i)
      for (const char* name : {"loss", "nll_loss", "logps/chosen", "logps/rejected", "grad_norm"}) {
        CAPTURE(i);
        CAPTURE(name);
        CHECK(same_digits(number(gpu[i], name), number(cpu[i], name),
                          tolerance * (std::string(name) == "grad_norm" ? 5 : 1)));
      }
    CHECK(number(gpu[19], "loss") < 0.95 * number(gpu[0], "loss"));
  }
}

TEST_CASE("device: stopped on the emulated GPU and resumed there, the run is the straight run") {
  const Training training;
  const Words device{"--device", "cuda-emulated", "--dtype", "bf16"};
  const auto with = [&](Words more) {
    more.insert(more.end(), device.begin(), device.end());
    return more;
  };
  const auto straight = training.metrics(with({"--max-steps", "4"}));
  REQUIRE(training.train(with({"--max-steps", "4", "--save-every", "2", "--stop-after-seconds", "1000"})).status == 0);
  fs::remove(training.folder.path() / "out" / "model.safetensors");
  const Outcome resumed =
      run("orpo_train", {"--resume", training.folder.path() / "out" / "checkpoint-2", "--device", "cuda-emulated"},
          training.folder.path());
  REQUIRE_MESSAGE(resumed.status == 0, resumed.err);
  const auto again = metrics_of(training.folder.path() / "out");
  REQUIRE(again.size() == 4);
  for (size_t i = 0; i < 4; ++i)
    for (const char* name : {"loss", "grad_norm", "logps/rejected"}) CHECK(again[i].at(name) == straight[i].at(name));
}

// The program in a folder of its own, with a driver that is not one.
struct Elsewhere {
  Training training;
  fs::path program = training.folder.path() / "bin";
  Elsewhere() {
    fs::create_directory(program);
    const fs::path beside = tests_folder() / "orpo_train", above = fs::current_path() / "orpo_train";
    fs::copy(fs::exists(beside) ? beside : above, program / "orpo_train");
  }
  // driver: what tests/driver answers; empty: there is none.
  Outcome train(const std::string& driver, const Words& more) const {
    const char* before = std::getenv("LD_LIBRARY_PATH");
    const std::string kept = before ? before : "";
    if (!driver.empty()) setenv("LD_LIBRARY_PATH", (tests_folder() / "tests/driver").c_str(), 1);
    setenv("ORPO_TEST_DRIVER", driver.c_str(), 1);
    Words words = training.words({"--max-steps", "1", "--dtype", "fp32"});
    words.insert(words.end(), more.begin(), more.end());
    const Outcome outcome = run((program / "orpo_train").string(), words, training.folder.path());
    unsetenv("ORPO_TEST_DRIVER");
    before ? setenv("LD_LIBRARY_PATH", kept.c_str(), 1) : unsetenv("LD_LIBRARY_PATH");
    return outcome;
  }
};

TEST_CASE("device: what is missing for a GPU is one line and exit status 2") {
  const Elsewhere elsewhere;
  const auto refused = [&](const std::string& driver, const char* device, const char* words) {
    const Outcome outcome = elsewhere.train(driver, {"--device", device});
    INFO(outcome.err);
    CHECK(outcome.status == 2);
    CHECK(outcome.last_error_line().find(words) != std::string::npos);
    CHECK(!fs::exists(elsewhere.training.folder.path() / "out"));
  };
  if (void* driver = dlopen("libcuda.so.1", RTLD_NOW))
    dlclose(driver);
  else
    refused("", "cuda", "--device cuda: no NVIDIA driver is installed here");
  refused("12040 0", "cuda", "--device cuda: the NVIDIA driver shows no GPU");
  refused("12040 1", "cuda", "orpo_cuda.so is not beside the program, nor in build/release; `make cuda` builds it");
  refused("", "cuda-emulated", "orpo_cuda_emulated.so is not beside the program");
  // A library that is no plugin stands for one of other sources.
  fs::copy(tests_folder() / "tests/driver/libcuda.so.1", elsewhere.program / "orpo_cuda.so");
  refused("12040 1", "cuda", "was built from other sources than this program; `make cuda` builds it anew");
}

TEST_CASE("device: auto takes the CPU, with a line where a GPU is to be seen") {
  const Elsewhere elsewhere;
  const Outcome none = elsewhere.train("12040 0", {}), useless = elsewhere.train("12040 1", {});
  CHECK(none.status == 0);
  CHECK(none.err.find("device:") == std::string::npos);
  CHECK_MESSAGE(useless.status == 0, useless.err);
  CHECK(useless.err.find("device: the CPU, as the GPU cannot be used: orpo_cuda.so is not beside the program") !=
        std::string::npos);
}

TEST_CASE("device: a step allocates nothing and waits once; the plan knows what operations need") {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    PlanRequest r;
    r.config = odd_config();
    r.dtype = dtype;
    r.micro_tokens = 60, r.largest_pair_rows = 27, r.step_pairs = 6;
    r.rehearsal = [] { return std::make_unique<CudaBackend>(CudaBackend::Purpose::rehearses); };
    const MemoryPlan plan = make_plan(r, int64_t{1} << 30);
    CHECK(plan.workspace_bytes > 0);
    CudaBackend backend;
    backend.reserve_workspace(plan.workspace_bytes);
    CHECK(backend.workspace_bytes() == plan.workspace_bytes);
    Arena state("state", backend, plan.state_bytes), scratch("scratch", backend, plan.scratch_bytes);
    CHECK(backend.peak_memory() >= plan.total());
    CHECK(backend.peak_memory() < plan.total() + 1024);
    DeviceModel model{r.config, dtype, TrainingTensors::allocate(r.config, dtype, state), r.head, backend, scratch};
    draw_weights(model, 1);
    start_optimizer(model);
    const Batch largest = largest_batch(plan.limits, true);
    backend.synchronize();
    const int64_t allocations = emulator::allocations_made(), waits = emulator::waits_made();
    zero_gradients(model);
    StepNumbers numbers(model, std::max(r.step_pairs, largest.pairs()));
    {
      MicroBatch micro(model, largest);
      micro.forward();
      micro.head({1, 1}, numbers.next(largest.pairs()));
      micro.backward();
    }
    numbers.read();
    AdamW update{};
    update.step = 1;
    update_weights(model, update);
    CHECK(emulator::allocations_made() == allocations);
    CHECK(emulator::waits_made() == waits + 1);
  }
}

}  // namespace
}  // namespace orpo::test
