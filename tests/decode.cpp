// Decoding with a key/value cache against running every whole sequence again.
#include "src/decode.h"

#include <numeric>

#include "src/plan.h"
#include "tests/check.h"
#include "tests/tiny_model.h"

using namespace orpo;
using namespace orpo::test;

namespace {

// Uneven, one of a single token, one that crosses tiles of attention.
std::vector<Tokens> uneven_prompts() {
  std::mt19937 random(5);
  std::vector<Tokens> prompts;
  for (const int length : {1, 7, 70, 3}) prompts.push_back(random_tokens(random, length, odd_config().vocab));
  return prompts;
}

Config long_config() {
  Config config = odd_config();
  config.max_positions = 400;
  return config;
}

DeviceModel device_model(TinyModel& tiny) {
  return {tiny.config, tiny.dtype, {tiny.weights, {}, {}, {}, {}}, {}, *tiny.backend, tiny.memory};
}

// The weights of one model in another of a wider dtype.
void copy_weights(const TinyModel& to, const TinyModel& from) {
  const auto out = parameters(to.config, to.weights), in = parameters(from.config, from.weights);
  for (size_t i = 0; i < out.size(); ++i) to.set(out[i].tensor, from.get(in[i].tensor));
}

// Logits after every token of a sequence, from one pass over the whole of it: [tokens * vocab].
Values whole_logits(TinyModel& model, const Tokens& sequence) {
  const auto rows = static_cast<int64_t>(sequence.size());
  Batch batch;
  batch.tokens = sequence;
  batch.positions.resize(sequence.size());
  std::iota(batch.positions.begin(), batch.positions.end(), 0);
  batch.segments.push_back({0, static_cast<int32_t>(rows), 0, 0});
  const Arena::Scope scope(model.memory);
  const DeviceBatch device = to_device(batch, *model.backend, model.memory);
  const Activations activations = Activations::allocate(model.config, model.dtype, rows, Keep::all, model.memory);
  forward(model.config, model.weights, activations, device, *model.backend, model.memory);
  const Tensor logits = model.memory.allocate("logits", accumulation_dtype(model.dtype), {rows, model.config.vocab});
  model.backend->linear_forward(logits, activations.hidden, model.weights.output, model.weights.output_bias);
  return model.get(logits);
}

// The last `count` tokens' logits.
void append_last(Values& to, const Values& logits, int64_t count, int64_t vocab) {
  to.insert(to.end(), logits.end() - count * vocab, logits.end());
}

// The next token by running the whole sequence again: what decoding must agree with.
Tokens decode_by_whole_sequences(TinyModel& model, Tokens sequence, int32_t stop, int64_t max_tokens) {
  Tokens result;
  while (static_cast<int64_t>(result.size()) < max_tokens) {
    const Values logits = whole_logits(model, sequence);
    const auto last = logits.end() - model.config.vocab;
    const auto best = static_cast<int32_t>(std::max_element(last, logits.end()) - last);
    if (best == stop) break;
    result.push_back(best), sequence.push_back(best);
  }
  return result;
}

}  // namespace

TEST_CASE("decode: logits with the cache are those of the whole sequences, step by step") {
  constexpr int64_t steps = 5;
  for (Config config : odd_family_configs())
    for (const DType dtype : {DType::f64, DType::f32, DType::bf16}) {
      CAPTURE(config.family);
      config.max_positions = 400;
      TinyModel model(config, dtype, make_cpu_backend(2)), exact(config, DType::f64, make_cpu_backend(2));
      copy_weights(exact, model);
      const int64_t vocab = model.config.vocab, before = model.memory.used();
      std::vector<Tokens> sequences;
      DeviceModel device = device_model(model);
      for (const int64_t prompt_rows : {80, 1000}) {  // prompts in several passes and in one
        sequences = uneven_prompts();
        Decoder decoder(device, {4, 90, prompt_rows});
        std::vector<Values> cached(sequences.size());  // of each sequence
        const auto take = [&](const Tensor& logits, const Tokens& of) {
          const Values values = model.get(logits);
          for (size_t i = 0; i < of.size(); ++i)
            cached[of[i]].insert(cached[of[i]].end(), values.begin() + i * vocab, values.begin() + (i + 1) * vocab);
        };
        Tokens going{0, 1, 2, 3};
        take(decoder.start(sequences), going);
        std::mt19937 random(11);
        for (int64_t step = 0; step < steps; ++step) {
          if (step == 2) going = {3, 0, 2};  // the second drops out, the others go on in another order
          const Tokens tokens = random_tokens(random, static_cast<int>(going.size()), static_cast<int>(vocab));
          take(decoder.step(going, tokens), going);
          for (size_t i = 0; i < going.size(); ++i) sequences[going[i]].push_back(tokens[i]);
        }
        for (size_t s = 0; s < sequences.size(); ++s) {
          CAPTURE(s);
          const auto count = static_cast<int64_t>(cached[s].size()) / vocab;
          CHECK(count == (s == 1 ? 3 : 1 + steps));
          Values whole, reference;
          append_last(whole, whole_logits(model, sequences[s]), count, vocab);
          append_last(reference, whole_logits(exact, sequences[s]), count, vocab);
          if (dtype == DType::f64)
            CHECK(largest_error(cached[s], whole) < 1e-12);
          else
            check_close("logits", cached[s], whole, reference, dtype);
        }
      }
      CHECK(model.memory.used() == before);  // a Decoder gives its memory back
    }
}

TEST_CASE("decode: greedy tokens are those of running the whole sequence again") {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    TinyModel model(long_config(), dtype, make_cpu_backend(2), 3, 2.0);
    DeviceModel device = device_model(model);
    const std::vector<Tokens> prompts = uneven_prompts();
    // A token that ends some of the sequences early, and not all at once.
    std::vector<Tokens> endless;
    for (const Tokens& prompt : prompts) endless.push_back(decode_by_whole_sequences(model, prompt, -1, 30));
    CHECK(decode(device, prompts, {}, 30) == endless);
    const int32_t stop = endless[0][4];
    std::vector<Tokens> expected;
    for (const Tokens& prompt : prompts) expected.push_back(decode_by_whole_sequences(model, prompt, stop, 30));
    CHECK(expected[0].size() < 5);
    CHECK(decode(device, prompts, {stop}, 30) == expected);
    for (size_t i = 0; i < prompts.size(); ++i)  // together as alone
      CHECK(decode(device, std::span(&prompts[i], 1), {stop}, 30)[0] == expected[i]);
  }
}

TEST_CASE("decode: each greedy token is the answer that evaluation finds most probable") {
  TinyModel model(odd_config(), DType::f32, make_cpu_backend(2));
  DeviceModel device = device_model(model);
  const std::vector<Tokens> prompts{{1, 2, 3}};
  const Tokens answer = decode(device, prompts, {}, 5)[0];
  REQUIRE(answer.size() == 5);
  Tokens known = prompts[0];
  for (const int32_t token : answer) {
    std::vector<Row> rows;
    for (int32_t other = 0; other < 37; ++other) rows.push_back({known, {other}, {(other + 1) % 37}});
    double best = -1e9;
    int32_t argbest = -1, at = 0;
    evaluate(device, MemoryPairs(rows), 4000, [&](const TokenPair&, const PairResult& r) {
      if (r.chosen_logp_sum > best) best = r.chosen_logp_sum, argbest = at;
      ++at;
    });
    CHECK(token == argbest);
    known.push_back(token);
  }
}

TEST_CASE("decode: stops at the model's positions, takes what the sampler says, refuses what it cannot do") {
  Config config = odd_config();  // 64 positions
  TinyModel model(config, DType::f32, make_cpu_backend(2));
  DeviceModel device = device_model(model);
  const auto count_up = [](std::span<const float> logits, int64_t sequence) {
    CHECK(logits.size() == 37);
    return static_cast<int32_t>(sequence + 1);
  };
  const std::vector<Tokens> prompts{Tokens(60, 1), Tokens(64, 2), Tokens(1, 3)};
  const std::vector<Tokens> results = decode(device, prompts, {}, 10, count_up);
  CHECK(results[0] == Tokens(4, 1));
  CHECK(results[1].empty());
  CHECK(results[2] == Tokens(10, 3));
  CHECK(decode(device, prompts, {}, 0) == std::vector<Tokens>(3));
  CHECK(decode(device, {}, {}, 10).empty());
  const std::vector<Tokens> longer{Tokens(65, 1)}, empty{Tokens{}};
  CHECK_THROWS_WITH_AS(decode(device, longer, {}, 1),
                       doctest::Contains("prompt 1 has 65 tokens where the model takes 1 to 64"), UserError);
  CHECK_THROWS_AS(decode(device, empty, {}, 1), UserError);
  const std::vector<float> nothing(37, std::nanf(""));
  CHECK_THROWS_AS(most_probable(nothing, 0), MachineError);
  const std::vector<float> tie{0, 3, 1, 3};
  CHECK(most_probable(tie, 0) == 1);

  Decoder decoder(device, {1, 8, 7});
  const std::vector<Tokens> seven{Tokens(7, 1)};
  decoder.start(seven);
  decoder.step(Tokens{0}, Tokens{1});
  check_refuses([&] { decoder.step(Tokens{0}, Tokens{1}); }, "keep_keys_values", "the cache is full: position 8");
}

TEST_CASE("decode: a plan has exactly the memory that decoding takes") {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    PlanRequest r;
    r.config = long_config();
    r.dtype = dtype;
    r.micro_tokens = r.largest_pair_rows = 2, r.step_pairs = 1;
    r.trains = false;
    const int64_t without = make_plan(r, int64_t{1} << 30).scratch_bytes;
    const std::vector<Tokens> prompts = uneven_prompts();
    r.decoding = decoding_limits(r.config, prompts, 20);
    CHECK(r.decoding.sequences == 4);
    CHECK(r.decoding.positions == 90);
    CHECK(r.decoding.prompt_rows == 70);
    const MemoryPlan plan = make_plan(r, int64_t{1} << 30);
    CHECK(plan.scratch_bytes > without);
    CHECK(plan.lines.back().what == "more for decoding");
    const auto backend = make_cpu_backend(2);
    Arena state("state", *backend, plan.state_bytes), scratch("scratch", *backend, plan.scratch_bytes);
    DeviceModel model{r.config, dtype,    TrainingTensors::allocate_weights(r.config, dtype, state),
                      {},       *backend, scratch};
    draw_weights(model, 1);
    decode(model, prompts, {}, 20);
    CHECK(scratch.high_water() <= plan.scratch_bytes);
    CHECK(scratch.used() == 0);
  }
}
