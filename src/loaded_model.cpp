#include "src/loaded_model.h"

#include "src/model_folder.h"
#include "src/setup.h"

namespace orpo {
namespace {

PlanRequest reading(const Options& options, const Config& config, int64_t largest_pair_rows, int64_t pairs,
                    const DecodingLimits& decoding) {
  PlanRequest request = plan_request(options, config);
  request.largest_pair_rows = largest_pair_rows;
  request.eval_pairs = pairs;
  request.trains = false;
  request.decoding = decoding;
  return request;
}

}  // namespace

LoadedModel::LoadedModel(const Options& options, const ModelDescription& description, const PairSet& set,
                         const DecodingLimits& decoding)
    : LoadedModel(options, reading(options, description.config, set.report().largest_pair_rows, set.size(), decoding)) {
}

LoadedModel::LoadedModel(const Options& options, const ModelDescription& description, const DecodingLimits& decoding)
    : LoadedModel(options, reading(options, description.config, 2, 1, decoding)) {}

LoadedModel::LoadedModel(const Options& options, const PlanRequest& request)
    : request_(request),
      backend_(open_backend(options)),
      plan_(make_plan(request_, memory_for(options, *backend_))),
      state_("state", *backend_, plan_.state_bytes),
      scratch_("scratch", *backend_, plan_.scratch_bytes),
      model_{
          request_.config, request_.dtype, TrainingTensors::allocate_weights(request_.config, request_.dtype, state_),
          request_.head,   *backend_,      scratch_} {
  backend_->reserve_workspace(plan_.workspace_bytes);
  load_weights(options.model, request_.config, model_.tensors.weights, *backend_);
}

}  // namespace orpo
