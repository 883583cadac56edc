// A checkpoint's JSON files as text; checkpoint.h reads them back.
#pragma once

#include <string>

#include "src/checkpoint.h"

namespace orpo {

// state/trainer.json.
std::string trainer_json(const TrainingState& state);
// trainer_state.json. Throws UserError where an entry of the log history is no JSON.
std::string trainer_state_json(const TrainingState& state);

}  // namespace orpo
