// Token embedding: a row of the table for each token.
#include "src/cpu/backend.h"
#include "src/cpu/rows.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

void CpuBackend::embedding_forward(const Tensor& out, const Tensor& weight, const Tensor& tokens) {
  shapes::embedding("embedding_forward", out, weight, out.dtype, tokens);
  require_below("embedding_forward", "token", tokens, weight.rows());
  copy_rows(out, weight, tokens);
}

void CpuBackend::embedding_backward(const Tensor& dweight, const Tensor& dout, const Tensor& tokens, int64_t padding) {
  shapes::embedding("embedding_backward", dout, dweight, accumulation_dtype(dout.dtype), tokens);
  require_below("embedding_backward", "token", tokens, dweight.rows());
  with_dtype("embedding_backward", dout.dtype, [&](auto zero) {
    using T = decltype(zero);
    add_rows<Accumulator<T>, T>(dweight, dout, tokens, padding);
  });
}

}  // namespace orpo
