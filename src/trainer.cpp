#include "src/trainer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "src/fail.h"
#include "src/rng.h"
#include "src/signals.h"
#include "src/stored_values.h"

namespace orpo {

TrainingTensors TrainingTensors::allocate_weights(const Config& config, DType dtype, Arena& arena) {
  TrainingTensors t;
  t.weights = Weights::allocate(config, dtype, arena);
  return t;
}

TrainingTensors TrainingTensors::allocate(const Config& config, DType dtype, Arena& arena) {
  TrainingTensors t = allocate_weights(config, dtype, arena);
  const DType sums = accumulation_dtype(dtype);
  if (dtype != sums) t.corrections = Weights::allocate(config, DType::i16, arena);
  t.first = Weights::allocate(config, sums, arena);
  t.second = Weights::allocate(config, sums, arena);
  t.gradients = Weights::allocate(config, sums, arena);
  return t;
}

DeviceBatch to_device(const Batch& batch, Backend& backend, Arena& arena) {
  const auto upload = [&](const void* host, std::initializer_list<int64_t> shape) {
    const Tensor t = arena.allocate("batch", DType::i32, shape);
    backend.upload(t, host);
    return t;
  };
  return {upload(batch.tokens.data(), {batch.rows()}),
          upload(batch.positions.data(), {batch.rows()}),
          upload(batch.segments.data(), {static_cast<int64_t>(batch.segments.size()), 4}),
          upload(batch.target_rows.data(), {batch.targets()}),
          upload(batch.target_tokens.data(), {batch.targets()}),
          upload(batch.pair_targets.data(), {batch.pairs(), 4}),
          &batch};
}

namespace {

Keep kept_by(const DeviceModel& model) {
  return !model.tensors.trains() ? Keep::nothing : model.recompute ? Keep::inputs : Keep::all;
}

}  // namespace

MicroBatch::MicroBatch(DeviceModel& model, const Batch& batch)
    : model_(model),
      scope_(model.scratch),
      batch_(to_device(batch, model.backend, model.scratch)),
      activations_(
          Activations::allocate(model.config, model.dtype, batch.rows(), kept_by(model), model.scratch)) {
  if (model.tensors.trains())
    dhidden_ = model.scratch.allocate("d hidden", model.dtype, {batch.rows(), model.config.table_width()});
}

void MicroBatch::forward() {
  orpo::forward(model_.config, model_.tensors.weights, activations_, batch_, model_.backend, model_.scratch);
}

void MicroBatch::head(const Normalisers& normalisers, const Tensor& results) {
  const bool trains = model_.tensors.trains();
  orpo::head(model_.config, model_.tensors.weights, trains ? &model_.tensors.gradients : nullptr,
             trains ? &dhidden_ : nullptr, results, activations_.hidden, batch_, normalisers, model_.head,
             model_.backend, model_.scratch);
}

void MicroBatch::backward() {
  orpo::backward(model_.config, model_.tensors.weights, model_.tensors.gradients, activations_, dhidden_, batch_,
                 model_.backend, model_.scratch);
}

void zero_gradients(DeviceModel& model) {
  for (const Parameter& g : parameters(model.config, model.tensors.gradients)) model.backend.zero(g.tensor);
}

void reduce_gradients(DeviceModel& model, Communicator& communicator) {
  for (const Parameter& g : parameters(model.config, model.tensors.gradients)) communicator.all_reduce(g.tensor);
}

namespace {

int64_t count_parameters(const DeviceModel& model) {
  return static_cast<int64_t>(parameters(model.config, model.tensors.weights).size());
}

// sums [parameters] fp64 = of each tensor, in the order of parameters().
void sums_of_squares(const DeviceModel& model, const Tensor& sums, const Weights& weights) {
  std::vector<Tensor> tensors;
  for (const Parameter& p : parameters(model.config, weights)) tensors.push_back(p.tensor);
  model.backend.sums_of_squares(sums, tensors);
}

}  // namespace

StepNumbers::StepNumbers(DeviceModel& model, int64_t pairs)
    : model_(model),
      scope_(model.scratch),
      parameters_(model.tensors.trains() ? count_parameters(model) : 0),
      numbers_(model.scratch.allocate("step's numbers", DType::f64, {pairs * pair_result_numbers + parameters_})) {}

Tensor StepNumbers::next(int64_t pairs) {
  Tensor results = numbers_.slice(taken_ * pair_result_numbers, pairs * pair_result_numbers);
  results.rank = 2, results.shape = {pairs, pair_result_numbers};
  taken_ += pairs;
  return results;
}

void StepNumbers::read() {
  const int64_t results = taken_ * pair_result_numbers;
  const Tensor all = numbers_.slice(0, results + parameters_);
  if (parameters_ > 0) sums_of_squares(model_, all.slice(results, parameters_), model_.tensors.gradients);
  std::vector<double> host(static_cast<size_t>(all.elements()));
  model_.backend.download(host.data(), all);
  pairs.resize(static_cast<size_t>(taken_));
  if (results > 0) std::memcpy(pairs.data(), host.data(), static_cast<size_t>(results) * sizeof(double));
  gradients.squares.assign(host.begin() + results, host.end());
  gradients.norm = std::sqrt(std::accumulate(gradients.squares.begin(), gradients.squares.end(), 0.0));
}

double clip_factor(double norm, double max_norm) {
  return max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1.0;
}

void update_weights(DeviceModel& model, const AdamW& settings) {
  const TrainingTensors& t = model.tensors;
  const auto masters = parameters(model.config, t.masters()), first = parameters(model.config, t.first),
             second = parameters(model.config, t.second), gradients = parameters(model.config, t.gradients);
  std::vector<AdamWTensors> list;
  for (size_t i = 0; i < masters.size(); ++i)
    list.push_back({masters[i].tensor, masters[i].correction, first[i].tensor, second[i].tensor, gradients[i].tensor,
                    masters[i].decays});
  model.backend.adamw(list, settings);
}

namespace {

[[noreturn]] void fail_tensors(const char* what, const std::vector<std::string>& names) {
  std::string list;
  for (size_t i = 0; i < std::min<size_t>(names.size(), 5); ++i) list += (i ? ", " : "") + names[i];
  if (names.size() > 5) list += concat(" and ", names.size() - 5, " more");
  fail_machine("first step: ", what, ": ", list, "; the run stops rather than train a part of the model");
}

}  // namespace

void check_first_gradients(const DeviceModel& model, const GradientNorm& gradients) {
  const std::vector<Parameter> list = parameters(model.config, model.tensors.gradients);
  std::vector<std::string> silent;
  for (size_t i = 0; i < list.size(); ++i)
    if (!(gradients.squares[i] > 0) || !std::isfinite(gradients.squares[i])) silent.push_back(list[i].name);
  if (!silent.empty()) fail_tensors("no gradient reached", silent);
}

void check_first_moments(const DeviceModel& model) {
  const std::vector<Parameter> list = parameters(model.config, model.tensors.first);
  const Arena::Scope scope(model.scratch);
  const Tensor sums = model.scratch.allocate("moments' squares", DType::f64, {count_parameters(model)});
  sums_of_squares(model, sums, model.tensors.first);
  std::vector<double> squares(list.size());
  model.backend.download(squares.data(), sums);
  std::vector<std::string> unchanged;
  for (size_t i = 0; i < list.size(); ++i)
    if (!(squares[i] > 0)) unchanged.push_back(list[i].name);
  if (!unchanged.empty()) fail_tensors("AdamW left the moments unchanged of", unchanged);
}

void draw_weights(DeviceModel& model, uint64_t seed) {
  uint32_t index = 0;
  for (const Parameter& p : parameters(model.config, model.tensors.masters())) {
    const Random random(seed, RandomStream::weights, index++);
    const int64_t n = p.tensor.elements();
    std::vector<float> values(n);
    const bool matrix = p.tensor.rank > 1, norm = p.name.ends_with("norm");
    const bool residual = p.name.ends_with("attention_output") || p.name.ends_with("down");
    const double deviation = model.config.initializer_range /
                             (residual && model.config.scaled_residual_init ? std::sqrt(2.0 * model.config.layers) : 1);
#pragma omp parallel for
    for (int64_t i = 0; i < n; ++i)
      values[i] = matrix ? static_cast<float>(deviation * random.normal(static_cast<uint64_t>(i)))
                  : norm ? 1.0f
                         : 0.0f;
    upload_values(p.master(), values, model.backend);
  }
}

void start_optimizer(DeviceModel& model) {
  for (const Weights* moments : {&model.tensors.first, &model.tensors.second})
    for (const Parameter& m : parameters(model.config, *moments)) model.backend.zero(m.tensor);
}

std::optional<PairSums> evaluate(DeviceModel& model, const PairSet& set, int64_t micro_tokens,
                                 const std::function<void(const TokenPair&, const PairResult&)>& each) {
  DeviceModel measured{model.config, model.dtype,   {model.tensors.weights, {}, {}, {}, {}},
                       model.head,   model.backend, model.scratch};
  std::vector<int64_t> all(set.size());
  std::iota(all.begin(), all.end(), int64_t{0});
  PairSums sums;
  for (const std::vector<int64_t>& part : micro_batches(set, all, micro_tokens)) {
    if (stop_requested()) return std::nullopt;
    const Batch batch = pack(set, part, model.head.nll_includes_prompt);
    StepNumbers numbers(measured, batch.pairs());
    MicroBatch micro(measured, batch);
    micro.forward();
    micro.head(count_normalisers(set, part, model.head.nll_includes_prompt), numbers.next(batch.pairs()));
    numbers.read();
    for (size_t i = 0; i < numbers.pairs.size(); ++i) {
      sums.add(numbers.pairs[i], model.head.nll_includes_prompt);
      if (each) each(set[batch.pair_ids[i]], numbers.pairs[i]);
    }
  }
  return sums;
}

}  // namespace orpo
