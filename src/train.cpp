// ./orpo_train: preference pairs in, an aligned model out.
#include <cmath>

#include "data/packer.h"
#include "src/config.h"
#include "src/console.h"
#include "src/demonstration.h"
#include "src/fail.h"
#include "src/run.h"
#include "src/setup.h"
#include "src/signals.h"
#include "src/waiting.h"

namespace orpo {
namespace {

// The gradient of one step's loss, left in the model's gradients.
StepResult compute_gradients(Run& run) {
  DeviceModel& model = run.model();
  const bool scores_prompt = model.head.nll_includes_prompt;
  StepResult result;

  // 1. The step's pairs are a function of the seed and the step's number.
  const std::vector<int64_t> pairs = run.sampler().batch(run.done);
  // 2. What the loss will be divided by is known before anything is computed.
  const Normalisers normalisers = count_normalisers(run.data(), pairs, scores_prompt);
  zero_gradients(model);
  StepNumbers numbers(model, static_cast<int64_t>(pairs.size()));
  for (const std::vector<int64_t>& part : balanced_micro_batches(run.data(), pairs, run.micro_tokens())) {
    // 3. A few pairs at a time become one stream of tokens, each prompt once.
    const Batch batch = pack(run.data(), part, scores_prompt);
    MicroBatch micro(model, batch);
    // 4. Tokens become hidden rows, layer by layer (model.cpp).
    micro.forward();
    // 5. Hidden rows become log-probabilities, these a preference (objective.h), and that a gradient (head.cpp).
    micro.head(normalisers, numbers.next(batch.pairs()));
    // 6. The gradient goes back through the layers and adds up at every weight.
    micro.backward();
    result.micro_batches += 1;
  }
  for (const int64_t pair : pairs) result.work.add(run.data()[pair], scores_prompt);
  // 7. All ranks add up their gradients.
  reduce_gradients(model, run.communicator());
  // 8. The gradient's length, over all weights together, and what became of each pair: now the device is waited for.
  numbers.read();
  result.gradients = numbers.gradients;
  for (const PairResult& pair : numbers.pairs) result.sums.add(pair, scores_prompt);
  run.communicator().all_reduce(result.sums.values());
  result.finite = std::isfinite(result.gradients.norm) && std::isfinite(loss_of(result.sums, model.head));
  return result;
}

StepResult train_step(Run& run) {
  StepResult result = compute_gradients(run);
  AdamW update = run.next_update();
  result.learning_rate = update.learning_rate;
  run.done += 1;
  // 9. A step that is not finite changes nothing.
  if (!result.finite) {
    run.skipped += 1, run.skipped_in_a_row += 1;
    return result;
  }
  run.skipped_in_a_row = 0;
  run.check_gradients(result.gradients);
  // 10. AdamW moves the weights, by a gradient that is not longer than --max-grad-norm.
  update.gradient_scale = clip_factor(result.gradients.norm, run.options().max_grad_norm);
  run.before_update();
  update_weights(run.model(), update);
  run.check_moments(update.learning_rate);
  return result;
}

int save_first_gradients(Run& run, const std::string& file) {
  const StepResult result = compute_gradients(run);
  if (!result.finite) fail("--save-gradients: the first step's loss or gradient is not finite");
  save_gradients(file, run.model().config, run.model().tensors.gradients, run.model().backend);
  console().say("gradients of the first step: ", file, "  (loss ", loss_of(result.sums, run.model().head), ", norm ",
                result.gradients.norm, ")");
  return exit_finished;
}

int train(const Options& options) {
  if (options.plan) return print_plan(options), exit_finished;
  catch_stop_signals();
  stop_after(options.stop_after_seconds);
  Run run(options);
  if (!options.save_gradients.empty()) return save_first_gradients(run, options.save_gradients);
  while (true) {
    const bool last = run.done >= run.total_steps;
    if ((run.done == 0 || last || run.due(run.options().eval_every)) && !run.evaluate()) return run.stop();
    if (run.due(run.options().save_every)) run.save();
    if (last) return run.finish();
    if (run.communicator().any(stop_requested())) return run.stop();
    run.log(train_step(run));
  }
}

}  // namespace
}  // namespace orpo

int main(int argc, char** argv) {
  using namespace orpo;
  spin_briefly(argv);
  return run_program("orpo_train", [&] {
    const Options options = parse_options(Program::train, argc, argv);
    const bool demonstration = options.model.empty() && options.resume.empty();
    return demonstration ? demonstrate(options, train) : train(options);
  });
}
