// The GPT-2 family: config.json field by field, names and layouts of its tensors, what it starts from, a run.
#include <cmath>
#include <cstring>

#include "src/trainer.h"
#include "tests/model_folders.h"
#include "tests/programs.h"
#include "tests/tiny_model.h"

namespace orpo::test {
namespace {

std::string gpt2_json(const std::string& more = "") {
  return "{" + more +
         R"("architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 37, "n_embd": 15, "n_layer": 2,
    "n_head": 3, "n_positions": 33, "n_ctx": 33, "n_inner": 17, "torch_dtype": "float32"})";
}
ModelDescription parse(const std::string& json) { return parse_model_config(json, "config.json"); }
Config with(const std::string& field) { return parse(gpt2_json(field)).config; }
std::string refusal(const std::string& field) {
  return error_line<UserError>([&] { with(field); });
}

std::vector<float> floats(const StoredTensor* t) {
  REQUIRE(t != nullptr);
  std::vector<float> values(t->data.size() / 4);
  std::memcpy(values.data(), t->data.data(), t->data.size());
  return values;
}
std::vector<float> floats(const Tensor& t, Backend& backend) {
  std::vector<float> values(t.elements());
  backend.download(values.data(), t);
  return values;
}

void load(TinyFolder& folder) {
  load_weights(folder.path(), folder.model.config, folder.model.weights, *folder.model.backend);
}

TEST_CASE("gpt2: sizes, flags and transformers' defaults") {
  const Config c = with("");
  CHECK(std::vector<int64_t>{c.vocab, c.width, c.intermediate, c.layers, c.heads, c.kv_heads, c.head_dim,
                             c.max_positions} == std::vector<int64_t>{37, 15, 17, 2, 3, 3, 5, 33});
  CHECK(c.norm == Norm::layer);
  CHECK(c.norm_epsilon == 1e-5);
  CHECK(c.position == Position::learned);
  CHECK(c.activation == Activation::gelu_tanh);
  CHECK((c.qkv_bias && c.attention_output_bias && c.mlp_bias && c.tied_embeddings && c.scaled_residual_init));
  CHECK(c.attention_shape(1).scale == doctest::Approx(1 / std::sqrt(5.0)));
  CHECK(c.parameters() == 37 * 15 + 33 * 15 + 2 * (4 * 15 + 15 * 45 + 45 + 15 * 15 + 15 + 2 * 15 * 17 + 17 + 15) + 30);
}

TEST_CASE("gpt2: every field that changes the result is computed or refused by name") {
  CHECK(parse(R"({"model_type": "gpt2", "vocab_size": 8, "n_embd": 6, "n_layer": 1, "n_head": 2, "n_inner": null})")
            .config.intermediate == 24);
  CHECK(with(R"("activation_function": "gelu", )").activation == Activation::gelu);
  CHECK(with(R"("activation_function": "gelu_pytorch_tanh", )").activation == Activation::gelu_tanh);
  CHECK(with(R"("activation_function": "relu", )").activation == Activation::relu);
  CHECK(refusal(R"("activation_function": "silu", )") ==
        "config.json: activation_function \"silu\" is not supported; this trainer computes gelu, gelu_fast, gelu_new, "
        "gelu_python, gelu_pytorch_tanh, relu");
  CHECK(with(R"("scale_attn_weights": false, )").attention_shape(1).scale == 1);
  CHECK(with(R"("scale_attn_by_inverse_layer_idx": true, )").attention_shape(1).scale ==
        doctest::Approx(0.5 / std::sqrt(5.0)));
  CHECK(with(R"("layer_norm_epsilon": 0.001, )").norm_epsilon == 0.001);
  CHECK(!with(R"("tie_word_embeddings": false, )").tied_embeddings);
  CHECK_NOTHROW(with(R"("reorder_and_upcast_attn": true, )"));  // scores are fp32 in any case
  CHECK(with(R"("pad_token_id": 5, )").padding_token == -1);    // its embedding takes its gradient
  CHECK(holds(refusal(R"("add_cross_attention": true, )"), "add_cross_attention true is not supported"));
  CHECK(holds(refusal(R"("num_key_value_heads": 1, )"), "the field num_key_value_heads (1) is not known"));
  CHECK(parse(gpt2_json(R"("resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.0, )")).notes ==
        std::vector<std::string>{"resid_pdrop 0.1 is taken as 0", "embd_pdrop 0.1 is taken as 0"});
  // What the published files say besides.
  CHECK_NOTHROW(with(R"("summary_type": "cls_index", "summary_use_proj": true, "summary_activation": null,
    "summary_proj_to_labels": true, "summary_first_dropout": 0.1, "n_special": 0, "predict_special_tokens": true,
    "gradient_checkpointing": false, "initializer_range": 0.02, "bos_token_id": 50256, "_num_labels": 1,
    "task_specific_params": {"text-generation": {"do_sample": true}}, )"));
  CHECK(holds(error_line<UserError>([] {
                parse(R"({"model_type": "gpt2", "vocab_size": 8, "n_embd": 10, "n_layer": 1, "n_head": 3})");
              }),
              "n_embd 10 is no multiple of n_head 3"));
}

TEST_CASE("gpt2: Conv1D matrices are stored [in, out], and come back as they went") {
  for (const DType device : {DType::f32, DType::bf16, DType::f64})
    for (const StoredDType stored : {StoredDType::f32, StoredDType::bf16}) {
      TinyFolder folder(device, gpt2_json());
      folder.save(stored);
      load(folder);  // rounded once
      const std::string before = folder.model.bytes();
      folder.save(stored);
      folder.model.fill(2);
      REQUIRE(folder.model.bytes() != before);
      load(folder);
      CHECK(folder.model.bytes() == before);
    }

  TinyFolder folder(DType::f32, gpt2_json());
  folder.save(StoredDType::f32);
  const StoredWeights stored = StoredWeights::of_folder(folder.path());
  CHECK(stored.tensors().size() == 2 + 2 * 12 + 2);
  const std::string layer = "transformer.h.1.";
  CHECK(stored.find(layer + "attn.c_attn.weight")->shape == std::vector<int64_t>{15, 45});
  CHECK(stored.find(layer + "mlp.c_fc.weight")->shape == std::vector<int64_t>{15, 17});
  CHECK(stored.find(layer + "mlp.c_proj.weight")->shape == std::vector<int64_t>{17, 15});
  CHECK(stored.find("transformer.wpe.weight")->shape == std::vector<int64_t>{33, 15});
  CHECK(!stored.find("lm_head.weight"));
  const auto theirs = floats(stored.find(layer + "attn.c_attn.weight")),
             ours = floats(folder.model.weights.layers[1].qkv, *folder.model.backend);
  for (int64_t in = 0; in < 15; ++in)
    for (int64_t out = 0; out < 45; ++out) CHECK(theirs[in * 45 + out] == ours[out * 15 + in]);
}

TEST_CASE("gpt2: the bare decoder's names and older folders' buffers are read; what is written has the full names") {
  TinyFolder folder(DType::f32, gpt2_json());
  folder.save(StoredDType::f32);
  const std::string before = folder.model.bytes();
  folder.rewrite([](auto& items) {
    for (auto& i : items) i.name = i.name.substr(std::string("transformer.").size());
    items.push_back({"h.0.attn.bias", "U8", {1, 1, 2, 2}, "1234"});
    items.push_back({"h.0.attn.masked_bias", "F32", {}, "1234"});
    TinyFolder::Item output = item(items, "wte.weight");
    output.name = "lm_head.weight";
    items.push_back(output);
  });
  folder.model.fill(2);
  load(folder);
  CHECK(folder.model.bytes() == before);
  CHECK(stored_dtype(folder.path(), folder.description) == StoredDType::f32);
  folder.rewrite([](auto& items) { item(items, "lm_head.weight").data[5] ^= 1; });
  CHECK(holds(folder.load_error(), "'lm_head.weight' differs from 'wte.weight'"));
  folder.rewrite([](auto& items) {
    std::erase_if(items, [](const auto& i) { return i.name == "lm_head.weight"; });
    item(items, "h.1.mlp.c_fc.weight").shape = {17, 15};
  });
  CHECK(holds(folder.load_error(), "tensor 'h.1.mlp.c_fc.weight' has shape [17,15]; config.json asks for [15,17]"));
  folder.save(StoredDType::f32);
  CHECK(StoredWeights::of_folder(folder.path()).find("transformer.h.0.ln_1.bias"));
}

TEST_CASE("gpt2: new weights as transformers draws them: what writes to the stream smaller, norms 1, biases 0") {
  Config config = odd_gpt2_config();
  config.width = 48, config.head_dim = 16, config.intermediate = 90, config.initializer_range = 0.5;
  const auto backend = make_cpu_backend(2);
  Arena state("state", *backend, int64_t{1} << 20), scratch("scratch", *backend, 64);
  DeviceModel model{config, DType::f32, TrainingTensors::allocate_weights(config, DType::f32, state), {}, *backend,
                    scratch};
  draw_weights(model, 3);
  const Weights& w = model.tensors.weights;
  const LayerWeights& layer = w.layers[1];
  const auto deviation = [&](const Tensor& t) {
    double squares = 0;
    for (const float v : floats(t, *backend)) squares += v * v;
    return std::sqrt(squares / static_cast<double>(t.elements()));
  };
  for (const Tensor& t : {w.embedding, w.positions, layer.qkv, layer.gate_up})
    CHECK(deviation(t) == doctest::Approx(0.5).epsilon(0.06));
  for (const Tensor& t : {layer.attention_output, layer.down})
    CHECK(deviation(t) == doctest::Approx(0.25).epsilon(0.06));
  for (const float v : floats(layer.mlp_norm, *backend)) CHECK(v == 1);
  for (const Tensor& t :
       {layer.attention_norm_bias, layer.mlp_norm_bias, w.final_norm_bias, layer.qkv_bias, layer.down_bias})
    for (const float v : floats(t, *backend)) CHECK(v == 0);
}

TEST_CASE("gpt2: a key bias gets no gradient, a position beyond the rows neither; the first step's check is content") {
  TinyModel model(odd_gpt2_config(), DType::f32, make_cpu_backend(2));
  const MemoryPairs rows(awkward_rows(37));
  model.run(rows, 1 << 20, HeadSettings{});
  const Config& c = model.config;
  const std::vector<double> bias = model.get(model.gradients.layers[0].qkv_bias),
                            positions = model.get(model.gradients.positions);
  for (int64_t i = 0; i < 45; ++i) CHECK((bias[i] == 0) == (i >= 15 && i < 30));
  for (int64_t p = 0; p < c.max_positions; ++p) {  // the longest row has 26 tokens, its last predicts nothing
    double most = 0;
    for (int64_t i = 0; i < c.width; ++i) most = std::max(most, std::abs(positions[p * c.width + i]));
    CHECK((most > 0) == (p < 25));
  }
}

TEST_CASE("gpt2: a run trains, saves, resumes bit for bit and evaluates; from random weights too") {
  const TemporaryFolder folder;
  const auto train = [&](const char* out, std::vector<std::string> more) {
    std::vector<std::string> words{"--model",           "tests/fixtures/reference_gpt2",
                                   "--data",            "tests/fixtures/reference_gpt2/rows.jsonl",
                                   "--output",          folder.path() / out,
                                   "--batch-pairs",     "4",
                                   "--learning-rate",   "0.003",
                                   "--threads",         "2",
                                   "--epochs",          "5"};
    words.insert(words.end(), more.begin(), more.end());
    const Outcome outcome = run("orpo_train", words, folder.path());
    REQUIRE_MESSAGE(outcome.status == 0, outcome.err);
  };
  train("straight", {"--save-every", "4", "--keep", "9"});
  train("resumed", {"--resume", folder.path() / "straight/checkpoint-4"});
  CHECK(text_of(folder.path() / "straight/model.safetensors") == text_of(folder.path() / "resumed/model.safetensors"));
  train("sft", {"--objective", "sft", "--dtype", "fp32"});
  train("random", {"--init", "random"});
  for (const char* out : {"straight", "sft", "random"}) {
    const std::vector<Json> steps = metrics_of(folder.path() / out);
    CHECK(steps.back().at("loss").get<double>() < 0.95 * steps[0].at("loss").get<double>());
    const Outcome eval = run("orpo_eval",
                             {"--model", folder.path() / out, "--data", "tests/fixtures/reference_gpt2/rows.jsonl"},
                             folder.path());
    CHECK_MESSAGE(eval.status == 0, eval.err);
  }
}

}  // namespace
}  // namespace orpo::test
