// The CUDA backend: each room's file cuda/X.cu holds X_forward then X_backward of this class, with the meaning that
// src/backend.h gives them. Every operation has its kernels; it becomes a Backend with backend.cu.
#pragma once

#include "src/backend.h"

struct CUstream_st;  // what cudaStream_t points to

namespace orpo {

using GpuStream = CUstream_st*;

// What the device found that the host could not see when it launched: an index out of range. Kernels skip what they
// refuse and note one such case; synchronize() throws it as the MachineError that the CPU backend throws at once.
struct RefusedNumbers {
  int64_t n[6];  // what they are is in the kind's message (memory.cu)
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

class MatrixProducts;  // products.h

class CudaBackend {
 public:
  CudaBackend();
  ~CudaBackend();
  CudaBackend(const CudaBackend&) = delete;

  // memory.cu
  void* allocate(int64_t bytes);
  void release(void* memory, int64_t bytes);
  void upload(const Tensor& device, const void* host);
  void download(void* host, const Tensor& device);
  void zero(const Tensor& x);
  void synchronize();

  void embedding_forward(const Tensor& out, const Tensor& weight, const Tensor& tokens, const Tensor& position_weight,
                         const Tensor& positions);
  void embedding_backward(const Tensor& dweight, const Tensor& dposition_weight, const Tensor& dout,
                          const Tensor& tokens, const Tensor& positions, int64_t padding);
  void linear_forward(const Tensor& out, const Tensor& in, const Tensor& weight, const Tensor& bias, bool adds);
  void linear_backward(const Tensor& din, const Tensor& dweight, const Tensor& dbias, const Tensor& dout,
                       const Tensor& in, const Tensor& weight, bool adds);
  void norm_forward(const Tensor& out, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                    const Tensor& residual, const Tensor& branch, const Tensor& weight, const Tensor& bias,
                    double epsilon);
  void norm_backward(const Tensor& dsum, const Tensor& dweight, const Tensor& dbias, const Tensor& out,
                     const Tensor& dout, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                     const Tensor& weight, const Tensor& bias);
  void rope_forward(const Tensor& qkv, const Tensor& positions, const RopeShape& shape);
  void rope_backward(const Tensor& dqkv, const Tensor& positions, const RopeShape& shape);
  void attention_forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, const DeviceBatch& batch,
                         const AttentionShape& shape);
  void attention_backward(const Tensor& dqkv, const Tensor& dout, const Tensor& out, const Tensor& lse,
                          const Tensor& qkv, const DeviceBatch& batch, const AttentionShape& shape);
  void keep_keys_values(const Tensor& keys, const Tensor& values, const Tensor& qkv, const Tensor& sequences,
                        const Tensor& positions, const AttentionShape& shape);
  void attention_decode(const Tensor& out, const Tensor& qkv, const Tensor& keys, const Tensor& values,
                        const Tensor& sequences, const Tensor& positions, const AttentionShape& shape);
  void activation_forward(const Tensor& out, const Tensor& gate_up, Activation activation);
  void activation_backward(const Tensor& dgate_up, const Tensor& out, const Tensor& dout, const Tensor& gate_up,
                           Activation activation);
  void gather(const Tensor& out, const Tensor& in, const Tensor& target_rows);
  void scatter_add(const Tensor& dout, const Tensor& din, const Tensor& target_rows);
  void head_forward(const Tensor& logp, const Tensor& lse, const Tensor& logits, const Tensor& target_tokens);
  void preference(const Tensor& results, const Tensor& coefficient, const Tensor& logp, const Tensor& pair_targets,
                  Objective objective, double lambda, const Normalisers& normalisers, bool nll_includes_prompt);
  void head_backward(const Tensor& dlogits, const Tensor& logits, const Tensor& lse, const Tensor& logp,
                     const Tensor& coefficient, const Tensor& target_tokens);
  void sums_of_squares(const Tensor& sums, std::span<const Tensor> gradients);
  void adamw(std::span<const AdamWTensors> list, const AdamW& settings);

 private:
  // Device memory for one operation; the next one may write over it.
  template <class T> T* scratch(int64_t count) {
    return static_cast<T*>(reserve_scratch(count * static_cast<int64_t>(sizeof(T))));
  }
  void* reserve_scratch(int64_t bytes);
  MatrixProducts& products();  // made when first asked for

  GpuStream compute_ = nullptr;  // what every kernel runs on
  Refused* refused_;             // on the device
  void* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
  std::shared_ptr<MatrixProducts> products_;
};

}  // namespace orpo
