// The one table that knows Hugging Face's tensor names.
#include <algorithm>

#include "src/fail.h"
#include "src/safetensors.h"

namespace orpo {

namespace {

// Hugging Face's modules for one of our tensors; several where ours holds the rows of all, one after the other.
struct Modules {
  std::string_view ours;  // within a layer, or outside of them; a bias belongs to its matrix or norm
  std::vector<std::string_view> theirs;
};

// How a family's checkpoints name things.
struct Naming {
  std::string_view family, base, decoder, layers;  // prefixes: one that folders may leave out, the decoder's within it,
                                                   // and a layer's before its number
  std::vector<Modules> modules;
  bool transposed = false;                     // matrices within layers are [in, out]
  std::vector<std::string_view> derived = {};  // endings of buffers that older folders hold
};

const std::vector<Modules> llama_modules = {{"embedding", {"embed_tokens"}},
                                            {"attention_norm", {"input_layernorm"}},
                                            {"qkv", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}},
                                            {"attention_output", {"self_attn.o_proj"}},
                                            {"mlp_norm", {"post_attention_layernorm"}},
                                            {"gate_up", {"mlp.gate_proj", "mlp.up_proj"}},
                                            {"down", {"mlp.down_proj"}},
                                            {"final_norm", {"norm"}}};
const std::vector<std::string_view> rotary_buffers = {"rotary_emb.inv_freq"};

const Naming namings[] = {{"llama", "model.", "", "layers.", llama_modules, false, rotary_buffers},
                          {"mistral", "model.", "", "layers.", llama_modules, false, rotary_buffers},
                          {"qwen2", "model.", "", "layers.", llama_modules, false, rotary_buffers},
                          {"phi",
                           "model.",
                           "",
                           "layers.",
                           {{"embedding", {"embed_tokens"}},
                            {"attention_norm", {"input_layernorm"}},
                            {"qkv", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}},
                            {"attention_output", {"self_attn.dense"}},
                            {"gate_up", {"mlp.fc1"}},
                            {"down", {"mlp.fc2"}},
                            {"final_norm", {"final_layernorm"}}},
                           false,
                           rotary_buffers},
                          {"gpt2",
                           "transformer.",
                           "",
                           "h.",
                           {{"embedding", {"wte"}},
                            {"positions", {"wpe"}},
                            {"attention_norm", {"ln_1"}},
                            {"qkv", {"attn.c_attn"}},
                            {"attention_output", {"attn.c_proj"}},
                            {"mlp_norm", {"ln_2"}},
                            {"gate_up", {"mlp.c_fc"}},
                            {"down", {"mlp.c_proj"}},
                            {"final_norm", {"ln_f"}}},
                           true,
                           {".attn.bias", ".attn.masked_bias"}},
                          {"opt",
                           "model.",
                           "decoder.",
                           "layers.",
                           {{"embedding", {"embed_tokens"}},
                            {"projection_in", {"project_in"}},
                            {"positions", {"embed_positions"}},
                            {"attention_norm", {"self_attn_layer_norm"}},
                            {"qkv", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}},
                            {"attention_output", {"self_attn.out_proj"}},
                            {"mlp_norm", {"final_layer_norm"}},
                            {"gate_up", {"fc1"}},
                            {"down", {"fc2"}},
                            {"final_norm", {"final_layer_norm"}},
                            {"projection_out", {"project_out"}}}}};

const Naming& naming(const Config& config) {
  for (const Naming& n : namings)
    if (config.family == n.family) return n;
  fail_machine("no Hugging Face names are known for the family ", config.family);
}
constexpr std::string_view output_name = "lm_head.weight";

// One of our tensors among Hugging Face's: the layer whose prefix it has (-1: none) and its modules there.
struct Home {
  int layer;
  const std::vector<std::string_view>& modules;
};
Home home_of(const Config& config, const Parameter& parameter, std::string_view name) {
  const bool in_layer = parameter.layer >= 0 && parameter.layer < config.layers;
  int layer = in_layer ? parameter.layer : -1;
  // Our norms stand before what reads them; a post-norm layer's own ones stand behind its blocks.
  if (config.block == Block::post_norm) {
    if (name == "final_norm")
      layer = config.layers - 1, name = "mlp_norm";
    else if (name == "attention_norm")
      layer -= 1, name = "mlp_norm";
    else if (name == "mlp_norm")
      name = "attention_norm";
  }
  for (const Modules& m : naming(config).modules)
    if (m.ours == name) return {layer, m.theirs};
  fail_machine("the family ", config.family, " has no Hugging Face name for ", parameter.name);
}

// Rows of each of the modules that share one of our tensors.
std::vector<int64_t> rows_of(const Config& c, size_t modules, int64_t all) {
  const int64_t kv = int64_t{c.kv_heads} * c.head_dim;
  if (modules == 3) return {c.attention_width(), kv, kv};
  if (modules == 2) return {c.intermediate, c.intermediate};
  return {all};
}

}  // namespace

std::vector<TensorPlace> tensor_places(const Config& config) {
  const Naming& family = naming(config);
  const std::string decoder = std::string(family.base) + std::string(family.decoder);
  Arena shapes = Arena::counting("shapes");
  const std::vector<Parameter> list = parameters(config, Weights::allocate(config, DType::f32, shapes));
  std::vector<TensorPlace> places;
  for (size_t i = 0; i < list.size(); ++i) {
    const Tensor& tensor = list[i].tensor;
    std::string_view name = list[i].name;
    if (name == "output" || name == "output_bias") {
      const bool bias = name == "output_bias";
      const std::vector<int64_t> shape(tensor.shape.begin(), tensor.shape.begin() + tensor.rank);
      places.push_back({bias ? "lm_head.bias" : std::string(output_name), i, 0, config.vocab, shape, false, 0});
      continue;
    }
    const bool in_layer = name.starts_with("layers."), turned = in_layer && tensor.rank == 2 && family.transposed;
    if (in_layer) name.remove_prefix(name.find('.', name.find('.') + 1) + 1);
    const bool bias = name.ends_with("_bias");
    if (bias) name.remove_suffix(std::string_view("_bias").size());
    const Home home = home_of(config, list[i], name);
    std::string prefix = decoder;
    if (home.layer >= 0) prefix += std::string(family.layers) + std::to_string(home.layer) + ".";
    const std::vector<int64_t> rows = rows_of(config, home.modules.size(), tensor.shape[0]);
    int64_t row = 0;
    for (size_t part = 0; part < rows.size(); ++part) {
      std::vector<int64_t> shape = {rows[part]};
      if (tensor.rank == 2) shape.insert(turned ? shape.begin() : shape.end(), tensor.columns());
      places.push_back({prefix + std::string(home.modules[part]) + (bias ? ".bias" : ".weight"), i, row, rows[part],
                        shape, turned, family.base.size()});
      row += rows[part];
    }
    REQUIRE_SHAPE("tensor_places", row == tensor.shape[0], "names for the ", tensor.shape[0], " rows of ", list[i].name,
                  "; there are names for ", row);
  }
  return places;
}

const StoredTensor* find_place(const StoredWeights& stored, const TensorPlace& place) {
  const StoredTensor* tensor = stored.find(place.name);
  return tensor ? tensor : stored.find(std::string_view(place.name).substr(place.base));
}

bool is_derived_tensor(const Config& config, std::string_view name) {
  const Naming& family = naming(config);
  return std::any_of(family.derived.begin(), family.derived.end(), [&](auto end) { return name.ends_with(end); });
}
std::string_view tied_output_name(const Config&) { return output_name; }

}  // namespace orpo
