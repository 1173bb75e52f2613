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
