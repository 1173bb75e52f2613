// Panel packing and the epilogue that stores a tile: both are transposes, in registers, of 16x16 (AVX-512),
// 8x8 (AVX2) or single elements. S is the vector type; T16 its transposer.
#pragma once

#include "kernels/generic/activation.h"
#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

PARED_INLINE float widen(const void* p, int64_t i, DType t) {
  if (t == DType::f32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return t == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
}

PARED_INLINE void narrow(void* p, int64_t i, DType t, float f) {
  if (t == DType::f32) {
    static_cast<float*>(p)[i] = f;
  } else {
    static_cast<uint16_t*>(p)[i] = t == DType::bf16 ? float_to_bf16(f) : float_to_f16(f);
  }
}

// Element by element: the tails of the vector kernels, and all of the scalar one.
void pack_elements(const PanelPackArgs& a, int m0, int m1, int u0, int u1) {
  for (int u = u0; u < u1; ++u)
    for (int m = m0; m < m1; ++m)
      a.panel[static_cast<int64_t>(u) * a.stride + m] =
          m < a.positions ? widen(a.x, m * a.x_stride + u, a.dtype) : 0.0f;
}

void store_elements(const PanelStoreArgs& a, int m0, int m1, int r0, int r1) {
  for (int m = m0; m < m1; ++m)
    for (int r = r0; r < r1; ++r) {
      const float sum = a.acc[static_cast<int64_t>(r) * a.acc_stride + m] + (a.bias ? a.bias[r] : 0.0f);
      narrow(a.y, m * a.y_stride + r, a.dtype, activate_scalar(sum, a.activation));
    }
}

}  // namespace
}  // namespace pared
