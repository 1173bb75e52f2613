// Dense int8 weights times words of four channels, output positions in lanes: a convolution of channel planes
// without a transpose on either side. Neighbouring positions read neighbouring words, so that a tap's operand
// is a vector load at any offset: it may cross a line, which takes two load slots, and still 6 such loads and
// 4 broadcasts for 24 products leave the products the limit.
#pragma once

#include "kernels/generic/simd_s8.h"
#include "kernels/types.h"

namespace pared {
namespace {

PARED_INLINE float float_of(int32_t v, ScalarS8) { return static_cast<float>(v); }
#if defined(__AVX2__)
PARED_INLINE __m256 float_of(__m256i v, Avx2S8) { return _mm256_cvtepi32_ps(v); }
#endif
#if defined(__AVXVNNI__)
PARED_INLINE __m256 float_of(__m256i v, AvxVnniS8) { return _mm256_cvtepi32_ps(v); }
#endif
#if defined(__AVX512BW__)
PARED_INLINE __m512 float_of(__m512i v, Avx512S8) { return _mm512_cvtepi32_ps(v); }
#endif
#if defined(__AVX512VNNI__)
PARED_INLINE __m512 float_of(__m512i v, VnniS8) { return _mm512_cvtepi32_ps(v); }
#endif

#if defined(__aarch64__)
PARED_INLINE float32x4_t float_of(NeonWideS8::V v, NeonWideS8) { return vcvtq_f32_s32(NeonWideS8::sums(v)); }
PARED_INLINE float32x4_t float_of(int32x4_t v, NeonWordSums) { return vcvtq_f32_s32(v); }
#endif

PARED_INLINE int32_t weight_word(const int8_t* w) {
  int32_t word;
  memcpy(&word, w, sizeof(word));
  return word;
}

// FILTERS filters from `filter` on by N vectors, the first position `first` words behind the tile's.
template <class S, class F, int FILTERS, int N>
PARED_INLINE void conv_planes_tile(const ConvPlanesArgs& a, int first, int filter) {
  typename S::V sum[FILTERS][N];
#pragma GCC unroll 16
  for (int f = 0; f < FILTERS; ++f)
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) sum[f][v] = S::zero();
  LeftOut<S> left_out[FILTERS / 4];
  const int8_t* w = a.w + filter * kInt8Unit;
  for (int t = 0; t < a.taps; ++t) {
    const int32_t* x = reinterpret_cast<const int32_t*>(a.x) + a.taps_at[t] + first;
    for (int u = 0; u < a.units; ++u, x += a.unit_stride, w += kInt8Panel * kInt8Unit) {
      typename S::Operand column[N];
#pragma GCC unroll 16
      for (int v = 0; v < N; ++v) column[v] = S::operand(x + v * S::width);
      if constexpr (kByLane<S>) {
#pragma GCC unroll 4
        for (int f = 0; f < FILTERS; f += 4) {
          const typename S::Four four = S::four(reinterpret_cast<const int32_t*>(w + f * kInt8Unit));
          left_out[f / 4].add(four);
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < N; ++v) sum[f + r][v] = S::fma(S::nth(four, r), column[v], sum[f + r][v]);
        }
      } else {
#pragma GCC unroll 16
        for (int f = 0; f < FILTERS; ++f) {
          const typename S::Value value = S::value(weight_word(w + f * kInt8Unit));
#pragma GCC unroll 16
          for (int v = 0; v < N; ++v) sum[f][v] = S::fma(value, column[v], sum[f][v]);
        }
      }
    }
  }
  const auto x_scale = F::set1(a.x_scale);
  for (int f = 0; f < FILTERS; ++f) {
    const auto rest = left_out[f / 4].of_row(f % 4);
    float* y = a.y + (filter + f) * a.y_stride + first;
    const auto scale = F::set1(a.w_scales[filter + f]);
    const int32_t zero = a.compensation[filter + f];
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v)
      F::store(
          y + v * F::width,
          F::mul(F::mul(float_of(S::minus(LeftOut<S>::with(sum[f][v], rest), zero), S{}), x_scale), scale));
  }
}

// COUNT vectors of all filters, from the tile's vector `first` on; as many filters at a time as fill the
// registers.
template <class S, class F, int SUMS, int COUNT>
void conv_planes_part(const ConvPlanesArgs& a, int first) {
  constexpr int kFilters = 16 * COUNT <= SUMS ? 16 : 8 * COUNT <= SUMS ? 8 : 4;
  for (int f = 0; f < a.filters; f += kFilters) {
    const char* ahead = static_cast<const char*>(a.ahead) + f * a.ahead_stride;
    for (int r = 0; first == 0 && r < kFilters && f + r < a.filters; ++r, ahead += a.ahead_stride)
      for (int64_t b = 0; b < a.ahead_bytes; b += 64) __builtin_prefetch(ahead + b, 1);
    conv_planes_tile<S, F, kFilters, COUNT>(a, first * S::width, f);
  }
}

// A tile of VECTORS groups of 16 positions: parts of at most WIDEST vectors, of equal width or one less.
// Tiles share the code of a width: a copy for each part took a compiler 80 s where vectors are single words.
template <class S, class F, int SUMS, int WIDEST, int VECTORS>
void conv_planes_rows(const ConvPlanesArgs& a) {
  constexpr int kAll = VECTORS * kPanelGroup / S::width, kParts = (kAll + WIDEST - 1) / WIDEST;
  constexpr int kNarrow = kAll / kParts, kWide = (kAll + kParts - 1) / kParts;
  for (int part = 0, first = 0; part < kParts; ++part) {
    const int end = kAll * (part + 1) / kParts;
    if (end - first == kNarrow) conv_planes_part<S, F, SUMS, kNarrow>(a, first);
    else conv_planes_part<S, F, SUMS, kWide>(a, first);
    first = end;
  }
}

#define PARED_CONV_PLANES_TABLE(S, F, SUMS, WIDEST)                                  \
  {conv_planes_rows<S, F, SUMS, WIDEST, 1>, conv_planes_rows<S, F, SUMS, WIDEST, 2>, \
   conv_planes_rows<S, F, SUMS, WIDEST, 3>, conv_planes_rows<S, F, SUMS, WIDEST, 4>, \
   conv_planes_rows<S, F, SUMS, WIDEST, 5>, conv_planes_rows<S, F, SUMS, WIDEST, 6>}

}  // namespace
}  // namespace pared
