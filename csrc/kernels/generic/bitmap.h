// Few tokens against masked weights. A vector's non-zeros are loaded from where the popcounts of the masks
// before it lead to, expanded to their lanes, and multiplied with each token's activation, which is broadcast
// from memory. E is one level's expansion (Avx512Expand, ...); it looks at the low 16 bits of its mask.
// 16-bit values become float32 before they are expanded.
//
// The limit on Zen 5, one token: moving a mask to its register and expanding take the same port, two cycles a
// vector; 1.95 were measured in L1. Loading the mask register from memory, shifting four masks apart there,
// or making it with vptestmd takes 2.0 to 3.8.
#pragma once

#include "kernels/generic/half.h"
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

// A pair of bfloat16 in each 32-bit lane is two float32, one shifted up, the other with the rest masked off.
constexpr int kSecondOfPair = static_cast<int>(0xffff0000u);

struct ScalarExpand {
  using S = ScalarF32;
  using Mask = uint16_t;
  using Value = float;
  static constexpr int depth = 1;
  static constexpr int tokens = 4;        // of one pass over a group: what the registers hold
  static constexpr bool by_lane = false;  // activations are lanes of a register, or broadcast
  static PARED_INLINE void expand(unsigned mask, const float* values, float out[16]) {
    for (int i = 0; i < 16; ++i) out[i] = mask >> i & 1 ? *values++ : 0.0f;
  }
};

struct ScalarExpandPairs : ScalarExpand {
  using Mask = uint32_t;
  using Value = uint16_t;
  static constexpr int depth = 2;
  static PARED_INLINE void expand(uint32_t mask, const uint16_t* values, float out[32]) {
    for (int i = 0; i < 16; ++i)
      for (int d = 0; d < 2; ++d) out[16 * d + i] = mask >> (2 * i + d) & 1 ? bf16_to_float(*values++) : 0.0f;
  }
};

#if defined(__AVX2__) || defined(__aarch64__)
// For each 8-bit mask and byte of eight words: the byte's place, or the sign bit, which clears it.
struct ExpandWordsTable {
  uint8_t place[256][16];
  constexpr ExpandWordsTable() : place() {
    for (int mask = 0; mask < 256; ++mask)
      for (int i = 0, n = 0; i < 8; ++i) {
        const bool set = mask >> i & 1;
        place[mask][2 * i] = set ? static_cast<uint8_t>(2 * n) : static_cast<uint8_t>(0x80);
        place[mask][2 * i + 1] = set ? static_cast<uint8_t>(2 * n++ + 1) : static_cast<uint8_t>(0x80);
      }
  }
};
alignas(64) constexpr ExpandWordsTable kExpandWordsTable;

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
#endif

#if defined(__AVX2__)
struct Avx2Expand {
  using S = Avx2F32;
  using Mask = uint16_t;
  using Value = float;
  static constexpr int depth = 1;
  static constexpr int tokens = 6;
  static constexpr bool by_lane = false;
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

struct Avx2ExpandPairs : Avx2Expand {
  using Mask = uint32_t;
  using Value = uint16_t;
  static constexpr int depth = 2;
  static PARED_INLINE __m128i eight(unsigned mask, const uint16_t* values) {
    return _mm_shuffle_epi8(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(values)),
        _mm_load_si128(reinterpret_cast<const __m128i*>(kExpandWordsTable.place[mask & 0xff])));
  }
  static PARED_INLINE void expand(uint32_t mask, const uint16_t* values, __m256 out[4]) {
    const uint16_t* at[4];
    for (int i = 0; i < 4; ++i) at[i] = values + __builtin_popcount(mask & ((1u << (8 * i)) - 1));
    for (int n = 0; n < 2; ++n) {
      const __m256i pairs =
          _mm256_set_m128i(eight(mask >> (16 * n + 8), at[2 * n + 1]), eight(mask >> (16 * n), at[2 * n]));
      out[n] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
      out[2 + n] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(kSecondOfPair)));
    }
  }
};
#endif

#if defined(__AVX512F__)
struct Avx512Expand {
  using S = Avx512F32;
  using Mask = uint16_t;
  using Value = float;
  static constexpr int depth = 1;
  static constexpr int tokens = 16;
  static constexpr bool by_lane = false;
  static PARED_INLINE void expand(unsigned mask, const float* values, __m512 out[1]) {
    // Zen 5 lets an expansion wait for the old content of its destination even when it zeroes: five cycles
    // each for one. A fresh zero that the compiler cannot see through keeps them apart.
    __m512 zero = _mm512_setzero_ps();
    // The mask likewise: compilers would shift it in a mask register, which takes four cycles.
    __asm__("" : "+v"(zero), "+r"(mask));
    out[0] = _mm512_mask_expandloadu_ps(zero, static_cast<__mmask16>(mask), values);
  }
};

struct Avx512ExpandPairs : Avx512Expand {
  using Mask = uint32_t;
  using Value = uint16_t;
  static constexpr int depth = 2;
#if defined(__AVX512VBMI2__)
  static PARED_INLINE void expand(uint32_t mask, const uint16_t* values, __m512 out[2]) {
    __m512i zero = _mm512_setzero_si512();
    __asm__("" : "+v"(zero), "+r"(mask));
    const __m512i pairs = _mm512_mask_expand_epi16(zero, _cvtu32_mask32(mask), _mm512_loadu_si512(values));
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(kSecondOfPair)));
  }
#else
  // Eight outputs at two inputs.
  static PARED_INLINE __m512i half(uint32_t mask, const uint16_t* values) {
    __m512i zero = _mm512_setzero_si512();
    __asm__("" : "+v"(zero), "+r"(mask));
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    return _mm512_mask_expand_epi32(zero, static_cast<__mmask16>(mask), _mm512_cvtepu16_epi32(words));
  }
  static PARED_INLINE void expand(uint32_t mask, const uint16_t* values, __m512 out[2]) {
    const __m512i lo = half(mask, values), hi = half(mask >> 16, values + __builtin_popcount(mask & 0xffff));
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_permutex2var_epi32(lo, even, hi), 16));
    out[1] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_permutex2var_epi32(lo, odd, hi), 16));
  }
#endif
};
#endif

#if defined(__aarch64__)
// For each mask of four lanes: the bytes of each one's place among the non-zeros, or such as lie nowhere.
struct ExpandFourTable {
  uint8_t place[16][16];
  constexpr ExpandFourTable() : place() {
    for (int mask = 0; mask < 16; ++mask)
      for (int lane = 0, n = 0; lane < 4; ++lane) {
        const bool set = mask >> lane & 1;
        for (int b = 0; b < 4; ++b)
          place[mask][4 * lane + b] = set ? static_cast<uint8_t>(4 * n + b) : static_cast<uint8_t>(0x80);
        n += set;
      }
  }
};
alignas(64) constexpr ExpandFourTable kExpandFour;

constexpr uint64_t kEachByte = 0x0101010101010101u;
// Each byte plus all below it, none more than 255.
PARED_INLINE uint64_t add_up(uint64_t bytes) { return bytes * kEachByte; }

PARED_INLINE uint8x16_t load_bytes(const void* p, uint64_t offset) {
  return vld1q_u8(static_cast<const uint8_t*>(p) + offset);
}

// FourVectors has their expansions.
struct NeonExpand {
  using S = NeonF32;
  using Mask = uint16_t;
  using Value = float;
  static constexpr int depth = 1;
  static constexpr int tokens = 5;
  static constexpr bool by_lane = true;
};

struct NeonExpandPairs : NeonExpand {
  using Mask = uint32_t;
  using Value = uint16_t;
  static constexpr int depth = 2;
  static constexpr int tokens = 4;
};
#endif

// The masks of four vectors, and where their values begin: popcounts of all the masks before, not a sum of
// single ones, so that there is no chain within a step. Returns where the next vector's begin.
template <class Value>
PARED_INLINE const Value* four_vectors(const uint16_t* masks, const Value* values, unsigned mask[4],
                                       const Value* from[4]) {
  uint64_t four;
  __builtin_memcpy(&four, masks, 8);
  for (int i = 0; i < 4; ++i) {
    mask[i] = static_cast<unsigned>(four >> (16 * i));
    from[i] = i == 0 ? values : values + __builtin_popcountll(four << (64 - 16 * i));
  }
  return values + __builtin_popcountll(four);
}
template <class Value>
PARED_INLINE const Value* four_vectors(const uint32_t* masks, const Value* values, unsigned mask[4],
                                       const Value* from[4]) {
  uint64_t two[2];
  __builtin_memcpy(two, masks, 16);
  const Value* const middle = values + __builtin_popcountll(two[0]);
  for (int i = 0; i < 4; ++i) mask[i] = static_cast<unsigned>(two[i / 2] >> (32 * (i % 2)));
  from[0] = values;
  from[1] = values + __builtin_popcount(mask[0]);
  from[2] = middle;
  from[3] = middle + __builtin_popcount(mask[2]);
  return middle + __builtin_popcountll(two[1]);
}

// Four vectors as E finds and expands them.
template <class E>
struct FourVectors {
  unsigned mask[4];
  const typename E::Value* from[4];
  PARED_INLINE const typename E::Value* find(const typename E::Mask* masks, const typename E::Value* values) {
    return four_vectors(masks, values, mask, from);
  }
  PARED_INLINE void expand(int i, typename E::S::V* out) const { E::expand(mask[i], from[i], out); }
};

#if defined(__aarch64__)
// A mask of four lanes names the bytes that they take from where its values begin; what lies outside of 16
// bytes is zero. Popcounts are of vectors here, so one of them counts for all of the masks.
template <>
struct FourVectors<NeonExpand> {
  // A byte each for the lower and the upper four lanes of eight: bytes before their values, and in the table.
  uint64_t before[2], row[2];
  const float* values;
  PARED_INLINE const float* find(const uint16_t* masks, const float* from) {
    values = from;
    const uint8x8_t bytes = vld1_u8(reinterpret_cast<const uint8_t*>(masks));
    const auto word = [](uint8x8_t v) { return vget_lane_u64(vreinterpret_u64_u8(v), 0); };
    const uint64_t lower = word(vcnt_u8(vand_u8(bytes, vdup_n_u8(0x0f)))),
                   up_to = add_up(word(vcnt_u8(bytes)));
    before[0] = up_to << 8 << 2;
    before[1] = ((up_to << 8) + lower) << 2;
    row[0] = (word(bytes) & kEachByte * 0x0f) << 4;
    row[1] = word(bytes) & kEachByte * 0xf0;
    return values + (up_to >> 56);
  }
  PARED_INLINE void expand(int i, float32x4_t out[4]) const {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      __asm__ volatile("");  // no load before its turn: there are no registers for more
      const int at = 8 * (2 * i + n / 2);
      const uint8x16_t place = vld1q_u8(kExpandFour.place[0] + (row[n % 2] >> at & 0xff));
      out[n] = vreinterpretq_f32_u8(vqtbl1q_u8(load_bytes(values, before[n % 2] >> at & 0xff), place));
    }
  }
};

template <>
struct FourVectors<NeonExpandPairs> {
  uint64_t masks[2], before[2];  // of two vectors, a byte for four outputs: bytes before their values
  const uint16_t* values[2];
  PARED_INLINE const uint16_t* find(const uint32_t* four, const uint16_t* from) {
    const uint8x16_t bytes = vld1q_u8(reinterpret_cast<const uint8_t*>(four));
    const uint64x2_t counts = vreinterpretq_u64_u8(vcntq_u8(bytes)), bits = vreinterpretq_u64_u8(bytes);
    const uint64_t up_to[2] = {add_up(vgetq_lane_u64(counts, 0)), add_up(vgetq_lane_u64(counts, 1))};
    masks[0] = vgetq_lane_u64(bits, 0);
    masks[1] = vgetq_lane_u64(bits, 1);
    for (int h = 0; h < 2; ++h) before[h] = up_to[h] << 8 << 1;
    values[0] = from;
    values[1] = from + (up_to[0] >> 56);
    return values[1] + (up_to[1] >> 56);
  }
  PARED_INLINE void expand(int i, float32x4_t out[8]) const {
    const int h = i / 2;
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      __asm__ volatile("");
      const int at = 8 * (4 * (i % 2) + n);
      const uint8x16_t place = vld1q_u8(kExpandWordsTable.place[masks[h] >> at & 0xff]);
      const uint32x4_t pairs =
          vreinterpretq_u32_u8(vqtbl1q_u8(load_bytes(values[h], before[h] >> at & 0xff), place));
      out[n] = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
      out[4 + n] = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(kSecondOfPair)));
    }
  }
};
#endif

// Sums that run beside each other for each token: what the latency of a multiply-add needs while an
// expansion, not the multiply-adds, sets the pace.
constexpr int partial_sums(int tokens, int vectors) {
  return tokens * vectors <= 2 ? 4 : tokens * vectors <= 7 ? 2 : 1;
}

// The same sums as below without registers to fill: a few instructions for the compiler.
template <class E, int TOKENS, class Mask = typename E::Mask, class Value = typename E::Value>
const Value* scalar_group(const Mask* masks, const Value* values, const Value* last, const float* x,
                          float* acc, int vectors, bool accumulate) {
  for (int i = 0; i < TOKENS * kBitmapVector && !accumulate; ++i) acc[i] = 0.0f;
  for (int v = 0; v < vectors; ++v) {
    if (v % kVectorsPerCheck == 0) {
      const int some = vectors - v < kVectorsPerCheck ? vectors - v : kVectorsPerCheck;
      if (!inside(masks + v, some, values, last)) return nullptr;
    }
    float w[E::depth][kBitmapVector];
    E::expand(masks[v], values, w[0]);
    values += __builtin_popcount(masks[v]);
    for (int d = 0; d < E::depth; ++d)
      for (int t = 0; t < TOKENS; ++t)
        for (int n = 0; n < kBitmapVector; ++n)
          acc[t * kBitmapVector + n] += w[d][n] * x[t * kBitmapStride + E::depth * v + d];
  }
  return values;
}

// TOKENS tokens of one group, the values behind `values`; returns the values behind the group, or null where
// the masks lead beyond `end`.
template <class E, int TOKENS, class Mask = typename E::Mask, class Value = typename E::Value>
PARED_INLINE const Value* bitmap_group(const Mask* masks, const Value* values, const Value* last,
                                       const float* x, float* acc, int vectors, bool accumulate) {
  using S = typename E::S;
  if constexpr (S::width == 1)
    return scalar_group<E, TOKENS>(masks, values, last, x, acc, vectors, accumulate);
  constexpr int N = kBitmapVector / S::width;
  constexpr int P = partial_sums(TOKENS, N);
  typename S::V sum[P][TOKENS][N];
  for (int p = 0; p < P; ++p)
    for (int t = 0; t < TOKENS; ++t)
      for (int n = 0; n < N; ++n)
        sum[p][t][n] = accumulate && p == 0 ? S::load(acc + t * kBitmapVector + n * S::width) : S::zero();
  for (int v = 0; v < vectors;) {
    const int stop = v + kVectorsPerCheck < vectors ? v + kVectorsPerCheck : vectors;
    if (!inside(masks + v, stop - v, values, last)) return nullptr;
    for (; v < stop; v += 4) {
      FourVectors<E> four;
      const Value* const next = four.find(masks + v, values);
      fetch_ahead(masks + v, values);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        typename S::V w[E::depth][N];
        four.expand(i, w[0]);
#pragma GCC unroll 2
        for (int d = 0; d < E::depth; ++d) {
          const int k = E::depth * i + d;
#pragma GCC unroll 16
          for (int t = 0; t < TOKENS; ++t) {
            if constexpr (E::by_lane) {
              const auto a = S::nth(S::four(x + t * kBitmapStride + E::depth * v + k / 4 * 4), k % 4);
              for (int n = 0; n < N; ++n) sum[k % P][t][n] = S::fma(a, w[d][n], sum[k % P][t][n]);
            } else {
              const auto a = S::set1(x[t * kBitmapStride + E::depth * v + k]);
              for (int n = 0; n < N; ++n) sum[k % P][t][n] = S::fma(w[d][n], a, sum[k % P][t][n]);
            }
          }
        }
      }
      values = next;
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
template <class E, int TOKENS, int FIRST = 0, class Mask = typename E::Mask, class Value = typename E::Value>
PARED_INLINE const Value* bitmap_shares(const Mask* masks, const Value* values, const Value* last,
                                        const float* x, float* acc, int vectors, bool accumulate) {
  constexpr int kLeft = TOKENS - FIRST, kShares = (kLeft + E::tokens - 1) / E::tokens;
  constexpr int kShare = (kLeft + kShares - 1) / kShares;
  const Value* end = bitmap_group<E, kShare>(masks, values, last, x + FIRST * kBitmapStride,
                                             acc + FIRST * kBitmapVector, vectors, accumulate);
  if constexpr (kShares > 1)
    bitmap_shares<E, TOKENS, FIRST + kShare>(masks, values, last, x, acc, vectors, accumulate);
  return end;
}

template <class E, int TOKENS>
bool bitmap_groups(const BitmapArgs<typename E::Mask, typename E::Value>& a) {
  const typename E::Mask* masks = a.masks;
  const typename E::Value* values = a.values;
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
