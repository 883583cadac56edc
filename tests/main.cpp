// Runs every test case; the last line printed is the count.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>

#include "cuda/emulator/runtime_api.h"
#include "cuda/emulator/stream.h"
#include "src/waiting.h"
#include "tests/check.h"

namespace {

struct Count : doctest::IReporter {
  static inline unsigned run = 0, failed = 0;

  explicit Count(const doctest::ContextOptions&) {}
  void test_run_end(const doctest::TestRunStats& stats) override {
    run = stats.numTestCasesPassingFilters, failed = stats.numTestCasesFailed;
  }
  void report_query(const doctest::QueryData&) override {}
  void test_run_start() override {}
  void test_case_start(const doctest::TestCaseData&) override {}
  void test_case_reenter(const doctest::TestCaseData&) override {}
  void test_case_end(const doctest::CurrentTestCaseStats&) override {}
  void test_case_exception(const doctest::TestCaseException&) override {}
  void subcase_start(const doctest::SubcaseSignature&) override {}
  void subcase_end() override {}
  void log_assert(const doctest::AssertData&) override {}
  void log_message(const doctest::MessageData&) override {}
  void test_case_skipped(const doctest::TestCaseData&) override {}
};
REGISTER_LISTENER("count", 1, Count);

}  // namespace

int main(int argc, char** argv) {
  orpo::spin_briefly(argv);
  doctest::Context context(argc, argv);
  int status = context.run();
  if (context.shouldExit()) return status;  // --list-test-cases, --help
  const unsigned skipped = orpo::test::skipped_cases;
  // What the CUDA code did wrong on the emulator without looking at the answer, and what it left behind.
  using namespace orpo::emulator;
  if (!noted_misuse().empty() || live_streams() || live_events() || device_bytes_in_use()) {
    std::printf("left on the emulated device: %lld streams, %lld events, %lld bytes\n%s",
                static_cast<long long>(live_streams()), static_cast<long long>(live_events()),
                static_cast<long long>(device_bytes_in_use()), noted_misuse().c_str());
    Count::failed += 1, Count::run += 1, status = 1;
  }
  std::printf("%u passed, %u failed", Count::run - Count::failed - skipped, Count::failed);
  if (skipped) std::printf(", %u skipped", skipped);
  std::printf("\n");
  return status;
}
