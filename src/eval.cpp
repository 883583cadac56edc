// ./orpo_eval: what a model makes of preference pairs. Means on stdout; with --per-pair one JSON line a kept row, in
// file order.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "src/config.h"
#include "src/console.h"
#include "src/fail.h"
#include "src/files.h"
#include "src/json.h"
#include "src/loaded_model.h"
#include "src/metrics.h"
#include "src/setup.h"
#include "src/signals.h"
#include "src/waiting.h"

namespace orpo {
namespace {

// file (where there are several), row, logps/* (means), tokens/*, nll (mean over the NLL scope), log_odds (D), loss
// (nll + lambda softplus(-D)).
std::string pair_line(const std::vector<std::string>& files, const TokenPair& pair, const PairResult& result,
                      const HeadSettings& settings) {
  PairSums one;
  one.add(result, settings.nll_includes_prompt);
  const double nan = std::nan("");
  const bool both = one.pairs > 0;
  const auto count = [](size_t n) { return static_cast<double>(n); };
  const std::string numbers = json_line({{"row", count(pair.row)},
                                         {"logps/chosen", one.chosen},
                                         {"logps/rejected", both ? one.rejected : nan},
                                         {"tokens/prompt", count(pair.trunk.size())},
                                         {"tokens/chosen", count(pair.chosen.size())},
                                         {"tokens/rejected", count(pair.rejected.size())},
                                         {"nll", one.nll / std::max(1.0, one.nll_tokens)},
                                         {"log_odds", both ? one.log_odds : nan},
                                         {"loss", loss_of(one, settings)}});
  const std::string file = files.size() > 1 ? concat("{\"file\": ", Json(files[pair.file]).dump(), ", ") : "{";
  return file + numbers.substr(1) + "\n";
}

int evaluate_rows(Options options) {
  const ModelDescription description = read_model_config(options.model);
  resolve_lengths(options, description.config);
  const std::unique_ptr<PairSet> set = load_rows(options, options.data, description.config, "data");

  LoadedModel loaded(options, description, *set);

  std::string lines;
  int64_t rows = 0;
  catch_stop_signals();
  const std::optional<PairSums> sums =
      evaluate(loaded.model(), *set, loaded.micro_tokens(), [&](const TokenPair& pair, const PairResult& result) {
        if (!options.per_pair.empty()) lines += pair_line(options.data, pair, result, loaded.model().head);
        rows += 1;
        console().progress(concat("row ", rows, "/", set->size()), rows == set->size());
      });
  if (!sums) fail_machine(stop_reason(), ": stopped after ", rows, " of ", set->size(), " rows; nothing was written");
  if (!options.per_pair.empty()) write_file_atomically(options.per_pair, lines);
  std::printf("rows %lld\n", static_cast<long long>(sums->rows));
  for (const auto& [name, value] : preference_metrics(*sums, loaded.model().head))
    std::printf("%s %.6g\n", name.c_str(), value);
  return exit_finished;
}

}  // namespace
}  // namespace orpo

int main(int argc, char** argv) {
  using namespace orpo;
  spin_briefly(argv);
  return run_program("orpo_eval", [&] { return evaluate_rows(parse_options(Program::eval, argc, argv)); });
}
