// Stands for NVIDIA's driver in tests of --device: ORPO_TEST_DRIVER says what it answers, "VERSION GPUS".
#include <cstdio>
#include <cstdlib>

namespace {

int number(int which) {
  int version = 0, gpus = 0;
  const char* answers = std::getenv("ORPO_TEST_DRIVER");
  if (!answers || std::sscanf(answers, "%d %d", &version, &gpus) != 2) return 0;
  return which == 0 ? version : gpus;
}

}  // namespace

extern "C" int cuDriverGetVersion(int* version) { return *version = number(0), 0; }
extern "C" int cuInit(unsigned) { return number(1) > 0 ? 0 : 100; }  // CUDA_ERROR_NO_DEVICE
extern "C" int cuDeviceGetCount(int* count) { return *count = number(1), 0; }
