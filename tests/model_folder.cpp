// Model folders out: what is written, replaced, and left alone when a save fails.
#include "src/model_folder.h"

#include "src/fail.h"
#include "src/files.h"
#include "src/safetensors.h"
#include "tests/model_folders.h"
#include "tests/temporary_folder.h"

using namespace orpo;
using namespace orpo::test;
namespace fs = std::filesystem;

TEST_CASE("model_folder: values that fp16 cannot hold are not saved as infinity") {
  TinyFolder folder;
  folder.model.set(folder.model.weights.final_norm, std::vector<float>(12, 70000.f));
  CHECK(error_line<UserError>([&] { folder.save(StoredDType::f16); }) ==
        "tensor 'model.norm.weight' holds 70000, and fp16 ends at 65504; save with --save-dtype bf16 or fp32");
  CHECK_NOTHROW(folder.save(StoredDType::bf16));
}

TEST_CASE("model_folder: gradients are one fp32 file with Hugging Face's names") {
  TinyFolder folder;
  const fs::path file = folder.path() / "gradients.safetensors";
  save_gradients(file, folder.model.config, folder.model.weights, *folder.model.backend);
  const StoredWeights stored = StoredWeights::of_file(file);
  CHECK(stored.tensors().size() == tensor_places(folder.model.config).size());
  for (const StoredTensor& t : stored.tensors()) CHECK(t.dtype == StoredDType::f32);
  CHECK(std::distance(fs::directory_iterator(folder.path()), {}) == 2);  // config.json and the file
}

TEST_CASE("model_folder: a saved model folder has everything its source had, and replaces an older one") {
  TinyFolder source;
  source.save(StoredDType::bf16);
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                           "tokenizer.model", "vocab.json"})
    write_file(source.path() / name, std::string("content of ") + name);
  make_folder(source.path() / "additional_chat_templates");
  write_file(source.path() / "additional_chat_templates/tool_use.jinja", "x");
  for (const char* name : {"README.md", "optimizer.pt", ".hidden.model"})
    write_file(source.path() / name, "not the model's");

  TemporaryFolder out;
  write_file(out.path() / "model-00001-of-00002.safetensors", "of an older run");
  write_file(out.path() / "model.safetensors.index.json", "of an older run");
  write_file(out.path() / "metrics.jsonl", "of this run");
  save_model(out.path(), {source.path(), source.description, StoredDType::f32}, source.model.weights,
             *source.model.backend);

  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(out.path())) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  CHECK(names == std::vector<std::string>{"additional_chat_templates", "chat_template.jinja", "config.json",
                                          "generation_config.json", "metrics.jsonl", "model.safetensors",
                                          "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"});
  CHECK(read_file(out.path() / "tokenizer.model") == "content of tokenizer.model");
  CHECK(read_file(out.path() / "additional_chat_templates/tool_use.jinja") == "x");
  CHECK(read_model_config(out.path()).dtype == StoredDType::f32);
  const std::string before = source.model.bytes();
  source.model.fill(9);
  CHECK(load_weights(out.path(), source.model.config, source.model.weights, *source.model.backend) == StoredDType::f32);
  CHECK(source.model.bytes() == before);
}

TEST_CASE("model_folder: a save that fails leaves the folder as it was") {
  TinyFolder source;
  TemporaryFolder out;
  const ModelSource from{source.path(), source.description, StoredDType::bf16};
  save_model(out.path(), from, source.model.weights, *source.model.backend);
  const std::string before = read_file(out.path() / "model.safetensors");
  source.model.set(source.model.weights.final_norm, std::vector<float>(12, 70000.f));
  CHECK_THROWS_AS(save_model(out.path(), {source.path(), source.description, StoredDType::f16}, source.model.weights,
                             *source.model.backend),
                  UserError);
  CHECK(read_file(out.path() / "model.safetensors") == before);
  CHECK(std::distance(fs::directory_iterator(out.path()), {}) == 2);
}
