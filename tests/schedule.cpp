// Learning-rate schedules against the values that transformers 5.23's get_scheduler gives, and their closed forms.
#include "src/schedule.h"

#include <doctest/doctest.h>

#include <vector>

namespace orpo {
namespace {

struct Case {
  LrSchedule schedule;
  int64_t warmup, total;
  std::vector<std::pair<int64_t, double>> factors;  // updates made before, factor
};

TEST_CASE("schedules are transformers' schedules") {
  const std::vector<Case> cases = {
      {LrSchedule::constant,
       0,
       20,
       {{0, 1.0}, {1, 1.0}, {3, 1.0}, {4, 1.0}, {5, 1.0}, {11, 1.0}, {19, 1.0}, {20, 1.0}}},
      {LrSchedule::constant,
       4,
       20,
       {{0, 0.0}, {1, 0.25}, {3, 0.75}, {4, 1.0}, {5, 1.0}, {11, 1.0}, {19, 1.0}, {20, 1.0}}},
      {LrSchedule::linear,
       0,
       20,
       {{0, 1.0}, {1, 0.95}, {3, 0.85}, {4, 0.8}, {5, 0.75}, {11, 0.45}, {19, 0.05}, {20, 0.0}}},
      {LrSchedule::linear,
       4,
       20,
       {{0, 0.0}, {1, 0.25}, {3, 0.75}, {4, 1.0}, {5, 0.9375}, {11, 0.5625}, {19, 0.0625}, {20, 0.0}}},
      {LrSchedule::cosine,
       0,
       20,
       {{0, 1.0},
        {1, 0.9938441702975689},
        {3, 0.9455032620941839},
        {4, 0.9045084971874737},
        {5, 0.8535533905932737},
        {11, 0.42178276747988447},
        {19, 0.00615582970243117},
        {20, 0.0}}},
      {LrSchedule::cosine,
       4,
       20,
       {{0, 0.0},
        {1, 0.25},
        {3, 0.75},
        {4, 1.0},
        {5, 0.9903926402016152},
        {11, 0.5975451610080642},
        {19, 0.009607359798384785},
        {20, 0.0}}},
      {LrSchedule::inverse_sqrt,
       0,
       20,
       {{0, 1.0},
        {1, 0.9999500037496877},
        {3, 0.9998500337415648},
        {4, 0.9998000599800071},
        {5, 0.9997500937109545},
        {11, 0.9994504533344625},
        {19, 0.9990513516101199},
        {20, 0.9990014975043671}}},
      {LrSchedule::inverse_sqrt,
       4,
       20,
       {{0, 0.0},
        {1, 0.25},
        {3, 0.75},
        {4, 1.0},
        {5, 0.8944271909999159},
        {11, 0.6030226891555273},
        {19, 0.4588314677411235},
        {20, 0.4472135954999579}}},
  };
  for (const Case& c : cases)
    for (const auto& [done, factor] : c.factors) {
      CAPTURE(static_cast<int>(c.schedule));
      CAPTURE(c.warmup);
      CAPTURE(done);
      CHECK(schedule_factor(c.schedule, done, c.warmup, c.total) == doctest::Approx(factor).epsilon(1e-12));
    }
}

TEST_CASE("warm-up starts at zero, reaches one, and leaves nothing negative behind") {
  for (const LrSchedule schedule :
       {LrSchedule::constant, LrSchedule::linear, LrSchedule::cosine, LrSchedule::inverse_sqrt}) {
    CHECK(schedule_factor(schedule, 0, 10, 100) == 0);
    CHECK(schedule_factor(schedule, 5, 10, 100) == 0.5);
    CHECK(schedule_factor(schedule, 10, 10, 100) == doctest::Approx(1));
    for (int64_t done = 0; done < 150; ++done) CHECK(schedule_factor(schedule, done, 10, 100) >= 0);
    CHECK(schedule_factor(schedule, 0, 0, 1) == 1);
  }
}

}  // namespace
}  // namespace orpo
