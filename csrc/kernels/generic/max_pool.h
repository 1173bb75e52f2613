// Max pooling of a channel plane. The largest of a window is found by axis: down the columns, which is whole
// vectors of neighbouring elements and widens 16-bit ones, then along those rows, which stay in L1. Several
// at a time: a load that takes from two vectors waits until both are written, ten times as long as one from
// L1.
#pragma once

#include "kernels/generic/conv_io.h"

namespace pared {
namespace {

// The larger one, and NaN where either is: the machine's maximum gives b then.
PARED_INLINE float larger(float a, float b) { return a != a || a > b ? a : b; }
#if defined(__AVX2__)
PARED_INLINE __m256 larger(__m256 a, __m256 b) {
  return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
#endif
#if defined(__AVX512F__)
PARED_INLINE __m512 larger(__m512 a, __m512 b) {
  return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
#endif
#if defined(__aarch64__)
PARED_INLINE float32x4_t larger(float32x4_t a, float32x4_t b) { return vmaxq_f32(a, b); }
#endif

template <int W>
PARED_INLINE uint32_t first_lanes(int64_t n) {
  return n < W ? (1u << n) - 1u : (1u << W) - 1u;
}

// row[m]: the largest of column m over the window's rows that the plane has; -infinity where it has none, and
// in the rest of the last vector.
template <class C, ConvRead R>
PARED_INLINE void pool_columns(const MaxPoolArgs& a, int64_t top, float* row) {
  using S = typename C::S;
  constexpr int W = S::width;
  int64_t i0 = 0, i1 = a.kernel_h;
  while (i0 < i1 && top + i0 * a.dilation_h < 0) ++i0;
  while (i0 < i1 && top + (i1 - 1) * a.dilation_h >= a.height) --i1;
  for (int64_t m = 0; m < a.width; m += W) {
    const uint32_t bits = first_lanes<W>(a.width - m);
    typename S::V v = S::set1(-__builtin_inff());
    for (int64_t i = i0; i < i1; ++i) {
      const auto x = C::template gather<R>(a.x, (top + i * a.dilation_h) * a.width + m, bits, 1, a.dtype);
      v = i == i0 ? x : larger(v, x);
    }
    S::store(row + m, v);
  }
  for (int64_t m = a.width; m % W != 0; ++m) row[m] = -__builtin_inff();
}

template <class C, ConvRead STEP>
PARED_INLINE void pool_row(const MaxPoolArgs& a, const float* row, int64_t to) {
  using S = typename C::S;
  constexpr int W = S::width;
  for (int64_t m = 0; m < a.out_w; m += W) {
    const uint32_t bits = first_lanes<W>(a.out_w - m);
    const int64_t from = m * a.stride_w - a.pad_left;
    typename S::V v = C::template gather<STEP>(row, from, bits, a.stride_w, DType::f32);
    for (int64_t j = 1; j < a.kernel_w; ++j)
      v = larger(v, C::template gather<STEP>(row, from + j * a.dilation_w, bits, a.stride_w, DType::f32));
    const int n = a.out_w - m < W ? static_cast<int>(a.out_w - m) : W;
    if (a.dtype == DType::f32) C::Io::store_first(static_cast<float*>(a.y) + to + m, v, n);
    else C::Io::store_first(static_cast<uint16_t*>(a.y) + to + m, v, n, a.dtype == DType::bf16);
  }
}

template <class C, ConvRead R, ConvRead STEP>
void pool_plane(const MaxPoolArgs& args) {
  const MaxPoolArgs a = args;  // a copy: a store cannot change it
  for (int64_t y0 = 0; y0 < a.out_h; y0 += kMaxPoolRows) {
    const int64_t y1 = y0 + kMaxPoolRows < a.out_h ? y0 + kMaxPoolRows : a.out_h;
    float* row = a.rows;
    for (int64_t y = y0; y < y1; ++y, row += a.row_stride)
      pool_columns<C, R>(a, y * a.stride_h - a.pad_top, row);
    row = a.rows;
    for (int64_t y = y0; y < y1; ++y, row += a.row_stride) pool_row<C, STEP>(a, row, y * a.out_w);
  }
}

template <class C, ConvRead R>
void max_pool_as(const MaxPoolArgs& a) {
  switch (conv_read(DType::f32, a.stride_w)) {
    case ConvRead::f32_1: return pool_plane<C, R, ConvRead::f32_1>(a);
    case ConvRead::f32_2: return pool_plane<C, R, ConvRead::f32_2>(a);
    default: return pool_plane<C, R, ConvRead::any>(a);
  }
}

template <class C>
void max_pool_plane(const MaxPoolArgs& a) {
  switch (conv_read(a.dtype, 1)) {
    case ConvRead::f32_1: return max_pool_as<C, ConvRead::f32_1>(a);
    case ConvRead::bf16_1: return max_pool_as<C, ConvRead::bf16_1>(a);
    default: return max_pool_as<C, ConvRead::f16_1>(a);
  }
}

}  // namespace
}  // namespace pared
