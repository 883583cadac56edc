#include "src/model.h"

#include <cmath>
#include <utility>

namespace orpo {

AttentionShape Config::attention_shape(int layer) const {
  double scale = scale_attention ? 1 / std::sqrt(static_cast<double>(head_dim)) : 1;
  if (scale_attention_by_layer) scale /= layer + 1;
  return {heads, kv_heads, head_dim, static_cast<float>(scale), windows.empty() ? 0 : windows[layer]};
}

RopeShape Config::rope_shape() const {
  return {heads, kv_heads, head_dim, rotary_dim ? rotary_dim : head_dim, rope_theta, rope_scaling};
}

int64_t Config::matrix_weights() const {
  return layers * width * (qkv_width() + attention_width() + gate_up_width() + intermediate) +
         (projects() ? 2 * width * table_width() : 0);
}

int64_t Config::parameters() const {
  Arena shapes = Arena::counting("parameters");
  int64_t sum = 0;
  for (const Parameter& p : orpo::parameters(*this, Weights::allocate(*this, DType::f32, shapes)))
    sum += p.tensor.elements();
  return sum;
}

Weights Weights::allocate(const Config& c, DType dtype, Arena& arena) {
  Weights w;
  const auto take = [&](const std::string& name, std::initializer_list<int64_t> shape) {
    return arena.allocate(name, dtype, shape);
  };
  const bool norm_bias = c.norm == Norm::layer, post_norm = c.block == Block::post_norm;
  w.embedding = take("embedding", {c.vocab, c.table_width()});
  if (c.projects()) w.projection_in = take("projection_in", {c.width, c.table_width()});
  if (c.position == Position::learned) w.positions = take("positions", {c.position_offset + c.max_positions, c.width});
  for (int i = 0; i < c.layers; ++i) {
    const std::string layer = "layers." + std::to_string(i) + ".";
    LayerWeights l;
    if (i > 0 || !post_norm) {
      l.attention_norm = take(layer + "attention_norm", {c.width});
      if (norm_bias) l.attention_norm_bias = take(layer + "attention_norm_bias", {c.width});
    }
    l.qkv = take(layer + "qkv", {c.qkv_width(), c.width});
    if (c.qkv_bias) l.qkv_bias = take(layer + "qkv_bias", {c.qkv_width()});
    l.attention_output = take(layer + "attention_output", {c.width, c.attention_width()});
    if (c.attention_output_bias) l.attention_output_bias = take(layer + "attention_output_bias", {c.width});
    if (c.block != Block::parallel) {
      l.mlp_norm = take(layer + "mlp_norm", {c.width});
      if (norm_bias) l.mlp_norm_bias = take(layer + "mlp_norm_bias", {c.width});
    }
    l.gate_up = take(layer + "gate_up", {c.gate_up_width(), c.width});
    if (c.mlp_bias) l.gate_up_bias = take(layer + "gate_up_bias", {c.gate_up_width()});
    l.down = take(layer + "down", {c.width, c.intermediate});
    if (c.mlp_bias) l.down_bias = take(layer + "down_bias", {c.width});
    w.layers.push_back(l);
  }
  w.final_norm = take("final_norm", {c.width});
  if (norm_bias) w.final_norm_bias = take("final_norm_bias", {c.width});
  if (c.projects()) w.projection_out = take("projection_out", {c.table_width(), c.width});
  w.output = c.tied_embeddings ? w.embedding : take("output", {c.vocab, c.table_width()});
  if (c.output_bias) w.output_bias = take("output_bias", {c.vocab});
  return w;
}

std::vector<Parameter> parameters(const Config& c, const Weights& w) {
  std::vector<Parameter> list;
  const auto add = [&](const std::string& name, const Tensor& tensor, int layer) {
    if (tensor) list.push_back({name, tensor, layer, tensor.rank > 1});
  };
  add("embedding", w.embedding, -1);
  add("projection_in", w.projection_in, -1);
  add("positions", w.positions, -1);
  for (int i = 0; i < c.layers; ++i) {
    const std::string layer = "layers." + std::to_string(i) + ".";
    const LayerWeights& l = w.layers[i];
    add(layer + "attention_norm", l.attention_norm, i);
    add(layer + "attention_norm_bias", l.attention_norm_bias, i);
    add(layer + "qkv", l.qkv, i);
    add(layer + "qkv_bias", l.qkv_bias, i);
    add(layer + "attention_output", l.attention_output, i);
    add(layer + "attention_output_bias", l.attention_output_bias, i);
    add(layer + "mlp_norm", l.mlp_norm, i);
    add(layer + "mlp_norm_bias", l.mlp_norm_bias, i);
    add(layer + "gate_up", l.gate_up, i);
    add(layer + "gate_up_bias", l.gate_up_bias, i);
    add(layer + "down", l.down, i);
    add(layer + "down_bias", l.down_bias, i);
  }
  add("final_norm", w.final_norm, c.layers);
  add("final_norm_bias", w.final_norm_bias, c.layers);
  add("projection_out", w.projection_out, c.layers);
  if (!c.tied_embeddings) add("output", w.output, c.layers);
  add("output_bias", w.output_bias, c.layers);
  return list;
}

std::vector<Parameter> parameters(const Config& c, const Masters& masters) {
  std::vector<Parameter> list = parameters(c, masters.weights);
  if (!masters.corrections.embedding) return list;
  const std::vector<Parameter> corrections = parameters(c, masters.corrections);
  for (size_t i = 0; i < list.size(); ++i) list[i].correction = corrections[i].tensor;
  return list;
}

Activations Activations::allocate(const Config& c, DType dtype, int64_t rows, Keep keep, Arena& arena) {
  Activations a;
  a.keep = keep;
  const DType sums = accumulation_dtype(dtype);
  const auto mean = [&] { return c.norm == Norm::layer ? arena.allocate("norm statistics", sums, {rows}) : Tensor(); };
  for (int i = 0; i < c.layers; ++i) {
    const bool shares = i > 0 && keep != Keep::all;
    LayerActivations l = shares ? a.layers[0] : LayerActivations{};
    if (!shares || keep == Keep::inputs) l.input = arena.allocate("layer input", dtype, {rows, c.width});
    if (shares) {
      a.layers.push_back(l);
      continue;
    }
    l.input_mean = mean();
    l.input_rstd = arena.allocate("norm statistics", sums, {rows});
    l.qkv = arena.allocate("query, key, value", dtype, {rows, c.qkv_width()});
    l.attention = arena.allocate("attention", dtype, {rows, c.attention_width()});
    l.lse = arena.allocate("attention statistics", sums, {c.heads, rows});
    if (c.block != Block::parallel) {
      l.middle = arena.allocate("layer middle", dtype, {rows, c.width});
      l.middle_mean = mean();
      l.middle_rstd = arena.allocate("norm statistics", sums, {rows});
    }
    l.gate_up = arena.allocate("gate, up", dtype, {rows, c.gate_up_width()});
    a.layers.push_back(l);
  }
  a.final = arena.allocate("final residual", dtype, {rows, c.width});
  a.final_mean = mean();
  a.final_rstd = arena.allocate("norm statistics", sums, {rows});
  a.hidden = arena.allocate("hidden", dtype, {rows, c.table_width()});
  return a;
}

KeyValueCache KeyValueCache::allocate(const Config& c, DType dtype, int64_t sequences, int64_t positions,
                                      Arena& arena) {
  KeyValueCache cache;
  const auto take = [&](const char* what) {
    return arena.allocate(what, dtype, {sequences, c.kv_heads, positions, c.head_dim});
  };
  for (int i = 0; i < c.layers; ++i) {
    const Tensor keys = take("cached keys");
    cache.layers.push_back({keys, take("cached values")});
  }
  return cache;
}

namespace {

// The position table without the rows that come before position 0.
Tensor from_position_0(const Config& c, const Tensor& table) {
  return table ? table.slice(c.position_offset, c.max_positions) : table;
}

// What is added to every key alike cancels in the softmax, unless a rotation turns it: the gradient of that part of the
// key bias is zero, and Adam would make whole steps of its rounding.
void zero_unseen_bias(const Config& c, const Tensor& dqkv_bias, Backend& backend) {
  const int64_t rotated = c.position == Position::rotary ? c.rope_shape().rotary_dim : 0;
  if (rotated == 0) return backend.zero(dqkv_bias.slice(c.attention_width(), int64_t{c.kv_heads} * c.head_dim));
  for (int head = 0; head < c.kv_heads && rotated < c.head_dim; ++head)
    backend.zero(dqkv_bias.slice(c.attention_width() + int64_t{head} * c.head_dim + rotated, c.head_dim - rotated));
}

// A layer's forward steps, on the memory that all layers share.
struct LayerForward {
  const Config& c;
  const DeviceBatch& batch;
  Backend& backend;
  Tensor normed;    // [rows, width] what a norm just wrote
  Tensor computed;  // [rows, width] what a block just computed; the next norm adds it to the residual stream

  LayerForward(const Config& config, DType dtype, const DeviceBatch& of, Backend& on, Arena& scratch)
      : c(config),
        batch(of),
        backend(on),
        normed(scratch.allocate("norm", dtype, {of.tokens.elements(), c.width})),
        computed(scratch.allocate("branch", dtype, {of.tokens.elements(), c.width})) {}

  // The stream behind a norm: what it read, or in a post-norm layer what it wrote.
  Tensor behind_norm(const Tensor& sum) const { return c.block == Block::post_norm ? normed : sum; }

  // Steps 2 to 8, which leave all that the layer's backward pass reads. residual + branch: the stream that enters.
  void run(int index, const LayerWeights& lw, const LayerActivations& la, const Tensor& residual, const Tensor& branch,
           const CachedRows* cached, const KeyValueCache::Layer& kept) const {
    const AttentionShape attention = c.attention_shape(index);
    // 2. Add the block before, normalise; the first post-norm layer reads the stream as it enters.
    if (lw.attention_norm)
      backend.norm_forward(normed, la.input, la.input_mean, la.input_rstd, residual, branch, lw.attention_norm,
                           lw.attention_norm_bias, c.norm_epsilon);
    const Tensor read = lw.attention_norm ? normed : la.input;
    // 3. Queries, keys and values of all heads in one product.
    backend.linear_forward(la.qkv, read, lw.qkv, lw.qkv_bias);
    // 4. Positions rotate queries and keys, unless they are learned.
    if (c.position == Position::rotary) backend.rope_forward(la.qkv, batch.positions, c.rope_shape());
    // 5. Each row looks back over its own sequence; in decoding over what the cache keeps of it.
    if (cached) backend.keep_keys_values(kept.keys, kept.values, la.qkv, cached->sequences, batch.positions, attention);
    if (cached && cached->continues)
      backend.attention_decode(la.attention, la.qkv, kept.keys, kept.values, cached->sequences, batch.positions,
                               attention);
    else
      backend.attention_forward(la.attention, la.lse, la.qkv, batch, attention);
    // 6. Heads are mixed.
    backend.linear_forward(computed, la.attention, lw.attention_output, lw.attention_output_bias);
    // 7. Add, normalise; a parallel block's MLP reads what attention read.
    if (lw.mlp_norm)
      backend.norm_forward(normed, la.middle, la.middle_mean, la.middle_rstd,
                           lw.attention_norm ? behind_norm(la.input) : la.input, computed, lw.mlp_norm,
                           lw.mlp_norm_bias, c.norm_epsilon);
    // 8. Gate and up in one product, or up alone.
    backend.linear_forward(la.gate_up, normed, lw.gate_up, lw.gate_up_bias);
  }
};

}  // namespace

void forward(const Config& c, const Weights& w, const Activations& a, const DeviceBatch& batch, Backend& backend,
             Arena& scratch, const CachedRows* cached) {
  const Arena::Scope scope(scratch);
  const DType dtype = a.hidden.dtype;
  const int64_t rows = a.hidden.rows();
  const LayerForward layer(c, dtype, batch, backend, scratch);
  const Tensor activated = scratch.allocate("activation", dtype, {rows, c.intermediate});
  const bool parallel = c.block == Block::parallel;

  backend.begin(-1, Pass::forward);
  // 1. Tokens become vectors, learned positions are added: the residual stream starts.
  Tensor residual = c.layers > 0 ? a.layers[0].input : a.final;
  const Tensor positions = from_position_0(c, w.positions);
  if (c.projects()) {
    const Arena::Scope narrow(scratch);
    const Tensor embedded = scratch.allocate("embedding", dtype, {rows, c.table_width()});
    backend.embedding_forward(embedded, w.embedding, batch.tokens, {}, {});
    backend.linear_forward(residual, embedded, w.projection_in, {});
    backend.embedding_forward(residual, {}, {}, positions, batch.positions);
  } else {
    backend.embedding_forward(residual, w.embedding, batch.tokens, positions, batch.positions);
  }
  backend.end(-1, Pass::forward);

  Tensor branch;  // none before the first layer
  for (int i = 0; i < c.layers; ++i) {
    const LayerWeights& lw = w.layers[i];
    const LayerActivations& la = a.layers[i];
    backend.begin(i, Pass::forward);
    // 2. to 8.
    layer.run(i, lw, la, residual, branch, cached, cached ? cached->cache.layers[i] : KeyValueCache::Layer{});
    // 9. silu(gate) * up, or a function of up.
    backend.activation_forward(activated, la.gate_up, c.activation);
    // 10. Back down to the stream's width; in a parallel block beside attention's result.
    backend.linear_forward(layer.computed, activated, lw.down, lw.down_bias, parallel);
    backend.end(i, Pass::forward);
    residual = parallel ? la.input : layer.behind_norm(la.middle);
    branch = layer.computed;
  }

  backend.begin(c.layers, Pass::forward);
  // 11. Add, normalise.
  const Tensor normed = c.projects() ? layer.normed : a.hidden;
  backend.norm_forward(normed, a.final, a.final_mean, a.final_rstd, residual, branch, w.final_norm, w.final_norm_bias,
                       c.norm_epsilon);
  // 12. To the width of the tokens' vectors: what the head reads.
  if (c.projects()) backend.linear_forward(a.hidden, normed, w.projection_out, {});
  backend.end(c.layers, Pass::forward);
}

void backward(const Config& c, const Weights& w, const Weights& g, const Activations& a, const Tensor& dhidden,
              const DeviceBatch& batch, Backend& backend, Arena& scratch) {
  const Arena::Scope scope(scratch);
  const RopeShape rope = c.rope_shape();
  const DType dtype = dhidden.dtype;
  const int64_t rows = dhidden.rows();
  const bool parallel = c.block == Block::parallel, post_norm = c.block == Block::post_norm;
  // The residual stream's gradient: every block adds its share on the way back.
  Tensor dresidual = scratch.allocate("d residual", dtype, {rows, c.width});
  // The gradient of what a norm wrote. A norm or an activation makes its output again over its output's gradient, and
  // the weights that read it get their gradient then.
  Tensor dnormed = c.projects() ? scratch.allocate("d norm", dtype, {rows, c.width}) : dhidden;
  // Back through a norm: dnormed -> dresidual +=, and normed again in dnormed's place. What a post-norm layer's norm
  // wrote is the stream: dresidual, which holds the gradients of all that read it, comes in, and out in its place.
  const auto through_norm = [&](const Tensor& dweight, const Tensor& dbias, const Tensor& sum, const Tensor& mean,
                                const Tensor& rstd, const Tensor& weight, const Tensor& bias) {
    if (post_norm) std::swap(dresidual, dnormed), backend.zero(dresidual);
    backend.norm_backward(dresidual, dweight, dbias, dnormed, dnormed, sum, mean, rstd, weight, bias);
  };

  backend.begin(c.layers, Pass::backward);
  // 12, the input.
  if (c.projects()) backend.linear_backward(dnormed, {}, {}, dhidden, {}, w.projection_out);
  // 11.
  if (post_norm)
    std::swap(dresidual, dnormed);
  else
    backend.zero(dresidual);
  through_norm(g.final_norm, g.final_norm_bias, a.final, a.final_mean, a.final_rstd, w.final_norm, w.final_norm_bias);
  // 12, the weight.
  if (c.projects()) backend.linear_backward({}, g.projection_out, {}, dhidden, dnormed, w.projection_out);
  backend.end(c.layers, Pass::backward);

  for (int i = c.layers - 1; i >= 0; --i) {
    const LayerWeights &lw = w.layers[i], &lg = g.layers[i];
    const LayerActivations& la = a.layers[i];
    backend.begin(i, Pass::backward);
    // Its input is kept: 2. to 8. once more. The last layer's are still there.
    if (a.keep == Keep::inputs && i + 1 < c.layers) {
      const Arena::Scope again(scratch);
      LayerForward(c, dtype, batch, backend, scratch).run(i, lw, la, la.input, {}, nullptr, {});
    }
    const Tensor dgate_up = la.gate_up;
    {
      const Arena::Scope block(scratch);
      const Tensor dactivated = scratch.allocate("d activation", dtype, {rows, c.intermediate}), activated = dactivated;
      // 10, the input. An addition hands its gradient to both sides: dresidual is the branch's gradient as well.
      backend.linear_backward(dactivated, {}, {}, dresidual, {}, lw.down);
      // 9.
      backend.activation_backward(dgate_up, activated, dactivated, la.gate_up, c.activation);
      // 10, the weight.
      backend.linear_backward({}, lg.down, lg.down_bias, dresidual, activated, lw.down);
      // 8, the input.
      backend.linear_backward(post_norm ? dresidual : dnormed, {}, {}, dgate_up, {}, lw.gate_up, post_norm);
    }
    if (!parallel) {
      // 7.
      through_norm(lg.mlp_norm, lg.mlp_norm_bias, la.middle, la.middle_mean, la.middle_rstd, lw.mlp_norm,
                   lw.mlp_norm_bias);
      // 8, the weight.
      backend.linear_backward({}, lg.gate_up, lg.gate_up_bias, dgate_up, dnormed, lw.gate_up);
    }
    {
      const Arena::Scope block(scratch);
      const Tensor dattention = scratch.allocate("d attention", dtype, {rows, c.attention_width()});
      const Tensor dqkv = scratch.allocate("d query, key, value", dtype, {rows, c.qkv_width()});
      // 6.
      backend.linear_backward(dattention, lg.attention_output, lg.attention_output_bias, dresidual, la.attention,
                              lw.attention_output);
      // 5.
      backend.attention_backward(dqkv, dattention, la.attention, la.lse, la.qkv, batch, c.attention_shape(i));
      // 4.
      if (c.position == Position::rotary) backend.rope_backward(dqkv, batch.positions, rope);
      // 3, the input.
      backend.linear_backward(post_norm ? dresidual : dnormed, {}, {}, dqkv, {}, lw.qkv, parallel || post_norm);
      // 2.
      if (lw.attention_norm)
        through_norm(lg.attention_norm, lg.attention_norm_bias, la.input, la.input_mean, la.input_rstd,
                     lw.attention_norm, lw.attention_norm_bias);
      // 8 in a parallel block, and 3, the weights.
      const Tensor read = lw.attention_norm ? dnormed : la.input;
      if (parallel) backend.linear_backward({}, lg.gate_up, lg.gate_up_bias, dgate_up, read, lw.gate_up);
      backend.linear_backward({}, lg.qkv, lg.qkv_bias, dqkv, read, lw.qkv);
      if (lg.qkv_bias) zero_unseen_bias(c, lg.qkv_bias, backend);
    }
    backend.end(i, Pass::backward);
  }

  backend.begin(-1, Pass::backward);
  // 1.
  const Tensor dpositions = from_position_0(c, g.positions);
  if (c.projects()) {
    const Arena::Scope narrow(scratch);
    const Tensor embedded = scratch.allocate("embedding", dtype, {rows, c.table_width()});
    backend.embedding_backward({}, dpositions, dresidual, {}, batch.positions, -1);
    backend.embedding_forward(embedded, w.embedding, batch.tokens, {}, {});
    backend.linear_backward({}, g.projection_in, {}, dresidual, embedded, w.projection_in);
    backend.linear_backward(embedded, {}, {}, dresidual, {}, w.projection_in);
    backend.embedding_backward(g.embedding, {}, embedded, batch.tokens, {}, c.padding_token);
  } else {
    backend.embedding_backward(g.embedding, dpositions, dresidual, batch.tokens, batch.positions, c.padding_token);
  }
  backend.end(-1, Pass::backward);
}

}  // namespace orpo
