#include "tests/emulated.h"

#include "cuda/backend.h"
#include "cuda/emulator/stream.h"

namespace orpo::test {

namespace {

class EmulatedBackend final : public Backend {
 public:
  explicit EmulatedBackend(const emulator::Settings& settings) { emulator::settings = settings; }
  std::string name() const override { return "cuda-emulated"; }

  void* allocate(int64_t bytes) override { return gpu_.allocate(bytes); }
  void release(void* memory, int64_t bytes) override { gpu_.release(memory, bytes); }
  void upload(const Tensor& device, const void* host) override { gpu_.upload(device, host); }
  void download(void* host, const Tensor& device) override {
    gpu_.download(host, device);
    for (int64_t i = 0; i < device.bytes(); ++i)  // FNV-1a
      hash = (hash ^ static_cast<const unsigned char*>(host)[i]) * 0x100000001b3u;
  }
  void zero(const Tensor& x) override { gpu_.zero(x); }
  void synchronize() override { gpu_.synchronize(); }
  void embedding_forward(const Tensor& out, const Tensor& weight, const Tensor& tokens, const Tensor& position_weight,
                         const Tensor& positions) override {
    gpu_.embedding_forward(out, weight, tokens, position_weight, positions);
  }
  void embedding_backward(const Tensor& dweight, const Tensor& dposition_weight, const Tensor& dout,
                          const Tensor& tokens, const Tensor& positions, int64_t padding) override {
    gpu_.embedding_backward(dweight, dposition_weight, dout, tokens, positions, padding);
  }
  void linear_forward(const Tensor& out, const Tensor& in, const Tensor& weight, const Tensor& bias,
                      bool adds) override {
    gpu_.linear_forward(out, in, weight, bias, adds);
  }
  void linear_backward(const Tensor& din, const Tensor& dweight, const Tensor& dbias, const Tensor& dout,
                       const Tensor& in, const Tensor& weight, bool adds) override {
    gpu_.linear_backward(din, dweight, dbias, dout, in, weight, adds);
  }
  void norm_forward(const Tensor& out, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                    const Tensor& residual, const Tensor& branch, const Tensor& weight, const Tensor& bias,
                    double epsilon) override {
    gpu_.norm_forward(out, sum, mean, rstd, residual, branch, weight, bias, epsilon);
  }
  void norm_backward(const Tensor& dsum, const Tensor& dweight, const Tensor& dbias, const Tensor& out,
                     const Tensor& dout, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                     const Tensor& weight, const Tensor& bias) override {
    gpu_.norm_backward(dsum, dweight, dbias, out, dout, sum, mean, rstd, weight, bias);
  }
  void rope_forward(const Tensor& qkv, const Tensor& positions, const RopeShape& shape) override {
    gpu_.rope_forward(qkv, positions, shape);
  }
  void rope_backward(const Tensor& dqkv, const Tensor& positions, const RopeShape& shape) override {
    gpu_.rope_backward(dqkv, positions, shape);
  }
  void attention_forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, const DeviceBatch& batch,
                         const AttentionShape& shape) override {
    gpu_.attention_forward(out, lse, qkv, batch, shape);
  }
  void attention_backward(const Tensor& dqkv, const Tensor& dout, const Tensor& out, const Tensor& lse,
                          const Tensor& qkv, const DeviceBatch& batch, const AttentionShape& shape) override {
    gpu_.attention_backward(dqkv, dout, out, lse, qkv, batch, shape);
  }
  void keep_keys_values(const Tensor& keys, const Tensor& values, const Tensor& qkv, const Tensor& sequences,
                        const Tensor& positions, const AttentionShape& shape) override {
    gpu_.keep_keys_values(keys, values, qkv, sequences, positions, shape);
  }
  void attention_decode(const Tensor& out, const Tensor& qkv, const Tensor& keys, const Tensor& values,
                        const Tensor& sequences, const Tensor& positions, const AttentionShape& shape) override {
    gpu_.attention_decode(out, qkv, keys, values, sequences, positions, shape);
  }
  void activation_forward(const Tensor& out, const Tensor& gate_up, Activation activation) override {
    gpu_.activation_forward(out, gate_up, activation);
  }
  void activation_backward(const Tensor& dgate_up, const Tensor& out, const Tensor& dout, const Tensor& gate_up,
                           Activation activation) override {
    gpu_.activation_backward(dgate_up, out, dout, gate_up, activation);
  }
  void gather(const Tensor& out, const Tensor& in, const Tensor& target_rows) override {
    gpu_.gather(out, in, target_rows);
  }
  void scatter_add(const Tensor& dout, const Tensor& din, const Tensor& target_rows) override {
    gpu_.scatter_add(dout, din, target_rows);
  }
  void head_forward(const Tensor& logp, const Tensor& lse, const Tensor& logits, const Tensor& target_tokens) override {
    gpu_.head_forward(logp, lse, logits, target_tokens);
  }
  void preference(const Tensor& results, const Tensor& coefficient, const Tensor& logp, const Tensor& pair_targets,
                  Objective objective, double lambda, const Normalisers& normalisers,
                  bool nll_includes_prompt) override {
    gpu_.preference(results, coefficient, logp, pair_targets, objective, lambda, normalisers, nll_includes_prompt);
  }
  void head_backward(const Tensor& dlogits, const Tensor& logits, const Tensor& lse, const Tensor& logp,
                     const Tensor& coefficient, const Tensor& target_tokens) override {
    gpu_.head_backward(dlogits, logits, lse, logp, coefficient, target_tokens);
  }
  void sums_of_squares(const Tensor& sums, std::span<const Tensor> gradients) override {
    gpu_.sums_of_squares(sums, gradients);
  }
  void adamw(std::span<const AdamWTensors> list, const AdamW& settings) override { gpu_.adamw(list, settings); }

  uint64_t hash = 0xcbf29ce484222325u;

 private:
  CudaBackend gpu_;
};

}  // namespace

std::unique_ptr<Backend> make_emulated_backend(const emulator::Settings& settings) {
  emulator::restart_device();  // whatever failed before
  return std::make_unique<EmulatedBackend>(settings);
}

uint64_t downloaded(const Backend& backend) { return dynamic_cast<const EmulatedBackend&>(backend).hash; }

}  // namespace orpo::test
