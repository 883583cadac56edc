// A GPU beside the emulator: what is added in a fixed order, or only moved, has the same bits; what calls an
// exponential or multiplies on tensor cores comes near. Where there is no GPU, another order of the emulator's threads
// stands in for it, so that all of this has run before there is one.
#include <cstdio>

#include "src/preference.h"
#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

constexpr int64_t rows = 70, width = 40, vocab = 123, inner = 56, positions = 64;
constexpr AttentionShape attention{4, 2, 10, 0.3f, 0};
constexpr RopeShape rope{4, 2, 10, 8, 1e4};
constexpr int64_t qkv_width = (4 + 2 * 2) * 10;

struct Output {
  Values values;
  DType dtype;
  bool exact;  // additions in a fixed order, and moves
};

// Each operation by itself on the same inputs, so that a difference is its own.
class Operations {
 public:
  Operations(Backend& backend, DType dtype) : backend_(backend), dtype_(dtype), sums_(accumulation_dtype(dtype)) {
    move_and_add();
    compute_rows();
    attend();
    score();
    update();
  }
  std::map<std::string, Output> outputs;

 private:
  DeviceTensor tensor(DType dtype, std::initializer_list<int64_t> shape, double low = -1, double high = 1) {
    const int64_t count = Tensor(nullptr, dtype, shape).elements();
    return {backend_, dtype, shape, rounded(random_values(count, ++seed_, low, high), dtype)};
  }
  DeviceTensor indices(int64_t count, int64_t limit) {
    Values values = random_values(count, ++seed_, 0, static_cast<double>(limit));
    for (double& v : values) v = std::floor(v);
    return {backend_, DType::i32, {count}, values};
  }
  void keep(const std::string& name, const DeviceTensor& t, bool exact = false) {
    outputs[name] = {t.values(), (*t).dtype, exact};
  }

  void move_and_add() {
    const DeviceTensor table = tensor(dtype_, {vocab, width}), learned = tensor(dtype_, {positions, width}),
                       in = tensor(dtype_, {rows, width}), tokens = indices(rows, vocab), at = indices(rows, positions),
                       list = indices(2 * rows, rows), more = tensor(dtype_, {2 * rows, width});
    const DeviceTensor out = tensor(dtype_, {rows, width}), dtable = tensor(sums_, {vocab, width}),
                       dlearned = tensor(sums_, {positions, width}), gathered = tensor(dtype_, {2 * rows, width}),
                       scattered = tensor(dtype_, {rows, width});
    backend_.embedding_forward(out, table, tokens, learned, at);
    keep("embedding_forward", out, true);
    backend_.embedding_backward(dtable, dlearned, in, tokens, at, 0);
    keep("embedding_backward", dtable, true), keep("embedding_backward, positions", dlearned, true);
    backend_.gather(gathered, in, list);
    keep("gather", gathered, true);
    backend_.scatter_add(scattered, more, list);
    keep("scatter_add", scattered, true);
    const DeviceTensor squares(backend_, DType::f64, {1});
    const Tensor& matrix = dtable;
    backend_.sums_of_squares(squares, std::vector<Tensor>{matrix});
    keep("sums_of_squares", squares, true);
  }

  void compute_rows() {
    const DeviceTensor in = tensor(dtype_, {rows, width}), branch = tensor(dtype_, {rows, width}),
                       weight = tensor(dtype_, {inner, width}), bias = tensor(dtype_, {inner}),
                       scale = tensor(dtype_, {width}), shift = tensor(dtype_, {width});
    const DeviceTensor wide = tensor(dtype_, {rows, inner}), dweight = tensor(sums_, {inner, width}),
                       dbias = tensor(sums_, {inner}), din = tensor(dtype_, {rows, width});
    backend_.linear_forward(wide, in, weight, bias);
    keep("linear_forward", wide);
    backend_.linear_backward(din, dweight, dbias, wide, in, weight);
    keep("linear_backward", din), keep("linear_backward, weight", dweight), keep("linear_backward, bias", dbias);

    const DeviceTensor sum = tensor(dtype_, {rows, width}), mean = tensor(sums_, {rows}), rstd = tensor(sums_, {rows}),
                       out = tensor(dtype_, {rows, width}), dscale = tensor(sums_, {width}),
                       dshift = tensor(sums_, {width}), dsum = tensor(dtype_, {rows, width});
    backend_.norm_forward(out, sum, mean, rstd, in, branch, scale, shift, 1e-5);
    keep("norm_forward", out), keep("norm_forward, sum", sum, true), keep("norm_forward, rstd", rstd);
    backend_.norm_backward(dsum, dscale, dshift, {}, branch, sum, mean, rstd, scale, shift);
    keep("norm_backward", dsum), keep("norm_backward, weight", dscale);

    for (const Activation kind : {Activation::swiglu, Activation::gelu, Activation::gelu_tanh, Activation::relu}) {
      const int64_t columns = inner / (is_gated(kind) ? 2 : 1);
      const DeviceTensor up = tensor(dtype_, {rows, inner}, -4, 4), dout = tensor(dtype_, {rows, columns}),
                         activated = tensor(dtype_, {rows, columns}), dup = tensor(dtype_, {rows, inner});
      const std::string name = "activation " + std::to_string(static_cast<int>(kind));
      backend_.activation_forward(activated, up, kind);
      keep(name + ", forward", activated, kind == Activation::relu);
      backend_.activation_backward(dup, {}, dout, up, kind);
      keep(name + ", backward", dup, kind == Activation::relu);
    }
  }

  void attend() {
    Batch batch;
    batch.segments = {{0, 20, 9, 12}, {41, 3, 15, 11}};
    batch.tokens.resize(rows);
    Values at_positions;
    for (const Segment& s : batch.segments)
      for (const auto& [first, count] : {std::pair{0, s.trunk}, {s.trunk, s.chosen}, {s.trunk, s.rejected}})
        for (int32_t i = 0; i < count; ++i) at_positions.push_back(first + i);
    const DeviceTensor at(backend_, DType::i32, {rows}, at_positions),
        segments(backend_, DType::i32, {2, 4}, Values{0, 20, 9, 12, 41, 3, 15, 11});
    DeviceBatch on_device;
    on_device.positions = at, on_device.segments = segments, on_device.host = &batch;
    const DeviceTensor qkv = tensor(dtype_, {rows, qkv_width}), dout = tensor(dtype_, {rows, 40}),
                       out = tensor(dtype_, {rows, 40}), lse = tensor(sums_, {4, rows}),
                       dqkv = tensor(dtype_, {rows, qkv_width}), turned = tensor(dtype_, {rows, qkv_width});
    backend_.rope_forward(turned, at, rope);
    keep("rope_forward", turned);
    backend_.attention_forward(out, lse, qkv, on_device, attention);
    keep("attention_forward", out), keep("attention_forward, log-sum-exp", lse);
    backend_.attention_backward(dqkv, dout, out, lse, qkv, on_device, attention);
    keep("attention_backward", dqkv);
  }

  void score() {
    const DeviceTensor logits = tensor(sums_, {rows, vocab}, -9, 9), tokens = indices(rows, vocab),
                       logp = tensor(sums_, {rows}, -3, -0.1), lse = tensor(sums_, {rows}),
                       coefficient = tensor(sums_, {rows}), dlogits = tensor(dtype_, {rows, vocab}),
                       pairs = DeviceTensor(backend_, DType::i32, {2, 4}, Values{0, 9, 12, 14, 35, 5, 20, 10});
    const DeviceTensor results(backend_, DType::f64, {2, pair_result_numbers});
    backend_.preference(results, coefficient, logp, pairs, Objective::orpo, 0.1, {40, 2}, true);
    keep("preference", coefficient);
    backend_.head_forward(logp, lse, logits, tokens);
    keep("head_forward", logp), keep("head_forward, log-sum-exp", lse);
    backend_.head_backward(dlogits, logits, lse, logp, coefficient, tokens);
    keep("head_backward", dlogits);
  }

  void update() {
    const DeviceTensor weight = tensor(dtype_, {width, width}), first = tensor(sums_, {width, width}, -0.1, 0.1),
                       second = tensor(sums_, {width, width}, 0, 0.1), gradient = tensor(sums_, {width, width}),
                       correction(backend_, DType::i16, {width, width});
    const AdamWTensors p{weight, dtype_ == sums_ ? Tensor() : Tensor(*correction), first, second, gradient, true};
    backend_.adamw(std::vector<AdamWTensors>{p}, {1e-3, 0.9, 0.999, 1e-8, 0.1, 3, 0.5});
    keep("adamw", weight), keep("adamw, first moment", first), keep("adamw, second moment", second);
  }

  Backend& backend_;
  DType dtype_, sums_;
  uint64_t seed_ = 40;
};

}  // namespace

TEST_CASE("gpu: beside the emulator, the same bits where additions have an order, near elsewhere") {
  const auto emulated = make_emulated_backend({});
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Operations expected(*emulated, dtype);
    const auto gpu = make_gpu_backend();
    const auto other = gpu ? nullptr : make_emulated_backend({.order = emulator::Order::reverse});
    Backend& device = gpu ? *gpu : *other;
    const Operations found(device, dtype);
    if (gpu) std::printf("the GPU beside the emulator, %s:\n", dtype_name(dtype));
    for (const auto& [name, output] : expected.outputs) {
      const Values& values = found.outputs.at(name).values;
      const double error = largest_error(values, output.values);
      const double spacings = error == 0 ? 0 : error / (spacing(output.dtype) * largest(output.values));
      if (gpu && error == 0) std::printf("  %s: the same bits\n", name.c_str());
      if (gpu && error != 0) std::printf("  %s: %.2g spacings at the largest value\n", name.c_str(), spacings);
      INFO(name);
      CHECK(spacings <= (output.exact ? 0 : 64));
      if (!gpu) CHECK(error == 0);
    }
  }
}
