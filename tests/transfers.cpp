// Uploads and downloads of more than their page-locked halves hold, beside kernels: every byte arrives, and each
// operation sees what was there when it was asked for.
#include <numeric>

#include "tests/check.h"

using namespace orpo;
using namespace orpo::test;

namespace {

constexpr int64_t rows = 175, width = 4096;  // 2.8 MB, beside halves of 1 MiB

std::vector<float> counting(float first) {
  std::vector<float> values(rows * width);
  std::iota(values.begin(), values.end(), first);
  return values;
}

}  // namespace

TEST_CASE("transfers: what follows an upload sees it, and what came before does not") {
  std::vector<int32_t> all(rows);
  std::iota(all.begin(), all.end(), 0);
  for (const Device& device : devices()) {
    if (device.name == "cpu") continue;
    INFO(device.name);
    const auto backend = device.make();
    const DeviceTensor x(*backend, DType::f32, {rows, width}), copy(*backend, DType::f32, {rows, width}),
        list(*backend, DType::i32, {rows});
    backend->upload(list, all.data());
    const std::vector<float> first = counting(0), second = counting(1e6f);
    std::vector<float> host = first;  // the caller's memory is its own again on return
    backend->upload(x, host.data());
    std::fill(host.begin(), host.end(), -1.0f);
    backend->gather(copy, x, list);
    backend->upload(x, second.data());
    backend->download(host.data(), copy);
    CHECK(host == first);
    backend->download(host.data(), x);
    CHECK(host == second);
  }
}
