// Activations that the epilogues fuse.
#pragma once

#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

// NaN stays NaN in every one of them.
PARED_INLINE float activate_scalar(float x, Activation a) {
  switch (a) {
    case Activation::none: return x;
    case Activation::relu: return x < 0.0f ? 0.0f : x;
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::gelu_tanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::silu: return x / (1.0f + expf(-x));
  }
  return x;
}

template <class S>
PARED_INLINE typename S::V activate(typename S::V v, Activation a) {
  if (a == Activation::none) return v;
  alignas(64) float lanes[S::width];
  S::store(lanes, v);
  for (int i = 0; i < S::width; ++i) lanes[i] = activate_scalar(lanes[i], a);
  return S::load(lanes);
}

}  // namespace
}  // namespace pared
