// 4-bit weights by 8-bit tokens, for few tokens: a 64-byte vector holds two units of 16 outputs, taken apart
// in registers. Each group of the reduction has its own scale, so that its int32 sum is scaled and added in
// float32, in the groups' order: the same bits at every level. What limits it is reading the weights.
#pragma once

#include "kernels/generic/gemm_u8s8.h"
#include "kernels/generic/panel_io.h"

namespace pared {
namespace {

// A level's way to take nibbles (n = q + 8) apart and multiply them with signed bytes. `room` is scratch.
struct ScalarNibbles {
  using D = ScalarDot;
  using X = const int8_t*;
  static PARED_INLINE X unit(const int8_t* p) { return p; }
  static PARED_INLINE void split(const uint8_t* p, int8_t* room, D::W& low, D::W& high) {
    for (int i = 0; i < 64; ++i) {
      room[i] = static_cast<int8_t>(p[i] & 15);
      room[64 + i] = static_cast<int8_t>(p[i] >> 4);
    }
    low = room;
    high = room + 64;
  }
  static PARED_INLINE void dot(D::Acc& acc, X x, D::W w) {
    for (int j = 0; j < kInt8Panel; ++j)
      for (int k = 0; k < kInt8Unit; ++k) acc.sum[j] += static_cast<uint32_t>(x[k] * w[j * kInt8Unit + k]);
  }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
struct Avx2Nibbles {
  using D = Avx2Dot;
  using X = __m256i;
  static PARED_INLINE X unit(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_set1_epi32(load_unit(reinterpret_cast<const uint8_t*>(p))));
  }
  static PARED_INLINE void split(const uint8_t* p, int8_t*, D::W& low, D::W& high) {
    const __m128i mask = _mm_set1_epi8(15);
    for (int i = 0; i < 4; ++i) {
      const __m128i v = _mm_load_si128(reinterpret_cast<const __m128i*>(p) + i);
      low.v[i] = _mm256_cvtepi8_epi16(_mm_and_si128(v, mask));
      high.v[i] = _mm256_cvtepi8_epi16(_mm_and_si128(_mm_srli_epi16(v, 4), mask));
    }
  }
  static PARED_INLINE void dot(D::Acc& acc, X x, const D::W& w) { D::dot(acc, x, w); }
};
#endif

#if defined(__AVX512F__) && !defined(__AVX512VNNI__)
struct Avx512Nibbles {
  using D = Avx512Dot;
  using X = __m512i;
  static PARED_INLINE X unit(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_set1_epi32(load_unit(reinterpret_cast<const uint8_t*>(p))));
  }
  static PARED_INLINE void split(const uint8_t* p, int8_t*, D::W& low, D::W& high) {
    const __m256i mask = _mm256_set1_epi8(15);
    for (int i = 0; i < 2; ++i) {
      const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(p) + i);
      low.v[i] = _mm512_cvtepi8_epi16(_mm256_and_si256(v, mask));
      high.v[i] = _mm512_cvtepi8_epi16(_mm256_and_si256(_mm256_srli_epi16(v, 4), mask));
    }
  }
  static PARED_INLINE void dot(D::Acc& acc, X x, const D::W& w) { D::dot(acc, x, w); }
};
#endif

#if defined(__AVX512VNNI__)
struct VnniNibbles {
  using D = VnniDot;
  using X = __m512i;
  static PARED_INLINE X unit(const int8_t* p) {
    return _mm512_set1_epi32(load_unit(reinterpret_cast<const uint8_t*>(p)));
  }
  static PARED_INLINE void split(const uint8_t* p, int8_t*, D::W& low, D::W& high) {
    const __m512i mask = _mm512_set1_epi8(15), v = _mm512_load_si512(p);
    low = _mm512_and_si512(v, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
  }
  // The nibbles are the unsigned operand.
  static PARED_INLINE void dot(D::Acc& acc, X x, D::W w) { acc = _mm512_dpbusd_epi32(acc, w, x); }
};
#endif

// float(p[i] - s)
PARED_INLINE float float_minus(const int32_t* p, int32_t s, ScalarF32) { return static_cast<float>(*p - s); }
#if defined(__AVX2__)
PARED_INLINE __m256 float_minus(const int32_t* p, int32_t s, Avx2F32) {
  return _mm256_cvtepi32_ps(
      _mm256_sub_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi32(s)));
}
#endif
#if defined(__AVX512F__)
PARED_INLINE __m512 float_minus(const int32_t* p, int32_t s, Avx512F32) {
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(p), _mm512_set1_epi32(s)));
}
#endif

template <class N, class IO, int TOKENS>
PARED_INLINE void gemm_s8u4_tokens(const Int4Args& a, int token) {
  using S = typename IO::S;
  using D = typename N::D;
  constexpr int W = S::width, V = kInt8Panel / W;
  constexpr int64_t kLine = 64;
  typename S::V total[TOKENS][V];
  for (int m = 0; m < TOKENS; ++m)
    for (int v = 0; v < V; ++v) total[m][v] = S::zero();
  const int8_t* x = a.x + token * a.x_stride;
  const uint8_t* w = a.w;
  alignas(64) int8_t room[2 * kLine];
  alignas(64) int32_t sums[kInt8Panel];
  for (int g = 0; g < a.groups; ++g) {
    const float* scales = reinterpret_cast<const float*>(w);
    w += kLine;
    // A sum for each half: with one token a single chain would wait out the latency.
    typename D::Acc acc[2][TOKENS];
    for (int m = 0; m < TOKENS; ++m) acc[0][m] = acc[1][m] = D::zero();
    for (int i = 0; i < a.pairs; ++i, w += kLine, x += 2 * kInt8Unit) {
      typename D::W low, high;
      N::split(w, room, low, high);
#pragma GCC unroll 4
      for (int m = 0; m < TOKENS; ++m) {
        N::dot(acc[0][m], N::unit(x + m * a.x_stride), low);
        N::dot(acc[1][m], N::unit(x + m * a.x_stride + kInt8Unit), high);
      }
    }
    for (int m = 0; m < TOKENS; ++m) {
      D::add(acc[0][m], acc[1][m]);
      D::store(sums, acc[0][m], false);
      const int32_t shift = a.sums[(token + m) * a.groups + g];
      for (int v = 0; v < V; ++v)
        total[m][v] =
            S::add(total[m][v], S::mul(float_minus(sums + v * W, shift, S{}), S::load(scales + v * W)));
    }
  }
  for (int v = 0; v * W < a.outputs; ++v) {
    const int count = a.outputs - v * W < W ? a.outputs - v * W : W;
    alignas(64) float bias[W];
    for (int i = 0; i < W; ++i) bias[i] = a.bias && i < count ? a.bias[v * W + i] : 0.0f;
    for (int m = 0; m < TOKENS; ++m) {
      const auto y = activate<S>(S::add(S::mul(total[m][v], S::set1(a.x_scales[token + m])), S::load(bias)),
                                 a.activation);
      const int64_t at = (token + m) * a.y_stride + v * W;
      if (a.dtype == DType::f32) {
        IO::store_first(static_cast<float*>(a.y) + at, y, count);
      } else {
        IO::store_first(static_cast<uint16_t*>(a.y) + at, y, count, a.dtype == DType::bf16);
      }
    }
  }
}

template <class N, class IO>
void gemm_s8u4_panel(const Int4Args& a) {
  int m = 0;
  for (; m + 4 <= a.tokens; m += 4) gemm_s8u4_tokens<N, IO, 4>(a, m);
  for (; m + 2 <= a.tokens; m += 2) gemm_s8u4_tokens<N, IO, 2>(a, m);
  if (m < a.tokens) gemm_s8u4_tokens<N, IO, 1>(a, m);
}

}  // namespace
}  // namespace pared
