// ./orpo_train without --model and --data: the shipped demonstration.
#pragma once

#include <filesystem>

#include "src/config.h"

namespace orpo {

// Two acts on generated data: a small base model learns plain text in which friendly and grumpy sentences both occur;
// then it is trained on dialogue pairs. train: what runs each act, the same as any run. Shows before and after on
// held-out pairs. Returns the exit status.
int demonstrate(const Options& options, int (*train)(const Options&));

// data/demonstration in the working folder or one above it, or beside the program or above that. Throws UserError.
std::filesystem::path demonstration_data();

}  // namespace orpo
