#include "data/pairs.h"

#include <omp.h>

#include <algorithm>
#include <exception>
#include <future>
#include <map>
#include <optional>

#include "data/lines.h"
#include "data/rows.h"
#include "data/token_cache.h"
#include "data/tokenise.h"
#include "src/fail.h"

namespace orpo {
namespace {

constexpr size_t shown_bad_rows = 5;

// What one line became. Exactly one of tokens, bad and error, or none of them for a blank line.
struct Outcome {
  std::optional<PairTokens> tokens;
  std::optional<BadRow> bad;
  std::exception_ptr error;
};

bool blank(std::string_view line) { return line.find_first_not_of(" \t\r\n") == std::string_view::npos; }

[[noreturn]] void refuse_bad(const std::string& place_and_reason) {
  fail(place_and_reason, "; mend the row, or leave bad rows out with --on-bad-row skip");
}

// One pass over the files: blocks of lines, each tokenised on all threads, collected in file order.
class Pass {
 public:
  Pass(const std::vector<std::filesystem::path>& files, const Tokenizer* tokenizer, const ChatTemplate* chat_template,
       const DataSettings& settings)
      : files_(files), tokenizer_(tokenizer), template_(chat_template), settings_(settings) {
    for (int i = 0; i < settings.threads; ++i)
      parsers_.emplace_back(RowRules{settings.single_answers, settings.vocabulary});
  }

  std::unique_ptr<StoredPairs> run(TokenWriter& writer) {
    for (size_t file = 0; file < files_.size(); ++file) read_file(static_cast<int32_t>(file), writer);
    for (const auto& [reason, count] : reasons_) report_.bad_reasons.emplace_back(reason, count);
    std::stable_sort(report_.bad_reasons.begin(), report_.bad_reasons.end(),
                     [](const auto& a, const auto& b) { return a.second > b.second; });
    return writer.finish(report_, first_bad_, files_);
  }

 private:
  void read_file(int32_t file, TokenWriter& writer) {
    LineReader reader(files_[file]);
    LineBlock block, next;
    const int64_t rows_before = report_.rows;
    bool more = reader.read(block);
    while (more) {
      auto following = std::async(std::launch::async, [&] { return reader.read(next); });
      std::vector<Outcome> outcomes = tokenise_block(block);
      for (size_t i = 0; i < outcomes.size(); ++i)
        collect(outcomes[i], file, block.first_line + static_cast<int64_t>(i), writer);
      more = following.get();
      std::swap(block, next);
    }
    if (report_.rows == rows_before) fail(files_[file].string(), ": holds no row; a row is one JSON object on a line");
  }

  std::vector<Outcome> tokenise_block(const LineBlock& block) {
    std::vector<Outcome> outcomes(block.lines.size());
#pragma omp parallel for schedule(dynamic, 8) num_threads(settings_.threads)
    for (size_t i = 0; i < outcomes.size(); ++i) {
      if (blank(block.lines[i])) continue;
      try {
        Row row = parsers_[omp_get_thread_num()].parse(block.lines[i]);
        outcomes[i].tokens = tokenise(std::move(row), tokenizer_, template_);
      } catch (const BadRow& bad) {
        outcomes[i].bad = bad;
      } catch (...) {
        outcomes[i].error = std::current_exception();
      }
    }
    return outcomes;
  }

  void collect(const Outcome& outcome, int32_t file, int64_t line, TokenWriter& writer) {
    if (outcome.error) std::rethrow_exception(outcome.error);
    if (!outcome.bad && !outcome.tokens) return;
    ++report_.rows;
    if (outcome.bad) return count_bad(*outcome.bad, file, line);
    const PairTokens& tokens = *outcome.tokens;
    writer.append({tokens.trunk, tokens.chosen, tokens.rejected, line, file}, tokens.prompt_merged);
  }

  void count_bad(const BadRow& bad, int32_t file, int64_t line) {
    if (settings_.on_bad_row == OnBadRow::error) refuse_bad(concat(files_[file].string(), ":", line, ": ", bad.text()));
    ++report_.bad;
    ++reasons_[bad.kind()];
    if (first_bad_.size() < shown_bad_rows) first_bad_.push_back({file, line, bad.text()});
  }

  const std::vector<std::filesystem::path>& files_;
  const Tokenizer* tokenizer_;
  const ChatTemplate* template_;
  const DataSettings& settings_;
  std::vector<RowParser> parsers_;  // one a thread
  DataReport report_;
  std::vector<BadPlace> first_bad_;
  std::map<std::string, int64_t> reasons_;
};

void refuse_empty(const PairSet& set, const std::vector<std::filesystem::path>& files, const DataSettings& settings) {
  if (set.size() > 0) return;
  const DataReport& report = set.report();
  std::string names;
  for (const auto& file : files) names += (names.empty() ? "" : ", ") + file.string();
  fail(names, ": no row is left of ", report.rows, ": ", report.bad, " bad",
       report.first_bad.empty() ? "" : " (the first: " + report.first_bad.front() + ")", ", ", report.dropped,
       " longer than --max-length ", settings.max_length, " or --max-prompt-length ", settings.max_prompt_length,
       report.dropped > 0 ? "; raise them or use --on-long truncate" : "");
}

std::unique_ptr<StoredPairs> load_or_tokenise(const std::vector<std::filesystem::path>& files,
                                              const Tokenizer* tokenizer, const ChatTemplate* chat_template,
                                              const DataSettings& settings) {
  const auto tokenise_into = [&](std::optional<CacheKey> key) {
    TokenWriter writer(key);
    return Pass(files, tokenizer, chat_template, settings).run(writer);
  };
  for (const auto& file : files)  // names what cannot be opened before anything is read; a pipe can be opened only once
    if (!std::filesystem::exists(file) || std::filesystem::is_regular_file(file)) LineReader{file};
  const auto key = settings.use_cache ? token_cache_key(files, tokenizer, chat_template, settings) : std::nullopt;
  if (!key) return tokenise_into(std::nullopt);
  if (auto cached = open_token_cache(*key, files, settings.threads)) return cached;
  try {
    return tokenise_into(key);
  } catch (const CacheTrouble& trouble) {
    auto set = tokenise_into(std::nullopt);
    set->add_note(
        concat("tokens are kept in memory, not cached (", trouble.what(), "; ORPO_CACHE names another folder)"));
    return set;
  }
}

}  // namespace

Fit fit_to_limits(TokenPair& pair, const DataSettings& settings) {
  const int64_t limit = settings.max_length, trunk = static_cast<int64_t>(pair.trunk.size());
  const int64_t answer = static_cast<int64_t>(std::max(pair.chosen.size(), pair.rejected.size()));
  if (trunk <= settings.max_prompt_length && trunk + answer <= limit) return Fit::whole;
  if (settings.on_long == OnLong::drop) return Fit::dropped;
  const int64_t room = std::min(answer, std::max<int64_t>(1, limit / 8));
  const int64_t kept = std::clamp<int64_t>(limit - room, 0, std::min(trunk, settings.max_prompt_length));
  const auto cut = [&](std::span<const int32_t> branch) {
    return branch.first(std::min<size_t>(branch.size(), limit - kept));
  };
  const bool preference = !pair.rejected.empty();
  pair.trunk = pair.trunk.last(kept);
  pair.chosen = cut(pair.chosen), pair.rejected = cut(pair.rejected);
  const bool scored = kept + static_cast<int64_t>(pair.chosen.size()) >= 2 &&
                      (!preference || kept + static_cast<int64_t>(pair.rejected.size()) >= 2);
  const bool equal = std::equal(pair.chosen.begin(), pair.chosen.end(), pair.rejected.begin(), pair.rejected.end());
  return scored && !equal ? Fit::truncated : Fit::dropped;
}

std::unique_ptr<PairSet> PairSet::load(const std::vector<std::filesystem::path>& files, const Tokenizer* tokenizer,
                                       const ChatTemplate* chat_template, const DataSettings& settings) {
  DataSettings used = settings;
  if (used.threads <= 0) used.threads = omp_get_max_threads();
  auto set = load_or_tokenise(files, tokenizer, chat_template, used);
  if (used.on_bad_row == OnBadRow::error && set->report().bad > 0) refuse_bad(set->report().first_bad.front());
  set->fit(used);
  refuse_empty(*set, files, used);
  return set;
}

}  // namespace orpo
