#include "src/stored_values.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "src/fail.h"

namespace orpo {
namespace {

// Small chunks are still in the cache when the device or the file takes them. A team of threads pays only where a
// tensor is large.
constexpr int64_t small_chunk = 1 << 18, large_chunk = 1 << 22, large_tensor = 1 << 24;
int64_t chunk_of(int64_t elements) { return elements < large_tensor ? std::min(elements, small_chunk) : large_chunk; }

template <class Value>
Value load(const std::byte* at) {  // tensors in a file need not be aligned
  Value value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

template <class Out, class In>
void convert_values(std::byte* out, const std::byte* in, int64_t n) {
#pragma omp parallel for simd schedule(static) if (n >= large_chunk)
  for (int64_t i = 0; i < n; ++i) {
    const Out value(static_cast<float>(load<In>(in + i * sizeof(In))));
    std::memcpy(out + i * sizeof(Out), &value, sizeof value);
  }
}

// body(type_identity<T>) for the C++ type of a dtype.
template <class Body>
void with_type(StoredDType dtype, Body&& body) {
  if (dtype == StoredDType::f32) body(std::type_identity<float>());
  if (dtype == StoredDType::bf16) body(std::type_identity<bf16>());
  if (dtype == StoredDType::f16) body(std::type_identity<f16>());
}
template <class Body>
void with_type(DType dtype, Body&& body) {
  if (dtype == DType::f32) body(std::type_identity<float>());
  if (dtype == DType::bf16) body(std::type_identity<bf16>());
  if (dtype == DType::f64) body(std::type_identity<double>());
}

bool same(DType device, StoredDType stored) {
  return (device == DType::f32 && stored == StoredDType::f32) || (device == DType::bf16 && stored == StoredDType::bf16);
}

// The transpose of a matrix of elements of `size` bytes, in tiles that stay in the cache.
std::vector<std::byte> transpose(const std::byte* matrix, int64_t rows, int64_t columns, int64_t size) {
  constexpr int64_t tile = 32;
  std::vector<std::byte> turned(static_cast<size_t>(rows * columns * size));
#pragma omp parallel for schedule(static)
  for (int64_t top = 0; top < rows; top += tile)
    for (int64_t left = 0; left < columns; left += tile)
      for (int64_t j = left; j < std::min(columns, left + tile); ++j)
        for (int64_t i = top; i < std::min(rows, top + tile); ++i)
          std::memcpy(turned.data() + (j * rows + i) * size, matrix + (i * columns + j) * size,
                      static_cast<size_t>(size));
  return turned;
}

Tensor flat(const Tensor& t) { return Tensor(t.data, t.dtype, {t.elements()}); }
MasterTensor flat(const MasterTensor& t) { return {flat(t.weight), t.correction ? flat(t.correction) : t.correction}; }

void upload_split(const MasterTensor& target, const float* masters, Backend& backend) {
  const int64_t n = target.weight.elements();
  std::vector<bf16> weights(n);
  std::vector<int16_t> corrections(n);
#pragma omp parallel for simd schedule(static) if (n >= large_chunk)
  for (int64_t i = 0; i < n; ++i) {
    const SplitMaster split = split_master(masters[i]);
    weights[i] = split.weight, corrections[i] = split.correction;
  }
  backend.upload(target.weight, weights.data());
  backend.upload(target.correction, corrections.data());
}

void download_joined(float* masters, const MasterTensor& source, Backend& backend) {
  const int64_t n = source.weight.elements();
  std::vector<bf16> weights(n);
  std::vector<int16_t> corrections(n);
  backend.download(weights.data(), source.weight);
  backend.download(corrections.data(), source.correction);
#pragma omp parallel for simd schedule(static) if (n >= large_chunk)
  for (int64_t i = 0; i < n; ++i) masters[i] = join_master({weights[i], corrections[i]});
}

template <class In>
void require_in_range(const std::byte* in, int64_t n, const std::string& name) {
  for (int64_t i = 0; i < n; ++i)
    if (const float value = static_cast<float>(load<In>(in + i * sizeof(In)));
        std::isfinite(value) && std::isinf(static_cast<float>(f16(value))))
      fail("tensor '", name, "' holds ", value, ", and fp16 ends at 65504; save with --save-dtype bf16 or fp32");
}

}  // namespace

f16::f16(float value) {
  const uint32_t u = std::bit_cast<uint32_t>(value), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x7f800000u) {  // infinity, NaN
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14 and above: exponent rebased, mantissa cut to 10 bits; rounding up may
                                          // carry to infinity
    half = std::min((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13, 0x7c00u);
  } else {  // subnormal: a multiple of 2^-24, which rounding to an integer finds
    half = static_cast<uint32_t>(std::nearbyint(std::bit_cast<float>(magnitude) * 0x1p24f));
  }
  bits = static_cast<uint16_t>(sign | half);
}

f16::operator float() const {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;  // subnormal
  const uint32_t rebased = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  return std::bit_cast<float>(sign | (magnitude < 0x400u ? std::bit_cast<uint32_t>(small) : rebased));
}

void read_values(const MasterTensor& target, const StoredTensor& stored, bool transposed, Backend& backend,
                 bool zeros) {
  const int64_t n = target.weight.elements();
  REQUIRE_SHAPE("read_values", stored.dtype && n == stored.elements(), stored.name, " has ", stored.elements(),
                " elements");
  const DType dtype = target.weight.dtype;
  const int64_t chunk = chunk_of(n), in_bytes = stored_dtype_bytes(*stored.dtype);
  std::vector<std::byte> turned;
  if (transposed) turned = transpose(stored.data.data(), target.weight.columns(), target.weight.rows(), in_bytes);
  const std::byte* source = transposed ? turned.data() : stored.data.data();
  if (same(dtype, *stored.dtype)) {
    if (target.correction && !zeros) backend.zero(target.correction);
    return backend.upload(target.weight, source);
  }
  const DType values = target.correction ? DType::f32 : dtype;
  std::vector<std::byte> staging(chunk * dtype_bytes(values));
  for (int64_t begin = 0; begin < n; begin += chunk) {
    const int64_t count = std::min(chunk, n - begin);
    with_type(values, [&](auto out) {
      with_type(*stored.dtype, [&](auto in) {
        convert_values<typename decltype(out)::type, typename decltype(in)::type>(
            staging.data(), source + begin * in_bytes, count);
      });
    });
    const MasterTensor part = flat(target).slice(begin, count);
    if (target.correction)
      upload_split(part, reinterpret_cast<const float*>(staging.data()), backend);
    else
      backend.upload(part.weight, staging.data());
  }
}

void upload_values(const MasterTensor& target, std::span<const float> values, Backend& backend) {
  read_values(target,
              {"values", "F32", StoredDType::f32, {static_cast<int64_t>(values.size())}, std::as_bytes(values), {}},
              false, backend);
}

void write_values(SafetensorsWriter& writer, const MasterTensor& source, bool transposed, StoredDType dtype,
                  const std::string& name, Backend& backend) {
  // A bf16 weight is its master rounded already.
  const MasterTensor kept = dtype == StoredDType::bf16 ? flat(source.weight) : flat(source);
  const DType values = kept.correction ? DType::f32 : kept.weight.dtype;
  const int64_t n = kept.weight.elements(), chunk = transposed ? n : chunk_of(n);  // it takes all of it to be turned
  std::vector<std::byte> wide(chunk * dtype_bytes(values)), rounded;
  for (int64_t begin = 0; begin < n; begin += chunk) {
    const int64_t count = std::min(chunk, n - begin);
    const MasterTensor part = kept.slice(begin, count);
    if (kept.correction)
      download_joined(reinterpret_cast<float*>(wide.data()), part, backend);
    else
      backend.download(wide.data(), part.weight);
    if (transposed)
      wide = transpose(wide.data(), source.weight.rows(), source.weight.columns(), dtype_bytes(values));
    if (same(values, dtype)) {
      writer.write(std::span(wide).first(count * dtype_bytes(values)));
      continue;
    }
    rounded.resize(count * stored_dtype_bytes(dtype));
    with_type(values, [&](auto in) {
      if (dtype == StoredDType::f16) require_in_range<typename decltype(in)::type>(wide.data(), count, name);
      with_type(dtype, [&](auto out) {
        convert_values<typename decltype(out)::type, typename decltype(in)::type>(rounded.data(), wide.data(), count);
      });
    });
    writer.write(rounded);
  }
}

}  // namespace orpo
