// The benchmark's main part: a training step of a model, where its time and its memory go.
#pragma once

#include "src/bench/machine.h"
#include "src/bench/models.h"
#include "src/bench/trial.h"
#include "src/config.h"

namespace orpo::bench {

// What every part of the benchmark works with.
struct Bench {
  const Options& options;
  const Workplace& work;
  Backend& backend;
  Machine& machine;  // its product rates grow when a later measurement is better

  // The arguments of a trial of this model: with --threads as given.
  std::vector<std::string> arguments(const BenchModel& model, DType dtype) const;
  // Rows drawn for a step written to a file, a step's pairs each time the same: the arguments that train on them.
  std::vector<std::string> on_rows(const std::vector<Row>& rows, int64_t steps) const;
  Trial trial(std::vector<std::string> arguments, const std::vector<std::string>& more) const;
};

// The model's weights, drawn once and written, where the folder has none: later trials read them.
BenchModel with_weights(Bench& bench, const BenchModel& model);

// Measures steps of the model on these rows (arguments that name them), prints the tables, returns the JSON of it.
Json measure_steps(Bench& bench, const BenchModel& model, DType dtype, const std::string& rows_name,
                   const std::vector<std::string>& rows);

}  // namespace orpo::bench
