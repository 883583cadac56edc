#include "src/bench/operations.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <vector>

#include "src/arena.h"
#include "src/console.h"
#include "src/fail.h"
#include "src/preference.h"
#include "src/rng.h"
#include "src/trainer.h"

namespace orpo::bench {
namespace {

using Clock = std::chrono::steady_clock;

Batch batch_of(const OperationShape& s) {
  Batch batch;
  const auto size = [](int64_t n) { return static_cast<int32_t>(n); };
  const Random random(7, RandomStream::benchmark);
  uint64_t drawn = 0;
  const auto token = [&] { return size(static_cast<int64_t>(random.below(static_cast<uint64_t>(s.vocab), ++drawn))); };
  for (int64_t pair = 0; pair < s.pairs; ++pair) {
    const int32_t begin = size(batch.rows()), first_target = size(batch.targets());
    const int32_t last_prompt_row = begin + size(s.prompt) - 1;
    // A row predicts the next; the prompt's last row predicts the first token of both answers.
    const auto targets = [&](int64_t count, int32_t first_row, int32_t next_rows) {
      for (int64_t i = 0; i < count; ++i) {
        batch.target_rows.push_back(i == 0 ? first_row : next_rows + size(i) - 1);
        batch.target_tokens.push_back(token());
      }
    };
    targets(s.prompt - 1, begin, begin + 1);
    targets(s.chosen, last_prompt_row, begin + size(s.prompt));
    targets(s.rejected, last_prompt_row, begin + size(s.prompt + s.chosen));
    for (const int64_t part : {int64_t{0}, s.chosen, s.rejected})
      for (int64_t i = part ? s.prompt : 0; i < s.prompt + part; ++i)
        batch.tokens.push_back(token()), batch.positions.push_back(size(i));
    batch.segments.push_back({begin, size(s.prompt), size(s.chosen), size(s.rejected)});
    batch.pair_targets.push_back({first_target, size(s.prompt - 1), size(s.chosen), size(s.rejected)});
    batch.pair_ids.push_back(pair);
  }
  return batch;
}

class Operations {
 public:
  Operations(Backend& backend, DType dtype, const OperationShape& shape, double enough)
      : backend_(backend),
        dtype_(dtype),
        sums_(accumulation_dtype(dtype)),
        s_(shape),
        enough_(enough),
        batch_(batch_of(shape)),
        entries_(entries_needed()) {}

  Json measure() {
    for_embedding();
    for_norm();
    const int64_t attention = s_.heads * s_.head_dim, qkv = (s_.heads + 2 * s_.kv_heads) * s_.head_dim;
    for_product("query, key, value", qkv, s_.width);
    for_rope_and_attention(qkv, attention);
    for_product("attention output", s_.width, attention);
    for_product(s_.gated ? "gate, up" : "up", up_width(), s_.width);
    for_activation();
    for_product("down", s_.width, s_.intermediate);
    for_head();
    for_update();
    const auto number = [](bool flag) { return flag ? 1 : 0; };
    return {{"shape",
             {{"pairs", s_.pairs},
              {"prompt", s_.prompt},
              {"chosen", s_.chosen},
              {"rejected", s_.rejected},
              {"width", s_.width},
              {"heads", s_.heads},
              {"kv_heads", s_.kv_heads},
              {"head_dim", s_.head_dim},
              {"rotary_dim", s_.rotary_dim},
              {"intermediate", s_.intermediate},
              {"vocab", s_.vocab},
              {"chunk", s_.chunk},
              {"gated", number(s_.gated)},
              {"layer_norm", number(s_.layer_norm)},
              {"biases", number(s_.biases)},
              {"learned_positions", number(s_.learned_positions)},
              {"update_entries", update_entries()}}},
            {"dtype", dtype_name(dtype_)},
            {"operations", list_}};
  }

 private:
  int64_t up_width() const { return s_.intermediate * (s_.gated ? 2 : 1); }
  int64_t update_entries() const { return up_width() * s_.width; }
  int64_t entries_needed() const {
    return std::max({s_.rows() * up_width(), s_.vocab * s_.width, s_.chunk * s_.vocab, update_entries()});
  }

  // A tensor of small random numbers of either sign.
  Tensor take(Arena& arena, DType dtype, std::initializer_list<int64_t> shape) {
    const Tensor t = arena.allocate("operation", dtype, shape);
    if (dtype != DType::f32 && dtype != DType::bf16) return backend_.zero(t), t;
    constexpr int64_t piece = 1 << 20;
    const std::vector<float>& values = numbers();
    std::vector<bf16> rounded(values.begin(), values.end());
    const void* from = dtype == DType::f32 ? static_cast<const void*>(values.data()) : rounded.data();
    Tensor flat(t.data, dtype, {t.elements()});
    for (int64_t at = 0; at < flat.elements(); at += piece)
      backend_.upload(flat.slice(at, std::min(piece, flat.elements() - at)), from);
    return t;
  }
  static const std::vector<float>& numbers() {
    static const std::vector<float> values = [] {
      std::vector<float> v(1 << 20);
      const Random random(11, RandomStream::benchmark);
      for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(random.uniform(i) - 0.5) * 0.1f;
      return v;
    }();
    return values;
  }
  Arena memory(int64_t tensors_of_most) {
    return Arena("operations", backend_, tensors_of_most * (entries_ * 4 + 64) + (64 << 20));
  }

  void time(const std::string& name, const std::function<void()>& call) {
    const auto round = [&](int64_t calls) {
      const auto start = Clock::now();
      for (int64_t i = 0; i < calls; ++i) call();
      backend_.synchronize();
      return std::chrono::duration<double>(Clock::now() - start).count();
    };
    double seconds = round(1);
    int64_t calls = 1;
    if (enough_ > 0) {
      seconds = round(1);  // the first one built what later ones find ready
      calls = std::clamp<int64_t>(static_cast<int64_t>(enough_ / std::max(seconds, 1e-7)), 1, 10000);
      for (int i = 0; i < 3; ++i) seconds = std::min(i ? seconds : 1e30, round(calls) / static_cast<double>(calls));
    }
    list_.push_back({{"name", name}, {"seconds", seconds}, {"calls", calls}});
  }

  void for_embedding() {
    Arena arena = memory(3);
    const DeviceBatch batch = to_device(batch_, backend_, arena);
    const Tensor out = take(arena, dtype_, {s_.rows(), s_.width}), weight = take(arena, dtype_, {s_.vocab, s_.width}),
                 dweight = take(arena, sums_, {s_.vocab, s_.width});
    const int64_t positions = s_.prompt + std::max(s_.chosen, s_.rejected);
    const auto learned = [&](DType dtype) {
      return s_.learned_positions ? take(arena, dtype, {positions, s_.width}) : Tensor();
    };
    const Tensor position = learned(dtype_), dposition = learned(sums_);
    time("embedding_forward",
         [&] { backend_.embedding_forward(out, weight, batch.tokens, position, batch.positions); });
    time("embedding_backward",
         [&] { backend_.embedding_backward(dweight, dposition, out, batch.tokens, batch.positions, -1); });
  }

  void for_norm() {
    Arena arena = memory(6);
    const auto rows = [&] { return take(arena, dtype_, {s_.rows(), s_.width}); };
    const Tensor out = rows(), sum = rows(), residual = rows(), branch = rows(), dsum = rows();
    const auto statistics = [&](bool wanted) { return wanted ? take(arena, sums_, {s_.rows()}) : Tensor(); };
    const auto vector = [&](DType dtype, bool wanted) { return wanted ? take(arena, dtype, {s_.width}) : Tensor(); };
    const bool layer = s_.layer_norm;
    const Tensor mean = statistics(layer), rstd = statistics(true), weight = vector(dtype_, true),
                 bias = vector(dtype_, layer), dweight = vector(sums_, true), dbias = vector(sums_, layer);
    time("norm_forward", [&] { backend_.norm_forward(out, sum, mean, rstd, residual, branch, weight, bias, 1e-5); });
    time("norm_backward",
         [&] { backend_.norm_backward(dsum, dweight, dbias, branch, residual, sum, mean, rstd, weight, bias); });
  }

  void for_product(const std::string& name, int64_t n, int64_t k) {
    Arena arena = memory(4);
    const Tensor in = take(arena, dtype_, {s_.rows(), k}), out = take(arena, dtype_, {s_.rows(), n}),
                 weight = take(arena, dtype_, {n, k}), dweight = take(arena, sums_, {n, k}),
                 bias = s_.biases ? take(arena, dtype_, {n}) : Tensor(),
                 dbias = s_.biases ? take(arena, sums_, {n}) : Tensor();
    time(name + ", forward", [&] { backend_.linear_forward(out, in, weight, bias); });
    time(name + ", input's gradient", [&] { backend_.linear_backward(in, {}, {}, out, {}, weight); });
    time(name + ", weight's gradient", [&] { backend_.linear_backward({}, dweight, dbias, out, in, weight); });
  }

  void for_rope_and_attention(int64_t qkv_width, int64_t attention_width) {
    Arena arena = memory(5);
    const DeviceBatch batch = to_device(batch_, backend_, arena);
    const auto size = [](int64_t n) { return static_cast<int>(n); };
    const Tensor qkv = take(arena, dtype_, {s_.rows(), qkv_width}), dqkv = take(arena, dtype_, {s_.rows(), qkv_width}),
                 out = take(arena, dtype_, {s_.rows(), attention_width}),
                 dout = take(arena, dtype_, {s_.rows(), attention_width}),
                 lse = take(arena, sums_, {s_.heads, s_.rows()});
    const AttentionShape attention{size(s_.heads), size(s_.kv_heads), size(s_.head_dim),
                                   static_cast<float>(1 / std::sqrt(static_cast<double>(s_.head_dim))), 0};
    const RopeShape rope{attention.heads, attention.kv_heads, attention.head_dim, size(s_.rotary_dim), 1e4};
    if (s_.rotary_dim) time("rope_forward", [&] { backend_.rope_forward(qkv, batch.positions, rope); });
    time("attention_forward", [&] { backend_.attention_forward(out, lse, qkv, batch, attention); });
    time("attention_backward", [&] { backend_.attention_backward(dqkv, dout, out, lse, qkv, batch, attention); });
    if (s_.rotary_dim) time("rope_backward", [&] { backend_.rope_backward(dqkv, batch.positions, rope); });
  }

  void for_activation() {
    Arena arena = memory(4);
    const Activation kind = s_.gated ? Activation::swiglu : Activation::gelu_tanh;
    const Tensor up = take(arena, dtype_, {s_.rows(), up_width()}), dup = take(arena, dtype_, {s_.rows(), up_width()}),
                 out = take(arena, dtype_, {s_.rows(), s_.intermediate}),
                 dout = take(arena, dtype_, {s_.rows(), s_.intermediate});
    time("activation_forward", [&] { backend_.activation_forward(out, up, kind); });
    time("activation_backward", [&] { backend_.activation_backward(dup, out, dout, up, kind); });
  }

  void for_head() {
    Arena arena = memory(6);
    const DeviceBatch batch = to_device(batch_, backend_, arena);
    const int64_t chunk = std::min(s_.chunk, batch_.targets());
    const Tensor hidden = take(arena, dtype_, {s_.rows(), s_.width}), rows = take(arena, dtype_, {chunk, s_.width}),
                 weight = take(arena, dtype_, {s_.vocab, s_.width}), dweight = take(arena, sums_, {s_.vocab, s_.width}),
                 logits = take(arena, sums_, {chunk, s_.vocab}), dlogits = take(arena, dtype_, {chunk, s_.vocab}),
                 logp = take(arena, sums_, {batch_.targets()}), lse = take(arena, sums_, {batch_.targets()}),
                 coefficient = take(arena, sums_, {batch_.targets()});
    const Tensor targets = batch.target_rows.slice(0, chunk), tokens = batch.target_tokens.slice(0, chunk);
    const Tensor results = arena.allocate("results", DType::f64, {s_.pairs, pair_result_numbers});
    time("gather", [&] { backend_.gather(rows, hidden, targets); });
    time("logits, forward", [&] { backend_.linear_forward(logits, rows, weight, {}); });
    time("head_forward", [&] { backend_.head_forward(logp.slice(0, chunk), lse.slice(0, chunk), logits, tokens); });
    time("preference", [&] {
      backend_.preference(results, coefficient, logp, batch.pair_targets, Objective::orpo, 0.1, {1000, 8}, true);
    });
    time("head_backward", [&] {
      backend_.head_backward(dlogits, logits, lse.slice(0, chunk), logp.slice(0, chunk), coefficient.slice(0, chunk),
                             tokens);
    });
    time("logits, input's gradient", [&] { backend_.linear_backward(rows, {}, {}, dlogits, {}, weight); });
    time("logits, weight's gradient", [&] { backend_.linear_backward({}, dweight, {}, dlogits, rows, weight); });
    time("scatter_add", [&] { backend_.scatter_add(hidden, rows, targets); });
  }

  void for_update() {
    Arena arena = memory(5);
    const auto entries = [&](DType dtype) { return take(arena, dtype, {update_entries()}); };
    const bool corrected = dtype_ != sums_;
    const AdamWTensors p{entries(dtype_), corrected ? entries(DType::i16) : Tensor(),
                         entries(sums_),  entries(sums_),
                         entries(sums_),  true};
    backend_.zero(p.second);  // a mean of squares is not negative
    time("zero", [&] { backend_.zero(p.gradient); });
    const Tensor sum = arena.allocate("sum", DType::f64, {1});
    time("sums_of_squares", [&] { backend_.sums_of_squares(sum, std::vector<Tensor>{p.gradient}); });
    time("adamw", [&] { backend_.adamw(std::vector<AdamWTensors>{p}, {1e-6, 0.9, 0.999, 1e-8, 0.1, 1, 1}); });
  }

  Backend& backend_;
  DType dtype_, sums_;
  OperationShape s_;
  double enough_;
  Batch batch_;
  int64_t entries_;
  Json list_ = Json::array();
};

}  // namespace

OperationShape operation_shape(const std::string& name) {
  // 1,024 rows a pair; logits in chunks of 128 MiB (src/head.h).
  if (name == "mistral-7b")
    return {8, 256, 384, 384, 4096, 32, 8, 128, 128, 14336, 32000, 1023, true, false, false, false};
  if (name == "phi-2") return {8, 256, 384, 384, 2560, 32, 32, 80, 32, 10240, 51200, 512, false, true, true, false};
  if (name == "gpt2") return {8, 256, 384, 384, 768, 12, 12, 64, 0, 3072, 50304, 512, false, true, true, true};
  if (name == "tiny") return {2, 9, 17, 13, 48, 4, 2, 12, 12, 72, 123, 38, true, false, false, false};
  fail("--shape: '", name, "' is not one of mistral-7b, phi-2, gpt2, tiny");
}

Json measure_operations(Backend& backend, DType dtype, const OperationShape& shape, double enough) {
  return Operations(backend, dtype, shape, enough).measure();
}

std::string operations_text(const Json& measured) {
  std::string text = concat("operations alone, ", measured.at("dtype").get<std::string>(), "\n");
  for (const Json& operation : measured.at("operations"))
    text += concat("  ", operation.at("name").get<std::string>(), ": ",
                   number_text(1e6 * operation.at("seconds").get<double>(), 1), " us\n");
  return text;
}

}  // namespace orpo::bench
