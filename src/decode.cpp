#include "src/decode.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "src/fail.h"

namespace orpo {
namespace {

void append(Batch& batch, std::span<const int32_t> tokens) {
  const auto begin = static_cast<int32_t>(batch.rows()), count = static_cast<int32_t>(tokens.size());
  batch.segments.push_back({begin, count, 0, 0});
  batch.tokens.insert(batch.tokens.end(), tokens.begin(), tokens.end());
  batch.positions.resize(batch.tokens.size());
  std::iota(batch.positions.begin() + begin, batch.positions.end(), 0);
  batch.target_rows.push_back(begin + count - 1);
  batch.target_tokens.push_back(0);
}

}  // namespace

Decoder::Decoder(DeviceModel& model, const DecodingLimits& limits)
    : model_(model),
      scope_(model.scratch),
      limits_(limits),
      cache_(KeyValueCache::allocate(model.config, model.dtype, limits.sequences, limits.positions, model.scratch)),
      hidden_(model.scratch.allocate("last hidden", model.dtype, {limits.sequences, model.config.table_width()})),
      logits_(model.scratch.allocate("logits", accumulation_dtype(model.dtype),
                                     {limits.sequences, model.config.vocab})) {}

// Runs the batch's rows and puts the hidden states of its target rows where the logits are made from.
void Decoder::pass(const Batch& batch, const Tokens& sequences, bool continues, int64_t first_logits) {
  const Arena::Scope scope(model_.scratch);
  const DeviceBatch device = to_device(batch, model_.backend, model_.scratch);
  const Tensor rows = model_.scratch.allocate("batch", DType::i32, {batch.rows()});
  model_.backend.upload(rows, sequences.data());
  const Activations activations =
      Activations::allocate(model_.config, model_.dtype, batch.rows(), Keep::nothing, model_.scratch);
  const CachedRows cached{cache_, rows, continues};
  forward(model_.config, model_.tensors.weights, activations, device, model_.backend, model_.scratch, &cached);
  model_.backend.gather(hidden_.slice(first_logits, batch.targets()), activations.hidden, device.target_rows);
}

Tensor Decoder::logits(int64_t rows) {
  const Tensor result = logits_.slice(0, rows);
  model_.backend.linear_forward(result, hidden_.slice(0, rows), model_.tensors.weights.output,
                                model_.tensors.weights.output_bias);
  return result;
}

Tensor Decoder::start(std::span<const Tokens> prompts) {
  lengths_.clear();
  for (size_t i = 0; i < prompts.size();) {
    Batch batch;
    Tokens sequences;
    const size_t first = i;
    do {
      const Tokens& prompt = prompts[i];
      append(batch, prompt);
      sequences.resize(batch.tokens.size(), static_cast<int32_t>(i));
      lengths_.push_back(static_cast<int32_t>(prompt.size()));
    } while (++i < prompts.size() && batch.rows() + static_cast<int64_t>(prompts[i].size()) <= limits_.prompt_rows);
    pass(batch, sequences, false, static_cast<int64_t>(first));
  }
  return logits(static_cast<int64_t>(prompts.size()));
}

Tensor Decoder::step(std::span<const int32_t> sequences, std::span<const int32_t> tokens) {
  Batch batch;
  batch.tokens.assign(tokens.begin(), tokens.end());
  for (const int32_t s : sequences) batch.positions.push_back(lengths_.at(s)++);
  batch.target_rows.resize(tokens.size());
  std::iota(batch.target_rows.begin(), batch.target_rows.end(), 0);
  batch.target_tokens.resize(tokens.size());
  pass(batch, Tokens(sequences.begin(), sequences.end()), true, 0);
  return logits(batch.rows());
}

int32_t most_probable(std::span<const float> logits, int64_t) {
  float largest = -std::numeric_limits<float>::infinity();
  const float* logit = logits.data();
  const size_t count = logits.size();
#pragma omp simd reduction(max : largest)
  for (size_t i = 0; i < count; ++i) largest = logit[i] > largest ? logit[i] : largest;
  const auto best = std::find(logits.begin(), logits.end(), largest);
  if (best == logits.end() || !std::isfinite(largest)) fail_machine("decode: the model's logits are not numbers");
  return static_cast<int32_t>(best - logits.begin());
}

DecodingLimits decoding_limits(const Config& config, std::span<const Tokens> prompts, int64_t max_tokens) {
  DecodingLimits limits{static_cast<int64_t>(prompts.size()), 0, 0};
  for (const Tokens& prompt : prompts) {
    const auto length = static_cast<int64_t>(prompt.size());
    limits.positions = std::max(limits.positions, std::min(length + max_tokens, config.max_positions));
    limits.prompt_rows = std::max(limits.prompt_rows, length);
  }
  return limits;
}

std::vector<Tokens> decode(DeviceModel& model, std::span<const Tokens> prompts, const Tokens& stops,
                           int64_t max_tokens, const NextToken& next) {
  const int64_t positions = model.config.max_positions, vocab = model.config.vocab;
  for (size_t i = 0; i < prompts.size(); ++i)
    if (prompts[i].empty() || static_cast<int64_t>(prompts[i].size()) > positions)
      fail("decode: prompt ", i + 1, " has ", prompts[i].size(), " tokens where the model takes 1 to ", positions);
  std::vector<Tokens> results(prompts.size());
  if (prompts.empty() || max_tokens <= 0) return results;

  Decoder decoder(model, decoding_limits(model.config, prompts, max_tokens));
  Tensor logits = decoder.start(prompts);
  Tokens going(prompts.size()), last;  // sequences that go on, and their newest tokens
  std::iota(going.begin(), going.end(), 0);
  std::vector<float> host;
  while (true) {
    REQUIRE_SHAPE("decode", logits.dtype == DType::f32, "logits are ", shape_text(logits));
    host.resize(static_cast<size_t>(logits.elements()));
    model.backend.download(host.data(), logits);
    Tokens still;
    last.clear();
    for (size_t i = 0; i < going.size(); ++i) {
      const int32_t s = going[i];
      const int64_t most = std::min(max_tokens, positions - static_cast<int64_t>(prompts[s].size()));
      if (most == 0) continue;
      const int32_t token = next({host.data() + static_cast<int64_t>(i) * vocab, static_cast<size_t>(vocab)}, s);
      if (std::find(stops.begin(), stops.end(), token) != stops.end()) continue;
      results[s].push_back(token);
      if (static_cast<int64_t>(results[s].size()) < most) still.push_back(s), last.push_back(token);
    }
    if (still.empty()) return results;
    going = still;
    logits = decoder.step(going, last);
  }
}

}  // namespace orpo
