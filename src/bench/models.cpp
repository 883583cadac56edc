#include "src/bench/models.h"

#include "src/demonstration.h"
#include "src/family.h"
#include "src/files.h"

namespace orpo::bench {
namespace {

BenchModel described(std::string name, const std::filesystem::path& folder, bool has_weights) {
  const Config config = read_model_config(folder).config;
  return {std::move(name), folder, config.vocab, config.max_positions, has_weights};
}

BenchModel written(std::string name, const std::filesystem::path& folder, const char* config) {
  make_folder(folder);
  write_file(folder / "config.json", config);
  return described(std::move(name), folder, false);
}

}  // namespace

BenchModel smollm2_shape(const std::filesystem::path& folder) {
  return written("SmolLM2-135M", folder, R"({
 "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
 "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_act": "silu", "max_position_embeddings": 8192,
 "rms_norm_eps": 1e-05, "rope_theta": 100000, "tie_word_embeddings": true, "initializer_range": 0.041666666666666664,
 "torch_dtype": "bfloat16"
})");
}

BenchModel gpt2_shape(const std::filesystem::path& folder) {
  return written("GPT-2 124M", folder, R"({
 "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
 "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "initializer_range": 0.02, "torch_dtype": "float32"
})");
}

BenchModel demonstration_model() { return described("demonstration", demonstration_data() / "model", false); }

BenchModel real_model(const std::filesystem::path& folder) {
  return described(folder.filename().string(), folder, true);
}

}  // namespace orpo::bench
