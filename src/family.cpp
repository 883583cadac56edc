#include "src/family.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <set>

#include "src/fail.h"
#include "src/files.h"
#include "src/json.h"

namespace fs = std::filesystem;

namespace orpo {
namespace {

// The fields of a config.json, each taken once; what is left at the end and not known to be harmless is refused.
class Fields {
 public:
  Fields(const Json& json, std::string where) : json_(json), where_(std::move(where)) {}

  template <class... Parts>
  [[noreturn]] void refuse(const std::string& key, const Parts&... what) const {
    fail(where_, ": ", key, " ", brief(json_.value(key, Json())), what...);
  }

  // The field's value; null where it is absent.
  const Json& take(const std::string& key) {
    static const Json absent;
    taken_.insert(key);
    const auto found = json_.find(key);
    return found == json_.end() ? absent : *found;
  }
  bool has(const std::string& key) const { return json_.contains(key) && !json_[key].is_null(); }

  int64_t count(const std::string& key, int64_t most, std::optional<int64_t> otherwise = std::nullopt) {
    const Json& value = take(key);
    if (value.is_null() && otherwise) return *otherwise;
    if (value.is_null()) fail(where_, ": ", key, " is missing");
    const bool whole = value.is_number_integer() && (value.is_number_unsigned() || value.get<int64_t>() >= 0);
    if (!whole || value.get<uint64_t>() < 1 || value.get<uint64_t>() > static_cast<uint64_t>(most))
      refuse(key, " is not a whole number from 1 to ", most);
    return value.get<int64_t>();
  }
  double positive(const std::string& key, double otherwise) {
    const Json& value = take(key);
    if (value.is_null()) return otherwise;
    if (!value.is_number() || !(value.get<double>() > 0) || !std::isfinite(value.get<double>()))
      refuse(key, " is not a positive number");
    return value.get<double>();
  }
  bool flag(const std::string& key, bool otherwise) {
    const Json& value = take(key);
    if (value.is_null()) return otherwise;
    if (!value.is_boolean()) refuse(key, " is neither true nor false");
    return value.get<bool>();
  }
  // A field that changes the result and of which only some values are computed; null and absence stand for the first.
  void only(const std::string& key, const std::vector<Json>& supported) {
    const Json& value = take(key);
    if (value.is_null() || std::find(supported.begin(), supported.end(), value) != supported.end()) return;
    std::string list;
    for (const Json& s : supported) list += (list.empty() ? "" : " or ") + s.dump();
    refuse(key, " is not supported; this trainer computes ", list);
  }
  void dropout(const std::string& key, std::vector<std::string>& notes) {
    const Json& value = take(key);
    if (value.is_null() || value == 0) return;
    if (!value.is_number() || value.get<double>() < 0 || value.get<double>() >= 1)
      refuse(key, " is not a number from 0 to 1");
    notes.push_back(key + " " + value.dump() + " is taken as 0");
  }

  void refuse_the_rest() const;
  const std::string& where() const { return where_; }

 private:
  const Json& json_;
  std::string where_;
  std::set<std::string> taken_;
};

// Fields that change neither logits nor gradients: who wrote the file, special tokens, how to generate, classification
// heads, what to return.
const std::set<std::string>& harmless_fields() {
  static const std::set<std::string> keys = {
      "_name_or_path", "transformers_version", "transformers.js_config", "auto_map", "use_cache", "is_llama_config",
      "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "_commit_hash",
      "_flash_attn_2_enabled", "unsloth_fixed", "unsloth_version",
      // special tokens
      "bos_token_id", "eos_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class",
      "prefix",
      // generation, as older files hold it
      "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
      "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
      "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
      "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
      "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "max_new_tokens",
      // other tasks' heads and what a call returns
      "finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "num_labels",
      "output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_bfloat16", "tf_legacy_loss",
      "chunk_size_feed_forward", "cross_attention_hidden_size"};
  return keys;
}

void Fields::refuse_the_rest() const {
  // Null says nothing, and a leading underscore is how transformers marks what is its own bookkeeping.
  for (const auto& [key, value] : json_.items())
    if (!taken_.contains(key) && !harmless_fields().contains(key) && !value.is_null() && !key.starts_with('_'))
      fail(where_, ": the field ", key, " (", brief(value),
           ") is not known to this trainer and may change what the model computes; remove it if it does not");
}

// Every layer attends to the whole sequence.
void no_sliding_window(Fields& f) {
  f.only("sliding_window", {nullptr});
  f.only("use_sliding_window", {false});
  f.only("attention_chunk_size", {nullptr});
  f.take("max_window_layers");  // read only where use_sliding_window holds
  const Json& types = f.take("layer_types");
  if (!types.is_null() && !types.is_array()) f.refuse("layer_types", " is no list");
  for (const Json& type : types)
    if (type != "full_attention")
      f.refuse("layer_types", " names ", brief(type), "; this trainer computes \"full_attention\"");
}

// rope_theta and rope_scaling as older files have them, or rope_parameters; both may stand there if they agree.
double rope_theta(Fields& f, double otherwise) {
  double theta = f.positive("rope_theta", otherwise);
  const bool given = f.has("rope_theta");
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const Json& rope = f.take(key);
    if (rope.is_null()) continue;
    if (!rope.is_object()) f.refuse(key, " is no object");
    Fields inner(rope, concat(f.where(), ": ", key));
    inner.only("rope_type", {"default"});
    inner.only("type", {"default"});
    inner.only("factor", {1.0});
    inner.only("partial_rotary_factor", {1.0});
    const double its_theta = inner.positive("rope_theta", theta);
    if (given && its_theta != theta) f.refuse(key, " has another rope_theta than the field beside it");
    theta = its_theta;
    inner.refuse_the_rest();
  }
  f.only("partial_rotary_factor", {1.0});
  f.only("rope_interleaved", {false});
  return theta;
}

// The MLP's function where it has no gate, by transformers' names.
Activation activation_named(Fields& f, const std::string& key, const std::string& otherwise) {
  static const std::map<std::string, Activation> names = {
      {"gelu_new", Activation::gelu_tanh},  {"gelu_pytorch_tanh", Activation::gelu_tanh},
      {"gelu_fast", Activation::gelu_tanh}, {"gelu", Activation::gelu},
      {"gelu_python", Activation::gelu},    {"relu", Activation::relu}};
  const Json& value = f.take(key);
  const auto found = names.find(value.is_null() ? otherwise : value.is_string() ? value.get<std::string>() : "");
  if (found != names.end()) return found->second;
  std::string list;
  for (const auto& [name, activation] : names) list += (list.empty() ? "" : ", ") + name;
  f.refuse(key, " is not supported; this trainer computes ", list);
}

StoredDType weights_dtype(Fields& f) {
  StoredDType dtype = StoredDType::f32;
  for (const char* key : {"torch_dtype", "dtype"}) {
    const Json& value = f.take(key);
    if (value.is_null()) continue;
    if (value == "float32")
      dtype = StoredDType::f32;
    else if (value == "bfloat16")
      dtype = StoredDType::bf16;
    else if (value == "float16")
      dtype = StoredDType::f16;
    else
      f.refuse(key, " is not supported; float32, bfloat16 and float16 are");
  }
  return dtype;
}

// Limits far above any model keep every product of sizes within 64 bits.
constexpr int64_t most_vocab = 1 << 24, most_width = 1 << 20, most_intermediate = most_width * 16,
                  most_layers = 1 << 12, most_heads = 1 << 14, most_head_dim = 1 << 12,
                  most_parameters = int64_t{1} << 44;

// transformers gives the token's input embedding no gradient, also where it is the end of sequence as well; there as
// here -1 is the last token.
int64_t padding_token(Fields& f, int64_t vocab) {
  const Json& value = f.take("pad_token_id");
  if (value.is_null()) return -1;
  if (!value.is_number_integer() || value.get<int64_t>() < -vocab || value.get<int64_t>() >= vocab)
    f.refuse("pad_token_id", " is no token of ", vocab);
  const int64_t id = value.get<int64_t>();
  return id < 0 ? id + vocab : id;
}

// What config.json calls the sizes that every decoder has.
struct SizeNames {
  const char *width, *intermediate, *layers, *heads, *positions;
};

void read_sizes(Fields& f, Config& c, const SizeNames& names, int64_t default_positions) {
  c.vocab = f.count("vocab_size", most_vocab);
  c.width = f.count(names.width, most_width);
  c.layers = static_cast<int>(f.count(names.layers, most_layers));
  c.heads = c.kv_heads = static_cast<int>(f.count(names.heads, most_heads));
  c.max_positions = f.count(names.positions, int64_t{1} << 30, default_positions);
}

// Heads that share the width: head_dim = width / heads.
void divide_width(Fields& f, Config& c, const SizeNames& names) {
  if (c.width % c.heads != 0) f.refuse(names.width, " is no multiple of ", names.heads, " ", c.heads);
  if (c.width / c.heads > most_head_dim)
    f.refuse(names.width, " gives heads of ", c.width / c.heads, " entries; the most is ", most_head_dim);
  c.head_dim = static_cast<int>(c.width / c.heads);
}

// What every decoder's config.json says in the same words: initialisation, precision, and that it is a plain decoder.
void read_common(Fields& f, ModelDescription& m) {
  m.config.initializer_range = f.positive("initializer_range", 0.02);
  m.dtype = weights_dtype(f);

  f.only("is_encoder_decoder", {false});
  f.only("add_cross_attention", {false});
  f.only("tie_encoder_decoder", {false});
  f.only("is_decoder", {false, true});
  f.only("pruned_heads", {Json::object()});
  if (f.has("quantization_config"))
    f.refuse("quantization_config", ": quantised weights are not supported; use the model in bf16, fp16 or fp32");
  f.take("quantization_config");
}

// LlamaForCausalLM: Llama, Llama-2, SmolLM2 and whatever else declares itself one.
void read_llama(Fields& f, ModelDescription& m) {
  Config& c = m.config;
  const SizeNames names{"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                        "max_position_embeddings"};
  read_sizes(f, c, names, 2048);
  c.intermediate = f.count(names.intermediate, most_intermediate);
  c.kv_heads = static_cast<int>(f.count("num_key_value_heads", most_heads, c.heads));
  if (c.heads % c.kv_heads != 0) f.refuse(names.heads, " is no multiple of num_key_value_heads ", c.kv_heads);
  if (f.has("head_dim"))
    c.head_dim = static_cast<int>(f.count("head_dim", most_head_dim));
  else
    f.take("head_dim"), divide_width(f, c, names);
  c.padding_token = padding_token(f, c.vocab);
  c.norm_epsilon = f.positive("rms_norm_eps", 1e-6);
  c.rope_theta = rope_theta(f, 10000);
  if (c.head_dim % 2 != 0)
    fail(f.where(), ": heads of ", c.head_dim, " entries cannot be rotated in pairs; head_dim has to be even");
  c.tied_embeddings = f.flag("tie_word_embeddings", false);
  c.qkv_bias = c.attention_output_bias = f.flag("attention_bias", false);
  c.mlp_bias = f.flag("mlp_bias", false);
  f.only("hidden_act", {"silu", "swish"});
  f.only("pretraining_tp", {1});
  f.dropout("attention_dropout", m.notes);
  no_sliding_window(f);
}

// GPT2LMHeadModel. Its embedding has no padding token, whatever pad_token_id says.
void read_gpt2(Fields& f, ModelDescription& m) {
  Config& c = m.config;
  const SizeNames names{"n_embd", "n_inner", "n_layer", "n_head", "n_positions"};
  read_sizes(f, c, names, 1024);
  c.intermediate = f.count(names.intermediate, most_intermediate, 4 * c.width);
  divide_width(f, c, names);
  c.norm = Norm::layer;
  c.norm_epsilon = f.positive("layer_norm_epsilon", 1e-5);
  c.position = Position::learned;
  c.activation = activation_named(f, "activation_function", "gelu_new");
  c.scaled_residual_init = true;
  c.tied_embeddings = f.flag("tie_word_embeddings", true);
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = true;
  c.scale_attention = f.flag("scale_attn_weights", true);
  c.scale_attention_by_layer = f.flag("scale_attn_by_inverse_layer_idx", false);
  f.flag("reorder_and_upcast_attn", false);  // scores in fp32, as they are here always
  for (const char* key : {"resid_pdrop", "embd_pdrop", "attn_pdrop"}) f.dropout(key, m.notes);
  // n_ctx is n_positions in older files and read by nobody; the others belong to the published files' history and to
  // the heads of other tasks.
  for (const char* key :
       {"pad_token_id", "n_ctx", "n_special", "predict_special_tokens", "gradient_checkpointing", "summary_type",
        "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"})
    f.take(key);
}

// The table of families: what config.json says of itself, and who reads it.
struct Family {
  const char *model_type, *architecture;
  void (*read)(Fields&, ModelDescription&);
};
constexpr Family families[] = {{"llama", "LlamaForCausalLM", read_llama}, {"gpt2", "GPT2LMHeadModel", read_gpt2}};

const Family& find_family(Fields& f) {
  const Json &architectures = f.take("architectures"), &type = f.take("model_type");
  const bool one = architectures.is_array() && architectures.size() == 1;
  std::string supported;
  for (const Family& family : families) {
    if (one && architectures[0] == family.architecture && (type.is_null() || type == family.model_type)) return family;
    if (architectures.is_null() && type == family.model_type) return family;
    supported +=
        (supported.empty() ? "" : ", ") + std::string(family.architecture) + " (model_type " + family.model_type + ")";
  }
  fail(f.where(), ": architecture ", brief(one ? architectures[0] : architectures), " (model_type ", brief(type),
       ") is not supported; this trainer knows ", supported);
}

}  // namespace

ModelDescription parse_model_config(std::string_view text, const std::string& where) {
  const Json json = parse_json(text, where);
  if (!json.is_object()) fail(where, ": is no JSON object");
  Fields fields(json, where);
  ModelDescription model;
  model.json = text;
  const Family& family = find_family(fields);
  model.config.family = family.model_type;
  read_common(fields, model);
  family.read(fields, model);
  fields.refuse_the_rest();
  if (model.config.parameters() > most_parameters)
    fail(where, ": describes ", model.config.parameters(), " parameters, which no machine holds");
  return model;
}

ModelDescription read_model_config(const fs::path& folder) {
  if (!fs::is_directory(folder)) fail(folder.string(), ": is no folder; --model takes a Hugging Face model folder");
  const fs::path file = folder / "config.json";
  if (!fs::exists(file)) fail(folder.string(), ": holds no config.json; --model takes a Hugging Face model folder");
  return parse_model_config(read_file(file), file.string());
}

std::string config_json_with_dtype(const ModelDescription& model, StoredDType dtype) {
  if (dtype == model.dtype && !model.json.empty()) return model.json;
  const char* name = dtype == StoredDType::f32 ? "float32" : dtype == StoredDType::bf16 ? "bfloat16" : "float16";
  nlohmann::ordered_json json = nlohmann::ordered_json::parse(model.json);
  if (json.contains("torch_dtype")) json["torch_dtype"] = name;
  if (json.contains("dtype") || !json.contains("torch_dtype")) json["dtype"] = name;
  return json.dump(2) + "\n";
}

}  // namespace orpo
