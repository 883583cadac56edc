// The pieces of a training step: norm, clipping, update, the first step's checks, new weights, evaluation, decoding.
#include "src/trainer.h"

#include <doctest/doctest.h>

#include <cmath>

#include "src/communicator.h"
#include "src/fail.h"
#include "src/plan.h"
#include "src/signals.h"
#include "src/stored_values.h"
#include "tests/tiny_model.h"

namespace orpo {
namespace {

// A small model with everything a run keeps.
struct Bench {
  Config config = test::odd_config();
  std::unique_ptr<Backend> backend = make_cpu_backend(2);
  Arena state, scratch;
  DeviceModel model;
  test::MemoryPairs set{test::awkward_rows(37)};
  std::vector<int64_t> all;

  explicit Bench(DType dtype = DType::f32)
      : state("state", *backend, int64_t{4} << 20),
        scratch("scratch", *backend, int64_t{16} << 20),
        model{config, dtype, TrainingTensors::allocate(config, dtype, state), {}, *backend, scratch} {
    model.config.initializer_range = 0.5;
    draw_weights(model, 3);
    start_optimizer(model);
    for (int64_t i = 0; i < set.size(); ++i) all.push_back(i);
  }

  PairSums compute(int64_t micro_tokens) {
    zero_gradients(model);
    const Normalisers normalisers = count_normalisers(set, all, true);
    StepNumbers numbers(model, set.size());
    for (const auto& part : micro_batches(set, all, micro_tokens)) {
      const Batch batch = pack(set, part, true);
      MicroBatch micro(model, batch);
      micro.forward();
      micro.head(normalisers, numbers.next(batch.pairs()));
      micro.backward();
    }
    numbers.read();
    PairSums sums;
    for (const PairResult& r : numbers.pairs) sums.add(r, true);
    return sums;
  }
  GradientNorm gradient_norm() {
    StepNumbers numbers(model, 0);
    numbers.read();
    return numbers.gradients;
  }
  std::vector<float> values(const Tensor& t) const {
    std::vector<float> v(t.elements());
    if (t.dtype == DType::f32) {
      backend->download(v.data(), t);
    } else {
      std::vector<bf16> narrow(t.elements());
      backend->download(narrow.data(), t);
      std::copy(narrow.begin(), narrow.end(), v.begin());
    }
    return v;
  }
};

TEST_CASE("the gradient's norm is over all tensors, and clipping is torch's") {
  Bench bench;
  bench.compute(1000);
  const GradientNorm g = bench.gradient_norm();
  double sum = 0;
  for (const Parameter& p : parameters(bench.config, bench.model.tensors.gradients))
    for (const float v : bench.values(p.tensor)) sum += static_cast<double>(v) * v;
  CHECK(g.norm == doctest::Approx(std::sqrt(sum)));
  CHECK(g.squares.size() == parameters(bench.config, bench.model.tensors.gradients).size());
  CHECK(clip_factor(4.0, 1.0) == 1.0 / (4.0 + 1e-6));
  CHECK(clip_factor(0.5, 1.0) == 1);
  CHECK(clip_factor(4.0, 0) == 1);
}

TEST_CASE("weight decay shrinks matrices and leaves norms and biases alone") {
  Bench bench;
  zero_gradients(bench.model);
  std::vector<std::vector<float>> before;
  const auto list = parameters(bench.config, bench.model.tensors.weights);
  for (const Parameter& p : list) before.push_back(bench.values(p.tensor));
  update_weights(bench.model, {0.1, 0.9, 0.999, 1e-8, 0.5, 1, 1.0});
  for (size_t i = 0; i < list.size(); ++i) {
    const std::vector<float> after = bench.values(list[i].tensor);
    CAPTURE(list[i].name);
    CHECK(after[0] == doctest::Approx(list[i].tensor.rank > 1 ? 0.95 * before[i][0] : before[i][0]));
  }
}

TEST_CASE("bf16 weights are their fp32 masters, rounded; masters read back give the same weights") {
  Bench bench(DType::bf16);
  bench.compute(1000);
  update_weights(bench.model, {0.01, 0.9, 0.999, 1e-8, 0, 1, 1.0});
  bool finer = false;
  for (const Parameter& p : parameters(bench.config, bench.model.tensors.masters())) {
    const auto kept = [&] {
      std::vector<bf16> weights(p.tensor.elements());
      std::vector<int16_t> corrections(p.tensor.elements());
      bench.backend->download(weights.data(), p.tensor);
      bench.backend->download(corrections.data(), p.correction);
      std::vector<float> masters;
      for (size_t j = 0; j < weights.size(); ++j) {
        masters.push_back(join_master({weights[j], corrections[j]}));
        CHECK(weights[j].bits == bf16(masters[j]).bits);
        finer = finer || corrections[j] != 0;
      }
      return masters;
    };
    const std::vector<float> masters = kept();
    bench.backend->zero(p.tensor), bench.backend->zero(p.correction);
    upload_values(p.master(), masters, *bench.backend);
    CHECK(kept() == masters);
  }
  CHECK(finer);
}

TEST_CASE("the first step names tensors that no gradient reached, and moments that did not move") {
  Bench bench;
  bench.compute(1000);
  CHECK_NOTHROW(check_first_gradients(bench.model, bench.gradient_norm()));
  bench.backend->zero(bench.model.tensors.gradients.layers[1].down);
  CHECK_THROWS_WITH_AS(
      check_first_gradients(bench.model, bench.gradient_norm()),
      "first step: no gradient reached: layers.1.down; the run stops rather than train a part of the model",
      MachineError);
  update_weights(bench.model, {0.01, 0.9, 0.999, 1e-8, 0, 1, 1.0});
  CHECK_THROWS_WITH_AS(check_first_moments(bench.model),
                       "first step: AdamW left the moments unchanged of: layers.1.down; the run stops rather than "
                       "train a part of the model",
                       MachineError);
}

TEST_CASE("new weights follow from the seed, have the family's spread, and round alike in bf16") {
  Bench bench, again, narrow(DType::bf16);
  const Tensor a = bench.model.tensors.weights.embedding;
  CHECK(bench.values(a) == again.values(again.model.tensors.weights.embedding));
  const auto wide = bench.values(a), rounded = narrow.values(narrow.model.tensors.weights.embedding);
  double squares = 0;
  for (size_t i = 0; i < wide.size(); ++i) {
    CHECK(rounded[i] == static_cast<float>(bf16(wide[i])));
    squares += wide[i] * wide[i];
  }
  CHECK(std::sqrt(squares / static_cast<double>(wide.size())) == doctest::Approx(0.5).epsilon(0.1));
  draw_weights(again.model, 4);
  CHECK(bench.values(a) != again.values(again.model.tensors.weights.embedding));
  for (const float v : bench.values(bench.model.tensors.weights.final_norm)) CHECK(v == 1);
  for (const float v : bench.values(bench.model.tensors.weights.layers[0].qkv_bias)) CHECK(v == 0);
}

TEST_CASE("an evaluation measures what a training step measures, touches no gradient, and visits rows in order") {
  Bench bench;
  const PairSums parts = bench.compute(20), trained = bench.compute(1000);
  CHECK(parts.pairs == trained.pairs);
  CHECK(loss_of(parts, bench.model.head) == doctest::Approx(loss_of(trained, bench.model.head)).epsilon(1e-5));
  const double norm = bench.gradient_norm().norm;
  std::vector<int64_t> rows;
  const auto sums =
      evaluate(bench.model, bench.set, 20, [&](const TokenPair& pair, const PairResult&) { rows.push_back(pair.row); });
  REQUIRE(sums);
  CHECK(loss_of(*sums, bench.model.head) == doctest::Approx(loss_of(trained, bench.model.head)).epsilon(1e-5));
  CHECK(sums->pairs == trained.pairs);
  CHECK(bench.gradient_norm().norm == norm);
  CHECK(rows == std::vector<int64_t>{1, 2, 3, 4, 5, 6});
}

TEST_CASE("one rank adds nothing") {
  Bench bench;
  bench.compute(1000);
  const double norm = bench.gradient_norm().norm;
  const auto alone = make_single_communicator();
  reduce_gradients(bench.model, *alone);
  CHECK(bench.gradient_norm().norm == norm);
  CHECK(alone->size() == 1);
  CHECK(alone->any(true));
  CHECK_FALSE(alone->any(false));
}

TEST_CASE("a run's time is up when it is") {
  CHECK_FALSE(stop_requested());
  stop_after(1000000);
  CHECK_FALSE(stop_requested());
  stop_after(0);
}

}  // namespace
}  // namespace orpo
