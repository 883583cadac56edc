// ./orpo_data: looks through a preference file before anyone rents a GPU for it. The report is on stdout; what would
// spoil a run is an error.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <limits>

#include "src/config.h"
#include "src/console.h"
#include "src/fail.h"
#include "src/files.h"
#include "src/inspection.h"
#include "src/json.h"
#include "src/waiting.h"
#include "tokenizer/template.h"
#include "tokenizer/tokenizer.h"

namespace orpo {
namespace {

// What the model folder says, as far as it is there: pre-tokenised rows need nothing of it.
struct Folder {
  std::filesystem::path path;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;
  std::string own_template;  // name; empty where the folder has none that is known
  int64_t vocabulary = 0, positions = 0;
};

Folder open_folder(const Options& options) {
  Folder folder;
  folder.path = options.model;
  if (!std::filesystem::is_directory(folder.path))
    fail(options.model, ": no such folder; --model needs a Hugging Face model folder");
  if (std::filesystem::exists(folder.path / "tokenizer.json") ||
      std::filesystem::exists(folder.path / "tokenizer.model")) {
    folder.tokenizer = Tokenizer::load(folder.path);
    folder.vocabulary = folder.tokenizer->vocabulary_size();
    folder.chat_template = choose_template(options.chat_template, folder.path);
    if (const auto jinja = own_template(folder.path))
      if (const auto own = recognise_template(*jinja, special_texts(folder.path))) folder.own_template = own->name();
  }
  const auto config = folder.path / "config.json";
  if (!std::filesystem::exists(config)) return folder;
  const Json json = parse_json(read_file(config), config.string());
  const auto number = [&](const char* name, int64_t otherwise) {
    return json.is_object() && json.contains(name) && json[name].is_number_integer() ? json[name].get<int64_t>()
                                                                                     : otherwise;
  };
  folder.vocabulary = number("vocab_size", folder.vocabulary);
  folder.positions = number("max_position_embeddings", 0);
  return folder;
}

DataSettings data_settings(const Options& options, const Folder& folder) {
  DataSettings settings;
  settings.max_length = options.max_length ? options.max_length : 2048;
  settings.max_prompt_length = options.max_prompt_length ? options.max_prompt_length : settings.max_length;
  settings.on_long = options.on_long;
  settings.single_answers = options.objective == Objective::sft;
  settings.vocabulary = folder.vocabulary;
  settings.threads = options.threads;
  return settings;
}

// Every row at its full length, bad ones counted.
std::unique_ptr<PairSet> load_whole(const Options& options, const Folder& folder, DataSettings settings) {
  settings.max_length = settings.max_prompt_length = std::numeric_limits<int32_t>::max();
  settings.on_bad_row = OnBadRow::skip;
  return PairSet::load({options.data.begin(), options.data.end()}, folder.tokenizer.get(), folder.chat_template.get(),
                       settings);
}

long long printed(int64_t value) { return value; }
double percent(int64_t part, int64_t all) {
  return all ? 100.0 * static_cast<double>(part) / static_cast<double>(all) : 0;
}
double ratio(int64_t a, int64_t b) { return b ? static_cast<double>(a) / static_cast<double>(b) : 0; }

std::string place(const Options& options, const TokenPair& pair) {
  return concat(options.data[pair.file], ":", pair.row);
}

void print_rows(const Options& options, const DataReport& report) {
  std::printf("rows      %lld in %zu file%s, %lld bad\n", printed(report.rows), options.data.size(),
              options.data.size() == 1 ? "" : "s", printed(report.bad));
  for (const auto& [reason, count] : report.bad_reasons)
    std::printf("bad       %lld %s\n", printed(count), reason.c_str());
  for (const std::string& bad : report.first_bad) std::printf("          %s\n", bad.c_str());
}

void print_template(const Options& options, const Folder& folder) {
  if (!folder.tokenizer) return;
  if (!folder.chat_template) return void(std::printf("template  none here; --template chooses one\n"));
  const char* whose = options.chat_template.empty() ? " (the model folder's own)" : "";
  std::printf("template  %s%s\n", folder.chat_template->name().c_str(), whose);
}

void print_lengths(const Inspection& found) {
  std::printf("tokens         min  median     90%%     max\n");
  for (const auto& [name, part] :
       {std::pair{"prompt", &found.prompt}, {"chosen", &found.chosen}, {"rejected", &found.rejected}})
    if (!part->sorted.empty())
      std::printf("  %-9s%7lld %7lld %7lld %7lld\n", name, printed(part->quantile(0)), printed(part->quantile(0.5)),
                  printed(part->quantile(0.9)), printed(part->quantile(1)));
}

void print_limits(const Inspection& found, const DataSettings& limits, const Folder& folder, int64_t longest_sequence) {
  std::printf(
      "limits    --max-length %lld --max-prompt-length %lld --on-long %s: %lld kept, %lld dropped, %lld truncated\n",
      printed(limits.max_length), printed(limits.max_prompt_length),
      limits.on_long == OnLong::drop ? "drop" : "truncate", printed(found.kept), printed(found.dropped),
      printed(found.truncated));
  const bool too_long = folder.positions > 0 && longest_sequence > folder.positions;
  if (too_long)
    std::printf("          the model has %lld positions: training takes no longer rows\n", printed(folder.positions));
}

void print_balance(const Inspection& found) {
  if (found.pairs > 0)
    std::printf("longer    chosen has more tokens than rejected in %.1f%% of the pairs, as many in %.1f%%\n",
                percent(found.chosen_longer, found.pairs), percent(found.same_length, found.pairs));
  std::printf("packed    %lld token rows with each prompt once", printed(found.packed_rows));
  if (found.pairs > 0)
    std::printf("; %.2f times as many with two sequences a pair", ratio(found.separate_rows, found.packed_rows));
  std::printf("; %.2f times padded in batches of %lld pairs\n", ratio(found.padded_rows, found.packed_rows),
              printed(padding_pairs));
}

// A token's text where it stands; as the vocabulary spells it where it is no whole character.
std::string spelled(const Tokenizer* tokenizer, std::span<const int32_t> ids, size_t i) {
  if (!tokenizer) return "";
  const size_t before = i > 0 ? 1 : 0;
  const std::string context = tokenizer->decode(ids.subspan(i - before, before));
  std::string text = tokenizer->decode(ids.subspan(i - before, before + 1));
  const bool readable =
      text.starts_with(context) && text.size() > context.size() && text.find("\ufffd") == std::string::npos;
  text = readable ? text.substr(context.size()) : tokenizer->token_text(ids[i]);
  return Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

// One line a token: part, place in the sequence, id, text, what training makes of it. The middle of a long part is left
// out.
void print_part(const char* name, std::span<const int32_t> ids, size_t begin, const Folder& folder,
                const std::set<int32_t>& ends) {
  constexpr size_t shown = 24;
  const bool answer = std::string_view(name) != "prompt";
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids.size() > 2 * shown + 2 && i == shown) {
      std::printf("  %-8s ... %zu more\n", name, ids.size() - 2 * shown);
      i = ids.size() - shown;
    }
    const std::string text = spelled(folder.tokenizer.get(), ids, i);
    const bool ends_here = answer && i + 1 == ids.size() && ends.contains(ids[i]);
    std::printf("  %-8s %6zu %7d  %-20s%s%s\n", name, begin + i, ids[i], text.c_str(),
                !answer ? "" : begin + i == 0 ? " context" : " scored", ends_here ? ", end of sequence" : "");
  }
}

void print_pair(const Options& options, const TokenPair& pair, const Folder& folder, const std::set<int32_t>& ends) {
  std::printf("\n%s: prompt %zu, chosen %zu, rejected %zu tokens\n", place(options, pair).c_str(), pair.trunk.size(),
              pair.chosen.size(), pair.rejected.size());
  print_part("prompt", pair.trunk, 0, folder, ends);
  print_part("chosen", pair.chosen, pair.trunk.size(), folder, ends);
  print_part("rejected", pair.rejected, pair.trunk.size(), folder, ends);
}

std::string token_name(const Folder& folder, int32_t id) {
  return folder.tokenizer ? concat(folder.tokenizer->token_text(id), ", id ", id) : concat("id ", id);
}

// The mistakes that no loss curve shows.
void refuse_mistakes(const Options& options, const Folder& folder, const PairSet& set, const std::set<int32_t>& ends) {
  const int32_t begin = folder.tokenizer ? folder.tokenizer->begin_of_sequence.value_or(-1) : -1;
  const Mistakes found = find_mistakes(set, begin, ends);
  if (const auto& f = found.doubled_begin; f.rows > 0)
    fail(place(options, f.first), ": prompt: begins with two begin-of-sequence tokens (", token_name(folder, begin),
         "), as ", f.rows, " of ", set.size(),
         " rows do; take the text of the token out of the rows or choose another --template");
  if (const auto& f = found.unscored_end; f.rows > 0)
    fail(place(options, f.first), ends.contains(f.first.chosen.back()) ? ": rejected" : ": chosen",
         ": does not end with an end-of-sequence token (", token_name(folder, *ends.begin()),
         ends.size() > 1 ? " or another of its kind" : "", ") that is scored, as in ", f.rows, " of ", set.size(),
         " rows; the model would not learn to stop: end the answers with it or choose another --template");
  const bool named = folder.chat_template && !options.chat_template.empty();
  const std::string name = folder.chat_template ? folder.chat_template->name() : "";
  if (named && name != "none" && !folder.own_template.empty() && name != folder.own_template)
    fail("--template ", name, ": generation renders with the model folder's own template, ", folder.own_template,
         ", so training would see other texts; leave out --template, or put the Jinja text of ", name,
         " into the folder");
  const int64_t merged = set.report().prompts_merged;
  if (name != "none" && 2 * merged > set.size())
    fail("--template ", name, ": in ", merged, " of ", set.size(),
         " rows the prompt's last token joins the answer's first, so generation "
         "would start from tokens that training never sees; choose a template that this tokenizer splits before the "
         "answer");
  if (merged > 0)
    console().say("note: in ", merged, " of ", set.size(), " rows the prompt's last token joins the answer's first (",
                  name == "none" ? "none joins the texts as they stand" : "the answer opens with white space", ")");
  if (const auto& f = found.inner_end; f.rows > 0)
    console().say("note: in ", f.rows, " of ", set.size(),
                  " rows an answer holds an end-of-sequence token before its end; the first is ",
                  place(options, f.first));
  if (ends.empty())
    console().say("note: the model folder names no end-of-sequence token, so the answers' ends were not checked");
}

void refuse_bad_rows(const Options& options, const DataReport& report) {
  if (report.bad == 0 || options.on_bad_row == OnBadRow::skip) return;
  fail(report.first_bad.front(), "; ", report.bad > 1 ? concat("with ", report.bad - 1, " more bad rows; ") : "",
       "mend the row, or leave bad rows out with --on-bad-row skip");
}

int inspect_rows(const Options& options) {
  const Folder folder = open_folder(options);
  const DataSettings limits = data_settings(options, folder);
  for (const std::string& file : options.data) {
    std::error_code absent;
    if (!options.write.empty() && std::filesystem::equivalent(file, options.write, absent))
      fail("--write: ", options.write, " is one of the --data files; give another name");
  }
  const std::unique_ptr<PairSet> set = load_whole(options, folder, limits);
  if (!set->report().note.empty()) console().say("note: ", set->report().note);
  const Inspection found = inspect(*set, limits);
  const std::set<int32_t> ends = ending_tokens(folder.path, folder.tokenizer.get(), folder.chat_template.get());
  print_rows(options, set->report());
  print_template(options, folder);
  print_lengths(found);
  print_limits(found, limits, folder, set->report().longest_sequence);
  print_balance(found);
  for (int64_t i = 0; i < std::min(options.show, set->size()); ++i) print_pair(options, (*set)[i], folder, ends);
  std::fflush(stdout);
  refuse_bad_rows(options, set->report());
  refuse_mistakes(options, folder, *set, ends);
  if (found.kept == 0) fail("no row fits --max-length ", limits.max_length, "; raise it or use --on-long truncate");
  if (!options.write.empty())
    console().say("wrote ", write_token_rows(*set, limits, options.write), " rows to ", options.write);
  return exit_finished;
}

}  // namespace
}  // namespace orpo

int main(int argc, char** argv) {
  using namespace orpo;
  spin_briefly(argv);
  return run_program("orpo_data", [&] { return inspect_rows(parse_options(Program::data, argc, argv)); });
}
