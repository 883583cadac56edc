// The optimiser: the gradient's sums of squares and AdamW, each one pass over memory.
#include <algorithm>

#include "src/cpu/backend.h"
#include "src/cpu/vector.h"
#include "src/master.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

namespace {

// Entries a thread takes at a time; sums keep this grouping whatever the number of threads.
constexpr int64_t block = 1 << 14;

int64_t blocks_of(const Tensor& t) { return (t.elements() + block - 1) / block; }

// The blocks of many tensors as one row of blocks: a model's small tensors cost no parallel loop each.
class Blocks {
 public:
  template <class List, class TensorOf> Blocks(const List& list, TensorOf&& tensor_of) {
    for (const auto& entry : list) {
      elements_.push_back(tensor_of(entry).elements());
      first_.push_back(first_.back() + blocks_of(tensor_of(entry)));
    }
  }
  int64_t count() const { return first_.back(); }
  int64_t first(size_t tensor) const { return first_[tensor]; }  // of the tensor; of the one after the last: count()

  // body(block, tensor, begin, count) for every block, dealt to threads in equal runs.
  template <class Body> void for_each(Body&& body) const {
    for_rows(count(), [&](int64_t b) {
      const auto t = static_cast<size_t>(std::upper_bound(first_.begin(), first_.end(), b) - first_.begin() - 1);
      const int64_t begin = (b - first_[t]) * block;
      body(b, t, begin, std::min(block, elements_[t] - begin));
    });
  }

 private:
  std::vector<int64_t> first_{0}, elements_;
};

template <class T> double squares_of_block(const T* x, int64_t count) {
  constexpr int64_t run = 32;  // enough sums side by side to wait for memory, not for one another
  double partial[run] = {};
  int64_t i = 0;
  for (; i + run <= count; i += run)
    for (int64_t l = 0; l < run; ++l) {
      const double value = static_cast<double>(static_cast<Accumulator<T>>(x[i + l]));
      partial[l] += value * value;
    }
  for (; i < count; ++i) partial[0] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  for (int64_t half = run / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) partial[l] += partial[l + half];
  return partial[0];
}

// The settings as each entry needs them.
template <class A> struct Step {
  A beta1, beta2, one_minus_beta1, one_minus_beta2, epsilon, keep, rate, second_correction, gradient_scale;

  Step(const AdamW& s, bool decays)
      : beta1(A(s.beta1)),
        beta2(A(s.beta2)),
        one_minus_beta1(A(1 - s.beta1)),
        one_minus_beta2(A(1 - s.beta2)),
        epsilon(A(s.epsilon)),
        keep(A(1 - (decays ? s.learning_rate * s.weight_decay : 0))),
        rate(A(s.learning_rate / (1 - std::pow(s.beta1, static_cast<double>(s.step))))),
        second_correction(A(1 / std::sqrt(1 - std::pow(s.beta2, static_cast<double>(s.step))))),
        gradient_scale(A(s.gradient_scale)) {}
};

// A run of masters in memory, a vector at a time: weights of A themselves, or bf16 weights with their corrections
// (master.h, whose two functions these are).
template <class T, class A> struct MasterRun {
  T* weight;
  int16_t* correction;

  template <class Count> Vector<A> load(int64_t i, Count n) const {
    if constexpr (!std::is_same_v<T, bf16>) {
      return cpu::load(weight + i, n);
    } else {
      const Words high = std::bit_cast<Words>(cpu::load(weight + i, n));
      const Integers low = __builtin_convertvector(load_halves(correction + i, n), Integers);
      return std::bit_cast<Vector<float>>(high + std::bit_cast<Words>(low));
    }
  }

  template <class Count> void store(int64_t i, Vector<A> master, Count n) const {
    if constexpr (!std::is_same_v<T, bf16>) {
      cpu::store(weight + i, master, n);
    } else {
      const HalfWords rounded = narrow(master);
      const Words high = std::bit_cast<Words>(widen(rounded));
      Integers low = std::bit_cast<Integers>(std::bit_cast<Words>(master) - high);
      low = low > 32767 ? Integers{} + 32767 : low;
      store_halves(weight + i, rounded, n);
      store_halves(correction + i, __builtin_convertvector(low, Halves), n);
    }
  }

 private:
  using Integers = VectorOf<float>::integers;
  typedef int16_t Halves __attribute__((vector_size(vector_bytes / 2)));

  template <class Count> static Halves load_halves(const int16_t* p, Count n) {
    Halves h{};
    std::memcpy(&h, p, static_cast<size_t>(n) * sizeof *p);
    return h;
  }
  template <class Half, class V, class Count> static void store_halves(Half* p, const V& v, Count n) {
    std::memcpy(p, &v, static_cast<size_t>(n) * sizeof *p);
  }
};

template <class T, class A>
void update_block(MasterRun<T, A> master, A* first, A* second, const A* gradient, int64_t count, const Step<A>& s) {
  for_vectors<A>(count, [&](int64_t i, auto n) {
    const Vector<A> g = load(gradient + i, n) * s.gradient_scale;
    const Vector<A> m = load(first + i, n) * s.beta1 + g * s.one_minus_beta1;
    const Vector<A> v = load(second + i, n) * s.beta2 + g * g * s.one_minus_beta2;
    store(first + i, m, n);
    store(second + i, v, n);
    const Vector<A> w = master.load(i, n) * s.keep - m * s.rate / (square_root<A>(v) * s.second_correction + s.epsilon);
    master.store(i, w, n);
  });
}

}  // namespace

void CpuBackend::sums_of_squares(const Tensor& sums, std::span<const Tensor> gradients) {
  shapes::sums_of_squares(sums, gradients);
  const Blocks blocks(gradients, [](const Tensor& g) { return g; });
  std::vector<double> partials(static_cast<size_t>(blocks.count()));
  blocks.for_each([&](int64_t b, size_t t, int64_t begin, int64_t count) {
    with_dtype("sums_of_squares", gradients[t].dtype, [&](auto zero) {
      partials[static_cast<size_t>(b)] = squares_of_block(gradients[t].as<const decltype(zero)>() + begin, count);
    });
  });
  for (size_t t = 0; t < gradients.size(); ++t) {
    double& sum = sums.as<double>()[t] = 0;
    for (int64_t b = blocks.first(t); b < blocks.first(t + 1); ++b) sum += partials[static_cast<size_t>(b)];
  }
}

void CpuBackend::adamw(std::span<const AdamWTensors> list, const AdamW& settings) {
  shapes::adamw(list, settings);
  const Blocks blocks(list, [](const AdamWTensors& p) { return p.weight; });
  blocks.for_each([&](int64_t, size_t t, int64_t begin, int64_t count) {
    const AdamWTensors& p = list[t];
    with_dtype("adamw", p.weight.dtype, [&](auto zero) {
      using T = decltype(zero);
      using A = Accumulator<T>;
      const MasterRun<T, A> master{p.weight.as<T>() + begin,
                                   p.correction ? p.correction.as<int16_t>() + begin : nullptr};
      update_block(master, p.first.as<A>() + begin, p.second.as<A>() + begin, p.gradient.as<const A>() + begin, count,
                   Step<A>(settings, p.decays));
    });
  });
}

}  // namespace orpo
