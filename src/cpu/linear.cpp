// Linear layers: matrix products by oneDNN in fp32 and bf16, by a plain loop in fp64 (which exists for gradient
// checks).
#include <dnnl.hpp>

#include <array>
#include <deque>
#include <map>

#include "src/cpu/backend.h"
#include "src/cpu/bf16.h"
#include "src/cpu/few_rows.h"
#include "src/cpu/rows.h"
#include "src/cpu/scratch.h"
#include "src/cpu/vector.h"
#include "src/shapes.h"

namespace orpo {

using namespace cpu;

bool cpu::multiplies_bf16() {
  static const bool has = [] {
    const unsigned needed = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_bf16);
    return (static_cast<unsigned>(dnnl::get_effective_cpu_isa()) & needed) == needed;
  }();
  return has;
}

namespace {

// A matrix as a product sees it: entry (i, j) at data[i * row_stride + j * column_stride].
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows, columns, row_stride, column_stride;

  Matrix(const Tensor& t)
      : data(t.data), dtype(t.dtype), rows(t.rows()), columns(t.columns()), row_stride(t.pitch()), column_stride(1) {}
  Matrix transposed() const {
    Matrix t = *this;
    std::swap(t.rows, t.columns), std::swap(t.row_stride, t.column_stride);
    return t;
  }
  dnnl::memory::desc description() const {
    return {{rows, columns},
            dtype == DType::bf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32,
            dnnl::memory::dims{row_stride, column_stride}};
  }
};

// c = a . b + bias, or c += a . b + bias
void multiply_in_double(const Matrix& c, const Matrix& a, const Matrix& b, const double* bias, bool accumulate) {
  const auto *x = static_cast<const double*>(a.data), *y = static_cast<const double*>(b.data);
  for_rows(c.rows, [&](int64_t i) {
    for (int64_t j = 0; j < c.columns; ++j) {
      double& out = static_cast<double*>(c.data)[i * c.row_stride + j];
      double sum = (accumulate ? out : 0) + (bias ? bias[j] : 0);
      for (int64_t k = 0; k < a.columns; ++k)
        sum += x[i * a.row_stride + k * a.column_stride] * y[k * b.row_stride + j * b.column_stride];
      out = sum;
    }
  });
}

// The same matrix, dense and in fp32: rows as they lie in memory, whichever way the product sees them.
Matrix widened(Matrix m, float* memory) {
  const bool turned = m.column_stride != 1;
  if (turned) m = m.transposed();
  for_rows(m.rows, [&](int64_t row) {
    const bf16* from = static_cast<const bf16*>(m.data) + row * m.row_stride;
    for_vectors<float>(m.columns,
                       [&](int64_t i, auto n) { store(memory + row * m.columns + i, load(from + i, n), n); });
  });
  m.data = memory, m.dtype = DType::f32, m.row_stride = m.columns;
  return turned ? m.transposed() : m;
}

// out = in . weight^T + bias for up to few_rows rows; adds: out +=.
void multiply_few(const Tensor& out, const Tensor& in, const Tensor& weight, const Tensor& bias, bool adds) {
  with_dtype("linear_forward", in.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = [&]<class Out>(Out* to) {
      multiply_few_rows(to, out.pitch(), in.as<const T>(), in.pitch(), weight.as<const T>(),
                        bias ? bias.as<const T>() : nullptr, in.rows(), weight.rows(), weight.columns(), adds);
    };
    if (out.dtype == in.dtype)
      run(out.as<T>());
    else
      run(out.as<Accumulator<T>>());
  });
}

}  // namespace

// oneDNN primitives by the shapes, strides and dtypes of a product. Row counts vary from one micro-batch to the next: a
// primitive takes 0.3 ms to make and holds up to a megabyte, so more than one micro-batch needs are kept, not many
// more, and the library, which would keep a thousand for itself, keeps none. The one that was made first goes first.
struct CpuBackend::MatrixProducts {
  using Key = std::array<int64_t, 13>;
  struct Product {
    dnnl::matmul multiply;
    dnnl::memory::desc packed;  // b as the product likes it best; empty: as it lies
    dnnl::reorder pack;
  };
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::map<Key, Product> products;
  std::deque<Key> made;  // keys of `products`, oldest first
  Scratch wide_a, wide_b, wide_c, packed_b, spread_a;

  MatrixProducts() { dnnl::set_primitive_cache_capacity(0); }

  // bf16 weights that many rows pass are packed first, once for the whole product: otherwise oneDNN does so in pieces,
  // over and over. One buffer serves all; a weight of more than 32 MiB stays as it lies: packing the head's takes
  // longer than it gives.
  static bool packs(const Matrix& c, const Matrix& b, bool accumulate) {
    return b.dtype == DType::bf16 && !accumulate && c.rows >= 512 && b.rows * b.columns <= int64_t{1} << 24;
  }

  // The gradient of a weight walks down the columns of dout. Where its rows are an even number of cache lines long they
  // meet in a few sets of every cache, which costs a tenth of the product: such a dout is copied to rows an odd number
  // of lines apart.
  Matrix spread(Matrix m) {
    constexpr int64_t line = 64, worthwhile_rows = 256;
    const int64_t entry = dtype_bytes(m.dtype), bytes = m.columns * entry, pitch = m.row_stride * entry;
    if (pitch % (2 * line) != 0 || m.rows < worthwhile_rows || m.dtype == DType::f64) return m;
    const int64_t lines = (bytes + line - 1) / line | 1;
    char* to = spread_a.reserve<char>(static_cast<size_t>(m.rows * lines * line));
    const auto* from = static_cast<const char*>(m.data);
    for_rows(m.rows, [&](int64_t row) {
      std::memcpy(to + row * lines * line, from + row * pitch, static_cast<size_t>(bytes));
    });
    m.data = to, m.row_stride = lines * line / entry;
    return m;
  }

  const Product& product(const Matrix& c, const Matrix& a, const Matrix& b, bool bias, bool accumulate) {
    const Key key{c.rows,          c.columns,    a.columns,        a.row_stride,     a.column_stride,  b.row_stride,
                  b.column_stride, c.row_stride, int64_t(a.dtype), int64_t(b.dtype), int64_t(c.dtype), bias,
                  accumulate};
    if (const auto found = products.find(key); found != products.end()) return found->second;
    constexpr size_t most = 32;
    if (products.size() >= most) products.erase(made.front()), made.pop_front();
    dnnl::primitive_attr attributes;
    if (accumulate) {
      dnnl::post_ops sum;
      sum.append_sum(1.f);
      attributes.set_post_ops(sum);
    }
    const bool pack = packs(c, b, accumulate);
    const dnnl::memory::desc weight =
        pack ? dnnl::memory::desc({b.rows, b.columns}, dnnl::memory::data_type::bf16, dnnl::memory::format_tag::any)
             : b.description();
    const dnnl::memory::desc bias_row({1, c.columns}, a.description().data_type(), dnnl::memory::dims{c.columns, 1});
    const auto plain = bias ? dnnl::matmul::desc(a.description(), weight, bias_row, c.description())
                            : dnnl::matmul::desc(a.description(), weight, c.description());
    const dnnl::matmul::primitive_desc chosen(plain, attributes, engine);
    Product fresh{dnnl::matmul(chosen), {}, {}};
    if (pack && chosen.weights_desc() != b.description()) {
      fresh.packed = chosen.weights_desc();
      fresh.pack = dnnl::reorder(dnnl::reorder::primitive_desc(engine, b.description(), engine, fresh.packed));
    }
    made.push_back(key);
    return products.emplace(key, fresh).first->second;
  }

  void run(const Matrix& c, const Matrix& a, const Matrix& b, const void* bias, bool accumulate) {
    const auto memory = [&](const Matrix& m) { return dnnl::memory(m.description(), engine, m.data); };
    const Product& p = product(c, a, b, bias, accumulate);
    dnnl::memory weight = memory(b);
    if (p.pack) {
      const dnnl::memory packed(p.packed, engine, packed_b.reserve<char>(p.packed.get_size()));
      p.pack.execute(stream, {{DNNL_ARG_FROM, weight}, {DNNL_ARG_TO, packed}});
      weight = packed;
    }
    std::unordered_map<int, dnnl::memory> arguments{
        {DNNL_ARG_SRC, memory(a)}, {DNNL_ARG_WEIGHTS, weight}, {DNNL_ARG_DST, memory(c)}};
    if (bias) {
      const dnnl::memory::desc row({1, c.columns}, a.description().data_type(), dnnl::memory::dims{c.columns, 1});
      arguments.emplace(DNNL_ARG_BIAS, dnnl::memory(row, engine, const_cast<void*>(bias)));
    }
    p.multiply.execute(stream, arguments);
    stream.wait();
  }

  // bf16 where the machine multiplies none: oneDNN's reference would take hundreds of times as long as widening.
  void run_widened(const Matrix& c, const Matrix& a, const Matrix& b, const bf16* bias, bool accumulate) {
    const Matrix x = widened(a, wide_a.reserve<float>(static_cast<size_t>(a.rows * a.columns)));
    const Matrix y = widened(b, wide_b.reserve<float>(static_cast<size_t>(b.rows * b.columns)));
    std::vector<float> wide_bias(bias ? bias : nullptr, bias ? bias + c.columns : nullptr);
    const void* row = bias ? wide_bias.data() : nullptr;
    if (c.dtype == DType::f32) return run(c, x, y, row, accumulate);
    Matrix z = c;
    z.data = wide_c.reserve<float>(static_cast<size_t>(c.rows * c.columns));
    z.dtype = DType::f32, z.row_stride = c.columns;
    if (accumulate) z = widened(c, static_cast<float*>(z.data));
    run(z, x, y, row, accumulate);
    for_rows(c.rows, [&](int64_t r) {
      const float* from = static_cast<const float*>(z.data) + r * c.columns;
      bf16* to = static_cast<bf16*>(c.data) + r * c.row_stride;
      for_vectors<float>(c.columns, [&](int64_t i, auto n) { store(to + i, load(from + i, n), n); });
    });
  }

  void multiply(const Matrix& c, const Matrix& a, const Matrix& b, const void* bias, bool accumulate) {
    if (c.rows == 0 || c.columns == 0 || (a.columns == 0 && accumulate)) return;
    if (c.dtype == DType::f64) return multiply_in_double(c, a, b, static_cast<const double*>(bias), accumulate);
    try {
      if (a.dtype == DType::bf16 && !multiplies_bf16())
        return run_widened(c, a, b, static_cast<const bf16*>(bias), accumulate);
      run(c, a, b, bias, accumulate);
    } catch (const dnnl::error& e) {
      fail_machine("oneDNN refused a product of [", a.rows, ", ", a.columns, "] and [", b.rows, ", ", b.columns, "] ",
                   dtype_name(a.dtype), ": ", e.what());
    }
  }
};

void CpuBackend::linear_forward(const Tensor& out, const Tensor& in, const Tensor& weight, const Tensor& bias,
                                bool adds) {
  shapes::linear_forward(out, in, weight, bias);
  if (in.rows() > 0 && in.rows() <= few_rows) return multiply_few(out, in, weight, bias, adds);
  if (!products_) products_ = std::make_shared<MatrixProducts>();
  products_->multiply(out, in, Matrix(weight).transposed(), bias.data, adds);
}

void CpuBackend::linear_backward(const Tensor& din, const Tensor& dweight, const Tensor& dbias, const Tensor& dout,
                                 const Tensor& in, const Tensor& weight, bool adds) {
  shapes::linear_backward(din, dweight, dbias, dout, in, weight);
  if (!products_) products_ = std::make_shared<MatrixProducts>();
  if (din) products_->multiply(din, dout, weight, nullptr, adds);
  if (dweight) products_->multiply(dweight, products_->spread(dout).transposed(), in, nullptr, true);
  if (!dbias) return;
  with_dtype("linear_backward", dout.dtype, [&](auto zero) { add_column_sums<decltype(zero)>(dbias, dout); });
}

}  // namespace orpo
