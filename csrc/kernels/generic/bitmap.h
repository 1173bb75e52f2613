// Few tokens against masked weights. A vector's non-zeros are loaded from where the popcounts of the masks
// before it lead to, expanded to their lanes, and multiplied with each token's activation, which is broadcast
// from memory. E is one level's expansion (Avx512Expand, ...); it looks at the low 16 bits of its mask.
//
// The limit on Zen 5, one token: moving a mask to its register and expanding take the same port, two cycles a
// vector; 1.95 were measured in L1. Loading the mask register from memory, shifting four masks apart there,
// or making it with vptestmd takes 2.0 to 3.8.
#pragma once

#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

constexpr int kBitmapVector = 16;  // outputs
// Bytes ahead of the masks and the values that are fetched: the out-of-order window holds 60 vectors, under
// 1 KB of a sparse weight, and memory is further away. Measured on Zen 5, 50 % zeros from memory, float32 and
// bytes, ns a vector: none 4.7 and 1.9, 1 KB 1.9 and 2.4, 4 KB 1.5 and 1.8, 8 KB 1.35 and 1.5, 8 KB and two
// lines a step 1.2 and 1.4; a plain read of as many bytes 1.0 and 1.3. At 80 and 90 % zeros 4 and 8 KB are
// equal.
constexpr int kMasksAhead = 2048, kValuesAhead = 8192;

// Once for every four vectors, of which a dense weight fills four lines of values and a half-dense one two.
PARED_INLINE void fetch_ahead(const void* masks, const void* values, int64_t masks_ahead = kMasksAhead,
                              int64_t values_ahead = kValuesAhead) {
  __builtin_prefetch(static_cast<const char*>(masks) + masks_ahead);
  __builtin_prefetch(static_cast<const char*>(values) + values_ahead);
  __builtin_prefetch(static_cast<const char*>(values) + values_ahead + 64);
}

// A loop looks where it stands in the buffer once for so many vectors, of floats and of bytes. Measured on
// Zen 5, one token, beside no look at all: 1 to 2 % longer; every 32 of floats 5 %; every 128 of bytes 32 %
// where 99 % are zeros, because most of such a weight is near the end of its buffer and its masks are
// counted.
constexpr int kVectorsPerCheck = 128, kByteVectorsPerCheck = 32;

// Whether the non-zeros that the masks of `vectors` vectors (a multiple of 4) ask for, from `values` on, end
// by `end`. Counted only near the end of a buffer: elsewhere there is room for vectors without zeros.
template <class Mask, class Value>
PARED_INLINE bool inside(const Mask* masks, int64_t vectors, const Value* values, const Value* end) {
  const int64_t room = end - values;
  if (room >= vectors * 8 * static_cast<int64_t>(sizeof(Mask))) return true;
  int64_t sum = 0;
  for (int64_t v = 0; v < vectors; v += static_cast<int64_t>(8 / sizeof(Mask))) {
    uint64_t some;
    __builtin_memcpy(&some, masks + v, 8);
    sum += __builtin_popcountll(some);
  }
  return sum <= room;
}

struct ScalarExpand {
  using S = ScalarF32;
  static constexpr int kTokens = 4;  // of one pass over a group: what the registers hold
  static PARED_INLINE void expand(unsigned mask, const float* values, float out[16]) {
    for (int i = 0; i < 16; ++i) out[i] = mask >> i & 1 ? *values++ : 0.0f;
  }
};

#if defined(__AVX2__)
// For each 8-bit mask and lane: the lane's place among the non-zeros, or the sign bit where there is none.
struct ExpandTable {
  uint8_t place[256][8];
  constexpr ExpandTable() : place() {
    for (int mask = 0; mask < 256; ++mask)
      for (int i = 0, n = 0; i < 8; ++i)
        place[mask][i] = mask >> i & 1 ? static_cast<uint8_t>(n++) : static_cast<uint8_t>(0x80);
  }
};
alignas(64) constexpr ExpandTable kExpandTable;

struct Avx2Expand {
  using S = Avx2F32;
  static constexpr int kTokens = 6;
  static PARED_INLINE __m256 half(unsigned mask, const float* values) {
    const __m256i place = _mm256_cvtepi8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpandTable.place[mask & 0xff])));
    const __m256 v = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), place);
    return _mm256_blendv_ps(v, _mm256_setzero_ps(), _mm256_castsi256_ps(place));
  }
  static PARED_INLINE void expand(unsigned mask, const float* values, __m256 out[2]) {
    out[0] = half(mask, values);
    out[1] = half(mask >> 8, values + __builtin_popcount(mask & 0xff));
  }
};
#endif

#if defined(__AVX512F__)
struct Avx512Expand {
  using S = Avx512F32;
  static constexpr int kTokens = 16;
  static PARED_INLINE void expand(unsigned mask, const float* values, __m512 out[1]) {
    // Zen 5 lets an expansion wait for the old content of its destination even when it zeroes: five cycles
    // each for one. A fresh zero that the compiler cannot see through keeps them apart.
    __m512 zero = _mm512_setzero_ps();
    // The mask likewise: compilers would shift it in a mask register, which takes four cycles.
    __asm__("" : "+v"(zero), "+r"(mask));
    out[0] = _mm512_mask_expandloadu_ps(zero, static_cast<__mmask16>(mask), values);
  }
};
#endif

// Sums that run beside each other for each token: what the latency of a multiply-add needs while an
// expansion, not the multiply-adds, sets the pace.
constexpr int partial_sums(int tokens, int vectors) {
  return tokens * vectors <= 2 ? 4 : tokens * vectors <= 7 ? 2 : 1;
}

// TOKENS tokens of one group, the values behind `values`; returns the values behind the group, or null where
// the masks lead beyond `end`.
template <class E, int TOKENS>
PARED_INLINE const float* bitmap_group(const uint16_t* masks, const float* values, const float* last,
                                       const float* x, float* acc, int vectors, bool accumulate) {
  using S = typename E::S;
  constexpr int N = kBitmapVector / S::width;
  constexpr int P = S::width == 1 ? 1 : partial_sums(TOKENS, N);
  typename S::V sum[P][TOKENS][N];
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < TOKENS; ++t)
      for (int n = 0; n < N; ++n)
        sum[p][t][n] = accumulate && p == 0 ? S::load(acc + t * kBitmapVector + n * S::width) : S::zero();
  for (int v = 0; v < vectors;) {
    const int stop = v + kVectorsPerCheck < vectors ? v + kVectorsPerCheck : vectors;
    if (!inside(masks + v, stop - v, values, last)) return nullptr;
    for (; v < stop; v += 4) {
      uint64_t four;
      __builtin_memcpy(&four, masks + v, 8);
      fetch_ahead(masks + v, values);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        // Popcounts of all the masks before, not a sum of single ones: no chain within the step.
        const float* from = i == 0 ? values : values + __builtin_popcountll(four << (64 - 16 * i));
        typename S::V w[N];
        E::expand(static_cast<unsigned>(four >> (16 * i)), from, w);
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; ++t) {
          const auto a = S::set1(x[t * kBitmapStride + v + i]);
          for (int n = 0; n < N; ++n) sum[i % P][t][n] = S::fma(w[n], a, sum[i % P][t][n]);
        }
      }
      values += __builtin_popcountll(four);
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int n = 0; n < N; ++n) {
      typename S::V s = sum[0][t][n];
      if constexpr (P == 2) s = S::add(s, sum[1][t][n]);
      if constexpr (P == 4) s = S::add(S::add(s, sum[1][t][n]), S::add(sum[2][t][n], sum[3][t][n]));
      S::store(acc + t * kBitmapVector + n * S::width, s);
    }
  return values;
}

// Tokens [FIRST, TOKENS) of a group, as many at a time as the registers hold, in shares of equal size.
template <class E, int TOKENS, int FIRST = 0>
PARED_INLINE const float* bitmap_shares(const uint16_t* masks, const float* values, const float* last,
                                        const float* x, float* acc, int vectors, bool accumulate) {
  constexpr int kLeft = TOKENS - FIRST, kShares = (kLeft + E::kTokens - 1) / E::kTokens;
  constexpr int kShare = (kLeft + kShares - 1) / kShares;
  const float* end = bitmap_group<E, kShare>(masks, values, last, x + FIRST * kBitmapStride,
                                             acc + FIRST * kBitmapVector, vectors, accumulate);
  if constexpr (kShares > 1)
    bitmap_shares<E, TOKENS, FIRST + kShare>(masks, values, last, x, acc, vectors, accumulate);
  return end;
}

template <class E, int TOKENS>
bool bitmap_groups(const BitmapArgs& a) {
  const uint16_t* masks = a.masks;
  const float* values = a.values;
  float* acc = a.acc;
  for (int g = 0; g < a.groups; ++g) {
    values = bitmap_shares<E, TOKENS>(masks, values, a.end, a.x, acc, a.vectors, a.accumulate);
    if (!values) return false;
    masks += a.vectors;
    acc += TOKENS * kBitmapVector;
  }
  return true;
}

#define PARED_BITMAP_TABLE(E)                                                              \
  {bitmap_groups<E, 1>,  bitmap_groups<E, 2>,  bitmap_groups<E, 3>,  bitmap_groups<E, 4>,  \
   bitmap_groups<E, 5>,  bitmap_groups<E, 6>,  bitmap_groups<E, 7>,  bitmap_groups<E, 8>,  \
   bitmap_groups<E, 9>,  bitmap_groups<E, 10>, bitmap_groups<E, 11>, bitmap_groups<E, 12>, \
   bitmap_groups<E, 13>, bitmap_groups<E, 14>, bitmap_groups<E, 15>, bitmap_groups<E, 16>}

}  // namespace
}  // namespace pared
