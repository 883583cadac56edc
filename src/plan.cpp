#include "src/plan.h"

#include <algorithm>
#include <numeric>

#include "src/console.h"
#include "src/fail.h"
#include "src/trainer.h"

namespace orpo {
namespace {

constexpr int64_t good_micro_tokens = 1536;  // enough rows for matrix products at full rate

// A row at least for each pair; a target for each row and one more a pair, whose last prompt row predicts two tokens.
MicroLimits limits_of(const PlanRequest& r, int64_t micro_tokens) {
  const int64_t most_pairs = std::max(r.step_pairs, r.eval_pairs);
  const int64_t rows = std::max(r.largest_pair_rows, std::min(micro_tokens, most_pairs * r.largest_pair_rows));
  const int64_t pairs = std::min(most_pairs, rows);
  return {rows, rows + pairs, pairs};
}

template <class Allocate>
int64_t counted(Allocate&& allocate) {
  Arena arena = Arena::counting("plan");
  allocate(arena);
  return arena.high_water();
}

int64_t weight_bytes(const Config& config, DType dtype) {
  return counted([&](Arena& arena) { Weights::allocate(config, dtype, arena); });
}

TrainingTensors allocate_state(const PlanRequest& r, Arena& arena) {
  return r.trains ? TrainingTensors::allocate(r.config, r.dtype, arena)
                  : TrainingTensors::allocate_weights(r.config, r.dtype, arena);
}

// The largest micro-batch through the code that trains, with passes: 0 the numbers of as many pairs as a step has
// alone, 1 the micro-batch's tensors too, 2 the head too, 3 the backward pass and the update too.
int64_t rehearse_micro_batch(const PlanRequest& r, Backend& nothing, const Batch& batch, int passes) {
  Arena state = Arena::counting("state");
  return counted([&](Arena& scratch) {
    DeviceModel model{r.config, r.dtype, allocate_state(r, state), r.head, nothing, scratch, r.recompute};
    StepNumbers numbers(model, std::max(r.step_pairs, batch.pairs()));
    if (passes == 0) return;
    MicroBatch micro(model, batch);
    if (passes >= 2) micro.forward(), micro.head({1, 1}, numbers.next(batch.pairs()));
    if (passes < 3 || !r.trains) return;
    micro.backward();
    numbers.read();
    AdamW update{};
    update.step = 1;
    update_weights(model, update);
  });
}

// Prompts that take all that their rows allow, and a token more for each.
int64_t rehearse_decoding(const PlanRequest& r, Backend& nothing) {
  if (r.decoding.sequences == 0) return 0;
  Arena state = Arena::counting("state");
  return counted([&](Arena& scratch) {
    DeviceModel model{r.config, r.dtype, allocate_state(r, state), r.head, nothing, scratch};
    std::vector<Tokens> prompts(r.decoding.sequences, Tokens(1));
    prompts[0].resize(std::max<int64_t>(1, r.decoding.prompt_rows - r.decoding.sequences + 1));
    Tokens all(prompts.size());
    std::iota(all.begin(), all.end(), 0);
    Decoder decoder(model, r.decoding);
    decoder.start(prompts);
    decoder.step(all, Tokens(all.size()));
  });
}

MemoryPlan rehearse(const PlanRequest& r, int64_t micro_tokens) {
  MemoryPlan plan;
  plan.micro_tokens = micro_tokens;
  plan.limits = limits_of(r, micro_tokens);
  const auto part = [&](const char* what, int64_t bytes) {
    if (bytes > 0) plan.lines.push_back({what, bytes});
  };
  const DType sums = accumulation_dtype(r.dtype);
  part("weights", weight_bytes(r.config, r.dtype));
  if (r.trains) {
    if (r.dtype != sums) part("corrections to fp32 masters", weight_bytes(r.config, DType::i16));
    part("moments", 2 * weight_bytes(r.config, sums));
    part("gradients", weight_bytes(r.config, sums));
  }
  plan.state_bytes = counted([&](Arena& arena) { allocate_state(r, arena); });

  const Batch batch = largest_batch(plan.limits, r.head.nll_includes_prompt);
  const std::unique_ptr<Backend> nothing = r.rehearsal();
  const auto bytes = [&](int passes) { return rehearse_micro_batch(r, *nothing, batch, passes); };
  const int64_t numbers = bytes(0), tensors = bytes(1), with_head = bytes(2);
  plan.scratch_bytes = bytes(3);
  part("results of pairs", numbers);
  part("activations", tensors - numbers);
  part("logits and head", with_head - tensors);
  part("more for the backward pass", plan.scratch_bytes - with_head);
  const int64_t decoding = rehearse_decoding(r, *nothing);
  part("more for decoding", decoding - plan.scratch_bytes);
  plan.scratch_bytes = std::max(plan.scratch_bytes, decoding);
  plan.workspace_bytes = nothing->workspace_bytes();
  part("the device's operations", plan.workspace_bytes);
  return plan;
}

// The rows of the longest pair that fits alone; 0: none does.
int64_t longest_that_fits(PlanRequest r, int64_t memory) {
  int64_t fits = 0, too_many = r.largest_pair_rows;
  while (too_many - fits > 1) {
    r.largest_pair_rows = fits + (too_many - fits) / 2;
    (rehearse(r, r.largest_pair_rows).total() <= memory ? fits : too_many) = r.largest_pair_rows;
  }
  return fits;
}

}  // namespace

int64_t largest_pair(int64_t max_length) { return std::max<int64_t>(1, 2 * (max_length - 1)); }

Batch largest_batch(const MicroLimits& limits, bool score_prompt) {
  Batch batch;
  batch.score_prompt = score_prompt;
  batch.tokens.assign(limits.rows, 0);
  batch.positions.assign(limits.rows, 0);
  batch.target_rows.assign(limits.targets, 0);
  batch.target_tokens.assign(limits.targets, 0);
  int32_t row = 0, target = 0;
  for (int64_t p = 0; p < limits.pairs; ++p) {
    const bool first = p == 0;  // as long as the others leave room for; they are as short as can be
    const int32_t rows = first ? static_cast<int32_t>(limits.rows - limits.pairs + 1) : 1;
    const int32_t targets = first ? static_cast<int32_t>(limits.targets - 2 * (limits.pairs - 1)) : 2;
    batch.segments.push_back({row, rows, 0, 0});
    batch.pair_targets.push_back({target, targets - 2, 1, 1});
    batch.pair_ids.push_back(p);
    row += rows, target += targets;
  }
  return batch;
}

MemoryPlan make_plan(const PlanRequest& r, int64_t memory) {
  const int64_t wanted = r.micro_tokens > 0 ? r.micro_tokens : std::max(r.largest_pair_rows, good_micro_tokens);
  MemoryPlan plan = rehearse(r, wanted);
  if (plan.total() <= memory) return plan;

  MemoryPlan least = rehearse(r, std::min(wanted, r.largest_pair_rows));
  if (least.total() > memory) {
    const int64_t longest = longest_that_fits(r, memory) / 2 + 1;  // largest_pair() the other way round
    fail("this run needs ", bytes_text(least.total()), " even with one pair of ", r.largest_pair_rows,
         " rows at a time, and there are ", bytes_text(memory), ": ", bytes_text(least.state_bytes), " for ",
         r.trains ? "weights, gradients and moments" : "weights", ", ", bytes_text(least.scratch_bytes),
         " for the pair; use a smaller model",
         longest > 1 ? concat(" or --max-length ", longest, ", the largest that fits") : "");
  }
  int64_t fits = least.micro_tokens, too_many = wanted;
  while (too_many - fits > 1) {
    const int64_t middle = fits + (too_many - fits) / 2;
    MemoryPlan tried = rehearse(r, middle);
    (tried.total() <= memory ? fits : too_many) = middle;
    if (tried.total() <= memory) least = std::move(tried);
  }
  if (r.micro_tokens > 0)
    fail("this run needs ", bytes_text(plan.total()), ", and there are ", bytes_text(memory),
         "; the largest --micro-tokens that fits is ", fits);
  return least;
}

std::string plan_table(const MemoryPlan& plan, const PlanRequest& r, int64_t memory) {
  std::string table;
  const auto line = [&](const std::string& what, int64_t bytes) {
    const std::string size = bytes_text(bytes), exact = std::to_string(bytes);
    table += concat(what, std::string(std::max<size_t>(1, 34 - std::min<size_t>(33, what.size())), ' '),
                    std::string(size.size() < 9 ? 9 - size.size() : 0, ' '), size,
                    std::string(exact.size() < 16 ? 16 - exact.size() : 0, ' '), exact, "\n");
  };
  table +=
      concat(r.config.parameters(), " parameters, ", dtype_name(r.dtype), "; largest micro-batch: ", plan.limits.rows,
             " rows, ", plan.limits.targets, " targets (--micro-tokens ", plan.micro_tokens, ")\n");
  table += concat("what", std::string(36, ' '), "size", std::string(11, ' '), "bytes\n");
  for (const MemoryPlan::Line& l : plan.lines) line(l.what, l.bytes);
  line("high-water mark", plan.total());
  line("there are", memory);
  return table;
}

}  // namespace orpo
