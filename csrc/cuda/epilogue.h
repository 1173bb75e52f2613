// What products share when their sums are done: activations, and narrowing to the output's type.
#pragma once

#include "cuda/ptx.h"
#include "kernels/types.h"

namespace pared::cuda {

// Each in the form that does not cancel in the far tail: 1 + erf(x) would. At -infinity gelu and silu give
// NaN, as torch's do.
__device__ __forceinline__ float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::relu: return x < 0.0f ? 0.0f : x;  // NaN stays
    case Activation::gelu: return 0.5f * x * erfcf(x * -0.70710678118654752f);
    case Activation::gelu_tanh: {
      const float z = 1.5957691216057308f * (x + 0.044715f * x * x * x);  // x sigmoid(z)
      return x / (1.0f + expf(-z));
    }
    case Activation::silu: return x / (1.0f + expf(-x));
    default: return x;
  }
}

template <class T>
__device__ __forceinline__ T narrow(float v) {
  return static_cast<T>(v);
}
template <>
__device__ __forceinline__ __half narrow(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow(float v) {
  return __float2bfloat16_rn(v);
}

// Four values that are stored with one instruction.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// The first `count` of them, at once where there are four and the address allows it.
template <class T>
__device__ __forceinline__ void store_first(T* y, const Four<T>& v, int count) {
  if (count == 4 && reinterpret_cast<uintptr_t>(y) % sizeof(v) == 0) {
    *reinterpret_cast<Four<T>*>(y) = v;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) y[i] = v.at[i];
  }
}

}  // namespace pared::cuda
