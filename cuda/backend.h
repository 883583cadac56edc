// The CUDA backend: each room's file cuda/X.cu holds X_forward then X_backward of this class.
#pragma once

#include <source_location>

#include "src/backend.h"

struct CUstream_st;  // what cudaStream_t points to

namespace orpo {

using GpuStream = CUstream_st*;

// What the device found that the host could not see when it launched: an index out of range. Kernels skip what they
// refuse and note one such case; synchronize() and download() throw it as the MachineError that the CPU
// backend throws at once.
struct RefusedNumbers {
  int64_t n[6];  // what they are is in the kind's message (backend.cu)
};
struct Refused {
  enum Kind : int32_t {
    nothing,
    embedding_forward,
    embedding_forward_position,
    embedding_backward,
    embedding_backward_position,
    rope_forward,
    rope_backward,
    attention_segment,
    attention_end,
    attention_backward_segment,
    attention_backward_end,
    keep_sequence,
    keep_position,
    decode_sequence,
    decode_position,
    gather,
    scatter_add,
    head_forward,
    head_backward,
    preference
  };
  int32_t kind;
  RefusedNumbers numbers;
};

struct Product;  // products.h
class MatrixProducts;
class Uploads;  // transfers.h
class Downloads;

class CudaBackend : public Backend {
 public:
  // computes: on the current GPU. rehearses: on none, to know workspace_bytes().
  enum class Purpose { computes, rehearses };
  explicit CudaBackend(Purpose purpose = Purpose::computes);
  ~CudaBackend() override;
  CudaBackend(const CudaBackend&) = delete;

  // backend.cu, rates.cu
  void* allocate(int64_t bytes) override;
  void release(void* memory, int64_t bytes) override;
  void upload(const Tensor& device, const void* host) override;
  void download(void* host, const Tensor& device) override;
  void zero(const Tensor& x) override;
  void synchronize() override;
  std::string name() const override { return device_name_; }
  int64_t free_memory() const override;
  int64_t peak_memory() const override;
  int64_t workspace_bytes() const override;
  void reserve_workspace(int64_t bytes) override;
  double published_rate(DType dtype) const override;

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
  // Device memory for one operation; the next one may write over it.
  template <class T> T* scratch(int64_t count) {
    return static_cast<T*>(reserve_scratch(count * static_cast<int64_t>(sizeof(T))));
  }
  void* reserve_scratch(int64_t bytes);
  MatrixProducts& products();  // made when first asked for
  void multiply(const Product& product, std::source_location asked = std::source_location::current());
  int64_t fixed_bytes() const;          // of the workspace: what does not depend on shapes
  void report(const Refused& refused);  // throws where it is something
  void count_memory(int64_t bytes);

  std::string device_name_;      // "NVIDIA H100 80GB HBM3"
  GpuStream compute_ = nullptr;  // what every kernel runs on
  Refused* refused_ = nullptr;   // on the device
  void* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
  std::shared_ptr<MatrixProducts> products_;
  int64_t memory_ = 0, most_memory_ = 0;  // bytes of the device in use now, at most
  std::unique_ptr<Uploads> uploads_;
  std::unique_ptr<Downloads> downloads_;
};

}  // namespace orpo
