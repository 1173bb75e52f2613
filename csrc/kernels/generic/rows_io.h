// Rows of activations in, rows of outputs out, for the kernels with outputs in vector lanes: nothing is
// transposed.
#pragma once

#include "kernels/generic/panel_io.h"

namespace pared {
namespace {

template <class IO>
void widen_rows(const RowsWidenArgs& a) {
  using S = typename IO::S;
  constexpr int W = S::width;
  for (int r = 0; r < a.rows; ++r) {
    float* to = a.to + static_cast<int64_t>(r) * a.to_stride;
    int i = 0;
    if (a.dtype == DType::f32) {
      const float* x = static_cast<const float*>(a.x) + r * a.x_stride;
      for (; i + W <= a.units; i += W) S::storeu(to + i, S::loadu(x + i));
      for (; i < a.units; ++i) to[i] = x[i];
    } else {
      const bool bf16 = a.dtype == DType::bf16;
      const uint16_t* x = static_cast<const uint16_t*>(a.x) + r * a.x_stride;
      for (; i + W <= a.units; i += W) S::storeu(to + i, IO::widen(x + i, bf16));
      for (; i < a.units; ++i) to[i] = bf16 ? bf16_to_float(x[i]) : f16_to_float(x[i]);
    }
    for (; i < a.padded; ++i) to[i] = 0.0f;
  }
}

template <class IO>
void store_rows(const RowsStoreArgs& a) {
  using S = typename IO::S;
  constexpr int W = S::width, kLanes = 16;
  for (int n = 0; n < a.outputs; n += W) {
    const int count = a.outputs - n < W ? a.outputs - n : W;
    typename S::V bias = S::zero();
    if (a.bias && count == W) {
      bias = S::loadu(a.bias + n);
    } else if (a.bias) {
      alignas(64) float rest[W] = {};
      for (int i = 0; i < count; ++i) rest[i] = a.bias[n + i];
      bias = S::load(rest);
    }
    const float* acc = a.acc + static_cast<int64_t>(n / kLanes) * a.tokens * kLanes + n % kLanes;
    for (int t = 0; t < a.tokens; ++t) {
      const auto v = activate<S>(S::add(S::load(acc + t * kLanes), bias), a.activation);
      const int64_t at = t * a.y_stride + n;
      if (a.dtype == DType::f32) {
        IO::store_first(static_cast<float*>(a.y) + at, v, count);
      } else {
        IO::store_first(static_cast<uint16_t*>(a.y) + at, v, count, a.dtype == DType::bf16);
      }
    }
  }
}

}  // namespace
}  // namespace pared
