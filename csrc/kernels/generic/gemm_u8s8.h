// The int8 micro-kernel: a register tile of tokens by panels of 16 outputs. A weight vector is loaded once
// for all tokens of the tile, a unit of a token (4 bytes) broadcast once for all panels. D is one level's dot
// product of a unit with a panel; without VNNI both operands are widened to 16 bits and multiplied with
// vpmaddwd, which no value saturates (vpmaddubsw would, at 255 * 127 * 2).
#pragma once

#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

struct ScalarDot {
  static constexpr int tokens = 1, panels = 1;
  struct Acc {
    uint32_t sum[kInt8Panel];
  };
  using W = const int8_t*;
  using A = const uint8_t*;
  static PARED_INLINE Acc zero() { return {}; }
  static PARED_INLINE W weights(const int8_t* p) { return p; }
  static PARED_INLINE A unit(const uint8_t* p) { return p; }
  static PARED_INLINE void dot(Acc& acc, A a, W w) {
    for (int j = 0; j < kInt8Panel; ++j)
      for (int k = 0; k < kInt8Unit; ++k) acc.sum[j] += static_cast<uint32_t>(a[k] * w[j * kInt8Unit + k]);
  }
  static PARED_INLINE void add(Acc& to, const Acc& from) {
    for (int j = 0; j < kInt8Panel; ++j) to.sum[j] += from.sum[j];
  }
  static PARED_INLINE void store(int32_t* p, const Acc& acc, bool accumulate) {
    for (int j = 0; j < kInt8Panel; ++j)
      p[j] = static_cast<int32_t>((accumulate ? static_cast<uint32_t>(p[j]) : 0u) + acc.sum[j]);
  }
};

#if defined(__AVX2__)
PARED_INLINE int32_t load_unit(const uint8_t* p) {
  int32_t u;
  memcpy(&u, p, 4);
  return u;
}
#endif

#if defined(__aarch64__)
// Arm's products, for 16 bytes of weights (four outputs) by a unit of a token. Instructions that take bytes
// of one sign alone get weights that are 128 more (w ^ 0x80); what that adds, 128 times the sum of the
// token's bytes, is taken from the sums before they begin.
struct NeonWideProducts {
  static constexpr bool biased = true;
  static constexpr int tokens = 3;  // by one panel: 24 sums
  struct Quarter {
    uint32x4_t low, high;  // outputs 0 and 1, 2 and 3, in two sums each
  };
  using Bytes = uint8x16_t;
  using Unit = uint8x16_t;
  using Units = const uint8_t*;  // four of them: a broadcast load costs less than a lane of a register
  static PARED_INLINE Quarter filled(uint32_t v) {
    const uint32x4_t all = vzip1q_u32(vdupq_n_u32(v), vdupq_n_u32(0));
    return {all, all};
  }
  static PARED_INLINE Bytes load(const int8_t* p) { return vld1q_u8(reinterpret_cast<const uint8_t*>(p)); }
  static PARED_INLINE Bytes operand(uint8x16_t w) { return veorq_u8(w, vdupq_n_u8(0x80)); }
  static PARED_INLINE Unit unit(const uint8_t* p) {
    uint32_t u;
    memcpy(&u, p, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(u));
  }
  static PARED_INLINE Units units(const uint8_t* p) { return p; }
  static PARED_INLINE Quarter dot(Quarter s, Bytes w, Unit x) {
    return {vpadalq_u16(s.low, vmull_u8(vget_low_u8(w), vget_low_u8(x))),
            vpadalq_u16(s.high, vmull_high_u8(w, x))};
  }
  template <int UNIT>
  static PARED_INLINE Quarter dot(Quarter s, Bytes w, Units x) {
    return dot(s, w, unit(x + UNIT * kInt8Unit));
  }
  static PARED_INLINE Quarter add(Quarter a, Quarter b) {
    return {vaddq_u32(a.low, b.low), vaddq_u32(a.high, b.high)};
  }
  static PARED_INLINE uint32x4_t outputs(Quarter s) { return vpaddq_u32(s.low, s.high); }
};

// A unit as the fused products take it, the lower half of a register: no instruction beside the load.
PARED_INLINE uint8x8_t low_unit(const uint8_t* p) {
  uint32_t u;
  memcpy(&u, p, 4);
  return vcreate_u8(u);
}
#endif

#if defined(__ARM_FEATURE_DOTPROD)
struct NeonUdotProducts {
  static constexpr bool biased = true;
  static constexpr int tokens = kGemmTokens;
  using Quarter = uint32x4_t;
  using Bytes = uint8x16_t;
  using Unit = uint8x8_t;
  using Units = uint8x16_t;
  static PARED_INLINE Quarter filled(uint32_t v) { return vdupq_n_u32(v); }
  static PARED_INLINE Bytes load(const int8_t* p) { return vld1q_u8(reinterpret_cast<const uint8_t*>(p)); }
  static PARED_INLINE Bytes operand(uint8x16_t w) { return veorq_u8(w, vdupq_n_u8(0x80)); }
  static PARED_INLINE Unit unit(const uint8_t* p) { return low_unit(p); }
  static PARED_INLINE Units units(const uint8_t* p) { return vld1q_u8(p); }
  static PARED_INLINE Quarter dot(Quarter s, Bytes w, Unit x) { return vdotq_lane_u32(s, w, x, 0); }
  template <int UNIT>
  static PARED_INLINE Quarter dot(Quarter s, Bytes w, Units x) {
    return vdotq_laneq_u32(s, w, x, UNIT);
  }
  static PARED_INLINE Quarter add(Quarter a, Quarter b) { return vaddq_u32(a, b); }
  static PARED_INLINE uint32x4_t outputs(Quarter s) { return s; }
};
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)
struct NeonUsdotProducts {
  static constexpr bool biased = false;
  static constexpr int tokens = kGemmTokens;
  using Quarter = int32x4_t;
  using Bytes = int8x16_t;
  using Unit = uint8x8_t;
  using Units = uint8x16_t;
  static PARED_INLINE Quarter filled(uint32_t v) { return vreinterpretq_s32_u32(vdupq_n_u32(v)); }
  static PARED_INLINE Bytes load(const int8_t* p) { return vld1q_s8(p); }
  static PARED_INLINE Bytes operand(uint8x16_t w) { return vreinterpretq_s8_u8(w); }
  static PARED_INLINE Unit unit(const uint8_t* p) { return low_unit(p); }
  static PARED_INLINE Units units(const uint8_t* p) { return vld1q_u8(p); }
  static PARED_INLINE Quarter dot(Quarter s, Bytes w, Unit x) { return vsudotq_lane_s32(s, w, x, 0); }
  template <int UNIT>
  static PARED_INLINE Quarter dot(Quarter s, Bytes w, Units x) {
    return vsudotq_laneq_s32(s, w, x, UNIT);
  }
  static PARED_INLINE Quarter add(Quarter a, Quarter b) { return vaddq_s32(a, b); }
  static PARED_INLINE uint32x4_t outputs(Quarter s) { return vreinterpretq_u32_s32(s); }
};
#endif

#if defined(__aarch64__)
// Products P for a panel, of weights as they are given: P::operand of bytes for true products, with tokens
// whose sums begin with start_of their bytes where P is biased.
template <class P>
struct NeonDot {
  static constexpr int tokens = P::tokens, panels = 1;
  struct Acc {
    typename P::Quarter v[4];
  };
  struct W {
    typename P::Bytes v[4];
  };
  using A = typename P::Unit;
  static PARED_INLINE Acc filled(uint32_t sum) {
    const typename P::Quarter v = P::filled(sum);
    return {{v, v, v, v}};
  }
  static PARED_INLINE Acc zero() { return filled(0); }
  static PARED_INLINE W weights(const int8_t* p) {
    return {{P::load(p), P::load(p + 16), P::load(p + 32), P::load(p + 48)}};
  }
  static PARED_INLINE A unit(const uint8_t* p) { return P::unit(p); }
  static PARED_INLINE void dot(Acc& acc, A a, const W& w) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) acc.v[i] = P::dot(acc.v[i], w.v[i], a);
  }
  static PARED_INLINE void add(Acc& to, const Acc& from) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) to.v[i] = P::add(to.v[i], from.v[i]);
  }
  static PARED_INLINE void store(int32_t* p, const Acc& acc, bool accumulate) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int32x4_t s = vreinterpretq_s32_u32(P::outputs(acc.v[i]));
      vst1q_s32(p + 4 * i, accumulate ? vaddq_s32(s, vld1q_s32(p + 4 * i)) : s);
    }
  }
};

// Adds the bytes of `units` units to four sums.
PARED_INLINE uint32x4_t add_bytes(uint32x4_t sums, const uint8_t* x, int64_t units) {
  const auto add = [&](uint8x16_t bytes) __attribute__((always_inline)) {
#if defined(__ARM_FEATURE_DOTPROD)
    sums = vdotq_u32(sums, bytes, vdupq_n_u8(1));
#else
    sums = vpadalq_u16(sums, vpaddlq_u8(bytes));
#endif
  };
  int64_t i = 0;
  for (; i + 4 <= units; i += 4) add(vld1q_u8(x + i * kInt8Unit));
  for (; i < units; ++i) add(vcombine_u8(low_unit(x + i * kInt8Unit), vdup_n_u8(0)));
  return sums;
}
// What the sums of a token with such bytes begin with.
PARED_INLINE uint32_t start_of(uint32x4_t sums) { return 0u - 128u * vaddvq_u32(sums); }
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// Eight outputs, whose partial sums lie in twos in `a` and `b`.
PARED_INLINE void store_pairs(int32_t* p, __m256i a, __m256i b, bool accumulate) {
  auto* to = reinterpret_cast<__m256i*>(p);
  __m256i s = _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8);
  if (accumulate) s = _mm256_add_epi32(s, _mm256_load_si256(to));
  _mm256_store_si256(to, s);
}

// Vector i: outputs 4 i ... 4 i + 3, two partial sums each.
struct Avx2Dot {
  static constexpr int tokens = 2, panels = 1;
  struct Acc {
    __m256i v[4];
  };
  using W = Acc;
  using A = __m256i;
  static PARED_INLINE Acc zero() {
    const __m256i z = _mm256_setzero_si256();
    return {{z, z, z, z}};
  }
  static PARED_INLINE W weights(const int8_t* p) {
    W w;
    for (int i = 0; i < 4; ++i)
      w.v[i] = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(p) + i));
    return w;
  }
  static PARED_INLINE A unit(const uint8_t* p) { return _mm256_cvtepu8_epi16(_mm_set1_epi32(load_unit(p))); }
  static PARED_INLINE void dot(Acc& acc, A a, const W& w) {
    for (int i = 0; i < 4; ++i) {
      acc.v[i] = _mm256_add_epi32(acc.v[i], _mm256_madd_epi16(a, w.v[i]));
      __asm__ volatile("" : "+x"(acc.v[i]));  // or sums are left to memory: see gemm_wide_tile
    }
  }
  static PARED_INLINE void add(Acc& to, const Acc& from) {
    for (int i = 0; i < 4; ++i) to.v[i] = _mm256_add_epi32(to.v[i], from.v[i]);
  }
  static PARED_INLINE void store(int32_t* p, const Acc& acc, bool accumulate) {
    for (int i = 0; i < 4; i += 2) store_pairs(p + 4 * i, acc.v[i], acc.v[i + 1], accumulate);
  }
};
#endif

#if defined(__AVXVNNI__)
// Twelve sums, two vectors of weights and a unit in sixteen registers.
struct AvxVnniDot {
  static constexpr int tokens = 6, panels = 1;
  struct Acc {
    __m256i v[2];
  };
  using W = Acc;
  using A = __m256i;
  static PARED_INLINE Acc zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  static PARED_INLINE W weights(const int8_t* p) {
    const auto* from = reinterpret_cast<const __m256i*>(p);
    return {{_mm256_load_si256(from), _mm256_load_si256(from + 1)}};
  }
  static PARED_INLINE A unit(const uint8_t* p) { return _mm256_set1_epi32(load_unit(p)); }
  static PARED_INLINE void dot(Acc& acc, A a, const W& w) {
    for (int i = 0; i < 2; ++i) acc.v[i] = _mm256_dpbusd_avx_epi32(acc.v[i], a, w.v[i]);
  }
  static PARED_INLINE void add(Acc& to, const Acc& from) {
    for (int i = 0; i < 2; ++i) to.v[i] = _mm256_add_epi32(to.v[i], from.v[i]);
  }
  static PARED_INLINE void store(int32_t* p, const Acc& acc, bool accumulate) {
    for (int i = 0; i < 2; ++i, p += 8) {
      auto* to = reinterpret_cast<__m256i*>(p);
      _mm256_store_si256(to, accumulate ? _mm256_add_epi32(acc.v[i], _mm256_load_si256(to)) : acc.v[i]);
    }
  }
};
#endif

#if defined(__AVX512F__) && !defined(__AVX512VNNI__)
// Vector i: outputs 8 i ... 8 i + 7, two partial sums each.
struct Avx512Dot {
  static constexpr int tokens = 6, panels = 2;
  struct Acc {
    __m512i v[2];
  };
  using W = Acc;
  using A = __m512i;
  static PARED_INLINE Acc zero() { return {{_mm512_setzero_si512(), _mm512_setzero_si512()}}; }
  static PARED_INLINE W weights(const int8_t* p) {
    const auto* from = reinterpret_cast<const __m256i*>(p);
    return {
        {_mm512_cvtepi8_epi16(_mm256_load_si256(from)), _mm512_cvtepi8_epi16(_mm256_load_si256(from + 1))}};
  }
  static PARED_INLINE A unit(const uint8_t* p) {
    return _mm512_cvtepu8_epi16(_mm256_set1_epi32(load_unit(p)));
  }
  static PARED_INLINE void dot(Acc& acc, A a, const W& w) {
    for (int i = 0; i < 2; ++i) acc.v[i] = _mm512_add_epi32(acc.v[i], _mm512_madd_epi16(a, w.v[i]));
  }
  static PARED_INLINE void add(Acc& to, const Acc& from) {
    for (int i = 0; i < 2; ++i) to.v[i] = _mm512_add_epi32(to.v[i], from.v[i]);
  }
  static PARED_INLINE void store(int32_t* p, const Acc& acc, bool accumulate) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    __m512i s = _mm512_add_epi32(_mm512_permutex2var_epi32(acc.v[0], even, acc.v[1]),
                                 _mm512_permutex2var_epi32(acc.v[0], odd, acc.v[1]));
    if (accumulate) s = _mm512_add_epi32(s, _mm512_load_si512(p));
    _mm512_store_si512(p, s);
  }
};
#endif

#if defined(__AVX512VNNI__)
struct VnniDot {
  static constexpr int tokens = kGemmTokens, panels = kGemmPanels;
  using Acc = __m512i;
  using W = __m512i;
  using A = __m512i;
  static PARED_INLINE Acc zero() { return _mm512_setzero_si512(); }
  static PARED_INLINE W weights(const int8_t* p) { return _mm512_load_si512(p); }
  static PARED_INLINE A unit(const uint8_t* p) { return _mm512_set1_epi32(load_unit(p)); }
  static PARED_INLINE void dot(Acc& acc, A a, W w) { acc = _mm512_dpbusd_epi32(acc, a, w); }
  static PARED_INLINE void add(Acc& to, const Acc& from) { to = _mm512_add_epi32(to, from); }
  static PARED_INLINE void store(int32_t* p, const Acc& acc, bool accumulate) {
    _mm512_store_si512(p, accumulate ? _mm512_add_epi32(acc, _mm512_load_si512(p)) : acc);
  }
};
#endif

// Keeps weights in their register: compilers would load them again for each token.
template <class W>
PARED_INLINE void keep(W&) {}
#if defined(__AVX512VNNI__)
PARED_INLINE void keep(__m512i& w) { __asm__("" : "+v"(w)); }
#endif

// Sums of an output that take turns where a tile has few: its chains would wait out the latency of the
// multiply-add. As many as the level's registers hold.
template <class D>
constexpr int sums_in_turn(int tokens, int panels) {
  const int chains = tokens * panels, room = D::tokens * D::panels;
  return chains <= 2 && 4 * chains <= room ? 4 : chains <= 4 && 2 * chains <= room ? 2 : 1;
}

// A tile that fits the registers. FETCH lines are fetched beside each unit: a prefetch takes a slot that the
// products leave idle, where many behind each other would hold them up.
template <class D, int TOKENS, int PANELS, int FETCH>
PARED_INLINE void gemm_tile_fetching(const GemmArgs& args, int token, int panel) {
  constexpr int U = sums_in_turn<D>(TOKENS, PANELS);
  const GemmArgs a = args;  // what it stores to might be its arguments, for all that the compiler knows
  typename D::Acc sum[U][TOKENS][PANELS];
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
    for (int m = 0; m < TOKENS; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < PANELS; ++v) sum[u][m][v] = D::zero();
  const int8_t* w = a.w + panel * a.w_stride;
  const int8_t* ahead = a.ahead.at + (FETCH > 0 ? panel * a.ahead.stride : 0);
  constexpr int kVector = kInt8Panel * kInt8Unit;
  for (int r = 0; r < a.runs; ++r, w += static_cast<int64_t>(a.units) * kVector) {
    const uint8_t* x = a.x + token * a.x_stride + a.run_at[r];
    const auto step = [&](int i, int u) __attribute__((always_inline)) {
      typename D::W weights[PANELS];
#pragma GCC unroll 4
      for (int v = 0; v < PANELS; ++v) {
        weights[v] = D::weights(w + v * a.w_stride + static_cast<int64_t>(i) * kVector);
        if constexpr (TOKENS > 1) keep(weights[v]);
      }
#pragma GCC unroll 4
      for (int v = 0; v < FETCH; ++v) __builtin_prefetch(ahead + v * a.ahead.stride, 0, 2);
      if (FETCH > 0) ahead += a.ahead.step;
#pragma GCC unroll 8
      for (int m = 0; m < TOKENS; ++m) {
        const typename D::A unit = D::unit(x + m * a.x_stride + static_cast<int64_t>(i) * kInt8Unit);
#pragma GCC unroll 4
        for (int v = 0; v < PANELS; ++v) D::dot(sum[u][m][v], unit, weights[v]);
      }
    };
    int i = 0;
    for (; i + U <= a.units; i += U)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) step(i + u, u);
    if constexpr (U > 1)
      for (; i < a.units; ++i) step(i, 0);
  }
#pragma GCC unroll 8
  for (int m = 0; m < TOKENS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < PANELS; ++v) {
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) D::add(sum[0][m][v], sum[u][m][v]);
      D::store(a.acc + (token + m) * a.acc_stride + (panel + v) * kInt8Panel, sum[0][m][v], a.accumulate);
    }
}

template <class D, int TOKENS, int PANELS>
PARED_INLINE void gemm_tile(const GemmArgs& a, int token, int panel) {
  // Where a level's tile is smaller than the table's, the first that meets a panel fetches.
  if (token == 0 && a.ahead.panels > 1) gemm_tile_fetching<D, TOKENS, PANELS, PANELS>(a, token, panel);
  else if (token == 0 && panel < a.ahead.panels) gemm_tile_fetching<D, TOKENS, PANELS, 1>(a, token, panel);
  else gemm_tile_fetching<D, TOKENS, PANELS, 0>(a, token, panel);
}

template <class D, int TOKENS, int PANELS>
PARED_INLINE void gemm_tokens(const GemmArgs& a, int panel) {
  constexpr int T = D::tokens;
  for (int m = 0; m + T <= TOKENS; m += T) gemm_tile<D, T, PANELS>(a, m, panel);
  if constexpr (TOKENS % T != 0) gemm_tile<D, TOKENS % T, PANELS>(a, TOKENS - TOKENS % T, panel);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// TOKENS tokens by V vectors of four outputs; `w` and `acc` begin at the first of them.
template <int TOKENS, int V>
PARED_INLINE void gemm_wide_tile(const uint16_t (*x)[kGemmUnits * kInt8Unit], const int8_t* w, int units,
                                 const int8_t* ahead, int64_t ahead_step, int32_t* acc, int64_t acc_stride,
                                 bool accumulate) {
  __m256i sum[TOKENS][V];
#pragma GCC unroll 8
  for (int m = 0; m < TOKENS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[m][v] = _mm256_setzero_si256();
  for (int i = 0; i < units; ++i, w += kInt8Panel * kInt8Unit, ahead += ahead_step) {
    __m256i weights[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      weights[v] = _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(w) + v));
    __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 8
    for (int m = 0; m < TOKENS; ++m) {
      int64_t four;
      memcpy(&four, x[m] + i * kInt8Unit, sizeof(four));
      __m256i unit = _mm256_set1_epi64x(four);
      // In this order: compilers would begin with all products, and have no registers left for the sums.
      __asm__ volatile("" : "+x"(unit));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sum[m][v] = _mm256_add_epi32(sum[m][v], _mm256_madd_epi16(unit, weights[v]));
        __asm__ volatile("" : "+x"(sum[m][v]));
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < TOKENS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; v += 2)
      store_pairs(acc + m * acc_stride + 4 * v, sum[m][v], sum[m][v + 1], accumulate);
}

// With 16-bit products: the tokens' bytes are widened first, for all panels (9 KB for six), so that a unit is
// one broadcast from memory. A quarter of the instructions would be widenings else. Weights are widened in
// registers, two vectors for six tokens.
template <int TOKENS, int PANELS>
void gemm_u8s8_wide(const GemmArgs& args) {
  const GemmArgs a = args;
  constexpr int V = TOKENS <= 2 ? 4 : 2;
  alignas(64) uint16_t wide[TOKENS][kGemmUnits * kInt8Unit];
  int units = 0;
  for (int r = 0; r < a.runs; ++r, units += a.units)
    for (int m = 0; m < TOKENS; ++m) {
      const uint8_t* from = a.x + m * a.x_stride + a.run_at[r];
      uint16_t* to = wide[m] + units * kInt8Unit;
      int i = 0;
      for (; i + 4 <= a.units; i += 4, from += 16, to += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                            _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
      for (; i < a.units; ++i, from += 4, to += 4)
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to),
                         _mm_cvtepu8_epi16(_mm_cvtsi32_si128(load_unit(from))));
    }
  for (int p = 0; p < PANELS; ++p) {
    const int8_t* w = a.w + p * a.w_stride;
    for (int v = 0; v < 4; v += V) {
      // The first vectors of a panel fetch; the others ask for one line again and again, which costs nothing.
      const bool fetch = v == 0 && p < a.ahead.panels;
      gemm_wide_tile<TOKENS, V>(wide, w + v * 16, units, fetch ? a.ahead.at + p * a.ahead.stride : w,
                                fetch ? a.ahead.step : 0, a.acc + p * kInt8Panel + v * 4, a.acc_stride,
                                a.accumulate);
    }
  }
}
#endif

#if defined(__aarch64__)
// A tile whose products take units from lanes: a token's bytes are loaded four units at a time. Few sums are
// taken several times over, or each would wait out the latency of its product. `start`: what each token's
// sums begin with.
template <class P, int TOKENS, int PANELS>
PARED_INLINE void gemm_lanes_tile(const GemmArgs& args, int token, int panel, const uint32_t* start) {
  using D = NeonDot<P>;
  constexpr int kRegisters = TOKENS * PANELS * static_cast<int>(sizeof(typename D::Acc) / 16);
  constexpr int U = kRegisters <= 4 ? 4 : kRegisters <= 8 ? 2 : 1;
  constexpr int kVector = kInt8Panel * kInt8Unit;
  const GemmArgs a = args;  // see gemm_tile_fetching
  typename D::Acc sum[U][TOKENS][PANELS];
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
    for (int m = 0; m < TOKENS; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < PANELS; ++v) sum[u][m][v] = D::filled(P::biased && u == 0 ? start[m] : 0);
  const int8_t* w = a.w + panel * a.w_stride;
  // Where nothing is to be fetched one line is asked for again and again, which costs nothing.
  const int8_t *none = w, *ahead[PANELS];
  int64_t step[PANELS];
#pragma GCC unroll 4
  for (int v = 0; v < PANELS; ++v) {
    const bool fetch = token == 0 && panel + v < a.ahead.panels;
    ahead[v] = fetch ? a.ahead.at + (panel + v) * a.ahead.stride : none;
    step[v] = fetch ? a.ahead.step : 0;
  }
  for (int r = 0; r < a.runs; ++r) {
    const uint8_t* x = a.x + token * a.x_stride + a.run_at[r];
    const auto multiply = [&](auto& sums, const auto& dot) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int v = 0; v < PANELS; ++v) {
        __builtin_prefetch(ahead[v], 0, 2);
        ahead[v] += step[v];
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
          const auto* at = reinterpret_cast<const uint8_t*>(w + v * a.w_stride + 16 * q);
          const typename P::Bytes bytes = P::operand(vld1q_u8(at));
#pragma GCC unroll 8
          for (int m = 0; m < TOKENS; ++m) sums[m][v].v[q] = dot(sums[m][v].v[q], bytes, m);
        }
      }
      w += kVector;
    };
    int i = 0;
    for (; i + 4 <= a.units; i += 4, x += 4 * kInt8Unit) {
      typename P::Units four[TOKENS];
#pragma GCC unroll 8
      for (int m = 0; m < TOKENS; ++m) four[m] = P::units(x + m * a.x_stride);
      using Quarter = typename P::Quarter;
      using Bytes = typename P::Bytes;
      multiply(sum[0], [&](Quarter s, Bytes b, int m) { return P::template dot<0>(s, b, four[m]); });
      multiply(sum[1 % U], [&](Quarter s, Bytes b, int m) { return P::template dot<1>(s, b, four[m]); });
      multiply(sum[2 % U], [&](Quarter s, Bytes b, int m) { return P::template dot<2>(s, b, four[m]); });
      multiply(sum[3 % U], [&](Quarter s, Bytes b, int m) { return P::template dot<3>(s, b, four[m]); });
    }
    for (; i < a.units; ++i, x += kInt8Unit)
      multiply(sum[0], [&](auto s, auto b, int m) { return P::dot(s, b, P::unit(x + m * a.x_stride)); });
  }
#pragma GCC unroll 8
  for (int m = 0; m < TOKENS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < PANELS; ++v) {
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) D::add(sum[0][m][v], sum[u][m][v]);
      D::store(a.acc + (token + m) * a.acc_stride + (panel + v) * kInt8Panel, sum[0][m][v], a.accumulate);
    }
}

// One token by all panels, two or three by two: as many sums as two of those with one panel would be too few.
template <class P, int TOKENS, int PANELS>
PARED_INLINE void gemm_lanes_tokens(const GemmArgs& a, int token, const uint32_t* start) {
  constexpr int kSums = P::tokens;
  constexpr int kPanels = kSums / TOKENS < 1 ? 1 : kSums / TOKENS > 4 ? 4 : kSums / TOKENS;
  int v = 0;
  for (; v + kPanels <= PANELS; v += kPanels) gemm_lanes_tile<P, TOKENS, kPanels>(a, token, v, start);
  if constexpr (PANELS % kPanels != 0) gemm_lanes_tile<P, TOKENS, PANELS % kPanels>(a, token, v, start);
}

template <class P, int TOKENS, int PANELS>
void gemm_u8s8_lanes(const GemmArgs& a) {
  uint32_t start[TOKENS];
  if constexpr (P::biased)
    for (int m = 0; m < TOKENS; ++m) {
      uint32x4_t sums = vdupq_n_u32(0);
      for (int r = 0; r < a.runs; ++r) sums = add_bytes(sums, a.x + m * a.x_stride + a.run_at[r], a.units);
      start[m] = start_of(sums);
    }
  constexpr int T = TOKENS <= P::tokens ? TOKENS : (TOKENS + 1) / 2;  // shares of nearly equal size
  gemm_lanes_tokens<P, T, PANELS>(a, 0, start);
  if constexpr (T < TOKENS) gemm_lanes_tokens<P, TOKENS - T, PANELS>(a, T, start + T);
}
#endif

template <class D, int TOKENS, int PANELS>
void gemm_u8s8_tile(const GemmArgs& a) {
  constexpr int P = D::panels;
  for (int v = 0; v + P <= PANELS; v += P) gemm_tokens<D, TOKENS, P>(a, v);
  if constexpr (PANELS % P != 0) gemm_tokens<D, TOKENS, PANELS % P>(a, PANELS - PANELS % P);
}

// The table's entries in its order.
#define PARED_GEMM_TOKENS(TILE, T) TILE(T, 1), TILE(T, 2), TILE(T, 3), TILE(T, 4)
#define PARED_GEMM_TILES(TILE)                                                         \
  {PARED_GEMM_TOKENS(TILE, 1), PARED_GEMM_TOKENS(TILE, 2), PARED_GEMM_TOKENS(TILE, 3), \
   PARED_GEMM_TOKENS(TILE, 4), PARED_GEMM_TOKENS(TILE, 5), PARED_GEMM_TOKENS(TILE, 6)}

}  // namespace
}  // namespace pared
