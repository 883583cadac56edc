// The CPU backend: each room's file src/cpu/X.cpp holds X_forward then X_backward of this class.
#pragma once

#include <memory>

#include "src/backend.h"
#include "src/host_memory.h"

namespace orpo {

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(int threads);
  ~CpuBackend() override;
  std::string name() const override { return "cpu"; }

  void* allocate(int64_t bytes) override;
  bool allocates_zeros() const override { return true; }
  void release(void* memory, int64_t bytes) override;
  void upload(const Tensor& device, const void* host) override;
  void download(void* host, const Tensor& device) override;
  void zero(const Tensor& x) override;
  void synchronize() override {}
  int64_t free_memory() const override { return available_memory(); }
  int64_t peak_memory() const override { return peak_resident_bytes(); }
  void begin(int layer, Pass pass) override;

  void embedding_forward(const Tensor& out, const Tensor& weight, const Tensor& tokens, const Tensor& position_weight,
                         const Tensor& positions) override;
  void embedding_backward(const Tensor& dweight, const Tensor& dposition_weight, const Tensor& dout,
                          const Tensor& tokens, const Tensor& positions, int64_t padding) override;
  void linear_forward(const Tensor& out, const Tensor& in, const Tensor& weight, const Tensor& bias,
                      bool adds) override;
  void linear_backward(const Tensor& din, const Tensor& dweight, const Tensor& dbias, const Tensor& dout,
                       const Tensor& in, const Tensor& weight, bool adds) override;
  void norm_forward(const Tensor& out, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                    const Tensor& residual, const Tensor& branch, const Tensor& weight, const Tensor& bias,
                    double epsilon) override;
  void norm_backward(const Tensor& dsum, const Tensor& dweight, const Tensor& dbias, const Tensor& out,
                     const Tensor& dout, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                     const Tensor& weight, const Tensor& bias) override;
  void rope_forward(const Tensor& qkv, const Tensor& positions, const RopeShape& shape) override;
  void rope_backward(const Tensor& dqkv, const Tensor& positions, const RopeShape& shape) override;
  void attention_forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, const DeviceBatch& batch,
                         const AttentionShape& shape) override;
  void attention_backward(const Tensor& dqkv, const Tensor& dout, const Tensor& out, const Tensor& lse,
                          const Tensor& qkv, const DeviceBatch& batch, const AttentionShape& shape) override;
  void keep_keys_values(const Tensor& keys, const Tensor& values, const Tensor& qkv, const Tensor& sequences,
                        const Tensor& positions, const AttentionShape& shape) override;
  void attention_decode(const Tensor& out, const Tensor& qkv, const Tensor& keys, const Tensor& values,
                        const Tensor& sequences, const Tensor& positions, const AttentionShape& shape) override;
  void activation_forward(const Tensor& out, const Tensor& gate_up, Activation activation) override;
  void activation_backward(const Tensor& dgate_up, const Tensor& out, const Tensor& dout, const Tensor& gate_up,
                           Activation activation) override;
  void gather(const Tensor& out, const Tensor& in, const Tensor& target_rows) override;
  void scatter_add(const Tensor& dout, const Tensor& din, const Tensor& target_rows) override;
  void head_forward(const Tensor& logp, const Tensor& lse, const Tensor& logits, const Tensor& target_tokens) override;
  void preference(const Tensor& results, const Tensor& coefficient, const Tensor& logp, const Tensor& pair_targets,
                  Objective objective, double lambda, const Normalisers& normalisers,
                  bool nll_includes_prompt) override;
  void head_backward(const Tensor& dlogits, const Tensor& logits, const Tensor& lse, const Tensor& logp,
                     const Tensor& coefficient, const Tensor& target_tokens) override;
  void sums_of_squares(const Tensor& sums, std::span<const Tensor> gradients) override;
  void adamw(std::span<const AdamWTensors> list, const AdamW& settings) override;

 private:
  struct MatrixProducts;  // linear.cpp: oneDNN primitives by shape
  struct RotaryTables;    // rope.cpp: cosines and sines by position
  struct AttentionTiles;  // attention.cpp: memory for each thread's unpacked tiles, and dQ's sums
  struct DecodingChunks;  // attention_decode.cpp: what chunks of a sequence's positions gave
  std::shared_ptr<MatrixProducts> products_;
  std::shared_ptr<RotaryTables> tables_;
  std::shared_ptr<AttentionTiles> tiles_;
  std::shared_ptr<DecodingChunks> chunks_;
};

}  // namespace orpo
