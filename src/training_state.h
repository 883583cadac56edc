// A checkpoint's JSON files as text; checkpoint.h reads them back.
#pragma once

#include <string>

#include "src/checkpoint.h"

namespace orpo {

std::string trainer_json(const TrainingState& state);  // state/trainer.json
std::string trainer_state_json(
    const TrainingState& state);  // trainer_state.json; throws UserError where a log entry is no JSON

}  // namespace orpo
