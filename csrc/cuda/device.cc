#include "cuda/device.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "core/check.h"

namespace pared::cuda {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a launch error stays set and would be blamed on the next call
  // From here on what a kernel does when it runs, not what is wrong with a call.
  const bool late = static_cast<int>(status) >= 700 && !synchronous();
  throw std::runtime_error(str(what, ": CUDA error ", static_cast<int>(status), " (",
                               cudaGetErrorName(status), "): ", cudaGetErrorString(status),
                               late ? "; it may come from a kernel that was started before, which "
                                      "PARED_CUDA_SYNC=1 in the environment names"
                                    : ""));
}

bool synchronous() {
  static const bool set = [] {
    const char* value = std::getenv("PARED_CUDA_SYNC");
    return value && std::strcmp(value, "1") == 0;
  }();
  return set;
}

DeviceGuard::DeviceGuard(int device, const char* what) {
  check(cudaGetDevice(&before_), what);
  if (before_ == device) return;
  check(cudaSetDevice(device), what);
  changed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(before_);
}

int device_count() {
  int n = 0;
  const cudaError_t status = cudaGetDeviceCount(&n);
  if (status == cudaErrorNoDevice) {
    cudaGetLastError();
    return 0;
  }
  check(status, "device_count");
  return n;
}

DeviceInfo device_info(int device) {
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, device), "device_info");
  return {p.name, p.major, p.minor, p.multiProcessorCount};
}

namespace {

// An attribute, asked of the driver once a device.
template <cudaDeviceAttr kAttribute>
int attribute(int device, const char* what) {
  constexpr int kCached = 64;
  static std::atomic<int> cache[kCached];  // one more than the value: 0 is unknown
  const bool cached = device >= 0 && device < kCached;
  int n = cached ? cache[device].load(std::memory_order_relaxed) : 0;
  if (n) return n - 1;
  check(cudaDeviceGetAttribute(&n, kAttribute, device), what);
  if (cached) cache[device].store(n + 1, std::memory_order_relaxed);
  return n;
}

}  // namespace

int multiprocessors(int device) {
  return attribute<cudaDevAttrMultiProcessorCount>(device, "multiprocessors");
}

int64_t shared_limit(int device) {
  return attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device, "shared_limit");
}

int capability(int device) {
  return 10 * attribute<cudaDevAttrComputeCapabilityMajor>(device, "capability") +
         attribute<cudaDevAttrComputeCapabilityMinor>(device, "capability");
}

bool bulk_copies(int device) { return capability(device) >= 90; }

}  // namespace pared::cuda
