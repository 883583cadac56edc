// Reads tokenizer.json into a Pipeline. What it does not know and would change ids is an error that names it.
#include <sstream>

#include "src/fail.h"
#include "src/files.h"
#include "tokenizer/json_file.h"
#include "tokenizer/pipeline.h"

namespace orpo {
namespace {

using Json = nlohmann::json;

constexpr int64_t id_limit = 1 << 22;  // far above any vocabulary; keeps a broken file from asking for all memory

// The file and the place in it, for messages: "DIR/tokenizer.json: model.merges".
struct Place {
  std::string file, name;

  std::string text() const { return name.empty() ? file : concat(file, ": ", name); }
  Place operator/(const std::string& member) const { return {file, name.empty() ? member : concat(name, ".", member)}; }
  Place operator[](size_t index) const { return {file, concat(name, "[", index, "]")}; }
};

[[noreturn]] void unsupported(const Place& place, const std::string& what) {
  fail(place.text(), ": ", what,
       " is not supported: it would change token ids; pass pre-tokenised rows, or use a model whose "
       "tokenizer is byte-level BPE, Llama-like BPE or sentencepiece");
}

const Json* member(const Json& object, const char* name) {  // nullptr where it is missing or null
  const auto found = object.find(name);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

template <class T>
T value(const Json& object, const char* name, T otherwise, const Place& place) {
  const Json* found = member(object, name);
  if (!found) return otherwise;
  bool fits;
  if constexpr (std::is_same_v<T, bool>) fits = found->is_boolean();
  else fits = found->is_string();
  if (!fits)
    fail((place / name).text(), ": expected a ", std::is_same_v<T, bool> ? "boolean" : "string", ", found ",
         found->type_name());
  return found->get<T>();
}

const Json& need(const Json& object, const char* name, Json::value_t type, const char* type_name, const Place& place) {
  const Json* found = object.is_object() ? member(object, name) : nullptr;
  if (!found) fail(place.text(), ": \"", name, "\" is missing; the file is not a whole tokenizer.json");
  if (found->type() != type) fail((place / name).text(), ": expected ", type_name, ", found ", found->type_name());
  return *found;
}

std::string type_of(const Json& step, const Place& place) {
  return need(step, "type", Json::value_t::string, "a string", place).get<std::string>();
}

int32_t id_of(const Json& number, const Place& place, const std::string& token) {
  if (!number.is_number_integer() || number.get<int64_t>() < 0 || number.get<int64_t>() >= id_limit)
    fail(place.text(), ": the id of \"", token, "\" must be a whole number from 0 to ", id_limit - 1, ", found ",
         number.dump());
  return number.get<int32_t>();
}

// A Sequence may hold a Sequence, but no honest file does so without end.
void refuse_deep(const Place& place) {
  if (place.name.size() > 500) fail(place.file, ": Sequences nested too deeply; the file is broken");
}

// {"String": "x"} or {"Regex": "x"}.
std::pair<std::string, bool> pattern_of(const Json& step, const Place& place) {
  const Json& pattern = need(step, "pattern", Json::value_t::object, "an object", place);
  for (const char* kind : {"String", "Regex"})
    if (const Json* text = member(pattern, kind); text && text->is_string())
      return {text->get<std::string>(), kind == std::string_view("Regex")};
  fail((place / "pattern").text(), ": expected {\"String\": ...} or {\"Regex\": ...}");
}

void read_normalizer(const Json& step, const Place& place, Pipeline& out) {
  const std::string type = type_of(step, place);
  if (type == "Sequence") {
    refuse_deep(place);
    const Json& steps = need(step, "normalizers", Json::value_t::array, "an array", place);
    for (size_t i = 0; i < steps.size(); ++i) read_normalizer(steps[i], (place / "normalizers")[i], out);
  } else if (type == "NFC") {
    out.normalizer.emplace_back(ComposeText{});
  } else if (type == "Prepend") {
    out.normalizer.emplace_back(PrependText{value<std::string>(step, "prepend", "", place)});
  } else if (type == "Replace") {
    auto [from, regex] = pattern_of(step, place);
    if (regex || from.empty()) unsupported(place, "a Replace normalizer with the regular expression \"" + from + "\"");
    out.normalizer.emplace_back(ReplaceText{std::move(from), value<std::string>(step, "content", "", place)});
  } else {
    unsupported(place, "the normalizer " + type);
  }
}

MatchBehavior behavior_of(const Json& step, const Place& place) {
  const auto name = value<std::string>(step, "behavior", "", place);
  if (name == "Isolated") return MatchBehavior::isolated;
  if (name == "Removed") return MatchBehavior::removed;
  if (name == "MergedWithPrevious") return MatchBehavior::merged_with_previous;
  if (name == "MergedWithNext") return MatchBehavior::merged_with_next;
  if (name == "Contiguous") return MatchBehavior::contiguous;
  unsupported(place, "the split behavior \"" + name + "\"");
}

Metaspace metaspace_of(const Json& step, const Place& place) {
  Metaspace m;
  m.mark = value<std::string>(step, "replacement", m.mark, place);
  m.split = value(step, "split", true, place);
  const auto scheme = value<std::string>(step, "prepend_scheme", "always", place);
  if (scheme != "always" && scheme != "first" && scheme != "never")
    unsupported(place, "prepend_scheme \"" + scheme + "\"");
  m.prefix = scheme == "always" ? PrefixSpace::always : scheme == "first" ? PrefixSpace::first : PrefixSpace::never;
  if (!value(step, "add_prefix_space", true, place)) m.prefix = PrefixSpace::never;
  if (m.mark != "\u2581") unsupported(place, "a Metaspace replacement other than U+2581");
  return m;
}

void read_pre_tokenizer(const Json& step, const Place& place, Pipeline& out) {
  const std::string type = type_of(step, place);
  if (type == "Sequence") {
    refuse_deep(place);
    const Json& steps = need(step, "pretokenizers", Json::value_t::array, "an array", place);
    for (size_t i = 0; i < steps.size(); ++i) read_pre_tokenizer(steps[i], (place / "pretokenizers")[i], out);
    return;
  }
  if (out.metaspace || out.model.byte_level)
    unsupported(place, "the pre-tokenizer " + type + " after " + (out.metaspace ? "Metaspace" : "ByteLevel"));
  if (type == "ByteLevel") {
    out.model.byte_level = true;
    if (value(step, "add_prefix_space", true, place)) out.space_before = out.splitters.size();
    if (value(step, "use_regex", true, place)) out.splitters.push_back(make_gpt2_splitter());
  } else if (type == "Digits") {
    out.splitters.push_back(make_digits_splitter(value(step, "individual_digits", false, place)));
  } else if (type == "Split") {
    auto [pattern, regex] = pattern_of(step, place);
    const MatchBehavior behavior = behavior_of(step, place);
    const bool invert = value(step, "invert", false, place);
    out.splitters.push_back(regex ? make_pattern_splitter(pattern, behavior, invert, place.text())
                                  : make_literal_splitter(std::move(pattern), behavior, invert));
  } else if (type == "Metaspace") {
    if (!out.splitters.empty()) unsupported(place, "Metaspace after another pre-tokenizer");
    out.metaspace = metaspace_of(step, place);
  } else {
    unsupported(place, "the pre-tokenizer " + type);
  }
}

void read_merges(const Json& merges, const Place& place, BpeFiles& out) {
  out.merges.reserve(merges.size());
  for (size_t i = 0; i < merges.size(); ++i) {
    const Json& merge = merges[i];
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      out.merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
      continue;
    }
    const std::string text = merge.is_string() ? merge.get<std::string>() : "";
    const size_t space = text.find(' ');
    if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos)
      fail(place[i].text(), ": a merge is \"a b\" or [\"a\", \"b\"], found ",
           merge.dump(-1, ' ', false, Json::error_handler_t::replace));
    out.merges.emplace_back(text.substr(0, space), text.substr(space + 1));
  }
}

void read_model(const Json& model, const Place& place, BpeFiles& out) {
  const auto type = value<std::string>(model, "type", model.contains("merges") ? "BPE" : "unnamed", place);
  if (type != "BPE") unsupported(place, "the model type " + type);
  if (const Json* dropout = member(model, "dropout"); dropout && *dropout != 0.0) unsupported(place, "dropout");
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (!value<std::string>(model, affix, "", place).empty()) unsupported(place, affix);
  out.unknown = value<std::string>(model, "unk_token", "", place);
  out.byte_fallback = value(model, "byte_fallback", false, place);
  out.fuse_unknown = value(model, "fuse_unk", false, place);
  out.ignore_merges = value(model, "ignore_merges", false, place);
  const Json& vocabulary = need(model, "vocab", Json::value_t::object, "an object", place);
  out.vocabulary.reserve(vocabulary.size());
  for (const auto& [text, id] : vocabulary.items()) out.vocabulary.emplace(text, id_of(id, place, text));
  read_merges(need(model, "merges", Json::value_t::array, "an array", place), place / "merges", out);
}

void read_added_tokens(const Json& tokens, const Place& place, Pipeline& out) {
  if (!tokens.is_array()) fail(place.text(), ": expected an array, found ", tokens.type_name());
  for (size_t i = 0; i < tokens.size(); ++i) {
    const Json& entry = tokens[i];
    AddedToken token;
    token.content = need(entry, "content", Json::value_t::string, "a string", place[i]).get<std::string>();
    if (const Json* id = member(entry, "id")) token.id = id_of(*id, place[i], token.content);
    token.special = value(entry, "special", false, place[i]);
    token.single_word = value(entry, "single_word", false, place[i]);
    token.lstrip = value(entry, "lstrip", false, place[i]);
    token.rstrip = value(entry, "rstrip", false, place[i]);
    token.normalized = value(entry, "normalized", !token.special, place[i]);
    out.added.push_back(std::move(token));
  }
}

// The token that comes before a single text: TemplateProcessing's first special token, or the [CLS] of the older
// processors.
std::string leading_token(const Json& processor, int depth = 0) {
  if (!processor.is_object() || depth > 8) return "";
  if (const Json* steps = member(processor, "processors"); steps && steps->is_array()) {
    for (const Json& step : *steps)
      if (auto found = leading_token(step, depth + 1); !found.empty()) return found;
  }
  if (const Json* single = member(processor, "single"); single && single->is_array() && !single->empty())
    if (const Json& first = (*single)[0]; first.is_object() && first.contains("SpecialToken"))
      if (const Json& token = first["SpecialToken"];
          token.is_object() && token.contains("id") && token["id"].is_string())
        return token["id"].get<std::string>();
  if (const Json* cls = member(processor, "cls"); cls && cls->is_array() && !cls->empty() && (*cls)[0].is_string())
    return (*cls)[0].get<std::string>();
  return "";
}

}  // namespace

Pipeline read_tokenizer_json(const std::filesystem::path& file) {
  const Place place{file.string(), ""};
  const Json root = read_json_file(file);
  if (!root.is_object()) fail(place.text(), ": expected an object, found ", root.type_name());
  Pipeline out;
  if (const Json* normalizer = member(root, "normalizer")) read_normalizer(*normalizer, place / "normalizer", out);
  if (const Json* step = member(root, "pre_tokenizer")) read_pre_tokenizer(*step, place / "pre_tokenizer", out);
  read_model(need(root, "model", Json::value_t::object, "an object", place), place / "model", out.model);
  if (const Json* tokens = member(root, "added_tokens")) read_added_tokens(*tokens, place / "added_tokens", out);
  if (const Json* processor = member(root, "post_processor")) out.begins_with = leading_token(*processor);
  return out;
}

Pipeline read_vocabulary_and_merges(const std::filesystem::path& vocabulary, const std::filesystem::path& merges) {
  Pipeline out;
  const Place place{vocabulary.string(), ""};
  const Json root = read_json_file(vocabulary);
  if (!root.is_object()) fail(vocabulary.string(), ": expected an object of tokens and ids, found ", root.type_name());
  for (const auto& [text, id] : root.items()) out.model.vocabulary.emplace(text, id_of(id, place, text));
  std::istringstream lines(read_file(merges));
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.empty() || line.starts_with("#version")) continue;
    const size_t space = line.find(' ');
    if (space == std::string::npos) fail(merges.string(), ": line \"", line, "\" is not a merge of two tokens");
    out.model.merges.emplace_back(line.substr(0, space), line.substr(space + 1));
  }
  return out;
}

}  // namespace orpo
