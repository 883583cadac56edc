// Token embedding: a row of the table for each token.
#include "cuda/gpu.cuh"
#include "cuda/rows.cuh"

namespace orpo {

void CudaBackend::embedding_forward(const Tensor& out, const Tensor& weight, const Tensor& tokens) {
  shapes::embedding("embedding_forward", out, weight, {}, out.dtype, tokens, {});
  with_gpu_dtype("embedding_forward", out.dtype, [&](auto zero) {
    copy_rows<decltype(zero)>(compute_, out, weight, tokens, refused_, Refused::embedding_forward);
  });
}

// No atomics: the block of a token's first row adds the token's rows in order.
void CudaBackend::embedding_backward(const Tensor& dweight, const Tensor& dout, const Tensor& tokens, int64_t padding) {
  shapes::embedding("embedding_backward", dout, dweight, {}, accumulation_dtype(dout.dtype), tokens, {});
  with_gpu_dtype("embedding_backward", dout.dtype, [&](auto zero) {
    add_rows<float, decltype(zero)>(compute_, dweight, dout, tokens, padding, scratch<int32_t>(2 * dout.rows()),
                                    refused_, Refused::embedding_backward);
  });
}

}  // namespace orpo
