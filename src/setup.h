// Options become things: what ./orpo_train and ./orpo_eval open alike.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "data/pairs.h"
#include "src/backend.h"
#include "src/config.h"
#include "src/family.h"
#include "src/head.h"
#include "src/plan.h"

namespace orpo {

// --dtype resolved; what auto chose is said on stderr.
DType resolve_dtype(const Options& options);

std::unique_ptr<Backend> open_backend(const Options& options);

// --device-memory, or what the device has free.
int64_t memory_for(const Options& options, const Backend& backend);

HeadSettings head_settings(const Options& options);

// The loss in one line: "NLL(prompt + chosen) + 0.1 * mean softplus(-log odds ratio)".
std::string loss_text(const Options& options);

// --max-length and --max-prompt-length resolved against the model's positions. Throws UserError where the model has
// fewer.
void resolve_lengths(Options& options, const Config& config);

// The rows of the files as the model's tokenizer and template read them (none are needed for pre-tokenised rows).
// resolve_lengths() first. What became of the rows is said on stderr, `what` in front; null: nothing is said.
std::unique_ptr<PairSet> load_rows(const Options& options, const std::vector<std::string>& files, const Config& config,
                                   const char* what);

// What a plan for these options knows before the rows are read: sizes, dtype, head, --micro-tokens.
PlanRequest plan_request(const Options& options, const Config& config);

// --plan: the table on stdout. Works from config.json alone; with rows to read, the largest pair is theirs.
void print_plan(Options options);

}  // namespace orpo
