// Embedding: a row of the table for each token, and one of the position table where positions are learned.
#include "cuda/gpu.cuh"
#include "cuda/rows.cuh"

namespace orpo {

void CudaBackend::embedding_forward(const Tensor& out, const Tensor& weight, const Tensor& tokens,
                                    const Tensor& position_weight, const Tensor& positions) {
  shapes::embedding("embedding_forward", out, weight, position_weight, out.dtype, tokens, positions);
  with_gpu_dtype("embedding_forward", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (weight) copy_rows<T>(compute_, out, weight, tokens, refused_, Refused::embedding_forward);
    if (position_weight)
      add_to_rows<T>(compute_, out, position_weight, positions, refused_, Refused::embedding_forward_position);
  });
}

// No atomics: rows of equal tokens, or positions, are added in row order by one block.
void CudaBackend::embedding_backward(const Tensor& dweight, const Tensor& dposition_weight, const Tensor& dout,
                                     const Tensor& tokens, const Tensor& positions, int64_t padding) {
  shapes::embedding("embedding_backward", dout, dweight, dposition_weight, accumulation_dtype(dout.dtype), tokens,
                    positions);
  with_gpu_dtype("embedding_backward", dout.dtype, [&](auto zero) {
    using T = decltype(zero);
    int32_t* chains = scratch<int32_t>(2 * dout.rows());
    if (dweight)
      add_rows<float, T>(compute_, dweight, dout, tokens, padding, chains, refused_, Refused::embedding_backward);
    if (dposition_weight)
      add_rows<float, T>(compute_, dposition_weight, dout, positions, -1, chains, refused_,
                         Refused::embedding_backward_position);
  });
}

}  // namespace orpo
