// Tokenizer::load: which files of the folder count, what transformers makes of them, and its special tokens.
//
// transformers (5) names a class for the folder and rebuilds the steps of three of them from vocabulary and merges,
// whatever tokenizer.json says of normaliser and words: LlamaTokenizer, GPT2Tokenizer, Qwen2Tokenizer. Every other
// class takes tokenizer.json as it stands. The same is done here, so that a folder gives the same ids in both.
#include "tokenizer/tokenizer.h"

#include <algorithm>
#include <map>

#include "src/fail.h"
#include "src/files.h"
#include "tokenizer/json_file.h"
#include "tokenizer/pipeline.h"
#include "tokenizer/template.h"

namespace orpo {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

// The object in a settings file; an absent file sets nothing.
Json read_json(const fs::path& file) {
  if (!fs::exists(file)) return Json::object();
  Json json = read_json_file(file);
  if (!json.is_object()) fail(file.string(), ": expected an object, found ", json.type_name());
  return json;
}

template <class T>
T value(const Json& object, const char* name, T otherwise) {
  const auto found = object.find(name);
  if (found == object.end() || found->is_null()) return otherwise;
  const bool fits = std::is_same_v<T, bool> ? found->is_boolean() : found->is_string();
  if (!fits)
    fail("the tokenizer's settings: \"", name, "\" must be a ", std::is_same_v<T, bool> ? "boolean" : "string",
         ", found ", found->type_name());
  return found->get<T>();
}

// The folder's settings.
struct Settings {
  Json tokenizer, model, special_map, generation;

  explicit Settings(const fs::path& folder)
      : tokenizer(read_json(folder / "tokenizer_config.json")),
        model(read_json(folder / "config.json")),
        special_map(read_json(folder / "special_tokens_map.json")),
        generation(read_json(folder / "generation_config.json")) {}
};

enum class Kind { as_it_stands, llama, gpt2, qwen2 };

Kind kind_of_class(std::string name) {
  if (name.ends_with("Fast")) name.resize(name.size() - 4);
  if (name == "LlamaTokenizer") return Kind::llama;
  if (name == "GPT2Tokenizer" || name == "CodeGenTokenizer") return Kind::gpt2;
  if (name == "Qwen2Tokenizer") return Kind::qwen2;
  return Kind::as_it_stands;
}

// AutoTokenizer's choice for the families trained here. byte_level: tokenizer.json has a ByteLevel step.
Kind choose_kind(const Settings& s, bool byte_level) {
  const auto named =
      value<std::string>(s.tokenizer, "tokenizer_class", value<std::string>(s.model, "tokenizer_class", ""));
  const auto family = value<std::string>(s.model, "model_type", "");
  const Kind kind = kind_of_class(named);
  if (family == "qwen2") return Kind::qwen2;  // the class that such folders name is known to be wrong at times
  if (kind == Kind::llama && byte_level) return Kind::as_it_stands;
  if (family == "mistral") return Kind::as_it_stands;
  if (named.empty() && (family == "gpt2" || family == "opt" || family == "phi")) return Kind::gpt2;
  return kind;
}

void rebuild(Pipeline& p, Kind kind, const Settings& s) {
  if (kind == Kind::as_it_stands) return;
  p.normalizer.clear();
  p.splitters.clear();
  p.metaspace.reset();
  p.added.clear();
  BpeFiles& m = p.model;
  m.unknown.clear();
  m.ignore_merges = false;
  m.byte_level = kind != Kind::llama;
  m.fuse_unknown = m.byte_fallback = kind == Kind::llama;
  p.space_before.reset();
  const bool space = value(s.tokenizer, "add_prefix_space", kind == Kind::llama);
  if (kind == Kind::gpt2 && space) p.space_before = 0;
  if (kind == Kind::qwen2 && space) p.space_before = 1;
  if (kind == Kind::gpt2) p.splitters.push_back(make_gpt2_splitter());
  if (kind == Kind::qwen2) {
    p.normalizer.emplace_back(ComposeText{});
    p.splitters.push_back(make_qwen2_splitter());
  }
  if (kind == Kind::llama) {
    p.metaspace.emplace();
    p.metaspace->split = false;
    p.metaspace->prefix = !space                                ? PrefixSpace::never
                          : value(s.tokenizer, "legacy", false) ? PrefixSpace::always
                                                                : PrefixSpace::first;
  }
}

// A special token is written as its text or as {"content": text, flags}.
std::optional<AddedToken> special_token(const Json& written) {
  AddedToken token;
  token.special = true;
  token.normalized = false;
  if (written.is_string()) {
    token.content = written.get<std::string>();
  } else if (written.is_object() && written.contains("content") && written["content"].is_string()) {
    token.content = written["content"].get<std::string>();
    token.single_word = value(written, "single_word", false);
    token.lstrip = value(written, "lstrip", false);
    token.rstrip = value(written, "rstrip", false);
    token.normalized = value(written, "normalized", true);
    token.special = value(written, "special", true);
  } else {
    return std::nullopt;
  }
  return token;
}

constexpr const char* special_names[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                         "pad_token", "cls_token", "mask_token"};

// The special tokens by role: the settings' own, else what the tokenizer's class takes.
std::map<std::string, AddedToken> special_tokens(const Settings& s, Kind kind) {
  std::map<std::string, AddedToken> out;
  const auto put = [&](const char* role, const Json& written) {
    if (const auto token = special_token(written)) out[role] = *token;
  };
  if (kind == Kind::llama)
    for (const auto& [role, text] : {std::pair{"bos_token", "<s>"}, {"eos_token", "</s>"}, {"unk_token", "<unk>"}})
      put(role, text);
  if (kind == Kind::gpt2)
    for (const char* role : {"bos_token", "eos_token", "unk_token"}) put(role, "<|endoftext|>");
  if (kind == Kind::qwen2)
    for (const char* role : {"eos_token", "unk_token", "pad_token"}) put(role, "<|endoftext|>");
  for (const char* role : special_names) {
    if (s.tokenizer.contains(role)) {
      if (s.tokenizer[role].is_null()) out.erase(role);
      put(role, s.tokenizer[role]);
    }
    if (!s.tokenizer.contains("added_tokens_decoder") && s.special_map.contains(role)) put(role, s.special_map[role]);
  }
  return out;
}

// Added tokens as transformers joins them: those of the settings override the file's; special tokens that are in
// neither come last.
void add_tokens(Pipeline& p, const std::vector<AddedToken>& of_file, const Settings& s,
                const std::map<std::string, AddedToken>& special, const std::string& where) {
  std::map<int64_t, AddedToken> listed;
  if (const auto found = s.tokenizer.find("added_tokens_decoder"); found != s.tokenizer.end()) {
    if (!found->is_object()) fail(where, ": added_tokens_decoder: expected an object, found ", found->type_name());
    for (const auto& [id, written] : found->items()) {
      auto token = special_token(written);
      if (!token) fail(where, ": added_tokens_decoder: the token of id ", id, " has no content");
      token->special = value(written, "special", false);
      token->normalized = value(written, "normalized", !token->special);
      listed[std::atoll(id.c_str())] = *token;
    }
  } else {
    for (const AddedToken& token : of_file) listed[token.id] = token;
  }
  for (const auto& [id, token] : listed) p.added.push_back(token);
  const auto missing = [&](const AddedToken& token) {
    return std::none_of(p.added.begin(), p.added.end(),
                        [&](const AddedToken& a) { return a.content == token.content; });
  };
  for (const char* role : special_names)
    if (const auto found = special.find(role); found != special.end() && missing(found->second))
      p.added.push_back(found->second);
  for (const char* name : {"extra_special_tokens", "additional_special_tokens"})
    if (const auto found = s.tokenizer.find(name);
        found != s.tokenizer.end() && (found->is_array() || found->is_object()))
      for (const Json& written : *found)
        if (const auto token = special_token(written); token && missing(*token)) p.added.push_back(*token);
}

std::optional<int32_t> id_in(const Json& json, const char* name) {
  const auto found = json.find(name);
  if (found == json.end()) return std::nullopt;
  const Json& id = found->is_array() && !found->empty() ? found->front() : *found;
  return id.is_number_integer() ? std::optional(id.get<int32_t>()) : std::nullopt;
}

uint64_t hash_files(const fs::path& folder) {
  Hasher hash;
  for (const char* name : {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
                           "special_tokens_map.json", "generation_config.json", "config.json"}) {
    hash.add(bytes_of(name));
    if (fs::exists(folder / name)) hash.add(MappedFile(folder / name).bytes());
  }
  return hash.value();
}

std::unique_ptr<Tokenizer> load_sentencepiece(const fs::path& file, const Settings& s, Kind kind,
                                              const std::map<std::string, AddedToken>& special) {
  SentencePieces pieces = read_sentencepiece(file);
  Pipeline& p = pieces.pipeline;
  const std::string where = file.string();
  const std::vector<AddedToken> of_file = std::exchange(p.added, {});
  if (!pieces.unigram) {
    const bool byte_fallback = p.model.byte_fallback;
    rebuild(p, kind, s);
    if (kind == Kind::as_it_stands) {
      // transformers' reading of a file whose class it does not know: no space in front.
      if (pieces.maps_characters)
        fail(where,
             ": its character map is only known together with \"tokenizer_class\": \"LlamaTokenizer\" in "
             "tokenizer_config.json");
      p.normalizer.emplace_back(ReplaceText{" ", "\u2581"});
      p.model.unknown = pieces.unknown;
      p.model.byte_fallback = byte_fallback;
    } else if (kind != Kind::llama) {
      fail(where,
           ": a sentencepiece model, but the tokenizer's class is byte-level; bring the folder's tokenizer.json");
    }
    add_tokens(p, of_file, s, special, where);
    return make_tokenizer(std::move(p), nullptr, where);
  }
  // Unigram: the library's rules. Not legacy: a space in front of the text only, not after each special token.
  const bool legacy = value(s.tokenizer, "legacy", true),
             prefix = pieces.prefix_space && value(s.tokenizer, "add_prefix_space", true);
  if (!legacy && prefix) p.metaspace = Metaspace{.prefix = PrefixSpace::first, .split = false};
  add_tokens(p, of_file, s, special, where);
  auto model = make_sentencepiece_model(std::move(pieces.proto), legacy && prefix, where);
  return make_tokenizer(std::move(p), std::move(model), where);
}

}  // namespace

std::unique_ptr<Tokenizer> Tokenizer::load(const fs::path& folder) {
  if (!fs::is_directory(folder)) fail("model folder ", folder.string(), ": is no folder");
  const Settings s(folder);
  if (value(s.tokenizer, "split_special_tokens", false))
    fail((folder / "tokenizer_config.json").string(),
         ": split_special_tokens is not supported: it would change token ids; set it to false");

  std::unique_ptr<Tokenizer> tokenizer;
  std::map<std::string, AddedToken> special;
  std::string begins_with;
  const fs::path json = folder / "tokenizer.json", pieces = folder / "tokenizer.model",
                 vocabulary = folder / "vocab.json";
  if (fs::exists(json)) {
    Pipeline p = read_tokenizer_json(json);
    const Kind kind = choose_kind(s, p.model.byte_level);
    special = special_tokens(s, kind);
    begins_with = p.begins_with;
    const std::vector<AddedToken> of_file = p.added;
    rebuild(p, kind, s);
    add_tokens(p, of_file, s, special, (folder / "tokenizer_config.json").string());
    tokenizer = make_tokenizer(std::move(p), nullptr, json.string());
  } else {
    const Kind kind = choose_kind(s, false);
    special = special_tokens(s, kind);
    if (fs::exists(pieces)) {
      tokenizer = load_sentencepiece(pieces, s, kind, special);
    } else if (fs::exists(vocabulary) && fs::exists(folder / "merges.txt")) {
      if (kind != Kind::gpt2 && kind != Kind::qwen2)
        fail(vocabulary.string(),
             ": how its tokens are cut is not known; bring the folder's tokenizer.json, or name the "
             "\"tokenizer_class\" (GPT2Tokenizer or Qwen2Tokenizer) in tokenizer_config.json");
      Pipeline p = read_vocabulary_and_merges(vocabulary, folder / "merges.txt");
      rebuild(p, kind, s);
      add_tokens(p, {}, s, special, (folder / "tokenizer_config.json").string());
      tokenizer = make_tokenizer(std::move(p), nullptr, vocabulary.string());
    } else {
      fail("model folder ", folder.string(),
           ": has no tokenizer (tokenizer.json or tokenizer.model); bring these files, or use "
           "pre-tokenised rows (prompt_ids, chosen_ids, rejected_ids)");
    }
    if (special.contains("bos_token") && value(s.tokenizer, "add_bos_token", false))
      begins_with = special["bos_token"].content;
  }
  const auto role = [&](const char* name, const char* id_name) {
    const auto found = special.find(name);
    std::optional<int32_t> id = found == special.end() ? std::nullopt : tokenizer->token_id(found->second.content);
    if (!id) id = id_in(s.generation, id_name);
    if (!id) id = id_in(s.model, id_name);
    return id && *id >= 0 && *id < tokenizer->vocabulary_size() ? id : std::nullopt;
  };
  tokenizer->begin_of_sequence = role("bos_token", "bos_token_id");
  tokenizer->end_of_sequence = role("eos_token", "eos_token_id");
  tokenizer->adds_begin_of_sequence = !begins_with.empty() && tokenizer->begin_of_sequence &&
                                      tokenizer->token_id(begins_with) == tokenizer->begin_of_sequence;
  tokenizer->fingerprint = hash_files(folder);
  return tokenizer;
}

SpecialTexts special_texts(const fs::path& folder) {
  const Settings s(folder);
  const fs::path json = folder / "tokenizer.json";
  const bool byte_level = fs::exists(json) && read_file(json).find("\"ByteLevel\"") != std::string::npos;
  const auto special = special_tokens(s, choose_kind(s, byte_level));
  const auto text = [&](const char* role) {
    const auto found = special.find(role);
    return found == special.end() ? std::string() : found->second.content;
  };
  return {text("bos_token"), text("eos_token")};
}

std::optional<std::string> own_template(const fs::path& folder) {
  const fs::path jinja = folder / "chat_template.jinja", settings = folder / "tokenizer_config.json";
  if (fs::exists(jinja)) return read_file(jinja);
  const Json config = read_json(settings);
  const auto found = config.find("chat_template");
  if (found == config.end() || found->is_null()) return std::nullopt;
  if (found->is_string()) return found->get<std::string>();
  if (found->is_array())
    for (const Json& entry : *found)
      if (entry.is_object() && value<std::string>(entry, "name", "") == "default")
        return value<std::string>(entry, "template", "");
  fail(settings.string(), ": chat_template: expected a text, or a list in which one is named \"default\"");
}

}  // namespace orpo
