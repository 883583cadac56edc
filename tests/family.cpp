// config.json of the Llama family: both generations, what is refused by name, what is written back.
#include "src/family.h"

#include <cmath>

#include "src/fail.h"
#include "tests/model_folders.h"
#include "tests/temporary_folder.h"

using namespace orpo;
using namespace orpo::test;

namespace {

ModelDescription parse(const std::string& json) { return parse_model_config(json, "config.json"); }
std::string refusal(const std::string& more) {
  return error_line<UserError>([&] { parse(llama_json(more)); });
}

// llama_json() with one field given another value, or removed.
std::string with(const std::string& key, const std::string& value) {
  std::string json = llama_json();
  const size_t begin = json.find("\"" + key + "\": "),
               end = json.find_first_of(",}", json[begin + key.size() + 4] == '[' ? json.find(']', begin) : begin);
  REQUIRE(begin != std::string::npos);
  return json.replace(begin, end - begin, value.empty() ? "\"use_cache\": true" : "\"" + key + "\": " + value);
}
std::string refusal_with(const std::string& key, const std::string& value) {
  return error_line<UserError>([&] { parse(with(key, value)); });
}

}  // namespace

TEST_CASE("family: sizes and flags of a Llama") {
  const ModelDescription m = parse(llama_json());
  const Config& c = m.config;
  CHECK(c.family == "llama");
  CHECK(std::vector<int64_t>{c.vocab, c.width, c.intermediate, c.layers, c.heads, c.kv_heads, c.head_dim,
                             c.max_positions} == std::vector<int64_t>{37, 12, 17, 2, 3, 1, 6, 64});
  CHECK(c.qkv_bias);
  CHECK(c.attention_output_bias);
  CHECK(c.mlp_bias);
  CHECK(!c.tied_embeddings);
  CHECK(c.norm_epsilon == 1e-5);
  CHECK(c.rope_theta == 10000);
  CHECK(m.dtype == StoredDType::bf16);
  CHECK(m.notes.empty());
  CHECK(m.json == llama_json());
}

TEST_CASE("family: what a file leaves out has transformers' defaults") {
  const Config c =
      parse(
          R"({"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2})")
          .config;
  CHECK(c.kv_heads == 2);
  CHECK(c.head_dim == 4);
  CHECK(c.max_positions == 2048);
  CHECK(c.norm_epsilon == 1e-6);
  CHECK(c.initializer_range == 0.02);
  CHECK(!c.qkv_bias);
  CHECK(!c.tied_embeddings);
}

TEST_CASE("family: both generations of config.json") {
  const auto theta = [](const std::string& more) { return parse(llama_json(more)).config.rope_theta; };
  CHECK(theta(R"("rope_theta": 100000, "rope_scaling": null, )") == 100000);
  CHECK(theta(R"("rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, )") == 500000);
  CHECK(theta(R"("rope_theta": 100000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, )") ==
        100000);
  CHECK(theta(R"("rope_scaling": {"type": "default"}, )") == 10000);
  CHECK(parse(with("torch_dtype", "\"float16\"")).dtype == StoredDType::f16);
  CHECK(parse(llama_json(R"("dtype": "float32", )")).dtype == StoredDType::f32);
  CHECK(parse(with("torch_dtype", "")).dtype == StoredDType::f32);
  // The fields of the published SmolLM2 configuration that say nothing about the result.
  CHECK_NOTHROW(parse(llama_json(
      R"("is_llama_config": true, "rope_interleaved": false, "pretraining_tp": 1, "transformers.js_config": {"kv": 1}, )")));
}

TEST_CASE("family: dropout is taken as 0 and said") {
  CHECK(parse(llama_json(R"("attention_dropout": 0.0, )")).notes.empty());
  CHECK(parse(llama_json(R"("attention_dropout": 0.25, )")).notes ==
        std::vector<std::string>{"attention_dropout 0.25 is taken as 0"});
}

TEST_CASE("family: a field that changes the result is refused by name") {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {R"("hidden_act": "gelu", )",
       R"(config.json: hidden_act "gelu" is not supported; this trainer computes "silu" or "swish")"},
      {R"("pretraining_tp": 2, )", "config.json: pretraining_tp 2 is not supported; this trainer computes 1"},
      {R"("rope_scaling": {"rope_type": "llama3", "factor": 8.0}, )",
       "config.json: rope_scaling: low_freq_factor is missing"},
      {R"("rope_scaling": {"type": "linear"}, )", "config.json: rope_scaling: factor is missing"},
      {R"("rope_scaling": {"type": "dynamic", "factor": 2.0}, )",
       R"(config.json: rope_scaling: type "dynamic" is not supported; this trainer computes "default", "linear" and "llama3")"},
      {R"("rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 3.0}, )",
       R"(config.json: rope_parameters {"factor":3.0,"rope_type":"linear"} says other than rope_scaling)"},
      {R"("rope_parameters": {"rope_type": "yarn", "factor": 2.0}, )",
       R"(config.json: rope_parameters: rope_type "yarn" is not supported; this trainer computes "default", "linear" and "llama3")"},
      {R"("rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "attention_factor": 2}, )",
       "config.json: rope_parameters: the field attention_factor (2) is not known to this trainer and may change what "
       "the model computes; remove it if it does not"},
      {R"("rope_theta": 5, "rope_parameters": {"rope_theta": 7}, )",
       R"(config.json: rope_parameters {"rope_theta":7} has another rope_theta than the field beside it)"},
      {R"("partial_rotary_factor": 0.5, )",
       "config.json: partial_rotary_factor 0.5 is not supported; this trainer computes 1.0"},
      {R"("sliding_window": 4096, )", "config.json: sliding_window 4096 is not supported; this trainer computes null"},
      {R"("use_sliding_window": true, )",
       "config.json: use_sliding_window true is not supported; this trainer computes false"},
      {R"("layer_types": ["full_attention", "sliding_attention"], )",
       R"(config.json: layer_types ["full_attention","sliding_attention"] names "sliding_attention"; this trainer computes "full_attention")"},
      {R"("quantization_config": {"bits": 4}, )",
       R"(config.json: quantization_config {"bits":4}: quantised weights are not supported; use the model in bf16, fp16 or fp32)"},
      {R"("logit_scale": 0.5, )",
       "config.json: the field logit_scale (0.5) is not known to this trainer and may change what the model computes; "
       "remove it if it does not"},
      {R"("dtype": "float64", )",
       R"(config.json: dtype "float64" is not supported; float32, bfloat16 and float16 are)"},
      {R"("use_cache": true, "use_cache": false, )", "config.json: the key 'use_cache' is given twice"},
  };
  for (const auto& [field, line] : cases) CHECK(refusal(field) == line);
}

TEST_CASE("family: an unknown architecture lists the known ones") {
  CHECK(
      refusal_with("architectures", R"(["GPTBigCodeForCausalLM"])") ==
      R"(config.json: architecture "GPTBigCodeForCausalLM" (model_type "llama") is not supported; this trainer knows LlamaForCausalLM (model_type llama), MistralForCausalLM (model_type mistral), Qwen2ForCausalLM (model_type qwen2), PhiForCausalLM (model_type phi), OPTForCausalLM (model_type opt), GPT2LMHeadModel (model_type gpt2))");
  CHECK(holds(refusal_with("model_type", "\"mamba\""), "(model_type \"mamba\") is not supported"));
  CHECK(holds(refusal_with("architectures", R"(["LlamaForCausalLM", "Other"])"), "is not supported"));
}

TEST_CASE("family: shapes that no model has") {
  CHECK(refusal_with("vocab_size", "") == "config.json: vocab_size is missing");
  CHECK(refusal_with("vocab_size", "0") == "config.json: vocab_size 0 is not a whole number from 1 to 16777216");
  CHECK(holds(refusal_with("hidden_size", "-12"), "hidden_size -12 is not a whole number"));
  CHECK(holds(refusal_with("hidden_size", "12.5"), "hidden_size 12.5 is not a whole number"));
  CHECK(holds(refusal_with("num_hidden_layers", "18446744073709551615"),
              "num_hidden_layers 18446744073709551615 is not a whole number"));
  CHECK(holds(refusal_with("num_hidden_layers", "\"2\""), "num_hidden_layers \"2\" is not a whole number"));
  CHECK(refusal_with("num_key_value_heads", "2") ==
        "config.json: num_attention_heads 3 is no multiple of num_key_value_heads 2");
  CHECK(refusal_with("head_dim", "5") ==
        "config.json: 5 of a head's 5 entries cannot be rotated in pairs; head_dim has to be even");
  CHECK(holds(refusal_with("rms_norm_eps", "0"), "rms_norm_eps 0 is not a positive number"));
  CHECK(holds(refusal_with("attention_bias", "1"), "attention_bias 1 is neither true nor false"));
  CHECK(holds(
      error_line<UserError>([] {
        parse(
            R"({"model_type": "llama", "vocab_size": 8, "hidden_size": 1048576, "intermediate_size": 16777216, "num_hidden_layers": 4096, "num_attention_heads": 1024})");
      }),
      "which no machine holds"));
}

TEST_CASE("family: what is no config.json") {
  CHECK(error_line<UserError>([] { parse("{\"a\": 1,"); }) == "config.json: is not valid JSON; it ends too early");
  CHECK(error_line<UserError>([] { parse("{\"a\": 1,}"); }) ==
        "config.json: is not valid JSON; it goes wrong at byte 9 of 9");
  CHECK(error_line<UserError>([] { parse("[]"); }) == "config.json: is no JSON object");
  CHECK(holds(error_line<UserError>([] { parse(std::string(100, '[')); }), "nested deeper than 64 levels"));
  CHECK(holds(error_line<UserError>([] { parse(R"({"rope_theta": 1e999})"); }), "a number that no double can hold"));
  TemporaryFolder folder;
  CHECK(error_line<UserError>([&] { read_model_config(folder.path()); }) ==
        folder.path().string() + ": holds no config.json; --model takes a Hugging Face model folder");
  CHECK(holds(error_line<UserError>([&] { read_model_config(folder.path() / "absent"); }), "is no folder"));
}

TEST_CASE("family: config.json is written back as it came, but for its dtype") {
  CHECK(config_json_with_dtype(parse(llama_json()), StoredDType::bf16) == llama_json());
  const std::string changed = config_json_with_dtype(parse(llama_json(R"("rope_theta": 1234.5, )")), StoredDType::f32);
  CHECK(holds(changed, "\"torch_dtype\": \"float32\""));
  CHECK(!holds(changed, "\"dtype\": \"float32\""));
  CHECK(changed.find("rope_theta") < changed.find("architectures"));  // the order stays
  CHECK(holds(config_json_with_dtype(parse(with("torch_dtype", "")), StoredDType::f16), "\"dtype\": \"float16\""));
  CHECK(parse(changed).dtype == StoredDType::f32);
  CHECK(parse(changed).config.rope_theta == 1234.5);
}
