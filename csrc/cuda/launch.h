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
  // For more than 48 KB of shared memory, static and dynamic together, a kernel has to ask, once a device;
  // asking again costs less than remembering. Of kernels with dynamic shared memory none has 16 KB besides.
  constexpr size_t kUnasked = size_t{48 - 16} << 10;
  const bool asks = plan.dynamic_shared > kUnasked;
#ifdef PARED_CUDA_EMULATED
  static_cast<void>(stream);
  emulate::run(name, {plan.grid.x, plan.grid.y, plan.grid.z}, {plan.block.x, plan.block.y, plan.block.z},
               plan.dynamic_shared, asks, [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  if (asks) {
    const auto set = [&](cudaFuncAttribute attribute, int value) {
      check(cudaFuncSetAttribute(kernel, attribute, value), name);
    };
    set(cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.dynamic_shared));
    // As many blocks of threads as fit are meant to share a multiprocessor, and not its L1.
    set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
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
