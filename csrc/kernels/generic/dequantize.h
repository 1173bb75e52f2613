// The epilogue of the int8 products: scales, bias, activation, narrowing. IO is a level's set of operations
// of generic/panel_io.h.
#pragma once

#include "kernels/generic/panel_io.h"

namespace pared {
namespace {

// float(a[i] - b[i]), the difference modulo 2^32.
PARED_INLINE float float_difference(const int32_t* a, const int32_t* b, ScalarF32) {
  return static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(*a) - static_cast<uint32_t>(*b)));
}
#if defined(__AVX2__)
PARED_INLINE __m256 float_difference(const int32_t* a, const int32_t* b, Avx2F32) {
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(a)),
                                             _mm256_load_si256(reinterpret_cast<const __m256i*>(b))));
}
#endif
#if defined(__AVX512F__)
PARED_INLINE __m512 float_difference(const int32_t* a, const int32_t* b, Avx512F32) {
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(a), _mm512_load_si512(b)));
}
#endif

template <class S>
PARED_INLINE typename S::V bias_vector(const DequantizeArgs& a, int n, int count) {
  if (!a.bias) return S::zero();
  if (count == S::width) return S::loadu(a.bias + n);
  alignas(64) float bias[S::width];
  for (int i = 0; i < S::width; ++i) bias[i] = i < count ? a.bias[n + i] : 0.0f;
  return S::load(bias);
}

template <class IO>
void dequantize_rows(const DequantizeArgs& a) {
  using S = typename IO::S;
  constexpr int W = S::width;
  for (int n = 0; n < a.outputs; n += W) {
    const int count = a.outputs - n < W ? a.outputs - n : W;
    const typename S::V b = bias_vector<S>(a, n, count), w = S::load(a.w_scales + n);
    for (int m = 0; m < a.tokens; ++m) {
      const auto sum = float_difference(a.acc + m * a.acc_stride + n, a.compensation + n, S{});
      const auto y = S::add(S::mul(S::mul(sum, S::set1(a.x_scales[m])), w), b);
      const auto v = activate<S>(y, a.activation);
      const int64_t at = m * a.y_stride + n;
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
