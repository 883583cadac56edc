#include "src/bench/comparisons.h"

#include <algorithm>
#include <chrono>
#include <cstdio>

#include "src/console.h"
#include "src/decode.h"
#include "src/loaded_model.h"
#include "src/setup.h"

namespace orpo::bench {
namespace {

constexpr int64_t longest_row = 1024;  // tokens of a drawn sequence

DType dtype_of_options(const Options& options) {
  return options.dtype == DTypeChoice::fp32 ? DType::f32 : DType::bf16;
}

Trial trial_on(Bench& bench, const BenchModel& model, const std::vector<Row>& rows, int64_t steps,
               const std::vector<std::string>& more = {}) {
  std::vector<std::string> words = bench.on_rows(rows, steps);
  words.insert(words.end(), more.begin(), more.end());
  return bench.trial(bench.arguments(model, dtype_of_options(bench.options)), words);
}

int64_t stream_rows(const std::vector<Row>& rows) {
  int64_t sum = 0;
  for (const Row& r : rows) sum += static_cast<int64_t>(r.prompt.size() + r.chosen.size() + r.rejected.size()) - 2;
  return sum;
}

int64_t planned(const Trial& trial, const char* what) {
  for (const Json& line : trial.profile.at("memory"))
    if (line.at("what") == what) return line.at("bytes").get<int64_t>();
  return 0;
}

int64_t quick_or(const Bench& bench, int64_t quick, int64_t whole) { return bench.options.quick ? quick : whole; }

void progress(const char* text) { console().progress(concat("bench: ", text)); }
void end_progress() { console().finish(); }

}  // namespace

Json compare_layouts(Bench& bench, const BenchModel& model) {
  const int64_t pairs = quick_or(bench, 2, 4);
  const int64_t longest = std::min(longest_row, model.positions);
  Json json = Json::array();
  std::printf("layouts, %s, %lld pairs, sequences padded within one micro-batch\n%-12s %-10s %8s %9s %7s %7s\n",
              model.name.c_str(), static_cast<long long>(pairs), "rows of", "layout", "rows", "seconds", "x rows",
              "x time");
  for (const RowLengths* lengths : {&alpaca_lengths, &hh_lengths}) {
    const std::vector<Row> drawn = draw_rows(*lengths, pairs, model.vocab, longest, bench.options.seed);
    double shared_rows = 0, shared_seconds = 0;
    for (const auto& [layout, name] : {std::pair{Layout::shared, "shared"}, std::pair{Layout::unshared, "unshared"},
                                       std::pair{Layout::padded, "padded"}}) {
      progress(concat("layout ", name, ", ", lengths->name).c_str());
      const std::vector<Row> rows = laid_out(drawn, layout, static_cast<size_t>(pairs));
      const double seconds = trial_on(bench, model, rows, 2).seconds(), count = static_cast<double>(stream_rows(rows));
      if (layout == Layout::shared) shared_rows = count, shared_seconds = seconds;
      end_progress();
      std::printf("%-12s %-10s %8.0f %9.3f %7.2f %7.2f\n", lengths->name, name, count, seconds, count / shared_rows,
                  seconds / shared_seconds);
      json.push_back({{"rows_of", lengths->name}, {"layout", name}, {"rows", count}, {"seconds", seconds}});
    }
  }
  std::printf("\n");
  return json;
}

Json compare_lengths(Bench& bench, const BenchModel& model) {
  const int64_t prompt = quick_or(bench, 8, 64), answer = quick_or(bench, 12, 225);  // 512 stream rows a pair
  Json json = Json::array();
  std::printf("tokens in one micro-batch, %s\n%-8s %9s %10s %12s %12s %12s\n", model.name.c_str(), "rows", "seconds",
              "us a row", "activations", "logits", "peak");
  const auto line = [&](const Trial& trial, int64_t rows) {
    const int64_t activations = planned(trial, "activations"), logits = planned(trial, "logits and head");
    std::printf("%-8lld %9.3f %10.1f %12s %12s %12s\n", static_cast<long long>(rows), trial.seconds(),
                1e6 * trial.seconds() / static_cast<double>(rows), bytes_text(activations).c_str(),
                bytes_text(logits).c_str(), bytes_text(trial.peak_bytes).c_str());
    json.push_back({{"rows", rows}, {"seconds", trial.seconds()}, {"activations", activations}, {"logits", logits},
                    {"peak_memory_bytes", trial.peak_bytes}});
  };
  for (const int64_t times : {1, 4, 16}) {
    const std::vector<Row> rows = equal_rows(prompt, answer, times, model.vocab, bench.options.seed);
    const int64_t count = stream_rows(rows);
    progress(concat(count, " rows at once").c_str());
    const Trial trial = trial_on(bench, model, rows, 2, {"--micro-tokens", std::to_string(count)});
    end_progress();
    line(trial, count);
  }
  const int64_t longest = std::min(model.positions, quick_or(bench, 128, model.positions)), tail = longest / 32;
  const std::vector<Row> rows = equal_rows(longest - tail, tail, 1, model.vocab, bench.options.seed);
  progress(concat("a pair of ", longest, " tokens").c_str());
  const Trial trial = trial_on(bench, model, rows, 1, {"--max-length", std::to_string(longest)});
  end_progress();
  line(trial, stream_rows(rows));
  std::printf("the last line: one pair whose two sequences are %lld tokens long\n\n", static_cast<long long>(longest));
  return json;
}

Json compare_threads(Bench& bench, const BenchModel& model) {
  const std::vector<Row> rows = draw_rows(alpaca_lengths, quick_or(bench, 1, 4), model.vocab,
                                          std::min(longest_row, model.positions), bench.options.seed);
  Json json = Json::array();
  double one = 0;
  for (int threads : {1, bench.machine.threads}) {
    progress(concat(threads, " threads").c_str());
    const double seconds = trial_on(bench, model, rows, 2, {"--threads", std::to_string(threads)}).seconds();
    if (threads == 1) one = seconds;
    end_progress();
    std::printf("%s, %d thread%s: %.3f s a step, %.2f times one thread's speed\n", model.name.c_str(), threads,
                threads == 1 ? "" : "s", seconds, one / seconds);
    json.push_back({{"threads", threads}, {"seconds", seconds}, {"speedup", one / seconds}});
  }
  std::printf("\n");
  return json;
}

Json measure_start_and_checkpoint(Bench& bench, const BenchModel& model) {
  progress("start and checkpoint");
  const std::vector<Row> rows = equal_rows(8, 8, 2, model.vocab, bench.options.seed);
  trial_on(bench, model, rows, 1);  // leaves the token cache
  const Trial trial = trial_on(bench, model, rows, 1, {"--save-every", "1"});
  const double start = trial.profile.at("start_seconds").get<double>(),
               checkpoint = trial.profile.at("checkpoint_seconds").get<double>();
  end_progress();
  std::printf("%s: %.2f s from the start to the first step (warm token cache); a checkpoint is written "
              "beside training in %.2f s\n\n",
              model.name.c_str(), start, checkpoint);
  return {{"start_seconds", start}, {"checkpoint_seconds", checkpoint}};
}

namespace {

// Bytes that a token of each of `sequences` reads at a context of `positions`: all weights that rows are multiplied
// with once, and the sequences' own keys and values.
double bytes_read(const Config& c, DType dtype, size_t sequences, double positions) {
  const double cached = 2.0 * c.layers * c.kv_heads * c.head_dim * positions * static_cast<double>(sequences);
  return (static_cast<double>(c.matrix_weights() + c.head_weights()) + cached) *
         static_cast<double>(dtype_bytes(dtype));
}

}  // namespace

Json measure_decoding(Bench& bench, const BenchModel& model) {
  Options options = bench.options;
  options.model = model.folder.string(), options.data.clear();
  const DType dtype = dtype_of_options(options);
  options.dtype = dtype == DType::bf16 ? DTypeChoice::bf16 : DTypeChoice::fp32;
  const ModelDescription description = read_model_config(model.folder);
  const Config& config = description.config;
  resolve_lengths(options, config);
  const int64_t fresh = quick_or(bench, 16, 64), most = std::min(config.max_positions, quick_or(bench, 32, 2048));
  Json json = Json::array();
  for (const auto& [sequences, context] :
       {std::pair{size_t{1}, fresh * 2}, {size_t{8}, fresh * 2}, {size_t{8}, most}}) {
    const std::vector<Row> rows =
        equal_rows(context - fresh, 2, static_cast<int64_t>(sequences), model.vocab, bench.options.seed);
    const std::string file = (bench.work.path() / "rows.jsonl").string();
    write_rows(file, rows);
    const std::unique_ptr<PairSet> set = load_rows(options, {file}, config, nullptr);
    std::vector<Tokens> prompts;
    for (const Row& row : rows) prompts.push_back(row.prompt);
    LoadedModel loaded(options, description, *set, decoding_limits(config, prompts, fresh));
    // A pass: from one choice of a token to the next; the prompt's pass comes before the first.
    using Clock = std::chrono::steady_clock;
    const auto seconds_of_pass = [&] {
      Clock::time_point first, last;
      int64_t choices = 0;
      decode(loaded.model(), prompts, {}, fresh, [&](std::span<const float> logits, int64_t sequence) {
        if (sequence == 0) (choices++ == 0 ? first : last) = Clock::now();
        return most_probable(logits, sequence);
      });
      return std::chrono::duration<double>(last - first).count() / static_cast<double>(choices - 1);
    };
    progress(concat("decoding, ", sequences, " sequences at ", context).c_str());
    const double pass = std::min(seconds_of_pass(), seconds_of_pass());
    const double rate = static_cast<double>(sequences) / pass,
                 positions = static_cast<double>(context - fresh / 2),
                 read = bytes_read(config, dtype, sequences, positions) / pass;
    end_progress();
    std::printf(
        "decoding, %s, %s, %zu sequence%s at a context of %.0f: %.1f tokens/s; weights, keys and values read at "
        "%.1f GB/s, %.2f of what reading alone reaches\n",
        model.name.c_str(), dtype_name(dtype), sequences, sequences == 1 ? "" : "s", positions, rate, read / 1e9,
        read / bench.machine.read_bandwidth);
    json.push_back(
        {{"sequences", sequences}, {"context", positions}, {"tokens_per_second", rate}, {"bytes_per_second", read}});
  }
  std::printf("\n");
  return json;
}

}  // namespace orpo::bench
