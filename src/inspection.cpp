#include "src/inspection.h"

#include <algorithm>
#include <cmath>

#include "data/packer.h"
#include "src/fail.h"
#include "src/files.h"
#include "src/json.h"

namespace orpo {
namespace {

int64_t length(std::span<const int32_t> ids) { return static_cast<int64_t>(ids.size()); }

// An end-of-sequence id of a Hugging Face configuration file: a number, or a list of them.
void add_configured_ends(const std::filesystem::path& file, std::set<int32_t>& ends) {
  if (!std::filesystem::exists(file)) return;
  const Json json = parse_json(read_file(file), file.string());
  if (!json.is_object() || !json.contains("eos_token_id")) return;
  const Json& value = json["eos_token_id"];
  for (const Json& id : value.is_array() ? value : Json::array({value}))
    if (id.is_number_integer()) ends.insert(id.get<int32_t>());
}

std::string ids_text(std::span<const int32_t> ids) {
  std::string text = "[";
  for (const int32_t id : ids) text += (text.size() > 1 ? ", " : "") + std::to_string(id);
  return text + "]";
}

std::string row_text(const TokenPair& pair) {
  const std::string prompt = "{\"prompt_ids\": " + ids_text(pair.trunk);
  if (pair.rejected.empty()) return prompt + ", \"completion_ids\": " + ids_text(pair.chosen) + "}\n";
  return prompt + ", \"chosen_ids\": " + ids_text(pair.chosen) + ", \"rejected_ids\": " + ids_text(pair.rejected) +
         "}\n";
}

// Rows of padded batches, two sequences a pair, added up batch by batch.
class Padding {
 public:
  void add(const TokenPair& pair) {
    sequences_ += pair.rejected.empty() ? 1 : 2;
    longest_ = std::max(longest_, length(pair.trunk) + std::max(length(pair.chosen), length(pair.rejected)));
    if (++pairs_ == padding_pairs) close();
  }
  int64_t rows() {
    close();
    return rows_;
  }

 private:
  void close() {
    rows_ += sequences_ * longest_;
    pairs_ = sequences_ = longest_ = 0;
  }
  int64_t pairs_ = 0, sequences_ = 0, longest_ = 0, rows_ = 0;
};

}  // namespace

int64_t Lengths::quantile(double q) const {
  if (sorted.empty()) return 0;
  const auto rank = static_cast<int64_t>(std::ceil(q * static_cast<double>(sorted.size())));
  return sorted[std::clamp<int64_t>(rank - 1, 0, static_cast<int64_t>(sorted.size()) - 1)];
}

Inspection inspect(const PairSet& set, const DataSettings& limits) {
  Inspection found;
  Padding padding;
  for (int64_t i = 0; i < set.size(); ++i) {
    TokenPair pair = set[i];
    const bool both = !pair.rejected.empty();
    found.prompt.sorted.push_back(length(pair.trunk));
    found.chosen.sorted.push_back(length(pair.chosen));
    if (both) found.rejected.sorted.push_back(length(pair.rejected));
    found.pairs += both;
    found.chosen_longer += both && pair.chosen.size() > pair.rejected.size();
    found.same_length += both && pair.chosen.size() == pair.rejected.size();
    const Fit fit = fit_to_limits(pair, limits);
    if (fit == Fit::dropped) {
      ++found.dropped;
      continue;
    }
    ++found.kept;
    found.truncated += fit == Fit::truncated;
    found.packed_rows += pair_rows(pair);
    found.separate_rows += length(pair.trunk) + length(pair.chosen);
    if (both) found.separate_rows += length(pair.trunk) + length(pair.rejected);
    padding.add(pair);
  }
  found.padded_rows = padding.rows();
  for (Lengths* part : {&found.prompt, &found.chosen, &found.rejected})
    std::sort(part->sorted.begin(), part->sorted.end());
  return found;
}

Mistakes find_mistakes(const PairSet& set, int32_t begin, const std::set<int32_t>& ends) {
  Mistakes found;
  for (int64_t i = 0; i < set.size(); ++i) {
    const TokenPair pair = set[i];
    const auto token = [&](size_t place) {
      return place < pair.trunk.size() ? pair.trunk[place] : pair.chosen[place - pair.trunk.size()];
    };
    if (begin >= 0 && pair.trunk.size() + pair.chosen.size() > 1 && token(0) == begin && token(1) == begin)
      found.doubled_begin.add(pair);
    if (ends.empty()) continue;
    bool scored = true, inner = false;
    for (const auto answer : {pair.chosen, pair.rejected}) {
      if (answer.empty()) continue;
      scored &= ends.contains(answer.back());
      inner |= std::any_of(answer.begin(), answer.end() - 1, [&](int32_t id) { return ends.contains(id); });
    }
    if (!scored) found.unscored_end.add(pair);
    if (inner) found.inner_end.add(pair);
  }
  return found;
}

std::set<int32_t> ending_tokens(const std::filesystem::path& folder, const Tokenizer* tokenizer,
                                const ChatTemplate* chat_template) {
  std::set<int32_t> ends;
  add_configured_ends(folder / "config.json", ends);
  add_configured_ends(folder / "generation_config.json", ends);
  if (!tokenizer) return ends;
  if (tokenizer->end_of_sequence) ends.insert(*tokenizer->end_of_sequence);
  if (!chat_template) return ends;
  const std::string answer = "y", ended = chat_template->response({{"user", "x"}}, answer);
  const size_t at = ended.rfind(answer);
  if (at == std::string::npos) return ends;
  if (const auto id = tokenizer->token_id(ended.substr(at + answer.size()))) ends.insert(*id);
  return ends;
}

int64_t write_token_rows(const PairSet& set, const DataSettings& limits, const std::filesystem::path& file) {
  int64_t rows = 0;
  replace_file(file, [&](const std::filesystem::path& beside) {
    OutputFile out(beside);
    std::string text;
    for (int64_t i = 0; i < set.size(); ++i) {
      TokenPair pair = set[i];
      if (fit_to_limits(pair, limits) == Fit::dropped) continue;
      text += row_text(pair);
      ++rows;
      if (text.size() < (1 << 20)) continue;
      out.write(bytes_of(text));
      text.clear();
    }
    out.write(bytes_of(text));
    out.finish();
  });
  return rows;
}

}  // namespace orpo
