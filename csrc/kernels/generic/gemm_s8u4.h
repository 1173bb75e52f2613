// 4-bit weights by 8-bit tokens: a 64-byte vector holds two units of 16 outputs, taken apart in registers.
// Each group of the reduction has its own scale, so that its int32 sum is scaled and added in float32, in the
// groups' order: the same bits at every level and for any tile. With few tokens reading the weights is what
// limits it, with many the loads: two panels share each unit of a token.
#pragma once

#include "kernels/generic/gemm_u8s8.h"
#include "kernels/generic/panel_io.h"

namespace pared {
namespace {

// A level's way to take nibbles (n = q + 8) apart and multiply them with signed bytes. `room` is scratch;
// tokens, panels: of the largest tile; up to `few` tokens by panels each half of a pair has sums of its own,
// for few would wait out the latency of a fused product.
struct ScalarNibbles {
  static constexpr int tokens = 4, panels = 1, few = 0;
  using D = ScalarDot;
  using X = const int8_t*;
  static PARED_INLINE X unit(const int8_t* p) { return p; }
  static PARED_INLINE D::W low(const uint8_t* p, int8_t* room) {
    for (int i = 0; i < 64; ++i) room[i] = static_cast<int8_t>(p[i] & 15);
    return room;
  }
  static PARED_INLINE D::W high(const uint8_t* p, int8_t* room) {
    for (int i = 0; i < 64; ++i) room[i] = static_cast<int8_t>(p[i] >> 4);
    return room;
  }
  static PARED_INLINE void dot(D::Acc& acc, X x, D::W w) {
    for (int j = 0; j < kInt8Panel; ++j)
      for (int k = 0; k < kInt8Unit; ++k) acc.sum[j] += static_cast<uint32_t>(x[k] * w[j * kInt8Unit + k]);
  }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
struct Avx2Nibbles {
  static constexpr int tokens = 2, panels = 1, few = 0;
  using D = Avx2Dot;
  using X = __m256i;
  static PARED_INLINE X unit(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_set1_epi32(load_unit(reinterpret_cast<const uint8_t*>(p))));
  }
  static PARED_INLINE D::W low(const uint8_t* p, int8_t*) {
    const __m128i mask = _mm_set1_epi8(15);
    D::W w;
    for (int i = 0; i < 4; ++i)
      w.v[i] =
          _mm256_cvtepi8_epi16(_mm_and_si128(_mm_load_si128(reinterpret_cast<const __m128i*>(p) + i), mask));
    return w;
  }
  static PARED_INLINE D::W high(const uint8_t* p, int8_t*) {
    const __m128i mask = _mm_set1_epi8(15);
    D::W w;
    for (int i = 0; i < 4; ++i) {
      const __m128i v = _mm_load_si128(reinterpret_cast<const __m128i*>(p) + i);
      w.v[i] = _mm256_cvtepi8_epi16(_mm_and_si128(_mm_srli_epi16(v, 4), mask));
    }
    return w;
  }
  static PARED_INLINE void dot(D::Acc& acc, X x, const D::W& w) { D::dot(acc, x, w); }
};
#endif

#if defined(__AVXVNNI__)
struct AvxVnniNibbles {
  static constexpr int tokens = 6, panels = 1, few = 2;
  using D = AvxVnniDot;
  using X = __m256i;
  static PARED_INLINE X unit(const int8_t* p) {
    return _mm256_set1_epi32(load_unit(reinterpret_cast<const uint8_t*>(p)));
  }
  static PARED_INLINE D::W low(const uint8_t* p, int8_t*) {
    const auto* from = reinterpret_cast<const __m256i*>(p);
    const __m256i mask = _mm256_set1_epi8(15);
    return {{_mm256_and_si256(_mm256_load_si256(from), mask),
             _mm256_and_si256(_mm256_load_si256(from + 1), mask)}};
  }
  static PARED_INLINE D::W high(const uint8_t* p, int8_t*) {
    const auto* from = reinterpret_cast<const __m256i*>(p);
    const __m256i mask = _mm256_set1_epi8(15);
    return {{_mm256_and_si256(_mm256_srli_epi16(_mm256_load_si256(from), 4), mask),
             _mm256_and_si256(_mm256_srli_epi16(_mm256_load_si256(from + 1), 4), mask)}};
  }
  static PARED_INLINE void dot(D::Acc& acc, X x, const D::W& w) {
    for (int i = 0; i < 2; ++i) acc.v[i] = _mm256_dpbusd_avx_epi32(acc.v[i], w.v[i], x);
  }
};
#endif

#if defined(__AVX512F__) && !defined(__AVX512VNNI__)
struct Avx512Nibbles {
  static constexpr int tokens = 4, panels = 1, few = 0;
  using D = Avx512Dot;
  using X = __m512i;
  static PARED_INLINE X unit(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_set1_epi32(load_unit(reinterpret_cast<const uint8_t*>(p))));
  }
  static PARED_INLINE D::W low(const uint8_t* p, int8_t*) {
    const __m256i mask = _mm256_set1_epi8(15);
    D::W w;
    for (int i = 0; i < 2; ++i)
      w.v[i] = _mm512_cvtepi8_epi16(
          _mm256_and_si256(_mm256_load_si256(reinterpret_cast<const __m256i*>(p) + i), mask));
    return w;
  }
  static PARED_INLINE D::W high(const uint8_t* p, int8_t*) {
    const __m256i mask = _mm256_set1_epi8(15);
    D::W w;
    for (int i = 0; i < 2; ++i) {
      const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(p) + i);
      w.v[i] = _mm512_cvtepi8_epi16(_mm256_and_si256(_mm256_srli_epi16(v, 4), mask));
    }
    return w;
  }
  static PARED_INLINE void dot(D::Acc& acc, X x, const D::W& w) { D::dot(acc, x, w); }
};
#endif

#if defined(__AVX512VNNI__)
struct VnniNibbles {
  static constexpr int few = 4, tokens = 6,
                       panels = 2;  // 12 sums in int32, 12 in float32, 4 vectors of weights
  using D = VnniDot;
  using X = __m512i;
  static PARED_INLINE X unit(const int8_t* p) {
    return _mm512_set1_epi32(load_unit(reinterpret_cast<const uint8_t*>(p)));
  }
  static PARED_INLINE D::W low(const uint8_t* p, int8_t*) {
    return _mm512_and_si512(_mm512_load_si512(p), _mm512_set1_epi8(15));
  }
  static PARED_INLINE D::W high(const uint8_t* p, int8_t*) {
    return _mm512_and_si512(_mm512_srli_epi16(_mm512_load_si512(p), 4), _mm512_set1_epi8(15));
  }
  static PARED_INLINE void dot(D::Acc& acc, X x, D::W w) { acc = _mm512_dpbusd_epi32(acc, w, x); }
};
#endif

// Pairs of units after which a level's sums are full and D::settle is called; 0: never.
template <class N>
constexpr int kFullAfter = 0;

#if defined(__aarch64__)
template <class W>
PARED_INLINE W low_nibbles(const uint8_t* p) {
  W w;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) w.v[i] = vreinterpretq_s8_u8(vandq_u8(vld1q_u8(p + 16 * i), vdupq_n_u8(15)));
  return w;
}
template <class W>
PARED_INLINE W high_nibbles(const uint8_t* p) {
  W w;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) w.v[i] = vreinterpretq_s8_u8(vshrq_n_u8(vld1q_u8(p + 16 * i), 4));
  return w;
}

// A product of a byte and a nibble is 1920 at most: seventeen fit a sum of 16 bits, which takes products as
// they are, eight at a time.
struct NeonWideNibbles {
  static constexpr int tokens = 2, panels = 1, few = 0;
  struct D {
    struct Acc {
      int16x8_t v[8];    // two outputs each
      int32x4_t sum[4];  // what was in them when they were full
    };
    struct W {
      int8x16_t v[4];
    };
    static PARED_INLINE Acc zero() {
      const int16x8_t none = vdupq_n_s16(0);
      const int32x4_t sum = vdupq_n_s32(0);
      return {{none, none, none, none, none, none, none, none}, {sum, sum, sum, sum}};
    }
    static PARED_INLINE void settle(Acc& a) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        a.sum[i] = vaddq_s32(a.sum[i], vpaddq_s32(vpaddlq_s16(a.v[2 * i]), vpaddlq_s16(a.v[2 * i + 1])));
        a.v[2 * i] = a.v[2 * i + 1] = vdupq_n_s16(0);
      }
    }
    static PARED_INLINE void add(Acc& to, Acc from) {
      settle(from);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) to.sum[i] = vaddq_s32(to.sum[i], from.sum[i]);
    }
    static PARED_INLINE void store(int32_t* p, Acc acc, bool) {
      settle(acc);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, acc.sum[i]);
    }
  };
  using X = int8x16_t;
  static PARED_INLINE X unit(const int8_t* p) {
    uint32_t u;
    memcpy(&u, p, 4);
    return vreinterpretq_s8_u32(vdupq_n_u32(u));
  }
  static PARED_INLINE D::W low(const uint8_t* p, int8_t*) { return low_nibbles<D::W>(p); }
  static PARED_INLINE D::W high(const uint8_t* p, int8_t*) { return high_nibbles<D::W>(p); }
  static PARED_INLINE void dot(D::Acc& acc, X x, const D::W& w) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      acc.v[2 * i] = vmlal_s8(acc.v[2 * i], vget_low_s8(w.v[i]), vget_low_s8(x));
      acc.v[2 * i + 1] = vmlal_high_s8(acc.v[2 * i + 1], w.v[i], x);
    }
  }
};
template <>
constexpr int kFullAfter<NeonWideNibbles> = 8;
#endif

#if defined(__ARM_FEATURE_DOTPROD)
// Both operands are signed.
struct NeonSdotProducts {
  static constexpr int tokens = 6;
  using Quarter = int32x4_t;
  using Bytes = int8x16_t;
  using Unit = int8x8_t;
  static PARED_INLINE Quarter filled(uint32_t v) { return vreinterpretq_s32_u32(vdupq_n_u32(v)); }
  static PARED_INLINE Bytes load(const int8_t* p) { return vld1q_s8(p); }
  static PARED_INLINE Unit unit(const uint8_t* p) { return vreinterpret_s8_u8(low_unit(p)); }
  static PARED_INLINE Quarter dot(Quarter s, Bytes w, Unit x) { return vdotq_lane_s32(s, w, x, 0); }
  static PARED_INLINE Quarter add(Quarter a, Quarter b) { return vaddq_s32(a, b); }
  static PARED_INLINE uint32x4_t outputs(Quarter s) { return vreinterpretq_u32_s32(s); }
};

struct NeonSdotNibbles {
  static constexpr int tokens = 6, panels = 1, few = 2;
  using D = NeonDot<NeonSdotProducts>;
  using X = D::A;
  static PARED_INLINE X unit(const int8_t* p) { return D::unit(reinterpret_cast<const uint8_t*>(p)); }
  static PARED_INLINE D::W low(const uint8_t* p, int8_t*) { return low_nibbles<D::W>(p); }
  static PARED_INLINE D::W high(const uint8_t* p, int8_t*) { return high_nibbles<D::W>(p); }
  static PARED_INLINE void dot(D::Acc& acc, X x, const D::W& w) { D::dot(acc, x, w); }
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

#if defined(__aarch64__)
PARED_INLINE float32x4_t float_minus(const int32_t* p, int32_t s, NeonF32) {
  return vcvtq_f32_s32(vsubq_s32(vld1q_s32(p), vdupq_n_s32(s)));
}
#endif

// Several panels side by side fetch those that come next: Zen 4, weights from memory, 0.66 to 0.82 of the
// time with two tokens and more.
template <class N, class IO, int TOKENS, int PANELS>
PARED_INLINE void gemm_s8u4_tile(const Int4Args& a, int token, int panel) {
  using S = typename IO::S;
  using D = typename N::D;
  constexpr int W = S::width, V = kInt8Panel / W;
  constexpr int U = TOKENS * PANELS <= N::few ? 2 : 1;
  constexpr int64_t kLine = 64;
  typename S::V total[TOKENS][PANELS][V];
  for (int m = 0; m < TOKENS; ++m)
    for (int p = 0; p < PANELS; ++p)
      for (int v = 0; v < V; ++v) total[m][p][v] = S::zero();
  const int8_t* x = a.x + token * a.x_stride;
  const uint8_t* w = a.w + panel * a.w_stride;
  alignas(64) int8_t room[PANELS][kLine];
  alignas(64) int32_t sums[kInt8Panel];
  for (int g = 0; g < a.groups; ++g) {
    const uint8_t* scales = w;
    w += kLine;
    typename D::Acc acc[U][TOKENS][PANELS];
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u)
#pragma GCC unroll 6
      for (int m = 0; m < TOKENS; ++m)
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) acc[u][m][p] = D::zero();
    for (int i = 0; i < a.pairs; ++i, w += kLine, x += 2 * kInt8Unit) {
      if constexpr (kFullAfter<N> > 0)
        if (i > 0 && i % kFullAfter<N> == 0)
          for (int m = 0; m < TOKENS; ++m)
            for (int p = 0; p < PANELS; ++p) D::settle(acc[0][m][p]);
      typename D::W weights[PANELS];
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) {
        weights[p] = N::low(w + p * a.w_stride, room[p]);
        // One panel alone is a stream that processors foresee.
        if constexpr (PANELS > 1) __builtin_prefetch(w + (PANELS + p) * a.w_stride, 0, 2);
      }
#pragma GCC unroll 6
      for (int m = 0; m < TOKENS; ++m) {
        const typename N::X unit = N::unit(x + m * a.x_stride);
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) N::dot(acc[0][m][p], unit, weights[p]);
      }
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) weights[p] = N::high(w + p * a.w_stride, room[p]);
#pragma GCC unroll 6
      for (int m = 0; m < TOKENS; ++m) {
        const typename N::X unit = N::unit(x + m * a.x_stride + kInt8Unit);
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) N::dot(acc[U - 1][m][p], unit, weights[p]);
      }
    }
#pragma GCC unroll 6
    for (int m = 0; m < TOKENS; ++m) {
      const int32_t shift = a.sums[(token + m) * a.groups + g];
#pragma GCC unroll 2
      for (int p = 0; p < PANELS; ++p) {
        if (U > 1) D::add(acc[0][m][p], acc[U - 1][m][p]);
        D::store(sums, acc[0][m][p], false);
        const float* s = reinterpret_cast<const float*>(scales + p * a.w_stride);
        for (int v = 0; v < V; ++v)
          total[m][p][v] =
              S::add(total[m][p][v], S::mul(float_minus(sums + v * W, shift, S{}), S::load(s + v * W)));
      }
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < PANELS; ++p)
    for (int v = 0; v < V; ++v) {
      const int first = (panel + p) * kInt8Panel + v * W;
      const int count = a.outputs - first < W ? a.outputs - first : W;
      if (count <= 0) break;
      alignas(64) float bias[W];
      for (int i = 0; i < W; ++i) bias[i] = a.bias && i < count ? a.bias[first + i] : 0.0f;
#pragma GCC unroll 6
      for (int m = 0; m < TOKENS; ++m) {
        const auto y = activate<S>(
            S::add(S::mul(total[m][p][v], S::set1(a.x_scales[token + m])), S::load(bias)), a.activation);
        const int64_t at = (token + m) * a.y_stride + first;
        if (a.dtype == DType::f32) {
          IO::store_first(static_cast<float*>(a.y) + at, y, count);
        } else {
          IO::store_first(static_cast<uint16_t*>(a.y) + at, y, count, a.dtype == DType::bf16);
        }
      }
    }
}

template <class N, class IO, int PANELS>
PARED_INLINE void gemm_s8u4_panels(const Int4Args& a, int panel) {
  int m = 0;
  if constexpr (N::tokens > 4)
    for (; m + N::tokens <= a.tokens; m += N::tokens) gemm_s8u4_tile<N, IO, N::tokens, PANELS>(a, m, panel);
  if constexpr (N::tokens >= 4)
    for (; m + 4 <= a.tokens; m += 4) gemm_s8u4_tile<N, IO, 4, PANELS>(a, m, panel);
  for (; m + 2 <= a.tokens; m += 2) gemm_s8u4_tile<N, IO, 2, PANELS>(a, m, panel);
  if (m < a.tokens) gemm_s8u4_tile<N, IO, 1, PANELS>(a, m, panel);
}

template <class N, class IO>
void gemm_s8u4_run(const Int4Args& a) {
  const int panels = (a.outputs + kInt8Panel - 1) / kInt8Panel;
  int p = 0;
  // One token alone reads each panel from end to end, as memory likes it best.
  if (N::panels > 1 && a.tokens > 1)
    for (; p + N::panels <= panels; p += N::panels) gemm_s8u4_panels<N, IO, N::panels>(a, p);
  for (; p < panels; ++p) gemm_s8u4_panels<N, IO, 1>(a, p);
}

}  // namespace
}  // namespace pared
