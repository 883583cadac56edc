#include "src/family.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "src/config_fields.h"
#include "src/fail.h"
#include "src/files.h"

namespace fs = std::filesystem;

namespace orpo {
namespace {

// Limits far above any model keep every product of sizes within 64 bits.
constexpr int64_t most_vocab = 1 << 24, most_width = 1 << 20, most_intermediate = most_width * 16,
                  most_layers = 1 << 12, most_heads = 1 << 14, most_head_dim = 1 << 12, most_positions = 1 << 30,
                  most_parameters = int64_t{1} << 44;

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

// Positions that a row sees of a windowed layer; 0: sliding_window is null. otherwise: where the field is absent.
int sliding_window(Fields& f, int otherwise) {
  const bool absent = !f.contains("sliding_window");
  if (!absent && !f.has("sliding_window")) return f.take("sliding_window"), 0;
  return static_cast<int>(f.count("sliding_window", int64_t{1} << 30, otherwise));
}

// Which of the layers are windowed: layer_types, or where that is absent those from max_window_layers on.
void qwen2_windows(Fields& f, Config& c) {
  const bool used = f.flag("use_sliding_window", false);
  const int window = sliding_window(f, 4096);
  const Json& first = f.take("max_window_layers");
  if (!first.is_null() && !(first.is_number_integer() && first.get<int64_t>() >= 0))
    f.refuse("max_window_layers", " is no number of layers");
  const Json& types = f.take("layer_types");
  if (!types.is_null() && (!types.is_array() || types.size() != static_cast<size_t>(c.layers)))
    f.refuse("layer_types", " is no list of ", c.layers, " layers");
  std::vector<int> windows(c.layers, 0);
  for (int i = 0; i < c.layers; ++i) {
    const bool late = i >= (first.is_null() ? 28 : first.get<int64_t>());
    if (!types.is_null() && types[i] != "full_attention" && types[i] != "sliding_attention")
      f.refuse("layer_types", " names ", brief(types[i]),
               R"(; this trainer computes "full_attention" and "sliding_attention")");
    const bool slides = types.is_null() ? late : types[i] == "sliding_attention";
    if (slides && used) windows[i] = window;
    if (slides && !used && !types.is_null())
      f.refuse("layer_types", " names \"sliding_attention\", and use_sliding_window is false");
  }
  if (used && window > 0) c.windows = windows;
}

// What rope_scaling or rope_parameters says of the frequencies. Newer files hold the theta there as well.
RopeScaling rope_scaling(Fields& f, int64_t max_positions) {
  RopeScaling s;
  const Json &type = f.take("rope_type"), &older = f.take("type");
  const Json& kind = type.is_null() ? older : type;
  if (kind.is_null() || kind == "default") {
    f.only("factor", {1.0});
  } else if (kind == "linear") {
    s.kind = RopeScaling::linear;
    s.factor = f.positive("factor");
  } else if (kind == "llama3") {
    s.kind = RopeScaling::llama3;
    s.factor = f.positive("factor");
    s.low_frequency = f.positive("low_freq_factor"), s.high_frequency = f.positive("high_freq_factor");
    s.original_positions =
        static_cast<double>(f.count("original_max_position_embeddings", most_positions, max_positions));
    if (!(s.high_frequency > s.low_frequency)) f.refuse("high_freq_factor", " is not more than low_freq_factor");
  } else {
    f.refuse(type.is_null() ? "type" : "rope_type",
             R"( is not supported; this trainer computes "default", "linear" and "llama3")");
  }
  return s;
}

// The rotary positions: rope_theta, rope_scaling and partial_rotary_factor as older files have them, or all in
// rope_parameters; both may stand there if they agree. partial: the share of each head that the family rotates where
// nothing is said; 0: it knows no other than all.
void read_rotary(Fields& f, Config& c, double partial = 0) {
  c.rope_theta = f.positive("rope_theta", 10000);
  const bool given = f.has("rope_theta");
  double share = partial > 0 ? f.positive("partial_rotary_factor", partial) : 1;
  bool scaled = false;
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const Json& rope = f.take(key);
    if (rope.is_null()) continue;
    if (!rope.is_object()) f.refuse(key, " is no object");
    Fields inner(rope, concat(f.where(), ": ", key));
    const RopeScaling scaling = rope_scaling(inner, c.max_positions);
    if (scaled && scaling != c.rope_scaling) f.refuse(key, " says other than rope_scaling");
    c.rope_scaling = scaling, scaled = true;
    if (partial > 0)
      share = inner.positive("partial_rotary_factor", share);
    else
      inner.only("partial_rotary_factor", {1.0});
    const double its_theta = inner.positive("rope_theta", c.rope_theta);
    if (given && its_theta != c.rope_theta) f.refuse(key, " has another rope_theta than the field beside it");
    c.rope_theta = its_theta;
    inner.refuse_the_rest();
  }
  if (partial == 0) f.only("partial_rotary_factor", {1.0});
  f.only("rope_interleaved", {false});
  if (share > 1) fail(f.where(), ": partial_rotary_factor ", share, " is more than 1");
  c.rotary_dim = static_cast<int>(c.head_dim * share);
  if (c.rotary_dim % 2 != 0 || c.rotary_dim == 0)
    fail(f.where(), ": ", c.rotary_dim, " of a head's ", c.head_dim, " entries cannot be rotated in pairs; head_dim",
         partial > 0 ? " times partial_rotary_factor" : "", " has to be even");
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
  c.max_positions = f.count(names.positions, most_positions, default_positions);
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

// What Llama and its kin say alike: gated MLPs, RMS norms, rotary positions, shared key and value heads.
// default_kv_heads: where num_key_value_heads is absent; 0: as many as there are query heads.
void read_llama_like(Fields& f, ModelDescription& m, int64_t default_positions, int default_kv_heads) {
  Config& c = m.config;
  const SizeNames names{"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                        "max_position_embeddings"};
  read_sizes(f, c, names, default_positions);
  c.intermediate = f.count(names.intermediate, most_intermediate);
  const bool null_heads = f.contains("num_key_value_heads") && !f.has("num_key_value_heads");
  c.kv_heads = static_cast<int>(
      f.count("num_key_value_heads", most_heads, default_kv_heads == 0 || null_heads ? c.heads : default_kv_heads));
  if (c.heads % c.kv_heads != 0) f.refuse(names.heads, " is no multiple of num_key_value_heads ", c.kv_heads);
  if (f.has("head_dim"))
    c.head_dim = static_cast<int>(f.count("head_dim", most_head_dim));
  else
    f.take("head_dim"), divide_width(f, c, names);
  c.padding_token = padding_token(f, c.vocab);
  c.norm_epsilon = f.positive("rms_norm_eps", 1e-6);
  read_rotary(f, c);
  c.tied_embeddings = f.flag("tie_word_embeddings", false);
  f.only("hidden_act", {"silu", "swish"});
  f.dropout("attention_dropout", m.notes);
}

// LlamaForCausalLM: Llama, Llama-2, Llama-3, SmolLM2 and whatever else declares itself one.
void read_llama(Fields& f, ModelDescription& m) {
  read_llama_like(f, m, 2048, 0);
  Config& c = m.config;
  c.qkv_bias = c.attention_output_bias = f.flag("attention_bias", false);
  c.mlp_bias = f.flag("mlp_bias", false);
  f.only("pretraining_tp", {1});
  no_sliding_window(f);
}

// MistralForCausalLM: every layer's attention is windowed.
void read_mistral(Fields& f, ModelDescription& m) {
  read_llama_like(f, m, 131072, 8);
  if (const int window = sliding_window(f, 4096)) m.config.windows.assign(m.config.layers, window);
  f.only("layer_types", {nullptr});
}

// Qwen2ForCausalLM: Qwen2 and Qwen2.5. Queries, keys and values have biases.
void read_qwen2(Fields& f, ModelDescription& m) {
  read_llama_like(f, m, 32768, 32);
  m.config.qkv_bias = true;
  qwen2_windows(f, m.config);
}

// PhiForCausalLM: Phi-1, Phi-1.5 and Phi-2. Its embedding has a padding token.
void read_phi(Fields& f, ModelDescription& m) {
  Config& c = m.config;
  const SizeNames names{"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                        "max_position_embeddings"};
  read_sizes(f, c, names, 2048);
  c.intermediate = f.count(names.intermediate, most_intermediate);
  c.kv_heads = static_cast<int>(f.count("num_key_value_heads", most_heads, c.heads));
  if (c.heads % c.kv_heads != 0) f.refuse(names.heads, " is no multiple of num_key_value_heads ", c.kv_heads);
  divide_width(f, c, names);
  c.padding_token = padding_token(f, c.vocab);
  c.block = Block::parallel;
  c.norm = Norm::layer;
  c.norm_epsilon = f.positive("layer_norm_eps", 1e-5);
  c.activation = activation_named(f, "hidden_act", "gelu_new");
  read_rotary(f, c, 0.5);
  c.tied_embeddings = f.flag("tie_word_embeddings", false);
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = c.output_bias = true;
  f.only("qk_layernorm", {false});
  for (const char* key : {"resid_pdrop", "embd_pdrop", "attention_dropout"}) f.dropout(key, m.notes);
}

// OPTForCausalLM: 125M to 66B; of them 350M has its norms behind the blocks and narrower token vectors.
void read_opt(Fields& f, ModelDescription& m) {
  Config& c = m.config;
  const SizeNames names{"hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads",
                        "max_position_embeddings"};
  read_sizes(f, c, names, 2048);
  c.intermediate = f.count(names.intermediate, most_intermediate);
  divide_width(f, c, names);
  c.embedding_width = f.count("word_embed_proj_dim", most_width, c.width);
  c.padding_token = f.contains("pad_token_id") ? padding_token(f, c.vocab) : 1;
  c.position = Position::learned;
  c.position_offset = 2;
  c.norm = Norm::layer;
  c.norm_epsilon = 1e-5;
  c.block = f.flag("do_layer_norm_before", true) ? Block::sequential : Block::post_norm;
  if (c.block == Block::sequential) f.only("_remove_final_layer_norm", {false});
  f.only("layer_norm_elementwise_affine", {true});
  c.activation = activation_named(f, "activation_function", "relu");
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = f.flag("enable_bias", true);
  c.tied_embeddings = f.flag("tie_word_embeddings", true);
  c.initializer_range = f.positive("init_std", 0.02);
  for (const char* key : {"dropout", "attention_dropout", "activation_dropout", "layerdrop"}) f.dropout(key, m.notes);
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
constexpr Family families[] = {
    {"llama", "LlamaForCausalLM", read_llama}, {"mistral", "MistralForCausalLM", read_mistral},
    {"qwen2", "Qwen2ForCausalLM", read_qwen2}, {"phi", "PhiForCausalLM", read_phi},
    {"opt", "OPTForCausalLM", read_opt},       {"gpt2", "GPT2LMHeadModel", read_gpt2},
};

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
