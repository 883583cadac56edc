// The device's memory: allocation, copies, and what its kernels refused.
#include "cuda/gpu.cuh"
#include "cuda/products.h"
#include "cuda/transfers.h"

namespace orpo {

namespace {

bool rehearses(CudaBackend::Purpose purpose) { return purpose == CudaBackend::Purpose::rehearses; }

}  // namespace

CudaBackend::CudaBackend(Purpose purpose) {
  if (rehearses(purpose)) {
    compute_ = rehearsal_stream();
    return;
  }
  cudaDeviceProp properties;
  gpu_check("the device's name", cudaGetDeviceProperties(&properties, 0));
  device_name_ = properties.name;
  gpu_check("a stream", cudaStreamCreateWithFlags(&compute_, cudaStreamNonBlocking));
  refused_ = static_cast<Refused*>(gpu_allocate(sizeof(Refused)));
  gpu_zero(refused_, sizeof(Refused), compute_);
  uploads_ = std::make_unique<Uploads>(compute_);
  downloads_ = std::make_unique<Downloads>(compute_, refused_);
  count_memory(fixed_bytes());
}

CudaBackend::~CudaBackend() {
  if (orpo::rehearses(compute_)) return;
  cudaStreamSynchronize(compute_);
  uploads_.reset(), downloads_.reset(), products_.reset();
  gpu_release(scratch_);
  gpu_release(refused_);
  cudaStreamDestroy(compute_);
}

int64_t CudaBackend::fixed_bytes() const {
  return static_cast<int64_t>(sizeof(Refused) + MatrixProducts::workspace_bytes) + Uploads::device_bytes;
}

void CudaBackend::count_memory(int64_t bytes) {
  memory_ += bytes;
  most_memory_ = std::max(most_memory_, memory_);
}

void* CudaBackend::allocate(int64_t bytes) {
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, static_cast<size_t>(bytes));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    fail_machine("the GPU has no ", bytes, " bytes of memory (", free_memory(),
                 " free); use fewer --micro-tokens or a smaller model");
  }
  gpu_check("allocate", status);
  count_memory(bytes);
  return memory;
}

void CudaBackend::release(void* memory, int64_t bytes) {
  if (!memory) return;
  cudaStreamSynchronize(compute_);
  gpu_release(memory);
  count_memory(-bytes);
}

void* CudaBackend::reserve_scratch(int64_t bytes) {
  if (bytes <= scratch_bytes_) return scratch_;
  if (!orpo::rehearses(compute_)) {
    gpu_wait(compute_);
    gpu_release(std::exchange(scratch_, nullptr));
    count_memory(-std::exchange(scratch_bytes_, 0));
    scratch_ = allocate(bytes);
  }
  scratch_bytes_ = bytes;
  return scratch_;
}

int64_t CudaBackend::workspace_bytes() const { return fixed_bytes() + scratch_bytes_; }
void CudaBackend::reserve_workspace(int64_t bytes) {
  reserve_scratch(bytes - fixed_bytes());
  products();
}

int64_t CudaBackend::free_memory() const {
  size_t free = 0, total = 0;
  gpu_check("the device's memory", cudaMemGetInfo(&free, &total));
  return static_cast<int64_t>(free);
}
int64_t CudaBackend::peak_memory() const { return most_memory_; }

void CudaBackend::upload(const Tensor& device, const void* host) {
  if (uploads_) uploads_->copy(device.data, host, device.bytes());
}
void CudaBackend::download(void* host, const Tensor& device) {
  if (downloads_) report(downloads_->copy(host, device.data, device.bytes()));
}
void CudaBackend::zero(const Tensor& x) { gpu_zero(x.data, x.bytes(), compute_); }

namespace {

struct Message {
  const char *operation, *format;
};

Message message_of(Refused::Kind kind) {
  const char* bad_segment = "segments in order; segment %lld is {%lld, %lld, %lld, %lld} where row %lld comes next";
  const char* bad_end = "segments of the whole stream; the segments end at row %lld, the stream has %lld";
  switch (kind) {
    case Refused::embedding_forward:
      return {"embedding_forward", "tokens of the table; token %lld is %lld of %lld"};
    case Refused::embedding_forward_position:
      return {"embedding_forward", "positions of the table; position %lld is %lld of %lld"};
    case Refused::embedding_backward:
      return {"embedding_backward", "tokens of the table; token %lld is %lld of %lld"};
    case Refused::embedding_backward_position:
      return {"embedding_backward", "positions of the table; position %lld is %lld of %lld"};
    case Refused::rope_forward:
      return {"rope_forward", "positions from 0 on; row %lld's position is %lld"};
    case Refused::rope_backward:
      return {"rope_backward", "positions from 0 on; row %lld's position is %lld"};
    case Refused::attention_segment:
      return {"attention_forward", bad_segment};
    case Refused::attention_end:
      return {"attention_forward", bad_end};
    case Refused::attention_backward_segment:
      return {"attention_backward", bad_segment};
    case Refused::attention_backward_end:
      return {"attention_backward", bad_end};
    case Refused::keep_sequence:
      return {"keep_keys_values", "sequences of the cache; sequence %lld is %lld of %lld"};
    case Refused::keep_position:
      return {"keep_keys_values",
              "room; the cache is full: position %lld of sequence %lld where there is room for %lld"};
    case Refused::decode_sequence:
      return {"attention_decode", "sequences of the cache; sequence %lld is %lld of %lld"};
    case Refused::decode_position:
      return {"attention_decode",
              "room; the cache is full: position %lld of sequence %lld where there is room for %lld"};
    case Refused::gather:
      return {"gather", "rows of the stream; target row %lld is %lld of %lld"};
    case Refused::scatter_add:
      return {"scatter_add", "rows of the stream; target row %lld is %lld of %lld"};
    case Refused::head_forward:
      return {"head_forward", "tokens of the vocabulary; target token %lld is %lld of %lld"};
    case Refused::head_backward:
      return {"head_backward", "tokens of the vocabulary; target token %lld is %lld of %lld"};
    case Refused::preference:
      return {"preference", "targets that exist; pair %lld has targets [%lld, %lld) of %lld"};
    case Refused::nothing:
      break;
  }
  return {"the device", "a known refusal (%lld)"};
}

}  // namespace

void CudaBackend::synchronize() {
  Refused refused{};
  gpu_download(&refused, refused_, sizeof refused, compute_);
  gpu_wait(compute_);
  report(refused);
}

void CudaBackend::report(const Refused& refused) {
  if (refused.kind == Refused::nothing) return;
  gpu_zero(refused_, sizeof(Refused), compute_);
  const Message message = message_of(static_cast<Refused::Kind>(refused.kind));
  const auto n = [&](int i) { return static_cast<long long>(refused.numbers.n[i]); };
  char text[200];
  snprintf(text, sizeof text, message.format, n(0), n(1), n(2), n(3), n(4), n(5));
  fail_machine(message.operation, ": needs ", static_cast<const char*>(text));
}

}  // namespace orpo
