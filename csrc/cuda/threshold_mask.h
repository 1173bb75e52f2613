// mask[i] = |x[i]| > threshold, on the device. Raw pointers and a stream: no torch, no Python.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"

namespace pared::cuda {

struct ThresholdMaskArgs {
  const void* x;  // n elements, aligned to their size
  DType dtype;    // f32, f16 or bf16
  int64_t n;
  const float* threshold;  // one element on the device: it may come from a kernel that is still running
  uint8_t* mask;           // n bytes, 0 or 1; does not overlap x
};

// Enqueues on the stream and returns; never waits, so that a CUDA graph can capture it. NaN is not above
// anything, and nothing is above a NaN threshold. Throws std::runtime_error that names the kernel.
void threshold_mask(const ThresholdMaskArgs& args, int device, cudaStream_t stream);

// Whether this build has code that the current device can run: cudaErrorNoKernelImageForDevice if not.
cudaError_t kernel_image_status();

}  // namespace pared::cuda
