// What every launcher shares: the device of a call, and errors that say which kernel met them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace pared::cuda {

// Throws std::runtime_error "<what>: CUDA error <number> (<name>): <text>" unless status is success.
void check(cudaError_t status, const char* what);

// PARED_CUDA_SYNC=1: every launch waits for its end, so that a kernel's own failure is an error of its own
// call. Otherwise the next call that asks the device meets it, and says so.
bool synchronous();

// Makes `device` current for one call and the caller's device current again afterwards.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* what);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Devices that the driver shows. Throws when there is no driver, or one older than the runtime needs.
int device_count();

struct DeviceInfo {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
};
DeviceInfo device_info(int device);

// The number that launch configurations need; asked of the driver once a device.
int multiprocessors(int device);
int64_t shared_limit(int device);  // bytes of shared memory that a block of threads may ask for
int capability(int device);        // 90 for 9.0
bool bulk_copies(int device);      // whether code for sm_90 runs there

}  // namespace pared::cuda
