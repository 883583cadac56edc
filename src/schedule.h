// Learning rate of a step. The definitions are those of transformers' get_scheduler (optimization.py), so that a run
// repeats one made there.
//
// With s = updates made before this one (0 for the first), w = warm-up steps, n = all steps, every schedule rises
// linearly first:
//
//   s < w:           s / max(1, w)
//
// and then follows
//
//   constant         1
//   linear           max(0, (n - s) / max(1, n - w))
//   cosine           max(0, (1 + cos(pi (s - w) / max(1, n - w))) / 2)
//   inverse-sqrt     1 / sqrt((s + t - w) / t),  t = w, or 10,000 without warm-up
//
// So the first update of a run with warm-up has learning rate 0, as there.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace orpo {

enum class LrSchedule { constant, linear, cosine, inverse_sqrt };

// Factor on --learning-rate for the update after `done` updates.
inline double schedule_factor(LrSchedule schedule, int64_t done, int64_t warmup, int64_t total) {
  const double s = static_cast<double>(done), w = static_cast<double>(warmup), n = static_cast<double>(total);
  if (done < warmup) return s / std::max(1.0, w);
  switch (schedule) {
    case LrSchedule::constant:
      return 1;
    case LrSchedule::linear:
      return std::max(0.0, (n - s) / std::max(1.0, n - w));
    case LrSchedule::cosine:
      return std::max(0.0, 0.5 * (1 + std::cos(M_PI * ((s - w) / std::max(1.0, n - w)))));
    case LrSchedule::inverse_sqrt: {
      const double t = warmup > 0 ? w : 10000;
      return 1 / std::sqrt((s + t - w) / t);
    }
  }
  return 1;
}

}  // namespace orpo
