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

Tensor flat(const Tensor& t) { return Tensor(t.data, t.dtype, {t.elements()}); }

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

void read_values(const Tensor& target, const StoredTensor& stored, Backend& backend) {
  REQUIRE_SHAPE("read_values", stored.dtype && target.elements() == stored.elements(), stored.name, " has ",
                stored.elements(), " elements");
  if (same(target.dtype, *stored.dtype)) return backend.upload(target, stored.data.data());
  const int64_t n = target.elements(), chunk = chunk_of(n), in_bytes = stored_dtype_bytes(*stored.dtype);
  std::vector<std::byte> staging(chunk * dtype_bytes(target.dtype));
  for (int64_t begin = 0; begin < n; begin += chunk) {
    const int64_t count = std::min(chunk, n - begin);
    with_type(target.dtype, [&](auto out) {
      with_type(*stored.dtype, [&](auto in) {
        convert_values<typename decltype(out)::type, typename decltype(in)::type>(
            staging.data(), stored.data.data() + begin * in_bytes, count);
      });
    });
    backend.upload(flat(target).slice(begin, count), staging.data());
  }
}

void write_values(SafetensorsWriter& writer, const Tensor& source, StoredDType dtype, const std::string& name,
                  Backend& backend) {
  const int64_t n = source.elements(), chunk = chunk_of(n);
  std::vector<std::byte> device(chunk * dtype_bytes(source.dtype)), rounded;
  for (int64_t begin = 0; begin < n; begin += chunk) {
    const int64_t count = std::min(chunk, n - begin);
    backend.download(device.data(), flat(source).slice(begin, count));
    if (same(source.dtype, dtype)) {
      writer.write(std::span(device).first(count * dtype_bytes(source.dtype)));
      continue;
    }
    rounded.resize(count * stored_dtype_bytes(dtype));
    with_type(source.dtype, [&](auto in) {
      if (dtype == StoredDType::f16) require_in_range<typename decltype(in)::type>(device.data(), count, name);
      with_type(dtype, [&](auto out) {
        convert_values<typename decltype(out)::type, typename decltype(in)::type>(rounded.data(), device.data(), count);
      });
    });
    writer.write(rounded);
  }
}

}  // namespace orpo
