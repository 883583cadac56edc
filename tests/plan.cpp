// The memory plan: what the rehearsal counts is what the real thing takes, and what does not fit is refused with a size
// that does.
#include "src/plan.h"

#include <doctest/doctest.h>

#include "src/fail.h"
#include "src/trainer.h"
#include "tests/tiny_model.h"

namespace orpo {
namespace {

PlanRequest request(DType dtype, bool trains = true, bool recompute = false) {
  PlanRequest r;
  r.config = test::odd_config();
  r.dtype = dtype;
  r.head.logits_bytes = 4096;  // several chunks
  r.micro_tokens = 60;
  r.largest_pair_rows = 27;
  r.step_pairs = 6;
  r.trains = trains, r.recompute = recompute;
  return r;
}

TEST_CASE("planned is used, to the byte") {
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const auto& [trains, recompute] : {std::pair{true, false}, {true, true}, {false, false}}) {
      CAPTURE(dtype_name(dtype));
      CAPTURE(trains);
      CAPTURE(recompute);
      const PlanRequest r = request(dtype, trains, recompute);
      const MemoryPlan plan = make_plan(r, int64_t{1} << 30);
      const auto backend = make_cpu_backend(2);
      Arena state("state", *backend, plan.state_bytes), scratch("scratch", *backend, plan.scratch_bytes);
      DeviceModel model{r.config,
                        dtype,
                        trains ? TrainingTensors::allocate(r.config, dtype, state)
                               : TrainingTensors::allocate_weights(r.config, dtype, state),
                        r.head,
                        *backend,
                        scratch,
                        recompute};
      CHECK(state.used() == plan.state_bytes);
      draw_weights(model, 1);
      if (trains) zero_gradients(model);

      // A batch that reaches every limit, with real segments.
      std::vector<test::Row> rows{{{1, 2, 3, 4, 5, 6}, std::vector<int32_t>(15, 7), std::vector<int32_t>(7, 8)}};
      while (rows.size() < 6) rows.push_back({{1, 2, 3, 4, 5}, {7, 8}, {9}});
      rows.push_back(rows.back());
      const test::MemoryPairs set(rows);
      std::vector<int64_t> all{0, 1, 2, 3, 4, 5};
      const Batch batch = pack(set, all, true);
      REQUIRE(batch.rows() <= plan.limits.rows);
      REQUIRE(batch.targets() <= plan.limits.targets);
      {
        StepNumbers numbers(model, batch.pairs());
        MicroBatch micro(model, batch);
        micro.forward();
        micro.head(count_normalisers(set, all, true), numbers.next(batch.pairs()));
        if (trains) micro.backward();
      }
      CHECK(scratch.high_water() <= plan.scratch_bytes);
      CHECK(scratch.used() == 0);

      const Batch largest = largest_batch(plan.limits, true);
      CHECK(largest.rows() == plan.limits.rows);
      CHECK(largest.targets() == plan.limits.targets);
      CHECK(largest.pairs() == plan.limits.pairs);
      {
        StepNumbers numbers(model, std::max(r.step_pairs, largest.pairs()));
        MicroBatch micro(model, largest);
        micro.forward();
        micro.head({1, 1}, numbers.next(largest.pairs()));
        if (trains) micro.backward();
      }
      CHECK(scratch.high_water() == plan.scratch_bytes);
      CHECK(plan.total() == state.used() + scratch.high_water());
    }
}

TEST_CASE("a layer more costs a step what its backward pass reads, with recompute its input, an evaluation nothing") {
  const auto cost = [](bool trains, bool recompute) {
    PlanRequest r = request(DType::bf16, trains, recompute);
    const int64_t few = make_plan(r, int64_t{1} << 30).scratch_bytes;
    r.config.layers += 1;
    return make_plan(r, int64_t{1} << 30).scratch_bytes - few;
  };
  const int64_t rows = request(DType::bf16).micro_tokens, input = rows * test::odd_config().width * 2;
  CHECK(cost(true, false) > 3 * input);
  CHECK(cost(true, true) >= input);
  CHECK(cost(true, true) <= input + 128);  // and a number for each parameter's gradient, in whole lines
  CHECK(cost(false, false) == 0);
}

TEST_CASE("a micro-batch never has more than the limits") {
  const test::MemoryPairs set(test::awkward_rows(37));
  PlanRequest r = request(DType::f32);
  r.largest_pair_rows = 0;
  std::vector<int64_t> all;
  for (int64_t i = 0; i < set.size(); ++i)
    all.push_back(i), r.largest_pair_rows = std::max(r.largest_pair_rows, pair_rows(set[i]));
  r.step_pairs = set.size();
  for (const int64_t micro_tokens : {1, 10, 30, 1000}) {
    r.micro_tokens = micro_tokens;
    const MicroLimits limits = make_plan(r, int64_t{1} << 30).limits;
    for (const auto& part : micro_batches(set, all, micro_tokens)) {
      const Batch batch = pack(set, part, true);
      CHECK(batch.rows() <= limits.rows);
      CHECK(batch.targets() <= limits.targets);
      CHECK(batch.pairs() <= limits.pairs);
    }
  }
  CHECK(largest_pair(10) == 18);
}

TEST_CASE("what does not fit is refused, and the size that is named fits") {
  PlanRequest r = request(DType::f32);
  r.micro_tokens = 5000, r.step_pairs = 1000;
  const int64_t memory = make_plan(r, int64_t{1} << 40).total() / 2;
  std::string line;
  try {
    make_plan(r, memory);
  } catch (const UserError& e) {
    line = e.what();
  }
  const std::string before = "the largest --micro-tokens that fits is ";
  REQUIRE(line.find(before) != std::string::npos);
  r.micro_tokens = std::stoll(line.substr(line.find(before) + before.size()));
  CHECK(make_plan(r, memory).total() <= memory);
  r.micro_tokens += r.micro_tokens / 20;
  CHECK_THROWS_AS(make_plan(r, memory), UserError);
  r.micro_tokens = 0;  // by itself: whatever fits, at least the largest pair
  const MemoryPlan chosen = make_plan(r, memory);
  CHECK(chosen.total() <= memory);
  CHECK(chosen.micro_tokens >= r.largest_pair_rows);
  CHECK_THROWS_WITH_AS(make_plan(r, 1000), doctest::Contains("even with one pair of 27 rows at a time"), UserError);
  r.micro_tokens = 1, r.largest_pair_rows = largest_pair(500);
  const int64_t enough = make_plan(r, int64_t{1} << 40).total();
  r.largest_pair_rows = largest_pair(1000);
  CHECK_THROWS_WITH_AS(make_plan(r, enough), doctest::Contains("or --max-length 500, the largest that fits"),
                       UserError);
}

}  // namespace
}  // namespace orpo
