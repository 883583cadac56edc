// Mistral, Llama-3, Qwen2, Phi and OPT: config.json field by field, names and layouts of their tensors, runs. What they
// compute is compared with transformers in tests/reference.cpp.
#include <algorithm>
#include <cmath>
#include <set>

#include "src/plan.h"
#include "src/trainer.h"
#include "tests/model_folders.h"
#include "tests/programs.h"
#include "tests/tiny_model.h"

namespace orpo::test {
namespace {

// The sizes that every family calls alike, and more fields before them.
std::string json_of(const std::string& type, const std::string& architecture, const std::string& more) {
  return "{" + more + R"("architectures": [")" + architecture + R"("], "model_type": ")" + type +
         R"(", "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64})";
}
std::string mistral_json(const std::string& more = "") {
  return json_of("mistral", "MistralForCausalLM", more + R"("intermediate_size": 17, "num_key_value_heads": 2, )");
}
std::string qwen2_json(const std::string& more = "") {
  return json_of("qwen2", "Qwen2ForCausalLM", more + R"("intermediate_size": 17, "num_key_value_heads": 2, )");
}
std::string phi_json(const std::string& more = "") {
  return json_of("phi", "PhiForCausalLM",
                 more + (more.find("partial") == more.npos ? R"("partial_rotary_factor": 0.4, )" : "") +
                     R"("intermediate_size": 17, )");
}
std::string opt_json(const std::string& more = "") {
  return json_of("opt", "OPTForCausalLM", more + R"("ffn_dim": 17, )");
}

Config config_of(const std::string& json) { return parse_model_config(json, "config.json").config; }
std::string refusal(const std::string& json) {
  return error_line<UserError>([&] { config_of(json); });
}

std::set<std::string> stored_names(const std::string& json) {
  TinyFolder folder(DType::f32, json);
  folder.save(StoredDType::f32);
  std::set<std::string> names;
  const StoredWeights stored = StoredWeights::of_folder(folder.path());
  for (const StoredTensor& t : stored.tensors()) names.insert(t.name);
  return names;
}

}  // namespace

TEST_CASE("families: mistral's window, and transformers' defaults where a field is absent") {
  const Config c = config_of(mistral_json());
  CHECK(c.windows == std::vector<int>(3, 4096));
  CHECK(c.attention_shape(2).window == 4096);
  CHECK((!c.qkv_bias && !c.attention_output_bias && !c.mlp_bias));
  CHECK(config_of(mistral_json(R"("sliding_window": null, )")).windows.empty());
  CHECK(config_of(mistral_json(R"("sliding_window": 5, )")).windows == std::vector<int>(3, 5));
  CHECK(config_of(json_of("mistral", "MistralForCausalLM",
                          R"("intermediate_size": 17, "head_dim": 6, "num_key_value_heads": null, )"))
            .kv_heads == 4);
  CHECK(holds(refusal(json_of("mistral", "MistralForCausalLM", R"("intermediate_size": 17, )")),
              "num_attention_heads 4 is no multiple of num_key_value_heads 8"));
  CHECK(holds(refusal(mistral_json(R"("sliding_window": 0, )")), "sliding_window 0 is not a whole number"));
  CHECK(holds(refusal(mistral_json(R"("layer_types": ["full_attention"], )")), "layer_types"));
  CHECK(holds(refusal(mistral_json(R"("attention_bias": true, )")), "the field attention_bias (true) is not known"));
}

TEST_CASE("families: llama-3's frequencies") {
  const Config c = config_of(
      json_of("llama", "LlamaForCausalLM",
              R"("intermediate_size": 17, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
      "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, )"));
  CHECK(c.rope_theta == 500000);
  CHECK(c.rope_shape().scaling == RopeScaling{RopeScaling::llama3, 8, 1, 4, 8192});
  // Slow, mixed and fast waves.
  const RopeShape s{1, 1, 128, 128, 500000, c.rope_scaling};
  CHECK(rope_frequency(s, 0) == 1);
  CHECK(rope_frequency(s, 63) == doctest::Approx(std::pow(500000, -126.0 / 128) / 8));
  const double mixed = rope_frequency(s, 31) / std::pow(500000, -62.0 / 128);
  CHECK((mixed > 1.0 / 8 && mixed < 1));
}

TEST_CASE("families: qwen2's biases, and which of its layers are windowed") {
  const Config c = config_of(qwen2_json(R"("sliding_window": 131072, "max_window_layers": 21, )"));
  CHECK((c.qkv_bias && !c.attention_output_bias && !c.mlp_bias && c.windows.empty()));
  CHECK(config_of(qwen2_json(R"("use_sliding_window": true, "sliding_window": 5, "max_window_layers": 2, )")).windows ==
        std::vector<int>{0, 0, 5});
  CHECK(config_of(qwen2_json(R"("use_sliding_window": true, )")).windows == std::vector<int>{0, 0, 0});
  CHECK(config_of(qwen2_json(R"("use_sliding_window": true, "sliding_window": 7, "max_window_layers": 0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], )"))
            .windows == std::vector<int>{7, 0, 7});
  CHECK(holds(refusal(qwen2_json(R"("layer_types": ["full_attention"], )")), "is no list of 3 layers"));
  CHECK(holds(refusal(qwen2_json(R"("layer_types": ["full_attention", "full_attention", "sliding_attention"], )")),
              "names \"sliding_attention\", and use_sliding_window is false"));
  CHECK(holds(refusal(qwen2_json(R"("use_sliding_window": true,
    "layer_types": ["full_attention", "full_attention", "chunked_attention"], )")),
              "names \"chunked_attention\""));
}

TEST_CASE("families: phi's parallel block, partial rotation and biased output") {
  const Config c = config_of(
      json_of("phi", "PhiForCausalLM", R"("intermediate_size": 17, "partial_rotary_factor": 0.4, "head_dim": null, )"));
  CHECK(c.block == Block::parallel);
  CHECK(c.norm == Norm::layer);
  CHECK(c.rope_shape().rotary_dim == 2);  // 0.4 of 6
  CHECK(c.activation == Activation::gelu_tanh);
  CHECK((c.qkv_bias && c.attention_output_bias && c.mlp_bias && c.output_bias && !c.tied_embeddings));
  CHECK(c.parameters() == 2 * 37 * 24 + 37 + 3 * (4 * (24 * 24 + 24) + 2 * 24 * 17 + 24 + 17 + 2 * 24) + 2 * 24);
  CHECK(config_of(phi_json(R"("rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 1.0}, )"))
            .rope_shape()
            .rotary_dim == 6);
  CHECK(holds(refusal(phi_json(R"("partial_rotary_factor": 0.5, )")), "3 of a head's 6 entries cannot be rotated"));
  CHECK(holds(refusal(phi_json(R"("partial_rotary_factor": 1.5, )")), "partial_rotary_factor 1.5 is more than 1"));
  CHECK(holds(refusal(phi_json(R"("qk_layernorm": true, )")), "qk_layernorm true is not supported"));
  CHECK(parse_model_config(phi_json(R"("resid_pdrop": 0.1, )"), "config.json").notes ==
        std::vector<std::string>{"resid_pdrop 0.1 is taken as 0"});
}

TEST_CASE("families: opt's positions, padding token, norms and projections") {
  const Config c = config_of(opt_json());
  CHECK(c.block == Block::sequential);
  CHECK((c.position == Position::learned && c.position_offset == 2 && c.padding_token == 1));
  CHECK((c.activation == Activation::relu && c.tied_embeddings && c.qkv_bias && c.mlp_bias && !c.projects()));
  CHECK(config_of(opt_json(R"("enable_bias": false, )")).qkv_bias == false);
  CHECK(config_of(opt_json(R"("pad_token_id": null, )")).padding_token == -1);
  const Config small = config_of(opt_json(R"("do_layer_norm_before": false, "word_embed_proj_dim": 10, )"));
  CHECK(small.block == Block::post_norm);
  CHECK((small.projects() && small.table_width() == 10));
  CHECK(small.parameters() ==
        37 * 10 + 2 * 24 * 10 + 66 * 24 + 3 * (4 * (24 * 24 + 24) + 2 * 24 * 17 + 24 + 17 + 4 * 24));
  CHECK(holds(refusal(opt_json(R"("_remove_final_layer_norm": true, )")), "_remove_final_layer_norm true"));
  CHECK(holds(refusal(opt_json(R"("layer_norm_elementwise_affine": false, )")), "layer_norm_elementwise_affine false"));
}

TEST_CASE("families: weights come back as they went, under Hugging Face's names") {
  for (const std::string& json :
       {mistral_json(), qwen2_json(), phi_json(), opt_json(),
        opt_json(R"("do_layer_norm_before": false, "word_embed_proj_dim": 10, "tie_word_embeddings": false, )")}) {
    CAPTURE(json);
    TinyFolder folder(DType::f32, json);
    folder.save(StoredDType::f32);
    const std::string before = folder.model.bytes();
    folder.model.fill(2);
    REQUIRE(folder.model.bytes() != before);
    load_weights(folder.path(), folder.model.config, folder.model.weights, *folder.model.backend);
    CHECK(folder.model.bytes() == before);
  }
  const std::set<std::string> phi = stored_names(phi_json());
  CHECK(phi.contains("model.layers.2.self_attn.dense.bias"));
  CHECK(phi.contains("model.final_layernorm.weight"));
  CHECK(phi.contains("lm_head.bias"));
  const std::set<std::string> opt = stored_names(opt_json());
  CHECK(opt.contains("model.decoder.embed_positions.weight"));
  CHECK(opt.contains("model.decoder.final_layer_norm.bias"));
  CHECK(!opt.contains("lm_head.weight"));
}

TEST_CASE("families: a post-norm layer's norms are those behind its blocks, and the bare decoder's names are read") {
  TinyFolder folder(DType::f32, opt_json(R"("do_layer_norm_before": false, )"));
  folder.save(StoredDType::f32);
  const StoredWeights stored = StoredWeights::of_folder(folder.path());
  const Weights& w = folder.model.weights;
  const auto same = [&](const char* name, const Tensor& ours) {
    std::vector<float> values(ours.elements());
    folder.model.backend->download(values.data(), ours);
    const StoredTensor* theirs = stored.find(std::string("model.decoder.") + name);
    REQUIRE(theirs);
    CHECK(std::ranges::equal(theirs->data, std::as_bytes(std::span(values))));
  };
  same("layers.0.self_attn_layer_norm.weight", w.layers[0].mlp_norm);
  same("layers.0.final_layer_norm.weight", w.layers[1].attention_norm);
  same("layers.1.final_layer_norm.bias", w.layers[2].attention_norm_bias);
  same("layers.2.final_layer_norm.weight", w.final_norm);
  CHECK(!w.layers[0].attention_norm);

  const std::string before = folder.model.bytes();
  folder.rewrite([](auto& items) {
    for (auto& i : items) i.name = i.name.substr(std::string("model.").size());
  });
  folder.model.fill(2);
  load_weights(folder.path(), folder.model.config, folder.model.weights, *folder.model.backend);
  CHECK(folder.model.bytes() == before);
}

TEST_CASE("families: the part of a key bias that no rotation turns gets no gradient") {
  TinyModel model(odd_phi_config(), DType::f32, make_cpu_backend(2));
  const MemoryPairs rows(awkward_rows(37));
  model.run(rows, 1 << 20, HeadSettings{});
  const std::vector<double> bias = model.get(model.gradients.layers[0].qkv_bias);
  for (int64_t i = 0; i < 40; ++i) CHECK((bias[i] == 0) == (i >= 24 && i < 30));  // 20 of queries, 4 rotated
}

TEST_CASE("families: planned is used, to the byte") {
  for (const Config& config : odd_family_configs())
    for (const bool recompute : {false, true}) {
      CAPTURE(config.family);
      PlanRequest r;
      r.config = config, r.micro_tokens = 60, r.largest_pair_rows = 27, r.step_pairs = 6, r.recompute = recompute;
      const MemoryPlan plan = make_plan(r, int64_t{1} << 30);
      const auto backend = make_cpu_backend(2);
      Arena state("state", *backend, plan.state_bytes), scratch("scratch", *backend, plan.scratch_bytes);
      DeviceModel model{r.config, r.dtype,  TrainingTensors::allocate(r.config, r.dtype, state), r.head, *backend,
                        scratch,  recompute};
      CHECK(state.used() == plan.state_bytes);
      draw_weights(model, 1);
      const Batch batch = largest_batch(plan.limits, true);
      StepNumbers numbers(model, batch.pairs());
      MicroBatch micro(model, batch);
      micro.forward(), micro.head({1, 1}, numbers.next(batch.pairs())), micro.backward();
      CHECK(scratch.high_water() == plan.scratch_bytes);
    }
}

TEST_CASE("families: a run trains, saves, resumes bit for bit and evaluates") {
  for (const std::string name : {"mistral", "llama3", "qwen2", "phi", "opt", "opt_350m"}) {
    CAPTURE(name);
    const TemporaryFolder folder;
    const std::string model = "tests/fixtures/reference_" + name, rows = model + "/rows.jsonl";
    const auto train = [&](const char* out, std::vector<std::string> more) {
      std::vector<std::string> words{
          "--model",       model, "--data",          rows,    "--output",  folder.path() / out,
          "--batch-pairs", "4",   "--learning-rate", "0.003", "--threads", "2",
          "--epochs",      "3"};
      words.insert(words.end(), more.begin(), more.end());
      const Outcome outcome = run("orpo_train", words, folder.path());
      REQUIRE_MESSAGE(outcome.status == 0, outcome.err);
    };
    train("straight", {"--save-every", "4", "--keep", "9"});
    train("resumed", {"--resume", folder.path() / "straight/checkpoint-4"});
    CHECK(text_of(folder.path() / "straight/model.safetensors") ==
          text_of(folder.path() / "resumed/model.safetensors"));
    const std::vector<Json> steps = metrics_of(folder.path() / "straight");
    CHECK(steps.back().at("loss").get<double>() < steps[0].at("loss").get<double>());
    const Outcome eval = run("orpo_eval", {"--model", folder.path() / "straight", "--data", rows}, folder.path());
    CHECK_MESSAGE(eval.status == 0, eval.err);
  }
}

}  // namespace orpo::test
