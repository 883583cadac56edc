// The backend of the memory rehearsal: checks every shape as the real ones do, computes nothing, owns no memory.
#include <memory>

#include "src/backend.h"
#include "src/shapes.h"

namespace orpo {
namespace {

struct RehearsalBackend final : Backend {
  std::string name() const override { return "rehearsal"; }
  void* allocate(int64_t) override { fail_machine("the rehearsal allocates nothing: give it a counting arena"); }
  void release(void*, int64_t) override {}
  void upload(const Tensor&, const void*) override {}
  void download(void*, const Tensor&) override {}
  void zero(const Tensor&) override {}
  void synchronize() override {}
  int64_t free_memory() const override { return 0; }
  int64_t peak_memory() const override { return 0; }

  void embedding_forward(const Tensor& out, const Tensor& weight, const Tensor& tokens, const Tensor& position_weight,
                         const Tensor& positions) override {
    shapes::embedding("embedding_forward", out, weight, position_weight, out.dtype, tokens, positions);
  }
  void embedding_backward(const Tensor& dweight, const Tensor& dposition_weight, const Tensor& dout,
                          const Tensor& tokens, const Tensor& positions, int64_t) override {
    shapes::embedding("embedding_backward", dout, dweight, dposition_weight, accumulation_dtype(dout.dtype), tokens,
                      positions);
  }
  void linear_forward(const Tensor& out, const Tensor& in, const Tensor& weight, const Tensor& bias, bool) override {
    shapes::linear_forward(out, in, weight, bias);
  }
  void linear_backward(const Tensor& din, const Tensor& dweight, const Tensor& dbias, const Tensor& dout,
                       const Tensor& in, const Tensor& weight, bool) override {
    shapes::linear_backward(din, dweight, dbias, dout, in, weight);
  }
  void norm_forward(const Tensor& out, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                    const Tensor& residual, const Tensor& branch, const Tensor& weight, const Tensor& bias,
                    double epsilon) override {
    shapes::norm_forward(out, sum, mean, rstd, residual, branch, weight, bias, epsilon);
  }
  void norm_backward(const Tensor& dsum, const Tensor& dweight, const Tensor& dbias, const Tensor& out,
                     const Tensor& dout, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                     const Tensor& weight, const Tensor& bias) override {
    shapes::norm_backward(dsum, dweight, dbias, out, dout, sum, mean, rstd, weight, bias);
  }
  void rope_forward(const Tensor& qkv, const Tensor& positions, const RopeShape& shape) override {
    shapes::rope("rope_forward", qkv, positions, shape);
  }
  void rope_backward(const Tensor& dqkv, const Tensor& positions, const RopeShape& shape) override {
    shapes::rope("rope_backward", dqkv, positions, shape);
  }
  void attention_forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, const DeviceBatch& batch,
                         const AttentionShape& shape) override {
    shapes::attention("attention_forward", qkv, out, lse, batch, shape);
  }
  void attention_backward(const Tensor& dqkv, const Tensor& dout, const Tensor& out, const Tensor& lse,
                          const Tensor& qkv, const DeviceBatch& batch, const AttentionShape& shape) override {
    shapes::attention_backward(dqkv, dout, out, lse, qkv, batch, shape);
  }
  void keep_keys_values(const Tensor& keys, const Tensor& values, const Tensor& qkv, const Tensor& sequences,
                        const Tensor& positions, const AttentionShape& shape) override {
    shapes::cached_rows("keep_keys_values", qkv, keys, values, sequences, positions, shape);
  }
  void attention_decode(const Tensor& out, const Tensor& qkv, const Tensor& keys, const Tensor& values,
                        const Tensor& sequences, const Tensor& positions, const AttentionShape& shape) override {
    shapes::attention_decode(out, qkv, keys, values, sequences, positions, shape);
  }
  void activation_forward(const Tensor& out, const Tensor& gate_up, Activation activation) override {
    shapes::activation_forward(out, gate_up, activation);
  }
  void activation_backward(const Tensor& dgate_up, const Tensor& out, const Tensor& dout, const Tensor& gate_up,
                           Activation activation) override {
    shapes::activation_backward(dgate_up, out, dout, gate_up, activation);
  }
  void gather(const Tensor& out, const Tensor& in, const Tensor& target_rows) override {
    shapes::row_list("gather", out, in, target_rows);
  }
  void scatter_add(const Tensor& dout, const Tensor& din, const Tensor& target_rows) override {
    shapes::row_list("scatter_add", din, dout, target_rows);
  }
  void head_forward(const Tensor& logp, const Tensor& lse, const Tensor& logits, const Tensor& target_tokens) override {
    shapes::head_forward("head_forward", logp, lse, logits, target_tokens);
  }
  void preference(const Tensor& results, const Tensor& coefficient, const Tensor& logp, const Tensor& pair_targets,
                  Objective, double, const Normalisers&, bool) override {
    shapes::preference(results, coefficient, logp, pair_targets);
  }
  void head_backward(const Tensor& dlogits, const Tensor& logits, const Tensor& lse, const Tensor& logp,
                     const Tensor& coefficient, const Tensor& target_tokens) override {
    shapes::head_backward(dlogits, logits, lse, logp, coefficient, target_tokens);
  }
  void sums_of_squares(const Tensor& sums, std::span<const Tensor> gradients) override {
    shapes::sums_of_squares(sums, gradients);
  }
  void adamw(std::span<const AdamWTensors> list, const AdamW& settings) override { shapes::adamw(list, settings); }
};

}  // namespace

std::unique_ptr<Backend> make_rehearsal_backend() { return std::make_unique<RehearsalBackend>(); }

}  // namespace orpo
