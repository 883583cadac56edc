// The CUDA backend as a plugin: what the programs load for --device cuda, and --device cuda-emulated.
#include "cuda/gpu.cuh"
#include "src/plugin.h"

namespace orpo {

namespace {

constexpr int oldest_major = 8;  // compute capability: bf16 on tensor cores, cp.async

void check_gpu() {
  int count = 0, driver = 0, major = 0, minor = 0;
  cudaDeviceProp properties{};
  if (const cudaError_t status = cudaGetDeviceCount(&count); status != cudaSuccess || count == 0) {
    cudaDriverGetVersion(&driver);
    fail("--device cuda: no GPU can be used: ", cudaGetErrorString(status), " (the driver supports CUDA ",
         driver / 1000, ".", driver % 1000 / 10, ")");
  }
  gpu_check("the device", cudaSetDevice(0));
  gpu_check("the device", cudaGetDeviceProperties(&properties, 0));
  gpu_check("the device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  gpu_check("the device", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0));
  if (major < oldest_major)
    fail("--device cuda: the ", properties.name, " is of compute capability ", major, ".", minor,
         "; the kernels need 8.0 or later (Ampere)");
}

#ifdef __CUDACC__
constexpr int cuda_version = CUDART_VERSION;
#else
constexpr int cuda_version = 0;
#endif

Backend* open_backend() {
  check_gpu();
  return new CudaBackend;
}
Backend* open_rehearsal() { return new CudaBackend(CudaBackend::Purpose::rehearses); }

}  // namespace

}  // namespace orpo

extern "C" const orpo::Plugin* orpo_plugin() {
  static const orpo::Plugin plugin{ORPO_BUILD, orpo::cuda_version, orpo::open_backend, orpo::open_rehearsal};
  return &plugin;
}
