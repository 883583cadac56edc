// A model folder opened for reading: evaluation and decoding, nothing trained.
#pragma once

#include <memory>

#include "data/pairs.h"
#include "src/config.h"
#include "src/family.h"
#include "src/plan.h"
#include "src/trainer.h"

namespace orpo {

class LoadedModel {
 public:
  // With memory for micro-batches of this set and for decoding. options: --dtype --device --threads --micro-tokens and
  // the objective's.
  LoadedModel(const Options& options, const ModelDescription& description, const PairSet& set,
              const DecodingLimits& decoding = {});
  // With memory for decoding alone.
  LoadedModel(const Options& options, const ModelDescription& description, const DecodingLimits& decoding);

  DeviceModel& model() { return model_; }
  int64_t micro_tokens() const { return plan_.micro_tokens; }

 private:
  LoadedModel(const Options& options, const PlanRequest& request);

  PlanRequest request_;
  std::unique_ptr<Backend> backend_;
  MemoryPlan plan_;
  Arena state_, scratch_;
  DeviceModel model_;
};

}  // namespace orpo
