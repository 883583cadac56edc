// The device's memory: allocation, copies, and what its kernels refused.
#include "cuda/gpu.cuh"

namespace orpo {

CudaBackend::CudaBackend() : refused_(static_cast<Refused*>(gpu_allocate(sizeof(Refused)))) {
  gpu_check("streams", cudaStreamCreateWithFlags(&compute_, cudaStreamNonBlocking));
  gpu_zero(refused_, sizeof(Refused), compute_);
}

CudaBackend::~CudaBackend() {
  cudaStreamSynchronize(compute_);
  gpu_release(scratch_);
  gpu_release(refused_);
  cudaStreamDestroy(compute_);
}

void* CudaBackend::allocate(int64_t bytes) { return gpu_allocate(bytes); }
void CudaBackend::release(void* memory, int64_t) {
  cudaStreamSynchronize(compute_);
  gpu_release(memory);
}

void* CudaBackend::reserve_scratch(int64_t bytes) {
  if (bytes <= scratch_bytes_) return scratch_;
  gpu_wait(compute_);
  gpu_release(scratch_);
  scratch_bytes_ = 0;
  scratch_ = gpu_allocate(bytes);
  scratch_bytes_ = bytes;
  return scratch_;
}

void CudaBackend::upload(const Tensor& device, const void* host) {
  gpu_upload(device.data, host, device.bytes(), compute_);
}
void CudaBackend::download(void* host, const Tensor& device) {
  gpu_download(host, device.data, device.bytes(), compute_);
  gpu_wait(compute_);
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
  Refused refused;
  gpu_download(&refused, refused_, sizeof refused, compute_);
  gpu_wait(compute_);
  if (refused.kind == Refused::nothing) return;
  gpu_zero(refused_, sizeof(Refused), compute_);
  const Message message = message_of(static_cast<Refused::Kind>(refused.kind));
  const auto n = [&](int i) { return static_cast<long long>(refused.numbers.n[i]); };
  char text[200];
  snprintf(text, sizeof text, message.format, n(0), n(1), n(2), n(3), n(4), n(5));
  fail_machine(message.operation, ": needs ", static_cast<const char*>(text));
}

}  // namespace orpo
