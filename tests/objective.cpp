// The objective's page: values in another form, derivatives, edges, and what must fail when a term is dropped, flipped
// or replaced.
#include "src/objective.h"

#include <limits>

#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

struct Golden {
  double lw, ll, log_odds, loss, delta, d_chosen, d_rejected;
};

// From the definition, log(p / (1 - p)) of each side, in 40 digits (mpmath).
const Golden golden[] = {
    {-0.7, -1.2, 0.8279585849479512, 0.36251609830722002, 0.30407688959556744, -0.6040286306412732,
     0.43513790924319484},
    {-0.05, -3.0, 5.9195589281146755, 0.0026827829220859394, 0.002679187475968262, -0.054934506073390207,
     0.0028195653698022692},
    {-1.5, -0.4, -1.957150472663474, 2.0892837149311505, 0.87622423719664631, -1.127890661019945, 2.6578025950930838},
    {-2.25, -2.25, 0.0, 0.69314718055994531, 0.5, -0.5589085251520403, 0.5589085251520403},
    {-0.01, -0.02, 0.69815968050786232, 0.40379706491940383, 0.33222037656890576, -33.388424695027419,
     16.777682713666053},
    {-40.0, -1.0, -39.458675145387082, 39.458675145387082, 1.0, -1.0, 1.5819767068693264},
};

bool near(double a, double b, double relative = 1e-13) {
  return std::abs(a - b) <= relative * std::max(1.0, std::abs(b));
}

bool finite(const PairPreference& p) {
  for (double v : {p.log_odds, p.loss, p.delta, p.h_chosen, p.h_rejected, p.d_chosen, p.d_rejected})
    if (!std::isfinite(v)) return false;
  return true;
}

// Every pair of mean log-probabilities where the odds term matters.
template <class Body> void each_pair(Body&& body) {
  for (double lw = -3; lw <= -0.05; lw += 0.118)
    for (double ll = -3; ll <= -0.05; ll += 0.0983) body(lw, ll);
}

}  // namespace

TEST_CASE("objective: golden values") {
  for (const Golden& g : golden) {
    const PairPreference p = preference(Objective::orpo, g.lw, g.ll);
    CAPTURE(g.lw);
    CAPTURE(g.ll);
    CHECK(near(p.log_odds, g.log_odds));
    CHECK(near(p.loss, g.loss));
    CHECK(near(p.delta, g.delta));
    CHECK(near(p.d_chosen, g.d_chosen));
    CHECK(near(p.d_rejected, g.d_rejected));
  }
}

TEST_CASE("objective: the odds ratio is not the probability ratio, its sign and its size matter") {
  for (const Golden& g : golden) {
    const PairPreference p = preference(Objective::orpo, g.lw, g.ll);
    CAPTURE(g.lw);
    CAPTURE(g.ll);
    if (g.lw != g.ll) {
      CHECK_FALSE(near(p.log_odds, g.lw - g.ll, 1e-3));
      CHECK_FALSE(near(p.log_odds, -g.log_odds, 1e-3));
      CHECK((p.log_odds > 0) == (g.lw > g.ll));
    }
    CHECK(p.loss > 0);
    CHECK(p.d_chosen < 0);    // raising the chosen answer lowers the loss
    CHECK(p.d_rejected > 0);  // raising the rejected one raises it
    CHECK(p.h_chosen >= 1);
    CHECK(p.h_rejected >= 1);
  }
}

TEST_CASE("objective: agrees with the definition in long double") {
  each_pair([](double lw, double ll) {
    const auto log_odds = [](long double l) { return std::log(std::exp(l) / (1 - std::exp(l))); };
    const long double d = log_odds(lw) - log_odds(ll);
    const PairPreference p = odds_ratio(lw, ll);
    CHECK(near(p.log_odds, static_cast<double>(d)));
    CHECK(near(p.loss, static_cast<double>(-std::log(1 / (1 + std::exp(-d))))));
    CHECK(near(p.delta, static_cast<double>(1 / (1 + std::exp(d)))));
  });
}

TEST_CASE("objective: derivatives agree with finite differences") {
  for (Objective objective : {Objective::orpo, Objective::sft, Objective::ratio})
    each_pair([&](double lw, double ll) {
      const double h = 1e-4 * std::min(-lw, -ll);
      const auto slope = [&](auto loss) {
        return (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h);
      };
      const PairPreference p = preference(objective, lw, ll);
      CHECK(near(p.d_chosen, slope([&](double d) { return preference(objective, lw + d, ll).loss; }), 1e-8));
      CHECK(near(p.d_rejected, slope([&](double d) { return preference(objective, lw, ll + d).loss; }), 1e-8));
    });
}

TEST_CASE("objective: monotone in both answers") {
  each_pair([](double lw, double ll) {
    CHECK(odds_ratio(lw + 0.01, ll).loss < odds_ratio(lw, ll).loss);
    CHECK(odds_ratio(lw, ll + 0.01).loss > odds_ratio(lw, ll).loss);
  });
}

TEST_CASE("objective: finite at the edges") {
  const double infinity = std::numeric_limits<double>::infinity();
  const double edges[] = {0.0, -0.0, -1e-300, -1e-18, -1e-9,  -0x1p-24, -0.6931471805599453,
                          -1,  -50,  -800,    -1e5,   -1e300, -1e308,   -infinity};
  for (Objective objective : {Objective::orpo, Objective::sft, Objective::ratio})
    for (double lw : edges)
      for (double ll : edges) {
        CAPTURE(lw);
        CAPTURE(ll);
        const PairPreference p = preference(objective, lw, ll);
        CHECK(finite(p));
        CHECK(p.loss >= 0);
        CHECK(p.d_chosen <= 0);
        CHECK(p.d_rejected >= 0);
        if (lw == ll) {
          CHECK(p.log_odds == 0);
          CHECK(p.loss == doctest::Approx(std::log(2)));
          CHECK(p.delta == 0.5);
        }
      }
  // p -> 1: the derivative is taken at the clamped value, 1 - p = 2^-24.
  CHECK(odds_ratio(0, -1).h_chosen == doctest::Approx(0x1p24));
  CHECK(odds_ratio(0, 0).d_rejected == doctest::Approx(0x1p23));
}

TEST_CASE("objective: a mean that is not a number stays one") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(odds_ratio(nan, -1).loss));
  CHECK(std::isnan(odds_ratio(-1, nan).loss));
}

TEST_CASE("objective: ratio leaves the odds out, sft weighs nothing") {
  const PairPreference ratio = preference(Objective::ratio, -0.7, -1.2), odds = preference(Objective::orpo, -0.7, -1.2);
  CHECK(ratio.log_odds == doctest::Approx(0.5));
  CHECK(ratio.h_chosen == 1);
  CHECK(ratio.h_rejected == 1);
  CHECK(ratio.loss == doctest::Approx(0.47407698418010663));  // log(1 + exp(-0.5))
  CHECK(ratio.loss != doctest::Approx(odds.loss));
  CHECK(preference(Objective::sft, -0.7, -1.2).loss == odds.loss);
  CHECK(preference_weight(Objective::sft, 0.1) == 0);
  CHECK(preference_weight(Objective::orpo, 0.1) == 0.1);
  CHECK(preference_weight(Objective::ratio, 0.1) == 0.1);
}
