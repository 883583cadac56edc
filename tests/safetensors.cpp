// Safetensors: headers, dtypes, shards, and one telling line for each broken folder.
#include "src/safetensors.h"

#include <cmath>
#include <cstring>

#include "src/fail.h"
#include "src/json.h"
#include "src/model_folder.h"
#include "src/stored_values.h"
#include "tests/model_folders.h"
#include "tests/temporary_folder.h"

using namespace orpo;
using namespace orpo::test;
namespace fs = std::filesystem;

namespace {

// A file with this header and so many bytes of data.
std::string file_text(const std::string& header, size_t data_bytes) {
  const uint64_t length = header.size();
  std::string text(reinterpret_cast<const char*>(&length), 8);
  text += header;
  for (size_t i = 0; i < data_bytes; ++i) text += static_cast<char>(i + 1);
  return text;
}
std::string refusal(const std::string& text) {
  return error_line<UserError>([&] { parse_safetensors(bytes_of(text), "x.safetensors"); });
}
std::string refusal(const std::string& header, size_t data_bytes) { return refusal(file_text(header, data_bytes)); }

}  // namespace

TEST_CASE("safetensors: a header is read with its dtypes, shapes and bytes") {
  const std::string text = file_text(
      R"({"__metadata__": {"format": "pt"}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [6, 14]}, "a": {"dtype": "BF16", "shape": [3, 1], "data_offsets": [0, 6]},
          "empty": {"dtype": "I64", "shape": [0, 4], "data_offsets": [6, 6]}}   )",
      14);
  const std::vector<StoredTensor> tensors = parse_safetensors(bytes_of(text), "x.safetensors");
  REQUIRE(tensors.size() == 3);
  CHECK(tensors[0].name == "a");
  CHECK(tensors[0].shape == std::vector<int64_t>{3, 1});
  CHECK(tensors[0].dtype == StoredDType::bf16);
  CHECK(tensors[0].data[0] == std::byte{1});
  CHECK(tensors[1].name == "empty");
  CHECK(!tensors[1].dtype);
  CHECK(tensors[2].name == "b");
  CHECK(tensors[2].data[0] == std::byte{7});
  CHECK(tensors[2].elements() == 2);
}

TEST_CASE("safetensors: a header that does not fit its file") {
  CHECK(refusal("1234567") == "x.safetensors: 7 bytes are no safetensors file; fetch it again");
  CHECK(refusal(std::string(8, '\xff') + "{}") ==
        "x.safetensors: is no safetensors file (a header of 18446744073709551615 bytes)");
  CHECK(refusal(file_text("{}", 0).substr(0, 9)) ==
        "x.safetensors: its header of 2 bytes does not fit the 9 bytes of the file: it is truncated; fetch it again");
  CHECK(refusal("[]", 0) == "x.safetensors: its header is no JSON object");
  CHECK(holds(refusal("{\"a\"", 0), "x.safetensors (header): is not valid JSON"));
  const auto entry = [](const std::string& fields) { return "{\"a\": {" + fields + "}}"; };
  CHECK(refusal(entry(R"("dtype": "F32", "shape": [1])"), 4) ==
        "x.safetensors: tensor 'a' lacks its dtype, shape or data_offsets");
  CHECK(refusal(entry(R"("dtype": "F33", "shape": [1], "data_offsets": [0, 4])"), 4) ==
        "x.safetensors: tensor 'a' has the dtype \"F33\", which is none of the format's");
  CHECK(refusal(entry(R"("dtype": "F32", "shape": [2], "data_offsets": [0, 8])"), 4) ==
        "x.safetensors: tensor 'a' ends at byte 8 of the data, but the file holds 4: it is truncated; fetch it again");
  CHECK(refusal(entry(R"("dtype": "F32", "shape": [2], "data_offsets": [0, 4])"), 4) ==
        "x.safetensors: tensor 'a' of shape [2] F32 takes 8 bytes, but its data_offsets hold 4");
  CHECK(holds(refusal(entry(R"("dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 4])"), 4),
              "takes far too many bytes"));
  CHECK(holds(refusal(entry(R"("dtype": "F32", "shape": [-1], "data_offsets": [0, 4])"), 4), "has -1 in its shape"));
  CHECK(holds(refusal(entry(R"("dtype": "F32", "shape": [1], "data_offsets": [4, 0])"), 4), "before it begins"));
  CHECK(holds(refusal(entry(R"("dtype": "F32", "shape": [1], "data_offsets": [0, 18446744073709551615])"), 4),
              "not two byte counts"));
  const auto pair = [](const std::string& a, const std::string& b) {
    return R"({"a": {"dtype": "U8", "shape": [2], "data_offsets": )" + a +
           R"(}, "b": {"dtype": "U8", "shape": [2], "data_offsets": )" + b + "}}";
  };
  CHECK(refusal(pair("[0, 2]", "[1, 3]"), 3) ==
        "x.safetensors: tensor 'b' begins at byte 1 of the data, inside the tensor before it, which ends at 2");
  CHECK(refusal(pair("[0, 2]", "[3, 5]"), 5) ==
        "x.safetensors: tensor 'b' begins at byte 3 of the data, after a gap that starts at 2");
  CHECK(refusal(pair("[0, 2]", "[2, 4]"), 6) ==
        "x.safetensors: 2 bytes follow its last tensor; it is not what its header says");
  CHECK(holds(
      refusal(
          R"({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})",
          0),
      "the key 'a' is given twice"));
}

TEST_CASE("safetensors: half precision is IEEE's, to nearest even") {
  for (const auto& [value, bits] : std::vector<std::pair<float, uint16_t>>{{0.f, 0},
                                                                           {-0.f, 0x8000},
                                                                           {1.f, 0x3c00},
                                                                           {-2.f, 0xc000},
                                                                           {65504.f, 0x7bff},
                                                                           {65519.f, 0x7bff},
                                                                           {65520.f, 0x7c00},
                                                                           {0x1p-14f, 0x0400},
                                                                           {0x1p-24f, 0x0001},
                                                                           {0x1p-25f, 0x0000},
                                                                           {0x1.8p-25f, 0x0001},
                                                                           {0x1.ff8p-15f, 0x03ff},
                                                                           {0x1.ffcp-15f, 0x0400},
                                                                           {1 + 0x1p-11f, 0x3c00},
                                                                           {1 + 0x3p-11f, 0x3c02},
                                                                           {INFINITY, 0x7c00},
                                                                           {-INFINITY, 0xfc00},
                                                                           {0.1f, 0x2e66},
                                                                           {1e-9f, 0}}) {
    CAPTURE(value);
    CHECK(f16(value).bits == bits);
  }
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    f16 half;
    half.bits = static_cast<uint16_t>(bits);
    const float value = half;
    const bool is_nan = (bits & 0x7fff) > 0x7c00;
    if (std::isnan(value) != is_nan || (!is_nan && f16(value).bits != bits))
      FAIL("half " << bits << " becomes " << value);
  }
  CHECK(std::isnan(static_cast<float>(f16(NAN))));
}

TEST_CASE("safetensors: weights come back as they went, rounded once") {
  for (const DType device : {DType::f32, DType::bf16, DType::f64})
    for (const StoredDType stored : {StoredDType::f32, StoredDType::bf16, StoredDType::f16})
      for (const int64_t shard_bytes : {int64_t{1} << 30, int64_t{1500}}) {
        CAPTURE(dtype_name(device));
        CAPTURE(stored_dtype_name(stored));
        TinyFolder folder(device);
        const std::string before = folder.model.bytes();
        folder.save(stored, shard_bytes);
        CHECK(fs::exists(folder.path() / "model.safetensors.index.json") == (shard_bytes == 1500));
        CHECK(fs::exists(folder.path() / "model.safetensors") == (shard_bytes != 1500));
        folder.model.fill(2);
        REQUIRE(folder.model.bytes() != before);
        CHECK(load_weights(folder.path(), folder.model.config, folder.model.weights, *folder.model.backend) == stored);
        CHECK(stored_dtype(folder.path(), folder.description) == stored);
        const bool exact = device != DType::f64 &&
                           (stored == StoredDType::f32 || (device == DType::bf16 && stored == StoredDType::bf16));
        if (exact) CHECK(folder.model.bytes() == before);
        const std::string once = folder.model.bytes();
        folder.save(stored, shard_bytes);  // what was rounded once is not rounded again
        folder.model.fill(3);
        load_weights(folder.path(), folder.model.config, folder.model.weights, *folder.model.backend);
        if (device != DType::bf16 || stored != StoredDType::f16) CHECK(folder.model.bytes() == once);
      }
}

TEST_CASE("safetensors: saved values are the nearest of the dtype") {
  TinyFolder folder;
  std::vector<float> values(37 * 12);
  folder.model.backend->download(values.data(), folder.model.weights.embedding);
  const auto expect = [&](StoredDType dtype, auto zero) {
    using T = decltype(zero);
    folder.save(dtype);
    const StoredWeights stored = StoredWeights::of_folder(folder.path());
    std::vector<T> saved(values.size());
    std::memcpy(saved.data(), stored.find("model.embed_tokens.weight")->data.data(), saved.size() * sizeof(T));
    double furthest = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      CHECK(static_cast<float>(saved[i]) == static_cast<float>(T(values[i])));
      furthest = std::max(furthest, std::abs(static_cast<double>(static_cast<float>(saved[i])) / values[i] - 1));
    }
    return furthest;
  };
  CHECK(expect(StoredDType::f32, float()) == 0);
  const double bf16_error = expect(StoredDType::bf16, bf16()), f16_error = expect(StoredDType::f16, f16());
  CHECK(bf16_error > 0x1p-10);
  CHECK(bf16_error <= 0x1p-8);  // half a unit in the last of 8 places
  CHECK(f16_error > 0x1p-13);
}

TEST_CASE("safetensors: our fused tensors hold Hugging Face's parts along out") {
  TinyFolder folder;
  const Config& c = folder.model.config;
  const LayerWeights& layer = folder.model.weights.layers[1];
  folder.save(StoredDType::f32);
  const StoredWeights stored = StoredWeights::of_folder(folder.path());
  const auto same = [&](const std::string& name, const Tensor& ours) {
    const StoredTensor* t = stored.find("model.layers.1." + name);
    REQUIRE(t);
    std::vector<std::byte> bytes(ours.bytes());
    folder.model.backend->download(bytes.data(), ours);
    return bytes.size() == t->data.size() && std::memcmp(bytes.data(), t->data.data(), bytes.size()) == 0;
  };
  CHECK(same("self_attn.q_proj.weight", layer.qkv.slice(0, 18)));
  CHECK(same("self_attn.k_proj.weight", layer.qkv.slice(18, 6)));
  CHECK(same("self_attn.v_proj.weight", layer.qkv.slice(24, 6)));
  CHECK(same("self_attn.v_proj.bias", layer.qkv_bias.slice(24, 6)));
  CHECK(same("mlp.gate_proj.weight", layer.gate_up.slice(0, c.intermediate)));
  CHECK(same("mlp.up_proj.weight", layer.gate_up.slice(c.intermediate, c.intermediate)));
  CHECK(same("self_attn.o_proj.weight", layer.attention_output));
  CHECK(same("mlp.down_proj.bias", layer.down_bias));
  CHECK(same("post_attention_layernorm.weight", layer.mlp_norm));
  CHECK(stored.find("lm_head.weight")->shape == std::vector<int64_t>{37, 12});
  CHECK(stored.find("model.embed_tokens.weight")->data.size() == 37 * 12 * 4);
  CHECK(reinterpret_cast<uintptr_t>(parse_safetensors(MappedFile(folder.file()).bytes(), "x")[0].data.data()) % 64 ==
        0);
}

TEST_CASE("safetensors: five broken model folders, one telling line each") {
  TinyFolder folder;
  folder.save(StoredDType::bf16);
  const std::string place = folder.path().string(), file = folder.file(), layer = "model.layers.1.";

  SUBCASE("truncated") {
    fs::resize_file(file, fs::file_size(file) - 100);
    CHECK(folder.load_error() == file +
                                     ": tensor 'lm_head.weight' ends at byte 7000 of the data, but the file holds "
                                     "6900: it is truncated; fetch it again");
    fs::resize_file(file, 100);
    CHECK(holds(folder.load_error(), "it is truncated; fetch it again"));
  }
  SUBCASE("wrong shape") {
    folder.rewrite([&](auto& items) { item(items, layer + "mlp.up_proj.weight").shape = {12, 17}; });
    CHECK(folder.load_error() ==
          file + ": tensor 'model.layers.1.mlp.up_proj.weight' has shape [12,17]; config.json asks for [17,12]");
  }
  SUBCASE("missing tensors") {
    folder.rewrite(
        [&](auto& items) { std::erase_if(items, [&](const auto& i) { return i.name.starts_with(layer + "mlp."); }); });
    CHECK(folder.load_error() ==
          place +
              ": tensor 'model.layers.1.mlp.gate_proj.weight' [17,12] is missing (and 5 more tensors); "
              "config.json describes 2 layers of the llama family");
  }
  SUBCASE("unknown architecture") {
    write_file(folder.path() / "config.json",
               R"({"architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": 37})");
    CHECK(error_line<UserError>([&] { read_model_config(folder.path()); }) ==
          place +
              "/config.json: architecture \"MambaForCausalLM\" (model_type \"mamba\") is not supported; this trainer "
              "knows LlamaForCausalLM (model_type llama), MistralForCausalLM (model_type mistral), Qwen2ForCausalLM "
              "(model_type qwen2), PhiForCausalLM (model_type phi), OPTForCausalLM (model_type opt), GPT2LMHeadModel "
              "(model_type gpt2)");
  }
  SUBCASE("wrong dtype") {
    folder.rewrite([&](auto& items) {
      TinyFolder::Item& norm = item(items, "model.norm.weight");
      norm.dtype = "I16";
    });
    CHECK(folder.load_error() == file + ": tensor 'model.norm.weight' is stored as I16; F32, BF16 and F16 can be read");
  }
}

TEST_CASE("safetensors: tensors without a place") {
  TinyFolder folder;
  folder.save(StoredDType::f32);
  const TinyFolder::Item frequencies{"model.layers.0.self_attn.rotary_emb.inv_freq", "F32", {1}, "1234"};
  folder.rewrite([&](auto& items) { items.push_back(frequencies); });
  CHECK_NOTHROW(load_weights(folder.path(), folder.model.config, folder.model.weights, *folder.model.backend));
  folder.rewrite([&](auto& items) {
    items.push_back({"model.layers.2.x", "F32", {1}, "1234"});
    items.push_back({"model.layers.3.x", "F32", {1}, "1234"});
  });
  CHECK(folder.load_error() ==
        folder.file() +
            ": tensor 'model.layers.2.x' [1] has no place in the model of config.json (2 layers of the llama family) "
            "(and 1 more unexpected tensors)");
}

TEST_CASE("safetensors: a tied output may be stored if it is the embedding") {
  TinyFolder folder(DType::f32, llama_json(R"("tie_word_embeddings": true, )"));
  folder.save(StoredDType::f32);
  const std::string before = folder.model.bytes();
  CHECK(!StoredWeights::of_folder(folder.path()).find("lm_head.weight"));
  folder.rewrite([](auto& items) {
    TinyFolder::Item output = item(items, "model.embed_tokens.weight");
    output.name = "lm_head.weight";
    items.push_back(output);
  });
  folder.model.fill(2);
  load_weights(folder.path(), folder.model.config, folder.model.weights, *folder.model.backend);
  CHECK(folder.model.bytes() == before);
  folder.rewrite([](auto& items) { item(items, "lm_head.weight").data[5] ^= 1; });
  CHECK(holds(folder.load_error(),
              "'lm_head.weight' differs from 'model.embed_tokens.weight', but config.json says that they are one"));
}

TEST_CASE("safetensors: a sharded folder agrees with its index") {
  TinyFolder folder;
  folder.save(StoredDType::f32, 6000);
  const fs::path index = folder.path() / "model.safetensors.index.json";
  const Json json = parse_json(read_file(index), "index");
  CHECK(json["metadata"]["total_size"] == folder.model.config.parameters() * 4);
  CHECK(json["weight_map"]["lm_head.weight"] == "model-00003-of-00003.safetensors");
  const std::string last = folder.file("model-00003-of-00003.safetensors");

  SUBCASE("missing shard") {
    fs::remove(last);
    CHECK(holds(folder.load_error(), last + ": this shard is missing; model.safetensors.index.json puts"));
  }
  SUBCASE("tensor in two shards") {
    folder.rewrite(
        [](auto& items) {
          items.push_back({"model.embed_tokens.weight", "F32", {1}, "1234"});
        },
        "model-00003-of-00003.safetensors");
    CHECK(holds(folder.load_error(), "tensor 'model.embed_tokens.weight' stands in model-0000"));
  }
  SUBCASE("tensor not where the index says") {
    folder.rewrite(
        [](auto& items) { std::erase_if(items, [](const auto& i) { return i.name == "model.norm.weight"; }); },
        "model-00003-of-00003.safetensors");
    CHECK(folder.load_error() ==
          last + ": tensor 'model.norm.weight' is missing; model.safetensors.index.json says that it is here");
  }
  SUBCASE("tensor that the index does not know") {
    folder.rewrite(
        [](auto& items) {
          items.push_back({"extra", "F32", {1}, "1234"});
        },
        "model-00003-of-00003.safetensors");
    CHECK(folder.load_error() == last + ": tensor 'extra' is not in model.safetensors.index.json");
  }
  SUBCASE("an index that leaves the folder") {
    write_file(index, R"({"weight_map": {"a": "../secret.safetensors"}})");
    CHECK(folder.load_error() == index.string() + ": weight_map gives tensor 'a' no file name of this folder");
  }
}

TEST_CASE("safetensors: a folder without weights says what it has") {
  TinyFolder folder;
  CHECK(folder.load_error() ==
        folder.path().string() + ": holds no model.safetensors and no model.safetensors.index.json");
  CHECK(stored_dtype(folder.path(), folder.description) == StoredDType::bf16);  // as config.json says
  write_file(folder.path() / "pytorch_model.bin", "x");
  CHECK(holds(folder.load_error(), "its pytorch_model.bin has to be converted first"));
}
