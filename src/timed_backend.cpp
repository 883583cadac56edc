#include "src/timed_backend.h"

namespace orpo {
namespace {

double total_bytes(std::initializer_list<const Tensor*> tensors) {
  double bytes = 0;
  for (const Tensor* t : tensors) bytes += static_cast<double>(t->bytes());
  return bytes;
}

// (query, key) pairs under the causal mask; a window is not taken into account.
double visible(const Batch& batch) {
  const auto part = [](double before, double rows) { return rows * before + rows * (rows + 1) / 2; };
  double sum = 0;
  for (const Segment& s : batch.segments)
    sum += part(0, s.trunk) + part(s.trunk, s.chosen) + part(s.trunk, s.rejected);
  return sum;
}

class TimedBackend final : public Backend {
 public:
  TimedBackend(std::unique_ptr<Backend> inner, int layers, Profile& profile)
      : inner_(std::move(inner)), layers_(layers), profile_(profile) {}

  std::string name() const override { return inner_->name(); }
  void* allocate(int64_t bytes) override { return inner_->allocate(bytes); }
  bool allocates_zeros() const override { return inner_->allocates_zeros(); }
  void release(void* memory, int64_t bytes) override { inner_->release(memory, bytes); }
  void synchronize() override { inner_->synchronize(); }
  int64_t free_memory() const override { return inner_->free_memory(); }
  int64_t peak_memory() const override { return inner_->peak_memory(); }
  int64_t workspace_bytes() const override { return inner_->workspace_bytes(); }
  void reserve_workspace(int64_t bytes) override { inner_->reserve_workspace(bytes); }
  double published_rate(DType dtype) const override { return inner_->published_rate(dtype); }
  void begin(int layer, Pass pass) override {
    layer_ = layer;
    inner_->begin(layer, pass);
  }
  void end(int layer, Pass pass) override {
    layer_ = outside;
    inner_->end(layer, pass);
  }

  void upload(const Tensor& device, const void* host) override {
    timed(Part::data, 0, {&device}, [&] { inner_->upload(device, host); }, Part::data);
  }
  // Not timed: a checkpoint's thread downloads beside the step.
  void download(void* host, const Tensor& device) override { inner_->download(host, device); }
  // Outside the layers it is gradients that are zeroed.
  void zero(const Tensor& x) override {
    timed(layer_ == outside ? Part::optimizer : Part::head, 0, {&x}, [&] { inner_->zero(x); });
  }

  void embedding_forward(const Tensor& out, const Tensor& weight, const Tensor& tokens, const Tensor& position_weight,
                         const Tensor& positions) override {
    timed(Part::embedding, 0, {&out, &out},
          [&] { inner_->embedding_forward(out, weight, tokens, position_weight, positions); });
  }
  void embedding_backward(const Tensor& dweight, const Tensor& dposition_weight, const Tensor& dout,
                          const Tensor& tokens, const Tensor& positions, int64_t padding) override {
    timed(Part::embedding, 0, {&dout, &dout},
          [&] { inner_->embedding_backward(dweight, dposition_weight, dout, tokens, positions, padding); });
  }
  void linear_forward(const Tensor& out, const Tensor& in, const Tensor& weight, const Tensor& bias,
                      bool adds) override {
    const ProductShape shape{false, false, false, in.rows(), weight.rows(), weight.columns(), out.dtype != in.dtype,
                             out.pitch(), layer_ == layers_};
    timed_product(shape, 1, {&out, &in, &weight}, [&] { inner_->linear_forward(out, in, weight, bias, adds); });
  }
  void linear_backward(const Tensor& din, const Tensor& dweight, const Tensor& dbias, const Tensor& dout,
                       const Tensor& in, const Tensor& weight, bool adds) override {
    const ProductShape shape{true, static_cast<bool>(din), static_cast<bool>(dweight), dout.rows(), weight.rows(),
                             weight.columns(), false, dout.pitch(), layer_ == layers_};
    timed_product(shape, shape.din + shape.dweight, {&din, &dweight, &dweight, &dout, &in, &weight},
                  [&] { inner_->linear_backward(din, dweight, dbias, dout, in, weight, adds); });
  }
  void norm_forward(const Tensor& out, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                    const Tensor& residual, const Tensor& branch, const Tensor& weight, const Tensor& bias,
                    double epsilon) override {
    timed(Part::norm, 0, {&out, &sum, &residual, &branch},
          [&] { inner_->norm_forward(out, sum, mean, rstd, residual, branch, weight, bias, epsilon); });
  }
  void norm_backward(const Tensor& dsum, const Tensor& dweight, const Tensor& dbias, const Tensor& out,
                     const Tensor& dout, const Tensor& sum, const Tensor& mean, const Tensor& rstd,
                     const Tensor& weight, const Tensor& bias) override {
    timed(Part::norm, 0, {&dsum, &dsum, &out, &dout, &sum},
          [&] { inner_->norm_backward(dsum, dweight, dbias, out, dout, sum, mean, rstd, weight, bias); });
  }
  void rope_forward(const Tensor& qkv, const Tensor& positions, const RopeShape& shape) override {
    timed(Part::rope, 0, {&qkv, &qkv}, [&] { inner_->rope_forward(qkv, positions, shape); });
  }
  void rope_backward(const Tensor& dqkv, const Tensor& positions, const RopeShape& shape) override {
    timed(Part::rope, 0, {&dqkv, &dqkv}, [&] { inner_->rope_backward(dqkv, positions, shape); });
  }
  // Useful FLOPs: two products forward, four backward; the scores that the backward pass makes again are not counted.
  void attention_forward(const Tensor& out, const Tensor& lse, const Tensor& qkv, const DeviceBatch& batch,
                         const AttentionShape& shape) override {
    timed(Part::attention, 4 * visible(*batch.host) * static_cast<double>(out.columns()), {&out, &lse, &qkv},
          [&] { inner_->attention_forward(out, lse, qkv, batch, shape); });
  }
  void attention_backward(const Tensor& dqkv, const Tensor& dout, const Tensor& out, const Tensor& lse,
                          const Tensor& qkv, const DeviceBatch& batch, const AttentionShape& shape) override {
    timed(Part::attention, 8 * visible(*batch.host) * static_cast<double>(out.columns()),
          {&dqkv, &dout, &out, &lse, &qkv},
          [&] { inner_->attention_backward(dqkv, dout, out, lse, qkv, batch, shape); });
  }
  // Decoding is no part of a training step: time and the new rows' bytes.
  void keep_keys_values(const Tensor& keys, const Tensor& values, const Tensor& qkv, const Tensor& sequences,
                        const Tensor& positions, const AttentionShape& shape) override {
    timed(Part::attention, 0, {&qkv},
          [&] { inner_->keep_keys_values(keys, values, qkv, sequences, positions, shape); });
  }
  void attention_decode(const Tensor& out, const Tensor& qkv, const Tensor& keys, const Tensor& values,
                        const Tensor& sequences, const Tensor& positions, const AttentionShape& shape) override {
    timed(Part::attention, 0, {&out, &qkv},
          [&] { inner_->attention_decode(out, qkv, keys, values, sequences, positions, shape); });
  }
  void activation_forward(const Tensor& out, const Tensor& gate_up, Activation activation) override {
    timed(Part::activation, 0, {&out, &gate_up}, [&] { inner_->activation_forward(out, gate_up, activation); });
  }
  void activation_backward(const Tensor& dgate_up, const Tensor& out, const Tensor& dout, const Tensor& gate_up,
                           Activation activation) override {
    timed(Part::activation, 0, {&dgate_up, &out, &dout, &gate_up},
          [&] { inner_->activation_backward(dgate_up, out, dout, gate_up, activation); });
  }
  void gather(const Tensor& out, const Tensor& in, const Tensor& target_rows) override {
    timed(Part::head, 0, {&out, &out}, [&] { inner_->gather(out, in, target_rows); });
  }
  void scatter_add(const Tensor& dout, const Tensor& din, const Tensor& target_rows) override {
    timed(Part::head, 0, {&din, &din, &din}, [&] { inner_->scatter_add(dout, din, target_rows); });
  }
  void head_forward(const Tensor& logp, const Tensor& lse, const Tensor& logits, const Tensor& target_tokens) override {
    timed(Part::head, 0, {&logits}, [&] { inner_->head_forward(logp, lse, logits, target_tokens); });
  }
  void preference(const Tensor& results, const Tensor& coefficient, const Tensor& logp, const Tensor& pair_targets,
                  Objective objective, double lambda, const Normalisers& normalisers,
                  bool nll_includes_prompt) override {
    timed(Part::head, 0, {&coefficient, &logp}, [&] {
      inner_->preference(results, coefficient, logp, pair_targets, objective, lambda, normalisers, nll_includes_prompt);
    });
  }
  void head_backward(const Tensor& dlogits, const Tensor& logits, const Tensor& lse, const Tensor& logp,
                     const Tensor& coefficient, const Tensor& target_tokens) override {
    timed(Part::head, 0, {&dlogits, &logits},
          [&] { inner_->head_backward(dlogits, logits, lse, logp, coefficient, target_tokens); });
  }
  void sums_of_squares(const Tensor& sums, std::span<const Tensor> gradients) override {
    double bytes = 0;
    for (const Tensor& g : gradients) bytes += total_bytes({&g});
    timed(Part::optimizer, 0, bytes, [&] { inner_->sums_of_squares(sums, gradients); });
  }
  void adamw(std::span<const AdamWTensors> list, const AdamW& settings) override {
    double bytes = 0;
    for (const AdamWTensors& p : list)
      bytes += 2 * total_bytes({&p.weight, &p.correction, &p.first, &p.second}) + total_bytes({&p.gradient});
    timed(Part::optimizer, 0, bytes, [&] { inner_->adamw(list, settings); });
  }

 private:
  static constexpr int outside = -2;  // no bracket is open

  // tensors: each named as often as it is read or written.
  template <class Operation>
  void timed(Part part, double flops, std::initializer_list<const Tensor*> tensors, Operation&& operation,
             Part before = Part::host) {
    timed(part, flops, total_bytes(tensors), operation, before);
  }
  template <class Operation>
  void timed(Part part, double flops, double bytes, Operation&& operation, Part before = Part::host) {
    const auto start = Profile::Clock::now();
    operation();
    inner_->synchronize();
    profile_.add(part, start, flops, bytes, before);
  }
  template <class Operation>
  void timed_product(const ProductShape& s, int products, std::initializer_list<const Tensor*> tensors,
                     Operation&& operation) {
    const auto start = Profile::Clock::now();
    operation();
    inner_->synchronize();
    const double flops = 2.0 * static_cast<double>(s.rows) * static_cast<double>(s.n) * static_cast<double>(s.k);
    profile_.add(s, start, products * flops, total_bytes(tensors));
  }

  std::unique_ptr<Backend> inner_;
  int layers_, layer_ = outside;
  Profile& profile_;
};

}  // namespace

std::unique_ptr<Backend> make_timed_backend(std::unique_ptr<Backend> inner, int layers, Profile& profile) {
  return std::make_unique<TimedBackend>(std::move(inner), layers, profile);
}

}  // namespace orpo
