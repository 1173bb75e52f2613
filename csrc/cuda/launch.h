// The one way to start a kernel, on a GPU and in the emulator.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "cuda/device.h"

namespace pared::cuda {

struct LaunchPlan {
  dim3 grid, block;
  size_t dynamic_shared = 0;
};

// Enqueues kernel(arguments...) on the stream and returns. The arguments are converted to the kernel's
// parameters. Throws std::runtime_error that begins with `name` when the launch is refused.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchPlan& plan, cudaStream_t stream,
            Arguments... arguments) {
#ifdef PARED_CUDA_EMULATED
  static_cast<void>(stream);
  emulate::run(name, {plan.grid.x, plan.grid.y, plan.grid.z}, {plan.block.x, plan.block.y, plan.block.z},
               plan.dynamic_shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  // Above 48 KB a kernel has to ask, once a device; asking again costs less than remembering.
  constexpr size_t kGranted = size_t{48} << 10;
  if (plan.dynamic_shared > kGranted)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(plan.dynamic_shared)),
          name);
  cudaLaunchConfig_t config = {};
  config.gridDim = plan.grid;
  config.blockDim = plan.block;
  config.dynamicSmemBytes = plan.dynamic_shared;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
  check(cudaGetLastError(), name);
  if (synchronous()) check(cudaStreamSynchronize(stream), name);
#endif
}

}  // namespace pared::cuda
