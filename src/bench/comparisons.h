// The benchmark's comparisons: the same program under two settings, in one run.
#pragma once

#include "src/bench/steps.h"

namespace orpo::bench {

// Each prints its lines and returns their JSON.

// The shared-prompt layout against two sequences a pair, and against sequences padded to the longest of a micro-batch.
Json compare_layouts(Bench& bench, const BenchModel& model);
// 1, 4 and 16 times the tokens in one micro-batch: time, memory, logits; and a sequence as long as the model's
// positions.
Json compare_lengths(Bench& bench, const BenchModel& model);
// One thread against all.
Json compare_threads(Bench& bench, const BenchModel& model);
// What a start and a checkpoint take.
Json measure_start_and_checkpoint(Bench& bench, const BenchModel& model);
// Greedy decoding, against the rate at which memory is read. The model's folder has weights.
Json measure_decoding(Bench& bench, const BenchModel& model);

}  // namespace orpo::bench
