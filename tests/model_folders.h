// Tiny Llama folders written by the tests that read them.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "src/arena.h"
#include "src/backend.h"
#include "src/family.h"
#include "src/files.h"
#include "src/json.h"
#include "src/model.h"
#include "src/model_folder.h"
#include "src/rng.h"
#include "src/safetensors.h"
#include "tests/temporary_folder.h"

namespace orpo::test {

// A config.json of 2 layers with biases, grouped queries and heads of odd count; `more` are further fields, each ending
// in a comma.
inline std::string llama_json(const std::string& more = "") {
  return "{" + more +
         R"("architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 37, "hidden_size": 12,
    "intermediate_size": 17, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6,
    "attention_bias": true, "mlp_bias": true, "max_position_embeddings": 64, "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16"})";
}

// Weights on a CPU backend, filled from a seed with values of about 0.1 that bf16 cannot hold.
class FilledWeights {
 public:
  FilledWeights(const Config& config, DType dtype, uint32_t seed, int threads = 2)
      : config(config),
        backend(make_cpu_backend(threads)),
        memory("weights", *backend, config.parameters() * dtype_bytes(dtype) + (1 << 14)),
        weights(Weights::allocate(config, dtype, memory)) {
    fill(seed);
  }
  void fill(uint32_t seed) {
    uint32_t number = seed * 1000;
    for (const Parameter& p : parameters(config, weights)) {
      const Random random(1, RandomStream::test, number++);
      std::vector<float> values(p.tensor.elements());
      for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(0.1 * random.normal(i));
      set(p.tensor, values);
    }
  }
  void set(const Tensor& t, const std::vector<float>& values) {
    const auto upload_as = [&](auto zero) {
      std::vector<decltype(zero)> typed(values.begin(), values.end());
      backend->upload(t, typed.data());
    };
    if (t.dtype == DType::f32) upload_as(float());
    if (t.dtype == DType::bf16) upload_as(bf16());
    if (t.dtype == DType::f64) upload_as(double());
  }
  // Everything, parameter after parameter, as it lies in memory.
  std::string bytes() const {
    std::string all;
    for (const Parameter& p : parameters(config, weights)) {
      std::string part(p.tensor.bytes(), '\0');
      backend->download(part.data(), p.tensor);
      all += part;
    }
    return all;
  }

  Config config;
  std::unique_ptr<Backend> backend;
  Arena memory;
  Weights weights;
};

// The one line that body() ends with.
template <class Error>
std::string error_line(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& e) {
    return e.what();
  }
  FAIL("no error");
  return "";
}

inline bool holds(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// A folder with such a model in it, and the errors of reading it back.
struct TinyFolder {
  explicit TinyFolder(DType dtype = DType::f32, const std::string& json = llama_json())
      : description(parse_model_config(json, "config.json")), model(description.config, dtype, 1) {
    write_file(folder.path() / "config.json", json);
  }
  void save(StoredDType dtype, int64_t shard_bytes = 1 << 30) {
    save_weights(path(), model.config, model.weights, dtype, *model.backend, shard_bytes);
  }
  std::string load_error() {
    return error_line<UserError>([&] { load_weights(path(), model.config, model.weights, *model.backend); });
  }
  const std::filesystem::path& path() const { return folder.path(); }
  std::string file(const char* name = "model.safetensors") const { return (path() / name).string(); }

  // Writes the folder's tensors again, as the function leaves them.
  struct Item {
    std::string name, dtype;
    std::vector<int64_t> shape;
    std::string data;
  };
  void rewrite(const std::function<void(std::vector<Item>&)>& change, const char* name = "model.safetensors") {
    std::vector<Item> items;
    {
      const StoredWeights stored = StoredWeights::of_file(file(name));
      for (const StoredTensor& t : stored.tensors())
        items.push_back(
            {t.name, t.dtype_text, t.shape, std::string(reinterpret_cast<const char*>(t.data.data()), t.data.size())});
    }
    change(items);
    Json header;
    std::string data;
    for (const Item& i : items) {
      header[i.name] = {
          {"dtype", i.dtype}, {"shape", i.shape}, {"data_offsets", {data.size(), data.size() + i.data.size()}}};
      data += i.data;
    }
    const std::string text = header.dump();
    const uint64_t length = text.size();
    write_file(file(name), std::string(reinterpret_cast<const char*>(&length), 8) + text + data);
  }

  TemporaryFolder folder;
  ModelDescription description;
  FilledWeights model;
};

inline TinyFolder::Item& item(std::vector<TinyFolder::Item>& items, const std::string& name) {
  return *std::find_if(items.begin(), items.end(), [&](const auto& i) { return i.name == name; });
}

}  // namespace orpo::test
