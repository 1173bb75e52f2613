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

#if defined(__AVX2__) && !defined(__AVX512F__)
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
    for (int i = 0; i < 4; ++i) acc.v[i] = _mm256_add_epi32(acc.v[i], _mm256_madd_epi16(a, w.v[i]));
  }
  static PARED_INLINE void add(Acc& to, const Acc& from) {
    for (int i = 0; i < 4; ++i) to.v[i] = _mm256_add_epi32(to.v[i], from.v[i]);
  }
  static PARED_INLINE void store(int32_t* p, const Acc& acc, bool accumulate) {
    for (int i = 0; i < 4; i += 2, p += 8) {
      auto* to = reinterpret_cast<__m256i*>(p);
      __m256i s = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc.v[i], acc.v[i + 1]), 0xd8);
      if (accumulate) s = _mm256_add_epi32(s, _mm256_load_si256(to));
      _mm256_store_si256(to, s);
    }
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

// A tile that fits the registers. With one token, two sums take turns: a chain a panel would wait out the
// latency of the multiply-add. FETCH lines are fetched beside each unit: a prefetch takes a slot that the
// products leave idle, where many behind each other would hold them up.
template <class D, int TOKENS, int PANELS, int FETCH>
PARED_INLINE void gemm_tile_fetching(const GemmArgs& args, int token, int panel) {
  constexpr int U = TOKENS == 1 && D::tokens > 1 ? 2 : 1;
  const GemmArgs a = args;  // what it stores to might be its arguments, for all that the compiler knows
  typename D::Acc sum[U][TOKENS][PANELS];
#pragma GCC unroll 2
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
      for (int v = 0; v < PANELS; ++v)
        weights[v] = D::weights(w + v * a.w_stride + static_cast<int64_t>(i) * kVector);
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
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) step(i + u, u);
    if (U > 1 && i < a.units) step(i, 0);
  }
#pragma GCC unroll 8
  for (int m = 0; m < TOKENS; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < PANELS; ++v) {
      if (U > 1) D::add(sum[0][m][v], sum[U - 1][m][v]);
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

template <class D, int TOKENS, int PANELS>
void gemm_u8s8_tile(const GemmArgs& a) {
  constexpr int P = D::panels;
  for (int v = 0; v + P <= PANELS; v += P) gemm_tokens<D, TOKENS, P>(a, v);
  if constexpr (PANELS % P != 0) gemm_tokens<D, TOKENS, PANELS % P>(a, PANELS - PANELS % P);
}

// The table's entries in its order.
#define PARED_GEMM_TOKENS(D, T) \
  gemm_u8s8_tile<D, T, 1>, gemm_u8s8_tile<D, T, 2>, gemm_u8s8_tile<D, T, 3>, gemm_u8s8_tile<D, T, 4>
#define PARED_GEMM_TABLE(D)                                                   \
  {PARED_GEMM_TOKENS(D, 1), PARED_GEMM_TOKENS(D, 2), PARED_GEMM_TOKENS(D, 3), \
   PARED_GEMM_TOKENS(D, 4), PARED_GEMM_TOKENS(D, 5), PARED_GEMM_TOKENS(D, 6)}

}  // namespace
}  // namespace pared
