// What each operation accepts, once for all backends: tensors' dtypes and shapes, refused with the operation's name,
// the rule and the value. Nothing here reads memory, so the rehearsal checks as the real backends do.
#pragma once

#include "src/backend.h"

namespace orpo::shapes {

// T: an activation dtype.
inline void activation_dtype(const char* op, const Tensor& x) {
  REQUIRE_SHAPE(op, x.dtype != DType::i32 && x.dtype != DType::i16, "an activation is ", shape_text(x));
}

// An activation of the same dtype as `like` and of this many rows and columns.
inline void matrix(const char* op, const char* what, const Tensor& x, DType dtype, int64_t rows, int64_t columns) {
  REQUIRE_SHAPE(op, x.rank == 2 && x.rows() == rows && x.columns() == columns && x.dtype == dtype, what, " is ",
                shape_text(x), " where ", shape_text(Tensor(nullptr, dtype, {rows, columns})), " is needed");
}
inline void vector(const char* op, const char* what, const Tensor& x, DType dtype, int64_t count) {
  REQUIRE_SHAPE(op, x.rank == 1 && x.elements() == count && x.dtype == dtype, what, " is ", shape_text(x), " where ",
                shape_text(Tensor(nullptr, dtype, {count})), " is needed");
}
inline void dense(const char* op, const char* what, const Tensor& x) {
  REQUIRE_SHAPE(op, x.pitch() == x.columns(), what, " has rows ", x.pitch(), " apart, ", x.columns(), " wide");
}
inline void pitched(const char* op, const char* what, const Tensor& x) {
  REQUIRE_SHAPE(op, x.pitch() >= x.columns(), what, " has rows ", x.pitch(), " apart, ", x.columns(), " wide");
}

inline void embedding(const char* op, const Tensor& rows, const Tensor& table, const Tensor& position_table,
                      DType table_dtype, const Tensor& tokens, const Tensor& positions) {
  activation_dtype(op, rows);
  if (table) {
    matrix(op, "table", table, table_dtype, table.rows(), rows.columns());
    vector(op, "tokens", tokens, DType::i32, rows.rows());
  }
  if (!position_table) return;
  matrix(op, "position table", position_table, table_dtype, position_table.rows(), rows.columns());
  vector(op, "positions", positions, DType::i32, rows.rows());
}

inline void linear_forward(const Tensor& out, const Tensor& in, const Tensor& weight, const Tensor& bias) {
  const char* op = "linear_forward";
  activation_dtype(op, in);
  REQUIRE_SHAPE(op, in.rank == 2 && weight.rank == 2, "input is ", shape_text(in), ", weight ", shape_text(weight));
  matrix(op, "weight", weight, in.dtype, weight.rows(), in.columns());
  REQUIRE_SHAPE(op, out.dtype == in.dtype || out.dtype == accumulation_dtype(in.dtype), "output is ", shape_text(out));
  matrix(op, "output", out, out.dtype, in.rows(), weight.rows());
  if (bias) vector(op, "bias", bias, in.dtype, weight.rows());
  dense(op, "weight", weight);
  pitched(op, "input", in), pitched(op, "output", out);
}

inline void linear_backward(const Tensor& din, const Tensor& dweight, const Tensor& dbias, const Tensor& dout,
                            const Tensor& in, const Tensor& weight) {
  const char* op = "linear_backward";
  activation_dtype(op, dout);
  REQUIRE_SHAPE(op, dout.rank == 2 && weight.rank == 2, "output gradient is ", shape_text(dout), ", weight ",
                shape_text(weight));
  const DType sums = accumulation_dtype(dout.dtype);
  matrix(op, "weight", weight, dout.dtype, weight.rows(), weight.columns());
  matrix(op, "output gradient", dout, dout.dtype, dout.rows(), weight.rows());
  dense(op, "weight", weight), pitched(op, "output gradient", dout);
  if (din) {
    matrix(op, "input gradient", din, dout.dtype, dout.rows(), weight.columns());
    pitched(op, "input gradient", din);
  }
  if (dweight) {
    matrix(op, "input", in, dout.dtype, dout.rows(), weight.columns());
    matrix(op, "weight gradient", dweight, sums, weight.rows(), weight.columns());
    pitched(op, "input", in), dense(op, "weight gradient", dweight);
  }
  if (dbias) vector(op, "bias gradient", dbias, sums, weight.rows());
}

inline void norm_forward(const Tensor& out, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                         const Tensor& residual, const Tensor& branch, const Tensor& weight, const Tensor& bias,
                         double epsilon) {
  const char* op = "norm_forward";
  activation_dtype(op, residual);
  const int64_t rows = residual.rows(), width = residual.columns();
  REQUIRE_SHAPE(op, residual.rank == 2 && width > 0, "the residual is ", shape_text(residual));
  REQUIRE_SHAPE(op, epsilon >= 0, "epsilon is ", epsilon);
  matrix(op, "output", out, residual.dtype, rows, width);
  matrix(op, "sum", sum, residual.dtype, rows, width);
  if (branch) matrix(op, "branch", branch, residual.dtype, rows, width);
  if (mean) vector(op, "mean", mean, accumulation_dtype(residual.dtype), rows);
  vector(op, "rstd", rstd, accumulation_dtype(residual.dtype), rows);
  vector(op, "weight", weight, residual.dtype, width);
  if (bias) vector(op, "bias", bias, residual.dtype, width);
}

inline void norm_backward(const Tensor& dsum, const Tensor& dweight, const Tensor& dbias, const Tensor& out,
                          const Tensor& dout, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                          const Tensor& weight, const Tensor& bias) {
  const char* op = "norm_backward";
  activation_dtype(op, sum);
  const int64_t rows = sum.rows(), width = sum.columns();
  REQUIRE_SHAPE(op, sum.rank == 2 && width > 0, "the sum is ", shape_text(sum));
  matrix(op, "sum gradient", dsum, sum.dtype, rows, width);
  if (out) matrix(op, "output", out, sum.dtype, rows, width);
  matrix(op, "output gradient", dout, sum.dtype, rows, width);
  vector(op, "weight gradient", dweight, accumulation_dtype(sum.dtype), width);
  REQUIRE_SHAPE(op, static_cast<bool>(dbias) == static_cast<bool>(bias), "bias is ", shape_text(bias),
                ", its gradient ", shape_text(dbias));
  if (bias) vector(op, "bias", bias, sum.dtype, width);
  if (dbias) vector(op, "bias gradient", dbias, accumulation_dtype(sum.dtype), width);
  if (mean) vector(op, "mean", mean, accumulation_dtype(sum.dtype), rows);
  vector(op, "rstd", rstd, accumulation_dtype(sum.dtype), rows);
  vector(op, "weight", weight, sum.dtype, width);
}

inline void heads(const char* op, int query, int key_value, int head_dim) {
  REQUIRE_SHAPE(op, key_value > 0 && query > 0 && query % key_value == 0, query, " query heads share ", key_value,
                " key/value heads");
  REQUIRE_SHAPE(op, head_dim > 0, "the head size is ", head_dim);
}

inline void rope(const char* op, const Tensor& qkv, const Tensor& positions, const RopeShape& shape) {
  activation_dtype(op, qkv);
  heads(op, shape.heads, shape.kv_heads, shape.head_dim);
  REQUIRE_SHAPE(op, shape.rotary_dim >= 0 && shape.rotary_dim <= shape.head_dim && shape.rotary_dim % 2 == 0,
                "rotary_dim is ", shape.rotary_dim, ", the head size ", shape.head_dim);
  REQUIRE_SHAPE(op, shape.theta > 0, "theta is ", shape.theta);
  REQUIRE_SHAPE(op, shape.scaling.factor > 0, "the scaling factor is ", shape.scaling.factor);
  matrix(op, "qkv", qkv, qkv.dtype, qkv.rows(), int64_t{shape.heads + 2 * shape.kv_heads} * shape.head_dim);
  vector(op, "positions", positions, DType::i32, qkv.rows());
}

inline void attention_qkv(const char* op, const Tensor& qkv, const AttentionShape& shape) {
  activation_dtype(op, qkv);
  heads(op, shape.heads, shape.kv_heads, shape.head_dim);
  REQUIRE_SHAPE(op, shape.window >= 0, "the window is ", shape.window);
  REQUIRE_SHAPE(op, shape.scale > 0, "the scale is ", shape.scale);
  matrix(op, "qkv", qkv, qkv.dtype, qkv.rows(), int64_t{shape.heads + 2 * shape.kv_heads} * shape.head_dim);
}

inline void attention(const char* op, const Tensor& qkv, const Tensor& out, const Tensor& lse, const DeviceBatch& batch,
                      const AttentionShape& shape) {
  attention_qkv(op, qkv, shape);
  const int64_t rows = qkv.rows();
  matrix(op, "output", out, qkv.dtype, rows, int64_t{shape.heads} * shape.head_dim);
  matrix(op, "lse", lse, accumulation_dtype(qkv.dtype), shape.heads, rows);
  matrix(op, "segments", batch.segments, DType::i32, batch.segments.rows(), 4);
}

inline void attention_backward(const Tensor& dqkv, const Tensor& dout, const Tensor& out, const Tensor& lse,
                               const Tensor& qkv, const DeviceBatch& batch, const AttentionShape& shape) {
  attention("attention_backward", qkv, out, lse, batch, shape);
  matrix("attention_backward", "output gradient", dout, qkv.dtype, out.rows(), out.columns());
  matrix("attention_backward", "qkv gradient", dqkv, qkv.dtype, qkv.rows(), qkv.columns());
}

// keys, values: [sequences, kv_heads, capacity, head_dim].
inline void cached_rows(const char* op, const Tensor& qkv, const Tensor& keys, const Tensor& values,
                        const Tensor& sequences, const Tensor& positions, const AttentionShape& shape) {
  attention_qkv(op, qkv, shape);
  const int64_t rows = qkv.rows();
  for (const Tensor* cache : {&keys, &values})
    REQUIRE_SHAPE(op,
                  cache->rank == 4 && cache->dtype == qkv.dtype && cache->shape[1] == shape.kv_heads &&
                      cache->shape[3] == shape.head_dim,
                  "the cache is ", shape_text(*cache), " for ", shape.kv_heads, " heads of ", shape.head_dim);
  REQUIRE_SHAPE(op, keys.shape == values.shape, "keys are ", shape_text(keys), ", values ", shape_text(values));
  vector(op, "sequences", sequences, DType::i32, rows);
  vector(op, "positions", positions, DType::i32, rows);
}

inline void attention_decode(const Tensor& out, const Tensor& qkv, const Tensor& keys, const Tensor& values,
                             const Tensor& sequences, const Tensor& positions, const AttentionShape& shape) {
  cached_rows("attention_decode", qkv, keys, values, sequences, positions, shape);
  matrix("attention_decode", "output", out, qkv.dtype, qkv.rows(), int64_t{shape.heads} * shape.head_dim);
}

// What the activation is given and gives: twice as wide with a gate.
inline void activation(const char* op, const char* what, const Tensor& out, const Tensor& gate_up,
                       Activation activation) {
  activation_dtype(op, gate_up);
  const int64_t parts = is_gated(activation) ? 2 : 1;
  REQUIRE_SHAPE(op, gate_up.rank == 2 && gate_up.columns() % parts == 0, "gate_up is ", shape_text(gate_up));
  matrix(op, what, out, gate_up.dtype, gate_up.rows(), gate_up.columns() / parts);
}

inline void activation_forward(const Tensor& out, const Tensor& gate_up, Activation kind) {
  activation("activation_forward", "output", out, gate_up, kind);
}

inline void activation_backward(const Tensor& dgate_up, const Tensor& out, const Tensor& dout, const Tensor& gate_up,
                                Activation kind) {
  const char* op = "activation_backward";
  activation(op, "output gradient", dout, gate_up, kind);
  if (out) activation(op, "output", out, gate_up, kind);
  matrix(op, "gate_up gradient", dgate_up, gate_up.dtype, gate_up.rows(), gate_up.columns());
}

// few: one row for each target; many: the stream's rows.
inline void row_list(const char* op, const Tensor& few, const Tensor& many, const Tensor& target_rows) {
  activation_dtype(op, few);
  matrix(op, "stream", many, few.dtype, many.rows(), few.columns());
  vector(op, "target_rows", target_rows, DType::i32, few.rows());
}

inline void head_forward(const char* op, const Tensor& logp, const Tensor& lse, const Tensor& logits,
                         const Tensor& target_tokens) {
  REQUIRE_SHAPE(op,
                logits.rank == 2 && logits.columns() > 0 && (logits.dtype == DType::f32 || logits.dtype == DType::f64),
                "logits are ", shape_text(logits));
  pitched(op, "logits", logits);
  vector(op, "logp", logp, logits.dtype, logits.rows());
  vector(op, "lse", lse, logits.dtype, logits.rows());
  vector(op, "target_tokens", target_tokens, DType::i32, logits.rows());
}

inline void preference(const Tensor& results, const Tensor& coefficient, const Tensor& logp,
                       const Tensor& pair_targets) {
  const char* op = "preference";
  REQUIRE_SHAPE(op, logp.rank == 1 && (logp.dtype == DType::f32 || logp.dtype == DType::f64), "logp is ",
                shape_text(logp));
  vector(op, "coefficient", coefficient, logp.dtype, logp.elements());
  matrix(op, "pair_targets", pair_targets, DType::i32, pair_targets.rows(), 4);
  matrix(op, "results", results, DType::f64, pair_targets.rows(), pair_result_numbers);
}

inline void head_backward(const Tensor& dlogits, const Tensor& logits, const Tensor& lse, const Tensor& logp,
                          const Tensor& coefficient, const Tensor& target_tokens) {
  const char* op = "head_backward";
  head_forward(op, logp, lse, logits, target_tokens);
  activation_dtype(op, dlogits);
  REQUIRE_SHAPE(op, accumulation_dtype(dlogits.dtype) == logits.dtype, "logits are ", shape_text(logits),
                ", their gradient ", shape_text(dlogits));
  matrix(op, "dlogits", dlogits, dlogits.dtype, logits.rows(), logits.columns());
  pitched(op, "dlogits", dlogits);
  vector(op, "coefficient", coefficient, logits.dtype, logits.rows());
}

inline void sums_of_squares(const Tensor& sums, std::span<const Tensor> gradients) {
  vector("sums_of_squares", "sums", sums, DType::f64, static_cast<int64_t>(gradients.size()));
  for (const Tensor& g : gradients) activation_dtype("sums_of_squares", g), dense("sums_of_squares", "gradient", g);
}

inline void adamw(std::span<const AdamWTensors> list, const AdamW& settings) {
  const char* op = "adamw";
  for (const AdamWTensors& p : list) {
    activation_dtype(op, p.weight);
    const DType sums = accumulation_dtype(p.weight.dtype);
    const int64_t n = p.weight.elements();
    for (const Tensor* t : {&p.first, &p.second, &p.gradient})
      REQUIRE_SHAPE(op, t->dtype == sums && t->elements() == n, "weight is ", shape_text(p.weight), ", moments ",
                    shape_text(p.first), " and ", shape_text(p.second), ", gradient ", shape_text(p.gradient));
    const Tensor& c = p.correction;
    REQUIRE_SHAPE(op, p.weight.dtype == sums ? !c : c.dtype == DType::i16 && c.elements() == n, "weight is ",
                  shape_text(p.weight), ", correction ", shape_text(c));
  }
  REQUIRE_SHAPE(op, settings.step >= 1, "step is ", settings.step);
}

}  // namespace orpo::shapes
