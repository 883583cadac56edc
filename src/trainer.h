// The pieces of a training step that stand around the model's two lists of calls: what a run keeps in memory, one
// micro-batch's way through the model, the gradient's norm, the update, and measuring a set of rows. src/train.cpp puts
// them in order.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/packer.h"
#include "src/arena.h"
#include "src/backend.h"
#include "src/communicator.h"
#include "src/head.h"
#include "src/metrics.h"
#include "src/model.h"

namespace orpo {

// What lives from step to step. T: the compute dtype (fp32 or bf16).
struct TrainingTensors {
  Weights weights;        // T
  Weights corrections;    // int16: what bf16 weights lack to be the fp32 masters (master.h); none where T is fp32
  Weights first, second;  // AdamW's moments, fp32
  Weights gradients;      // fp32

  static TrainingTensors allocate(const Config& config, DType dtype, Arena& arena);
  static TrainingTensors allocate_weights(const Config& config, DType dtype, Arena& arena);  // evaluation: nothing else
  bool trains() const { return static_cast<bool>(gradients.embedding); }
  Masters masters() const { return {weights, corrections}; }
};

// A model on a device, with the memory that its micro-batches pass through.
struct DeviceModel {
  Config config;
  DType dtype;
  TrainingTensors tensors;
  HeadSettings head;
  Backend& backend;
  Arena& scratch;
  bool recompute = false;  // training keeps each layer's input alone: Keep::inputs
};

// A micro-batch on its way through the model. Its activations are scratch: gone with this object.
class MicroBatch {
 public:
  MicroBatch(DeviceModel& model, const Batch& batch);
  void forward();  // tokens -> hidden rows
  // Hidden rows -> loss: results [pairs, 13] fp64 =; where the model trains also the loss's gradient at the hidden
  // rows.
  void head(const Normalisers& normalisers, const Tensor& results);
  void backward();                                              // -> gradients += of every weight
  const Tensor& hidden() const { return activations_.hidden; }  // [rows, width] T, after forward()

 private:
  DeviceModel& model_;
  Arena::Scope scope_;
  DeviceBatch batch_;
  Activations activations_;
  Tensor dhidden_;  // [rows, width] T
};

// Gradients of a step over all micro-batches and ranks.
struct GradientNorm {
  std::vector<double> squares;  // sum of squares of each parameter's gradient, in the order of parameters()
  double norm = 0;              // of all of them together; not finite where one of them is not
};

// What a step's micro-batches and its gradient come to, on the device until one download brings all of it: the one time
// that a step waits for the device. Scratch, taken before the step's micro-batches take theirs.
class StepNumbers {
 public:
  StepNumbers(DeviceModel& model, int64_t pairs);
  Tensor next(int64_t pairs);  // [pairs, 13] fp64: where the results of the coming pairs go
  void read();                 // brings the results; where the model trains measures the gradients and brings that too
  std::vector<PairResult> pairs;  // after read(), in the order of next()
  GradientNorm gradients;

 private:
  DeviceModel& model_;
  Arena::Scope scope_;
  int64_t taken_ = 0, parameters_;
  Tensor numbers_;  // [pairs * 13 + parameters] fp64
};

void zero_gradients(DeviceModel& model);
void reduce_gradients(DeviceModel& model, Communicator& communicator);

// Factor that brings the gradient's norm to at most max_norm (0: no limit), as torch.nn.utils.clip_grad_norm_.
double clip_factor(double norm, double max_norm);

// One AdamW update of every parameter; norms and biases do not decay. settings.step counts updates from 1.
void update_weights(DeviceModel& model, const AdamW& settings);

// A training step that leaves a tensor alone is a fault of the program or the model; these name it (MachineError).
void check_first_gradients(const DeviceModel& model, const GradientNorm& gradients);
void check_first_moments(const DeviceModel& model);

// New masters as transformers initialises them: matrices and embeddings normal(0, initializer_range), smaller by
// sqrt(2 layers) where the family scales what is added to the residual stream (GPT-2); norms 1, biases 0. A function of
// the seed alone. Every rank and backend draws the same.
void draw_weights(DeviceModel& model, uint64_t seed);
// moments = 0: before the first step.
void start_optimizer(DeviceModel& model);

// Sums over all rows of a set, nothing trained. each: called for every row in the set's order. Empty: stopped on the
// way (signals.h).
std::optional<PairSums> evaluate(DeviceModel& model, const PairSet& set, int64_t micro_tokens,
                                 const std::function<void(const TokenPair&, const PairResult&)>& each = {});

// Batch where the device reads it.
DeviceBatch to_device(const Batch& batch, Backend& backend, Arena& arena);

}  // namespace orpo
