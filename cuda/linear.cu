// Linear layers: products by cuBLASLt (products.h), and what is left around them: biases that it does not add, and the
// bias gradient.
#include "cuda/gpu.cuh"
#include "cuda/partials.cuh"
#include "cuda/products.h"

namespace orpo {

namespace {

constexpr int threads = 256;

// Every row of out = bias[width], or += where `adding`. A thread takes an entry.
template <bool adding, class To, class From>
__global__ void fill_rows_kernel(To* out, const From* bias, int64_t rows, int64_t width, int64_t pitch) {
  const int64_t index = int64_t{blockIdx.x} * threads + threadIdx.x, row = index / width, i = index % width;
  if (row >= rows) return;
  To& to = out[row * pitch + i];
  to = from_float<To>((adding ? to_float(to) : 0.0f) + to_float(bias[i]));
}

void fill_rows(GpuStream stream, const Tensor& out, const Tensor& bias, bool adds) {
  with_gpu_dtype("linear_forward", bias.dtype, [&](auto zero) {
    using From = decltype(zero);
    const auto run = [&]<class To>(To* to) {
      launch(adds ? fill_rows_kernel<true, To, From> : fill_rows_kernel<false, To, From>,
             blocks_for(out.elements(), threads), threads, 0, stream, to, bias.as<const From>(), out.rows(),
             out.columns(), out.pitch());
    };
    if (out.dtype == bias.dtype)
      run(out.as<From>());
    else
      run(out.as<float>());
  });
}

}  // namespace

MatrixProducts& CudaBackend::products() {
  if (!products_) products_ = std::make_shared<MatrixProducts>();
  return *products_;
}

void CudaBackend::multiply(const Product& product, std::source_location asked) {
  if (rehearses(compute_)) return;
  last_operations.note(asked);
  products().run(product, compute_);
}

void CudaBackend::linear_forward(const Tensor& out, const Tensor& in, const Tensor& weight, const Tensor& bias,
                                 bool adds) {
  const char* op = "linear_forward";
  shapes::linear_forward(out, in, weight, bias);
  with_gpu_dtype(op, in.dtype, [](auto) {});
  if (out.elements() == 0 || rehearses(compute_)) return;
  Product product{
      .operation = op, .out = out, .a = in, .b = weight, .transpose_b = true, .accumulate = adds, .bias = bias};
  if (bias && !products().fuses(product)) {
    fill_rows(compute_, out, bias, adds);
    product.bias = {}, product.accumulate = true;
  }
  multiply(product);
}

namespace {

// sums[blockIdx.y, n] = column sums over every gridDim.y-th stretch of rows: a warp takes 32 N columns and every
// eighth row, and the warps' sums are added up in order.
template <bool aligned, class T> __global__ void __launch_bounds__(threads)
    column_sums_kernel(float* sums, const T* x, int64_t rows, int64_t width, int64_t pitch, int64_t stretch) {
  constexpr int N = wide<T>, warps = threads / 32;
  SHARED(float, parts, [warps][32 * N]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t i = (int64_t{blockIdx.x} * 32 + lane) * N;
  const int64_t begin = blockIdx.y * stretch, end = begin + stretch < rows ? begin + stretch : rows;
  float sum[N] = {};
  if (i < width)
    for (int64_t row = begin + warp; row < end; row += warps) {
      float v[N];
      load<aligned>(v, x + row * pitch + i, width - i);
#pragma unroll
      for (int e = 0; e < N; ++e) sum[e] += v[e];
    }
#pragma unroll
  for (int e = 0; e < N; ++e) parts[warp][e * 32 + lane] = sum[e];
  __syncthreads();
  for (int c = threadIdx.x; c < 32 * N; c += threads) {  // entry e of lane l
    const int64_t column = (int64_t{blockIdx.x} * 32 + c % 32) * N + c / 32;
    float total = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) total += parts[w][c];
    if (column < width) sums[blockIdx.y * width + column] = total;
  }
}

}  // namespace

void CudaBackend::linear_backward(const Tensor& din, const Tensor& dweight, const Tensor& dbias, const Tensor& dout,
                                  const Tensor& in, const Tensor& weight, bool adds) {
  const char* op = "linear_backward";
  shapes::linear_backward(din, dweight, dbias, dout, in, weight);
  with_gpu_dtype(op, dout.dtype, [](auto) {});
  if (dout.elements() == 0) return;
  if (din) multiply({.operation = op, .out = din, .a = dout, .b = weight, .accumulate = adds});
  if (dweight)
    multiply({.operation = op, .out = dweight, .a = dout, .b = in, .transpose_a = true, .accumulate = true});
  if (!dbias) return;
  constexpr int64_t most_stretches = 64, fewest_rows = 32;  // enough blocks for an H100's 132 SMs where n is small
  const int64_t rows = dout.rows(), n = dout.columns();
  const int64_t stretch = std::max(fewest_rows, (rows + most_stretches - 1) / most_stretches);
  const int64_t stretches = (rows + stretch - 1) / stretch;
  float* sums = scratch<float>(stretches * n);
  with_gpu_dtype(op, dout.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_constant(rows_aligned({&dout}), [&](auto aligned) {
      launch(column_sums_kernel<aligned(), T>, dim3(blocks_for(n, 32 * wide<T>), static_cast<unsigned>(stretches)),
             threads, 0, compute_, sums, dout.as<const T>(), rows, n, dout.pitch(), stretch);
    });
  });
  add_partials(compute_, dbias.as<float>(), nullptr, sums, stretches, n, n);
}

}  // namespace orpo
