// The whole model: gradients against finite differences in double, and the equalities that the packed batch promises.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>

#include "tests/tiny_model.h"

using namespace orpo;
using namespace orpo::test;

namespace {

constexpr int64_t one_batch = 1 << 20;

TinyModel tiny(DType dtype, Config config = odd_config(), double scale = 0.7, int threads = 2) {
  return TinyModel(config, dtype, make_cpu_backend(threads), 1, scale);
}

// Every flag of Config in some model.
std::vector<Config> odd_configs() {
  Config exact = odd_gpt2_config();
  exact.activation = Activation::gelu, exact.scale_attention_by_layer = true, exact.kv_heads = 1;
  Config mixed = odd_config();
  mixed.norm = Norm::layer, mixed.activation = Activation::gelu_tanh, mixed.scale_attention = false;
  mixed.attention_output_bias = mixed.mlp_bias = false;
  std::vector<Config> all = odd_family_configs();
  all.push_back(exact), all.push_back(mixed);
  return all;
}

// |a - b| / |b|
double distance(const std::vector<double>& a, const std::vector<double>& b) {
  REQUIRE(a.size() == b.size());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) difference += (a[i] - b[i]) * (a[i] - b[i]), norm += b[i] * b[i];
  return std::sqrt(difference / norm);
}

// The packed batch of one pair rewritten as two separate sequences, trunk + chosen and trunk + rejected: the prompt
// computed twice, its last row once for each answer. The oracle for "shared prompt = separate sequences".
Batch separate(const Row& row, bool score_prompt) {
  Batch b;
  PairTargets targets{0, 0, 0, 0};
  std::vector<std::pair<int32_t, int32_t>> rejected_targets;
  for (const std::vector<int32_t>* branch : {&row.chosen, &row.rejected}) {
    const int32_t begin = static_cast<int32_t>(b.tokens.size()), trunk = static_cast<int32_t>(row.trunk.size());
    std::vector<int32_t> sequence = row.trunk;
    sequence.insert(sequence.end(), branch->begin(), branch->end());
    for (int32_t i = 0; i + 1 < static_cast<int32_t>(sequence.size()); ++i) {
      b.tokens.push_back(sequence[i]);
      b.positions.push_back(i);
      const bool in_prompt = i + 1 < trunk, chosen = branch == &row.chosen;
      if (in_prompt && !(chosen && score_prompt)) continue;
      b.target_rows.push_back(begin + i);
      b.target_tokens.push_back(sequence[i + 1]);
      ++(in_prompt ? targets.prompt : chosen ? targets.chosen : targets.rejected);
    }
    b.segments.push_back({begin, static_cast<int32_t>(b.tokens.size()) - begin, 0, 0});
  }
  b.pair_targets.push_back(targets);
  b.score_prompt = score_prompt;
  return b;
}

}  // namespace

TEST_CASE("model: every gradient agrees with finite differences in double") {
  const MemoryPairs rows(awkward_rows(37));
  for (Config config : odd_configs())
    for (const bool tied : {false, true})
      for (const Objective objective : {Objective::orpo, Objective::sft, Objective::ratio})
        for (const bool with_prompt : {true, false}) {
          CAPTURE(config.family);
          config.tied_embeddings = tied;
          TinyModel model = tiny(DType::f64, config);
          HeadSettings settings;
          settings.objective = objective, settings.lambda = 0.8, settings.nll_includes_prompt = with_prompt;
          const auto outcome = model.run(rows, one_batch, settings);
          size_t offset = 0;
          std::mt19937 random(3);
          for (const Parameter& p : parameters(model.config, model.weights)) {
            CAPTURE(p.name);
            const std::vector<double> start = model.get(p.tensor);
            std::vector<double> direction(start.size()), moved(start.size());
            double along = 0;
            for (size_t i = 0; i < start.size(); ++i) {
              direction[i] = std::normal_distribution<double>()(random);
              along += direction[i] * outcome.gradient[offset + i];
            }
            const auto loss_at = [&](double step) {
              for (size_t i = 0; i < start.size(); ++i) moved[i] = start[i] + step * direction[i];
              model.set(p.tensor, moved);
              return model.run(rows, one_batch, settings, false).loss;
            };
            const double h = 1e-4;
            const double measured = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h);
            model.set(p.tensor, start);
            CHECK(along == doctest::Approx(measured).epsilon(1e-6).scale(1e-2));
            CHECK(along != 0);
            offset += start.size();
          }
          REQUIRE(offset == outcome.gradient.size());
        }
}

TEST_CASE("model: the odds term matters in these tests") {
  const MemoryPairs rows(awkward_rows(37));
  TinyModel model = tiny(DType::f64);
  HeadSettings with, without;
  with.lambda = 1, without.objective = Objective::sft;
  const auto a = model.run(rows, one_batch, with), b = model.run(rows, one_batch, without);
  CHECK(a.nll == doctest::Approx(b.nll).epsilon(1e-12));
  CHECK(a.loss > b.loss + 0.1);
  CHECK(distance(a.gradient, b.gradient) > 0.05);
  for (const PairResult& p : a.pairs)
    if (p.rejected_tokens && p.chosen_tokens) CHECK(p.chosen_logp_sum / p.chosen_tokens > -12);
}

TEST_CASE("model: a shared prompt gives what two separate sequences give") {
  for (const Config& config : odd_configs())
    for (const bool with_prompt : {true, false}) {
      CAPTURE(config.family);
      TinyModel model = tiny(DType::f64, config);
      HeadSettings settings;
      settings.lambda = 0.9, settings.nll_includes_prompt = with_prompt;
      for (const Row& row : awkward_rows(37)) {
        CAPTURE(row.trunk.size());
        CAPTURE(row.chosen.size());
        CAPTURE(row.rejected.size());
        if (row.trunk.empty() && (row.chosen.size() == 1 || row.rejected.size() == 1)) continue;
        const MemoryPairs one({row});
        const int64_t index = 0;
        const Normalisers n = count_normalisers(one, {&index, 1}, with_prompt);
        const Batch packed = pack(one, {&index, 1}, with_prompt), apart = separate(row, with_prompt);
        const auto a = model.run({packed}, n, settings), b = model.run({apart}, n, settings);
        if (!row.trunk.empty()) CHECK(packed.rows() < apart.rows());
        CHECK(packed.targets() == apart.targets());
        CHECK(a.loss == doctest::Approx(b.loss).epsilon(1e-12));
        CHECK(distance(a.logps, b.logps) < 1e-12);
        CHECK(distance(a.gradient, b.gradient) < 1e-11);
        // The trunk's last row predicts both first answers: naming it once would lose the rejected one.
        if (!row.trunk.empty()) {
          const int32_t last = static_cast<int32_t>(row.trunk.size()) - 1;
          CHECK(std::count(packed.target_rows.begin(), packed.target_rows.end(), last) == 2);
        }
      }
    }
}

TEST_CASE("model: packing and micro-batches change loss and gradient by rounding only") {
  std::vector<Row> many = awkward_rows(37);
  for (const Row& r : awkward_rows(37, 11)) many.push_back(r);
  const MemoryPairs rows(many);
  for (const Config& config : odd_configs())
    for (const auto& [dtype, tolerance] : {std::pair{DType::f64, 1e-12}, {DType::f32, 3e-5}}) {
      TinyModel model = tiny(dtype, config);
      const HeadSettings settings;
      const auto whole = model.run(rows, one_batch, settings), parts = model.run(rows, 40, settings),
                 alone = model.run(rows, 1, settings);
      CHECK(whole.micro_batches == 1);
      CHECK(parts.micro_batches > 1);
      CHECK(parts.micro_batches < alone.micro_batches);
      CHECK(alone.micro_batches == rows.size());
      for (const auto* other : {&parts, &alone}) {
        CHECK(other->loss == doctest::Approx(whole.loss).epsilon(tolerance));
        CHECK(distance(other->gradient, whole.gradient) < tolerance);
      }
    }
}

TEST_CASE("model: a small logits budget recomputes logits and gives the same") {
  const MemoryPairs rows(awkward_rows(37));
  for (const auto& [dtype, tolerance] : {std::pair{DType::f64, 1e-12}, {DType::f32, 3e-5}}) {
    TinyModel model = tiny(dtype);
    HeadSettings roomy, tight;
    tight.logits_bytes = 37 * 8 * 3;
    CHECK(head_chunk_rows(model.config, roomy, 60, dtype) == 60);
    CHECK(head_chunk_rows(model.config, tight, 60, dtype) < 7);
    const auto a = model.run(rows, one_batch, roomy), b = model.run(rows, one_batch, tight);
    CHECK(a.loss == doctest::Approx(b.loss).epsilon(tolerance));
    CHECK(distance(b.gradient, a.gradient) < tolerance);
    CHECK(distance(b.logps, a.logps) < tolerance);
  }
}

TEST_CASE("model: recomputed layers give the same bits from less memory") {
  const MemoryPairs rows(awkward_rows(37));
  for (Config config : odd_family_configs())
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      CAPTURE(config.family);
      config.layers = 5;
      if (!config.windows.empty()) config.windows = {0, 3, 0, 5, 4};
      TinyModel keeps = tiny(dtype, config), recomputes = tiny(dtype, config);
      recomputes.keep = Keep::inputs;
      const auto a = keeps.run(rows, 40, HeadSettings{}), b = recomputes.run(rows, 40, HeadSettings{});
      CHECK(b.loss == a.loss);
      CHECK(b.gradient == a.gradient);
      CHECK(recomputes.memory.high_water() < keeps.memory.high_water());
    }
}

TEST_CASE("model: fp32 and bf16 stay close to double") {
  const MemoryPairs rows(awkward_rows(37));
  const HeadSettings settings;
  for (const Config& config : odd_family_configs()) {
    CAPTURE(config.family);
    const auto truth = tiny(DType::f64, config).run(rows, one_batch, settings),
               single = tiny(DType::f32, config).run(rows, one_batch, settings),
               half = tiny(DType::bf16, config).run(rows, one_batch, settings);
    CHECK(distance(single.gradient, truth.gradient) < 1e-5);
    CHECK(distance(single.logps, truth.logps) < 1e-5);
    // bf16 keeps 8 bits: 2^-9 a rounding, a few dozen roundings deep.
    CHECK(distance(half.gradient, truth.gradient) < 0.08);
    CHECK(distance(half.logps, truth.logps) < 0.03);
    CHECK(distance(half.gradient, truth.gradient) > 1e-4);
  }
}

TEST_CASE("model: finite where answers are certain or impossible") {
  const MemoryPairs rows(awkward_rows(37));
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const double scale : {0.0, 8.0, 60.0}) {
      TinyModel model = tiny(dtype, odd_config(), scale);
      const auto outcome = model.run(rows, one_batch, HeadSettings{});
      CHECK(std::isfinite(outcome.loss));
      CHECK(std::all_of(outcome.gradient.begin(), outcome.gradient.end(), [](double g) { return std::isfinite(g); }));
    }
}

TEST_CASE("model: same threads, same bits") {
  const MemoryPairs rows(awkward_rows(37));
  for (const Config& config : odd_family_configs())
    for (const DType dtype : {DType::f32, DType::bf16}) {
      TinyModel model = tiny(dtype, config);
      const auto first = model.run(rows, one_batch, HeadSettings{});
      for (int i = 0; i < 20; ++i) {
        const auto again = model.run(rows, one_batch, HeadSettings{});
        REQUIRE(again.loss == first.loss);
        REQUIRE(again.gradient == first.gradient);
      }
    }
}
