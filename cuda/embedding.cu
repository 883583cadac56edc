// Embedding: a row of the table for each token, and one of the position table where positions are learned.
#include "cuda/gpu.cuh"
#include "cuda/rows.cuh"

namespace orpo {

void CudaBackend::embedding_forward(const Tensor& out, const Tensor& weight, const Tensor& tokens,
                                    const Tensor& position_weight, const Tensor& positions) {
  shapes::embedding("embedding_forward", out, weight, position_weight, out.dtype, tokens, positions);
  with_gpu_dtype("embedding_forward", out.dtype, [&](auto zero) {
    copy_rows<decltype(zero)>(compute_, out, weight, tokens, Refused::embedding_forward, position_weight, positions,
                              Refused::embedding_forward_position, refused_);
  });
}

// No atomics: rows of equal tokens, or positions, are added in row order by one block.
void CudaBackend::embedding_backward(const Tensor& dweight, const Tensor& dposition_weight, const Tensor& dout,
                                     const Tensor& tokens, const Tensor& positions, int64_t padding) {
  shapes::embedding("embedding_backward", dout, dweight, dposition_weight, accumulation_dtype(dout.dtype), tokens,
                    positions);
  with_gpu_dtype("embedding_backward", dout.dtype, [&](auto zero) {
    using T = decltype(zero);
    int32_t* sorted = scratch<int32_t>(2 * dout.rows());
    if (dweight)
      add_rows<float, T>(compute_, dweight, dout, tokens, padding, sorted, refused_, Refused::embedding_backward);
    if (dposition_weight)
      add_rows<float, T>(compute_, dposition_weight, dout, positions, -1, sorted, refused_,
                         Refused::embedding_backward_position);
  });
}

}  // namespace orpo
