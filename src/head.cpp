#include "src/head.h"

#include <algorithm>

namespace orpo {
namespace {

// One chunk's memory: as many rows of logits as the budget allows, and the hidden rows that make them.
struct Chunk {
  Tensor logits;   // [chunk, vocab] A, rows logits_pitch apart
  Tensor hidden;   // [chunk, width] T
  Tensor dhidden;  // [chunk, width] T, absent when nothing flows back
};

// Consecutive pairs whose targets fit one chunk, or one pair that needs several.
struct Group {
  int64_t first_pair, pairs, first_target, targets;
};

std::vector<Group> group_pairs(const Batch& batch, int64_t chunk_rows) {
  std::vector<Group> groups;
  for (int64_t p = 0; p < batch.pairs(); ++p) {
    const PairTargets& t = batch.pair_targets[p];
    const int64_t targets = t.end() - t.begin;
    if (!groups.empty() && groups.back().targets + targets <= chunk_rows) {
      groups.back().pairs += 1;
      groups.back().targets += targets;
    } else {
      groups.push_back({p, 1, t.begin, targets});
    }
  }
  return groups;
}

std::vector<double> downloaded(const Tensor& values, Backend& backend) {
  std::vector<double> result(values.elements());
  if (values.dtype == DType::f64) {
    backend.download(result.data(), values);
  } else {
    std::vector<float> narrow(values.elements());
    backend.download(narrow.data(), values);
    std::copy(narrow.begin(), narrow.end(), result.begin());
  }
  return result;
}

// Entries from one row of logits to the next: an odd number of cache lines. Rows an even number apart, as those of
// vocabularies like 49,152 are, meet in a few sets of every cache, and the products that walk them run at half speed.
int64_t logits_pitch(int64_t vocab, DType dtype) {
  const int64_t line = 64 / dtype_bytes(dtype);
  return ((vocab + line - 1) / line | 1) * line;
}

// dlogits in the compute dtype over its own row's logits: bf16 rows stand at twice their pitch from each other.
Tensor over(const Tensor& logits, DType dtype) {
  Tensor dlogits = logits;
  dlogits.dtype = dtype;
  dlogits.row_pitch = logits.pitch() * (dtype_bytes(logits.dtype) / dtype_bytes(dtype));
  return dlogits;
}

}  // namespace

int64_t head_chunk_rows(const Config& config, const HeadSettings& settings, int64_t max_targets, DType dtype) {
  const DType sums = accumulation_dtype(dtype);
  const int64_t row_bytes = logits_pitch(config.vocab, sums) * dtype_bytes(sums);
  return std::clamp<int64_t>(settings.logits_bytes / row_bytes, 1, std::max<int64_t>(max_targets, 1));
}

void head(const Config& config, const Weights& weights, const Weights* gradients, const Tensor* dhidden,
          const Tensor& results, const Tensor& hidden, const DeviceBatch& batch, const Normalisers& normalisers,
          const HeadSettings& settings, Backend& backend, Arena& scratch, std::vector<double>* logp_out) {
  const Arena::Scope scope(scratch);
  const DType dtype = hidden.dtype, sums = accumulation_dtype(dtype);
  const int64_t targets = batch.target_rows.elements();
  const int64_t chunk_rows = head_chunk_rows(config, settings, targets, dtype);
  const Tensor logp = scratch.allocate("head statistics", sums, {targets});
  const Tensor lse = scratch.allocate("head statistics", sums, {targets});
  const Tensor coefficient = scratch.allocate("head statistics", sums, {targets});
  Chunk chunk;
  const int64_t pitch = logits_pitch(config.vocab, sums);
  chunk.logits = scratch.allocate("logits", sums, {chunk_rows, pitch});
  chunk.logits.shape[1] = config.vocab, chunk.logits.row_pitch = pitch;
  chunk.hidden = scratch.allocate("head rows", dtype, {chunk_rows, config.table_width()});
  if (gradients) chunk.dhidden = scratch.allocate("d head rows", dtype, {chunk_rows, config.table_width()});

  // Targets [first, first + count): hidden rows -> logits, which stay in the chunk.
  const auto make_logits = [&](int64_t first, int64_t count) {
    backend.gather(chunk.hidden.slice(0, count), hidden, batch.target_rows.slice(first, count));
    backend.linear_forward(chunk.logits.slice(0, count), chunk.hidden.slice(0, count), weights.output,
                           weights.output_bias);
  };
  // Logits -> dlogits in place -> gradients of the output matrix and of the hidden rows.
  const auto give_back = [&](int64_t first, int64_t count) {
    const Tensor logits = chunk.logits.slice(0, count), dlogits = over(logits, dtype);
    const Tensor rows = chunk.dhidden.slice(0, count);
    backend.head_backward(dlogits, logits, lse.slice(first, count), logp.slice(first, count),
                          coefficient.slice(first, count), batch.target_tokens.slice(first, count));
    backend.linear_backward(rows, gradients->output, gradients->output_bias, dlogits, chunk.hidden.slice(0, count),
                            weights.output);
    backend.scatter_add(*dhidden, rows, batch.target_rows.slice(first, count));
  };

  backend.begin(config.layers, Pass::forward);
  if (gradients) backend.zero(*dhidden);
  for (const Group& group : group_pairs(*batch.host, chunk_rows)) {
    const int64_t end = group.first_target + group.targets;
    // 1. Log-probability of every target of these pairs.
    for (int64_t first = group.first_target; first < end; first += chunk_rows) {
      const int64_t count = std::min(chunk_rows, end - first);
      make_logits(first, count);
      backend.head_forward(logp.slice(first, count), lse.slice(first, count), chunk.logits.slice(0, count),
                           batch.target_tokens.slice(first, count));
    }
    // 2. THE PREFERENCE: two means a pair become one coefficient a row (preference.h, objective.h).
    backend.preference(results.slice(group.first_pair, group.pairs), coefficient, logp,
                       batch.pair_targets.slice(group.first_pair, group.pairs), settings.objective, settings.lambda,
                       normalisers, settings.nll_includes_prompt);
    if (!gradients) continue;
    // 3. Back through the softmax and the output matrix, last chunk first: its logits are still there, the others are
    // made again.
    const int64_t last = group.first_target + std::max<int64_t>(group.targets - 1, 0) / chunk_rows * chunk_rows;
    for (int64_t first = last; first >= group.first_target; first -= chunk_rows) {
      const int64_t count = std::min(chunk_rows, end - first);
      if (count == 0) break;
      if (first + count < end) make_logits(first, count);
      give_back(first, count);
    }
  }
  backend.end(config.layers, Pass::forward);
  if (logp_out) *logp_out = downloaded(logp, backend);
}

}  // namespace orpo
