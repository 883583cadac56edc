// The decoder: what it is (Config), what it learns (Weights), what a micro-batch leaves behind for the backward pass
// (Activations), and the two lists of calls, forward() and backward(). Written once for every family and every device.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "src/arena.h"
#include "src/backend.h"
#include "src/batch.h"
#include "src/master.h"
#include "src/tensor.h"

namespace orpo {

enum class Norm { rms, layer };           // norm's formula with and without the mean; a layer norm has biases
enum class Position { rotary, learned };  // queries and keys are rotated, or a learned vector is added to each token's
// How a layer's two blocks, attention and MLP, meet the residual stream x:
//   sequential   x += attention(norm(x)),  x += mlp(norm(x))
//   parallel     x += attention(norm(x)) + mlp(norm(x)), one norm                            (Phi-2)
//   post_norm    x = norm(x + attention(x)),  x = norm(x + mlp(x))                             (OPT-350M)
enum class Block { sequential, parallel, post_norm };

// Names are the field's; family.h reads them from a Hugging Face config.json.
struct Config {
  std::string family;           // "llama", "gpt2", ...: a row of family.cpp's table
  int64_t vocab = 0;            // vocab_size
  int64_t width = 0;            // hidden_size
  int64_t intermediate = 0;     // intermediate_size
  int layers = 0;               // num_hidden_layers
  int heads = 0;                // num_attention_heads
  int kv_heads = 0;             // num_key_value_heads
  int head_dim = 0;             // head_dim, or width / heads
  int64_t max_positions = 0;    // max_position_embeddings
  int64_t embedding_width = 0;  // word_embed_proj_dim, with a matrix between it and another width; 0: the width
  Block block = Block::sequential;
  Norm norm = Norm::rms;
  double norm_epsilon = 1e-6;  // rms_norm_eps, layer_norm_epsilon
  Position position = Position::rotary;
  double rope_theta = 10000;
  RopeScaling rope_scaling;
  int rotary_dim = 0;           // of each head, the rest is not rotated; 0: all of it
  int64_t position_offset = 0;  // rows of the position table that no position uses come first (OPT)
  std::vector<int> windows;     // of each layer: positions that a row sees, 0: all; empty: all layers see all
  Activation activation = Activation::swiglu;
  double initializer_range = 0.02;
  bool scaled_residual_init = false;  // the matrices that write to the residual stream start smaller by sqrt(2 layers)
  int64_t padding_token = -1;  // pad_token_id: its input embedding gets no gradient (torch's padding_idx); -1: none
  bool tied_embeddings = false;
  bool qkv_bias = false;  // on query, key and value
  bool attention_output_bias = false;
  bool mlp_bias = false;                  // on gate, up and down
  bool output_bias = false;               // on the logits
  bool scale_attention = true;            // scores by 1 / sqrt(head_dim)
  bool scale_attention_by_layer = false;  // and by 1 / (layer + 1)

  int64_t qkv_width() const { return static_cast<int64_t>(heads + 2 * kv_heads) * head_dim; }
  int64_t attention_width() const { return static_cast<int64_t>(heads) * head_dim; }
  int64_t table_width() const { return embedding_width ? embedding_width : width; }
  bool projects() const { return table_width() != width; }
  int64_t gate_up_width() const { return is_gated(activation) ? 2 * intermediate : intermediate; }
  AttentionShape attention_shape(int layer) const;
  RopeShape rope_shape() const;
  // Entries of the weight matrices that a row is multiplied with, in all layers together and in the head: what useful
  // FLOPs count (metrics.h).
  int64_t matrix_weights() const;
  int64_t head_weights() const { return vocab * table_width(); }
  int64_t parameters() const;
};

// Matrices are [out, in] as in Hugging Face checkpoints; fused ones hold their parts one after the other along out.
struct LayerWeights {
  Tensor attention_norm;         // [width]: the norm before attention, of a post-norm layer the one behind the layer
                                 // before, which the first has not
  Tensor attention_norm_bias;    // [width] or absent
  Tensor qkv;                    // [(heads + 2 kv_heads) * head_dim, width]: query heads, key heads, value heads
  Tensor qkv_bias;               // [(heads + 2 kv_heads) * head_dim] or absent
  Tensor attention_output;       // [width, heads * head_dim]
  Tensor attention_output_bias;  // [width] or absent
  Tensor mlp_norm;               // [width]; absent in a parallel block
  Tensor mlp_norm_bias;          // [width] or absent
  Tensor gate_up;                // [2 * intermediate, width]: gate, then up; [intermediate, width] without a gate
  Tensor gate_up_bias;           // [2 * intermediate] or [intermediate], or absent
  Tensor down;                   // [width, intermediate]
  Tensor down_bias;              // [width] or absent
};

// The weights, and in the same form their gradients, master copies and moments.
struct Weights {
  Tensor embedding;      // [vocab, embedding_width]
  Tensor projection_in;  // [width, embedding_width] where the widths differ, or absent
  Tensor positions;      // [position_offset + max_positions, width] where positions are learned, or absent
  std::vector<LayerWeights> layers;
  Tensor final_norm;       // [width]
  Tensor final_norm_bias;  // [width] or absent
  Tensor projection_out;   // [embedding_width, width] where the widths differ, or absent
  Tensor output;           // [vocab, embedding_width]; the embedding itself where the family ties them
  Tensor output_bias;      // [vocab] or absent

  // Takes every tensor from the arena, all of one dtype, in the order of parameters().
  static Weights allocate(const Config& config, DType dtype, Arena& arena);
};

// Weights at full precision.
struct Masters {
  Weights weights;
  Weights corrections;  // int16 (master.h); without tensors where the weights are the masters

  Masters(Weights weights, Weights corrections = {})
      : weights(std::move(weights)), corrections(std::move(corrections)) {}
};

// One trainable tensor. Every Weights of a Config lists the same parameters in the same order (a tied output once, as
// the embedding).
struct Parameter {
  std::string name;  // "layers.3.qkv"
  Tensor tensor;
  int layer;            // -1: embeddings; config.layers: final norm and output
  bool decays;          // weight decay applies: matrices yes, norms and biases no
  Tensor correction{};  // of a master; absent: the tensor is the master

  MasterTensor master() const { return {tensor, correction}; }
};
std::vector<Parameter> parameters(const Config& config, const Weights& weights);
std::vector<Parameter> parameters(const Config& config, const Masters& masters);

// What forward() leaves for backward(), for one micro-batch: in the activation dtype T, or its accumulation dtype A.
// What the norms and the activation wrote is not kept: their backward makes it again.
struct LayerActivations {
  Tensor input;        // [rows, width] residual stream entering the layer; of post-norm layers what the norm reads
  Tensor input_mean;   // [rows] A, layer norm only
  Tensor input_rstd;   // [rows] A
  Tensor qkv;          // [rows, (heads + 2 kv_heads) * head_dim] rotated where positions are rotary
  Tensor attention;    // [rows, heads * head_dim]
  Tensor lse;          // [heads, rows] A
  Tensor middle;       // [rows, width] residual stream after attention; absent in a parallel block
  Tensor middle_mean;  // [rows] A, layer norm only
  Tensor middle_rstd;  // [rows] A
  Tensor gate_up;      // [rows, 2 * intermediate], or [rows, intermediate] without a gate
};

// What is kept of each layer.
enum class Keep {
  all,      // what its backward pass reads
  inputs,   // its input; the backward pass computes the rest again, in memory that the layers share (--recompute)
  nothing,  // all layers share the memory of one: evaluation
};

struct Activations {
  Keep keep;
  std::vector<LayerActivations> layers;
  Tensor final;       // [rows, width] residual stream after the last layer
  Tensor final_mean;  // [rows] A, layer norm only
  Tensor final_rstd;  // [rows] A
  Tensor hidden;      // [rows, embedding_width] final norm's output, projected: what the head reads

  static Activations allocate(const Config& config, DType dtype, int64_t rows, Keep keep, Arena& arena);
};

// Decoding's memory: keys and values of every position so far, so that a new token passes through the model alone.
struct KeyValueCache {
  struct Layer {
    Tensor keys, values;  // [sequences, kv_heads, positions, head_dim] T
  };
  std::vector<Layer> layers;

  static KeyValueCache allocate(const Config& config, DType dtype, int64_t sequences, int64_t positions, Arena& arena);
};

// What forward() has to know of a cache: its rows' keys and values are kept there, at their positions.
struct CachedRows {
  const KeyValueCache& cache;
  Tensor sequences;  // [rows] int32: the cached sequence of each row
  bool continues;    // rows see their sequence's cached positions; else what the batch's segments say: whole prompts
};

// tokens -> activations.hidden [rows, embedding_width] T. Reads weights, writes activations. scratch: memory for what
// nobody reads later. cached: decoding; a row that continues a cached sequence gives what it would in the whole
// sequence.
void forward(const Config& config, const Weights& weights, const Activations& activations, const DeviceBatch& batch,
             Backend& backend, Arena& scratch, const CachedRows* cached = nullptr);

// dhidden [rows, embedding_width] T -> gradients +=. The steps of forward() in reverse, with their numbers. Consumes
// dhidden and the activations (not Keep::nothing), over which their gradients are written. scratch: memory for the
// other gradients.
void backward(const Config& config, const Weights& weights, const Weights& gradients, const Activations& activations,
              const Tensor& dhidden, const DeviceBatch& batch, Backend& backend, Arena& scratch);

}  // namespace orpo
