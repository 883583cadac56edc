#include "src/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "src/fail.h"
#include "src/rng.h"

namespace orpo {

Sampler::Sampler(const SamplingSettings& settings, std::span<const Tokens> prompts, int64_t first)
    : settings_(settings), first_(first), drawn_(prompts.size()) {
  if (settings.repetition_penalty == 1) return;
  for (const Tokens& prompt : prompts) seen_.emplace_back(prompt.begin(), prompt.end());
}

int32_t Sampler::operator()(std::span<const float> logits, int64_t sequence) {
  if (!seen_.empty()) {
    penalised_.assign(logits.begin(), logits.end());
    const auto penalty = static_cast<float>(settings_.repetition_penalty);
    for (const int32_t token : seen_[sequence]) {
      float& logit = penalised_[token];
      logit = logit > 0 ? logit / penalty : logit * penalty;
    }
    logits = penalised_;
  }
  const int32_t token = settings_.temperature == 0 ? most_probable(logits, sequence) : draw(logits, sequence);
  drawn_[sequence] += 1;
  if (!seen_.empty()) seen_[sequence].insert(token);
  return token;
}

// p_i = exp((x_i - max) / temperature) / sum. Of the tokens by falling probability those are kept before which less
// than top_p lies; the first one always is.
int32_t Sampler::draw(std::span<const float> logits, int64_t sequence) {
  const double largest = logits[most_probable(logits, sequence)];
  std::vector<double> weight(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) weight[i] = std::exp((logits[i] - largest) / settings_.temperature);
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const double total = std::accumulate(weight.begin(), weight.end(), 0.0);
  double kept = total;
  if (settings_.top_p < 1) {
    std::sort(order.begin(), order.end(),
              [&](int32_t a, int32_t b) { return weight[a] != weight[b] ? weight[a] > weight[b] : a < b; });
    kept = 0;
    size_t count = 0;
    while (count < order.size() && (count == 0 || kept < settings_.top_p * total)) kept += weight[order[count++]];
    order.resize(count);
  }
  const Random random(settings_.seed, RandomStream::sampling, static_cast<uint32_t>(first_ + sequence));
  double left = random.uniform(drawn_[sequence]) * kept;
  for (const int32_t token : order)
    if ((left -= weight[token]) < 0) return token;
  return order.back();  // rounding
}

}  // namespace orpo
