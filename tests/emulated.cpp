#include "tests/emulated.h"

#include <cstdlib>

#include "cuda/backend.h"
#include "cuda/emulator/stream.h"
#include "src/device.h"

namespace orpo::test {

namespace {

class EmulatedBackend final : public CudaBackend {
 public:
  void download(void* host, const Tensor& device) override {
    CudaBackend::download(host, device);
    for (int64_t i = 0; i < device.bytes(); ++i)  // FNV-1a
      hash = (hash ^ static_cast<const unsigned char*>(host)[i]) * 0x100000001b3u;
  }

  uint64_t hash = 0xcbf29ce484222325u;
};

}  // namespace

std::unique_ptr<Backend> make_emulated_backend(const emulator::Settings& settings) {
  emulator::restart_device();  // whatever failed before
  emulator::settings = settings;
  return std::make_unique<EmulatedBackend>();
}

bool tests_device(const std::string& name) {
  const char* chosen = std::getenv("ORPO_TEST_DEVICE");
  return chosen ? name == chosen : name != "cuda";
}

std::unique_ptr<Backend> make_gpu_backend() {
#ifdef __SANITIZE_THREAD__  // whose tests stand on the emulator alone
  return nullptr;
#else
  return tests_device("cuda") ? Device::open(DeviceChoice::cuda).make_backend(0) : nullptr;
#endif
}

uint64_t downloaded(const Backend& backend) { return dynamic_cast<const EmulatedBackend&>(backend).hash; }

}  // namespace orpo::test
