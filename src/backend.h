// Every operation of the model, declared once. A room X implements X_forward then X_backward: src/cpu/X.cpp for the
// CPU, cuda/X.cu for GPUs.
//
// One rule for all outputs:
//   activations and their gradients          =     overwritten
//   parameter gradients (dweight, dbias)     +=    accumulated, in the accumulation dtype
//   the residual stream's gradient           +=    the one named exception: norm_backward and scatter_add
//
// T names the activation dtype (fp32, bf16 or fp64), A its accumulation dtype (fp32; fp64 for fp64). All tensors are
// row-major, and dense but for linear's and the head's matrices, which may have a row_pitch; [rows, x] means one row a
// token of the packed stream (batch.h). Any row count, width and vocabulary: tails are the operation's business.
// A shape that an operation cannot compute is refused with the operation's name, the rule and the value.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/batch.h"
#include "src/preference.h"
#include "src/tensor.h"

namespace orpo {

enum class Pass { forward, backward };

// What the MLP computes between its two products. swiglu: silu(gate) * up (Shazeer 2020); the others have no gate.
// gelu(x) = x Phi(x) (Hendrycks & Gimpel 2016); gelu_tanh: its approximation by tanh(sqrt(2 / pi) (x + 0.044715 x^3)).
enum class Activation { swiglu, gelu, gelu_tanh, relu };
constexpr bool is_gated(Activation a) { return a == Activation::swiglu; }

// What attention has to know besides its tensors. Query head j reads key/value head j / (heads / kv_heads).
struct AttentionShape {
  int heads, kv_heads, head_dim;
  float scale;  // 1 / sqrt(head_dim) unless the family says otherwise
  int window;   // a query sees this many positions, itself included; 0: all before it
};

// How the frequencies of rotary positions are changed for contexts longer than a model was first trained on.
struct RopeScaling {
  enum Kind {
    none,
    linear,  // all frequencies over factor (position interpolation, Chen et al. 2023)
    llama3,  // those of waves longer than original_positions / low_frequency over factor, those of waves shorter than
             // original_positions / high_frequency as they are, between the two a mixture (Llama 3.1)
  };
  Kind kind = none;
  double factor = 1, low_frequency = 1, high_frequency = 4, original_positions = 0;
  bool operator==(const RopeScaling&) const = default;
};

struct RopeShape {
  int heads, kv_heads, head_dim;
  int rotary_dim;  // first rotary_dim entries of a head are rotated, in halves: (i, i + rotary_dim / 2) form a pair
  double theta;    // frequency of pair i: theta^(-2 i / rotary_dim), scaled
  RopeScaling scaling{};
};

// Radians that pair i turns from one position to the next.
ORPO_HOST_DEVICE inline double rope_frequency(const RopeShape& shape, int i) {
  const double frequency = pow(shape.theta, -2.0 * i / shape.rotary_dim);
  const RopeScaling& s = shape.scaling;
  if (s.kind == RopeScaling::none) return frequency;
  if (s.kind == RopeScaling::linear) return frequency / s.factor;
  const double waves = s.original_positions * frequency / (2 * 3.14159265358979323846);  // in the original context
  const double kept = (waves - s.low_frequency) / (s.high_frequency - s.low_frequency);
  return waves < s.low_frequency    ? frequency / s.factor
         : waves > s.high_frequency ? frequency
                                    : (1 - kept) * frequency / s.factor + kept * frequency;
}

struct AdamW {
  double learning_rate, beta1, beta2, epsilon, weight_decay;
  int64_t step;           // 1 for the first update (bias correction)
  double gradient_scale;  // multiplies every gradient first: the clipping factor
};

// One parameter's part in an update; all of one size. Where weights are bf16 the fp32 master is the weight together
// with its correction (master.h), else it is the weight.
struct AdamWTensors {
  Tensor weight;         // T
  Tensor correction;     // int16, or absent
  Tensor first, second;  // moments m and v, A
  Tensor gradient;       // A
  bool decays;           // weight_decay applies
};

struct Backend {
  virtual ~Backend() = default;
  virtual std::string name() const = 0;

  // Memory of the device. allocate() throws MachineError when there is none left.
  virtual void* allocate(int64_t bytes) = 0;
  virtual bool allocates_zeros() const { return false; }  // what it has just allocated is 0: no need to write that
  virtual void release(void* memory, int64_t bytes) = 0;
  virtual void upload(const Tensor& device, const void* host) = 0;  // device = host
  virtual void download(void* host, const Tensor& device) = 0;      // host = device; any thread, beside other calls
  virtual void zero(const Tensor& x) = 0;                           // x = 0
  virtual void synchronize() = 0;                                   // returns when everything asked for is done
  virtual int64_t free_memory() const = 0;                          // bytes that a run may still take
  virtual int64_t peak_memory() const = 0;                          // most bytes ever taken: of the device, or process

  // What operations take of the device's memory besides their tensors. A rehearsal backend knows after the largest
  // shapes went through it; reserved once, no operation of those shapes allocates.
  virtual int64_t workspace_bytes() const { return 0; }
  virtual void reserve_workspace(int64_t /*bytes*/) {}
  // Matrix products of this dtype a second, FLOP/s, as the device's maker publishes it; 0: unknown, to be measured.
  virtual double published_rate(DType) const { return 0; }

  // Brackets around each layer of forward and backward (layer -1: embedding, layers: the head's side): no-ops on one
  // device. Weight gathering, prefetch, gradient-ready reduction and offload live behind them.
  virtual void begin(int /*layer*/, Pass) {}
  virtual void end(int /*layer*/, Pass) {}

  // embedding: out[rows, width] T = weight[vocab, width] T at tokens[rows] int32, plus position_weight[n, width] T at
  // positions[rows] int32. Either table may be absent; without weight (and tokens) out is what is added to.
  virtual void embedding_forward(const Tensor& out, const Tensor& weight, const Tensor& tokens,
                                 const Tensor& position_weight, const Tensor& positions) = 0;
  // dweight[vocab, width] A += dout[rows, width] T, rows of equal tokens added in row order; those of the token
  // `padding` (-1: none) add nothing.  dposition_weight[n, width] A += dout likewise by positions. Either may be
  // absent.
  virtual void embedding_backward(const Tensor& dweight, const Tensor& dposition_weight, const Tensor& dout,
                                  const Tensor& tokens, const Tensor& positions, int64_t padding) = 0;

  // linear: out[rows, n] T or A = in[rows, k] T . weight[n, k]^T T + bias[n] T (bias may be absent). adds: out +=.
  virtual void linear_forward(const Tensor& out, const Tensor& in, const Tensor& weight, const Tensor& bias,
                              bool adds = false) = 0;
  // din[rows, k] T = dout . weight;  dweight[n, k] A += dout^T . in;  dbias[n] A += column sums of dout.
  // dout[rows, n] T. Each of the three may be absent, and in where dweight is: a caller that makes `in` again only
  // after din asks for them one after the other. adds: din +=, where two products read one input.
  virtual void linear_backward(const Tensor& din, const Tensor& dweight, const Tensor& dbias, const Tensor& dout,
                               const Tensor& in, const Tensor& weight, bool adds = false) = 0;

  // norm: layer norm (Ba et al. 2016), or RMS norm (Zhang & Sennrich 2019; LlamaRMSNorm) where mean is absent and
  // counts as 0; fused with the residual addition before it:
  //   sum[rows, width] T = residual + branch (branch may be absent: then sum may be residual itself and is left alone)
  //   mean[rows] A = mean(sum),   rstd[rows] A = 1 / sqrt(mean((sum - mean)^2) + epsilon)
  //   out[rows, width] T = weight[width] * (sum - mean) * rstd + bias[width] (bias may be absent)
  // out may be residual itself: in place.
  virtual void norm_forward(const Tensor& out, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                            const Tensor& residual, const Tensor& branch, const Tensor& weight, const Tensor& bias,
                            double epsilon) = 0;
  // dsum[rows, width] T += gradient through the norm (the residual's gradient, which already holds what comes past the
  // norm);  dweight[width] A +=;  dbias[width] A += (absent where bias is).  dout[rows, width] T. What was normalised
  // is made again from sum, mean and rstd: out[rows, width] T = what norm_forward wrote, bit for bit (may be absent,
  // or dout itself: in place).
  virtual void norm_backward(const Tensor& dsum, const Tensor& dweight, const Tensor& dbias, const Tensor& out,
                             const Tensor& dout, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                             const Tensor& weight, const Tensor& bias) = 0;

  // rope: rotary position embedding in place (Su et al. 2021; the half-split pairing of Hugging Face Llama) on the
  // query and key heads of qkv[rows, (heads + 2 kv_heads) * head_dim] T at positions[rows] int32. Angles in double.
  // Backward: the inverse rotation, in place on dqkv.
  virtual void rope_forward(const Tensor& qkv, const Tensor& positions, const RopeShape& shape) = 0;
  virtual void rope_backward(const Tensor& dqkv, const Tensor& positions, const RopeShape& shape) = 0;

  // attention: causal softmax attention over the packed stream (Vaswani et al. 2017; tiles as in FlashAttention-2, Dao
  // 2023). A trunk row sees trunk rows up to itself; a branch row sees the pair's trunk and its own branch up to
  // itself; the window counts positions in the sequence.
  //   qkv[rows, (heads + 2 kv_heads) * head_dim] T, rotated;  out[rows, heads * head_dim] T
  //   lse[heads, rows] A = log-sum-exp of the scaled scores
  virtual void attention_forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, const DeviceBatch& batch,
                                 const AttentionShape& shape) = 0;
  // dqkv[rows, (heads + 2 kv_heads) * head_dim] T =; every entry written. dout like out.
  virtual void attention_backward(const Tensor& dqkv, const Tensor& dout, const Tensor& out, const Tensor& lse,
                                  const Tensor& qkv, const DeviceBatch& batch, const AttentionShape& shape) = 0;

  // attention_decode: decoding's side of attention, over keys and values kept from earlier calls. Row r is the position
  // positions[r] int32 of the cached sequence sequences[r] int32.
  //   qkv[rows, (heads + 2 kv_heads) * head_dim] T, rotated
  //   keys, values[sequences, kv_heads, capacity, head_dim] T: what a head looks back over lies together
  // Keeps each row's key and value: keys, values at [sequences[r], :, positions[r], :] =. A position past the capacity
  // is refused: the cache is full.
  virtual void keep_keys_values(const Tensor& keys, const Tensor& values, const Tensor& qkv, const Tensor& sequences,
                                const Tensor& positions, const AttentionShape& shape) = 0;
  // out[rows, heads * head_dim] T = causal softmax attention of each row's queries to its sequence's positions up to
  // its own, as far as the window reaches; that position's key and value are kept already. Long sequences are cut into
  // chunks of positions whose results are joined by their maxima and sums (flash decoding, Dao et al. 2023).
  virtual void attention_decode(const Tensor& out, const Tensor& qkv, const Tensor& keys, const Tensor& values,
                                const Tensor& sequences, const Tensor& positions, const AttentionShape& shape) = 0;

  // activation: gated: gate_up[rows, 2 n] T holds gate then up; out[rows, n] T = silu(gate) * up. Without a gate:
  // gate_up[rows, n] T holds up; out = the activation's function of it.
  virtual void activation_forward(const Tensor& out, const Tensor& gate_up, Activation activation) = 0;
  // dgate_up T =, shaped like gate_up (may be gate_up itself: in place);  out[rows, n] T = what activation_forward
  // wrote, bit for bit (may be absent; may be dout itself: in place).
  virtual void activation_backward(const Tensor& dgate_up, const Tensor& out, const Tensor& dout, const Tensor& gate_up,
                                   Activation activation) = 0;

  // head, over a chunk of the row list:
  // out[n, width] T = in[rows, width] T at rows target_rows[n] int32.
  virtual void gather(const Tensor& out, const Tensor& in, const Tensor& target_rows) = 0;
  // dout[rows, width] T += din[n, width] T at target_rows; a row named twice receives both, in list order.
  virtual void scatter_add(const Tensor& dout, const Tensor& din, const Tensor& target_rows) = 0;
  // lse[n] A = log-sum-exp of logits[n, vocab] A;  logp[n] A = logits at target_tokens[n] int32 - lse, at most 0.
  virtual void head_forward(const Tensor& logp, const Tensor& lse, const Tensor& logits,
                            const Tensor& target_tokens) = 0;
  // preference (preference.h has the formulas): results[pairs, 13] fp64, PairResults, and coefficient[targets] A,
  // -dL/dlogp of each target. logp[targets] A in the order of Batch::target_rows; pair_targets[pairs, 4] int32 as in
  // DeviceBatch, or a slice of it: only the targets of the pairs named there are read and written.
  virtual void preference(const Tensor& results, const Tensor& coefficient, const Tensor& logp,
                          const Tensor& pair_targets, Objective objective, double lambda,
                          const Normalisers& normalisers, bool nll_includes_prompt) = 0;
  // dlogits[n, vocab] T = c * (softmax(logits) - onehot(target)), c = coefficient[n] A: dL/dlogits. dlogits may lie
  // over logits, each row at the start of its own logits row (row_pitch says so): T is never wider than A.
  // The target's entry is -c * (-expm1(logp)), never softmax - 1, which loses the digits that h multiplies.
  virtual void head_backward(const Tensor& dlogits, const Tensor& logits, const Tensor& lse, const Tensor& logp,
                             const Tensor& coefficient, const Tensor& target_tokens) = 0;

  // adamw: sums[gradients] fp64 = sum of squares of each gradient tensor, in a fixed order; not finite where an entry
  // is not.
  virtual void sums_of_squares(const Tensor& sums, std::span<const Tensor> gradients) = 0;
  // AdamW with decoupled decay (Loshchilov & Hutter 2019; torch.optim.AdamW) of every tensor of the list, in one pass
  // over memory; g = gradient_scale * gradient:
  //   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  mhat, vhat: m, v over 1 - b1^step, 1 - b2^step
  //   master -= lr * decay * master (where it decays);  master -= lr * mhat / (sqrt(vhat) + eps)
  virtual void adamw(std::span<const AdamWTensors> list, const AdamW& settings) = 0;
};

// The CPU backend: OpenMP threads, oneDNN for matrix products. threads 0: all the machine has.
std::unique_ptr<Backend> make_cpu_backend(int threads);
// A backend that computes nothing: the memory rehearsal runs the model through it on a counting arena.
std::unique_ptr<Backend> make_rehearsal_backend();

}  // namespace orpo
