// Embedding: a row of the table for each token, and one of the position table where positions are learned.
#include "src/cpu/backend.h"
#include "src/cpu/rows.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

void CpuBackend::embedding_forward(const Tensor& out, const Tensor& weight, const Tensor& tokens,
                                   const Tensor& position_weight, const Tensor& positions) {
  const char* op = "embedding_forward";
  shapes::embedding(op, out, weight, position_weight, out.dtype, tokens, positions);
  if (weight) {
    require_below(op, "token", tokens, weight.rows());
    copy_rows(out, weight, tokens);
  }
  if (!position_weight) return;
  require_below(op, "position", positions, position_weight.rows());
  with_dtype(op, out.dtype, [&](auto zero) { add_to_rows<decltype(zero)>(out, position_weight, positions); });
}

void CpuBackend::embedding_backward(const Tensor& dweight, const Tensor& dposition_weight, const Tensor& dout,
                                    const Tensor& tokens, const Tensor& positions, int64_t padding) {
  const char* op = "embedding_backward";
  shapes::embedding(op, dout, dweight, dposition_weight, accumulation_dtype(dout.dtype), tokens, positions);
  if (dweight) require_below(op, "token", tokens, dweight.rows());
  if (dposition_weight) require_below(op, "position", positions, dposition_weight.rows());
  with_dtype(op, dout.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (dweight) add_rows<Accumulator<T>, T>(dweight, dout, tokens, padding);
    if (dposition_weight) add_rows<Accumulator<T>, T>(dposition_weight, dout, positions);
  });
}

}  // namespace orpo
