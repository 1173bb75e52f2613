// One pass over x at the speed of memory: a read of x and a write of a byte an element, nothing else moves.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/mask_plan.h"
#include "cuda/threshold_mask.h"

namespace pared::cuda {
namespace {

__device__ float widen(float v) { return v; }
__device__ float widen(__half v) { return __half2float(v); }
__device__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ uint8_t above(T v, float threshold) {
  return fabsf(widen(v)) > threshold;
}

// What one 16-byte load becomes: a byte an element, stored at once.
template <int kCount>
struct alignas(kCount) Bytes {
  uint8_t at[kCount];
};

template <class T>
__global__ void __launch_bounds__(kMaskThreads)
    threshold_mask_kernel(const T* __restrict__ x, const float* __restrict__ threshold,
                          uint8_t* __restrict__ mask, const MaskPlan plan) {
  constexpr int kCount = kLoadBytes / sizeof(T);
  const float t = *threshold;
  const int64_t lane = int64_t{blockIdx.x} * kMaskThreads + threadIdx.x;
  const int64_t lanes = int64_t{gridDim.x} * kMaskThreads;
  const int64_t tail = plan.head + plan.vectors * kCount;
  if (lane < plan.head) mask[lane] = above(x[lane], t);
  if (lane < plan.tail) mask[tail + lane] = above(x[tail + lane], t);

  const uint4* loads = reinterpret_cast<const uint4*>(x + plan.head);
  uint8_t* out = mask + plan.head;
  for (int64_t first = lane; first < plan.vectors; first += kMaskUnroll * lanes) {
    // All loads before the first use: one warp alone cannot hide the latency of memory.
    uint4 loaded[kMaskUnroll];
#pragma unroll
    for (int u = 0; u < kMaskUnroll; ++u)
      if (first + u * lanes < plan.vectors)
        loaded[u] = __ldcs(loads + first + u * lanes);  // read once: stream
#pragma unroll
    for (int u = 0; u < kMaskUnroll; ++u) {
      const int64_t i = first + u * lanes;
      if (i >= plan.vectors) break;
      const T* v = reinterpret_cast<const T*>(&loaded[u]);
      Bytes<kCount> bytes;
#pragma unroll
      for (int j = 0; j < kCount; ++j) bytes.at[j] = above(v[j], t);
      if (plan.wide_stores) {
        reinterpret_cast<Bytes<kCount>*>(out)[i] = bytes;
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) out[i * kCount + j] = bytes.at[j];
      }
    }
  }
}

template <class T>
void launch_mask(const ThresholdMaskArgs& a, int device, cudaStream_t stream, const char* name) {
  const DeviceGuard guard(device, name);
  const MaskPlan plan = plan_mask(reinterpret_cast<uintptr_t>(a.x), reinterpret_cast<uintptr_t>(a.mask), a.n,
                                  sizeof(T), multiprocessors(device));
  if (plan.blocks == 0) return;
  launch(name, threshold_mask_kernel<T>, {plan.blocks, kMaskThreads}, stream, static_cast<const T*>(a.x),
         a.threshold, a.mask, plan);
}

}  // namespace

void threshold_mask(const ThresholdMaskArgs& a, int device, cudaStream_t stream) {
  switch (a.dtype) {
    case DType::f32: return launch_mask<float>(a, device, stream, "threshold_mask_f32");
    case DType::f16: return launch_mask<__half>(a, device, stream, "threshold_mask_f16");
    default: return launch_mask<__nv_bfloat16>(a, device, stream, "threshold_mask_bf16");
  }
}

cudaError_t kernel_image_status() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, threshold_mask_kernel<float>);
  cudaGetLastError();
  return status;
}

}  // namespace pared::cuda
