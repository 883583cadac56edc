#include "src/device.h"

#include <dlfcn.h>

#include <cstring>
#include <filesystem>
#include <map>

#include "src/console.h"
#include "src/fail.h"
#include "src/plugin.h"

namespace orpo {
namespace {

namespace fs = std::filesystem;

// ---- the driver

// What the NVIDIA driver says of itself, without any library of the toolkit.
struct Driver {
  int version = 0;      // 1000 * major + 10 * minor of the CUDA that it supports; 0: there is no driver
  int devices = 0;      // that it shows
  std::string trouble;  // what it answered instead
};

Driver look_at_driver() {
  Driver driver;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) return driver;
  const auto function = [&](const char* name) { return reinterpret_cast<int (*)(int*)>(dlsym(library, name)); };
  const auto initialise = reinterpret_cast<int (*)(unsigned)>(dlsym(library, "cuInit"));
  const auto version = function("cuDriverGetVersion"), count = function("cuDeviceGetCount");
  constexpr int no_device = 100;  // CUDA_ERROR_NO_DEVICE
  if (!initialise || !version || !count || version(&driver.version) != 0 || driver.version <= 0) {
    driver.version = 1, driver.trouble = "libcuda.so.1 does not say its version";
    return driver;
  }
  int status = initialise(0);
  if (status == 0) status = count(&driver.devices);
  if (status == no_device) driver.devices = 0;
  if (status != 0 && status != no_device)
    driver.trouble = concat("the NVIDIA driver does not start (CUDA error ", status, ")");
  return driver;
}

std::string version_text(int version) { return concat(version / 1000, ".", version % 1000 / 10); }

// ---- plugins

std::vector<fs::path> plugin_folders() {
  std::error_code none;
  const fs::path program = fs::read_symlink("/proc/self/exe", none).parent_path();
  return {program, program / "build/release"};
}

// Throws UserError.
const Plugin* load_plugin(const char* choice, const std::string& file, const char* target) {
  fs::path found;
  for (const fs::path& folder : plugin_folders())
    if (std::error_code none; found.empty() && fs::exists(folder / file, none)) found = folder / file;
  if (found.empty())
    fail("--device ", choice, ": ", file, " is not beside the program, nor in build/release; `make ", target,
         "` builds it");
  void* library = dlopen(found.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) fail("--device ", choice, ": ", found.string(), " does not load: ", dlerror());
  const auto entry = reinterpret_cast<PluginEntry>(dlsym(library, plugin_entry));
  const Plugin* plugin = entry ? entry() : nullptr;
  if (!plugin || std::strncmp(plugin->build, plugin_build, sizeof plugin_build) != 0)
    fail("--device ", choice, ": ", found.string(), " was built from other sources than this program; `make ", target,
         "` builds it anew");
  return plugin;
}

// Throws UserError where the driver is not one on which this plugin's CUDA runs; null: any plugin's.
void check_driver(const Driver& driver, const Plugin* plugin) {
  if (driver.version == 0)
    fail("--device cuda: no NVIDIA driver is installed here (libcuda.so.1 is not found); --device cpu trains without");
  if (!driver.trouble.empty()) fail("--device cuda: ", driver.trouble);
  if (driver.devices == 0)
    fail("--device cuda: the NVIDIA driver shows no GPU; is one there, and named in CUDA_VISIBLE_DEVICES?");
  if (plugin && driver.version / 1000 < plugin->cuda_version / 1000)
    fail("--device cuda: the NVIDIA driver supports CUDA ", version_text(driver.version), ", and orpo_cuda.so needs ",
         plugin->cuda_version / 1000, ".0 or later; update the driver, or build with an older toolkit");
}

// What is wrong with the driver is said before what is missing beside the program.
const Plugin* load_cuda() {
  try {
    return load_plugin("cuda", "orpo_cuda.so", "cuda");
  } catch (const UserError&) {
    check_driver(look_at_driver(), nullptr);
    throw;
  }
}

// GPU or not; a GPU that is there and of no use is worth a line.
const Plugin* choose_automatically() {
  const Driver driver = look_at_driver();
  if (driver.version == 0 || (driver.devices == 0 && driver.trouble.empty())) return nullptr;
  try {
    const Plugin* plugin = load_cuda();
    check_driver(driver, plugin);
    delete plugin->make_backend();  // may refuse the GPU itself
    return plugin;
  } catch (const UserError& e) {
    constexpr std::string_view prefix = "--device cuda: ";
    std::string why = e.what();
    if (why.starts_with(prefix)) why.erase(0, prefix.size());
    console().say("device: the CPU, as the GPU cannot be used: ", why);
    return nullptr;
  }
}

}  // namespace

const Device& Device::open(DeviceChoice choice) {
  static std::map<DeviceChoice, Device> opened;
  const auto found = opened.find(choice);
  if (found != opened.end()) return found->second;
  const Plugin* plugin = nullptr;
  if (choice == DeviceChoice::automatic) plugin = choose_automatically();
  if (choice == DeviceChoice::cuda) plugin = load_cuda();
  if (choice == DeviceChoice::cuda_emulated)
    plugin = load_plugin("cuda-emulated", "orpo_cuda_emulated.so", "cuda-emulated");
  return opened.emplace(choice, Device(plugin)).first->second;
}

std::unique_ptr<Backend> Device::make_backend(int threads) const {
  if (!plugin_) return make_cpu_backend(threads);
  if (plugin_->cuda_version > 0) check_driver(look_at_driver(), plugin_);
  return std::unique_ptr<Backend>(plugin_->make_backend());
}

std::unique_ptr<Backend> Device::make_rehearsal_backend() const {
  return plugin_ ? std::unique_ptr<Backend>(plugin_->make_rehearsal_backend()) : orpo::make_rehearsal_backend();
}

}  // namespace orpo
