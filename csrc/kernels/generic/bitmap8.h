// Masked bytes: a vector of 16 outputs by 4 inputs is 64 bytes, of which the non-zeros are stored. Expanded
// into a tile for the dense int8 kernel, or in registers for a few tokens.
#pragma once

#include "kernels/generic/bitmap.h"
#include "kernels/generic/gemm_u8s8.h"
#include "kernels/types.h"

namespace pared {
namespace {

constexpr int kByteVector = 64;
struct ScalarBytes {
  static PARED_INLINE void expand(uint64_t mask, const int8_t* values, int8_t* out) {
    for (int i = 0; i < kByteVector; ++i) out[i] = mask >> i & 1 ? *values++ : int8_t{0};
  }
};

#if defined(__AVX2__)
// Eight bytes at a time by a table of shuffles: vpexpandb is AVX-512 VBMI2. (pdep takes two multiplications'
// worth of one port for each eight, and 18 cycles and more on Zen 2.)
PARED_INLINE __m128i expand_eight(uint64_t mask, const int8_t* values) {
  return _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)),
                          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpandTable.place[mask & 0xff])));
}

// The four quarters of a vector. Where each eight begin is a popcount of its own: no chain.
PARED_INLINE void expand_quarters(uint64_t mask, const int8_t* values, __m128i out[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int8_t* low = values + __builtin_popcountll(_bzhi_u64(mask, 16 * i));
    const int8_t* high = values + __builtin_popcountll(_bzhi_u64(mask, 16 * i + 8));
    out[i] = _mm_unpacklo_epi64(expand_eight(mask >> 16 * i, low), expand_eight(mask >> (16 * i + 8), high));
  }
}

struct Avx2Bytes {
  static PARED_INLINE void expand(uint64_t mask, const int8_t* values, int8_t* out) {
    __m128i quarters[4];
    expand_quarters(mask, values, quarters);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm_store_si128(reinterpret_cast<__m128i*>(out) + i, quarters[i]);
  }
};
#endif

#if defined(__aarch64__)
// Byte i: the set bits of bytes 0 to i of the mask. There is no popcount of a general register; that of a
// vector is by bytes, and a multiplication sums them up.
PARED_INLINE uint64_t running_counts(uint64_t mask) {
  const uint64_t counts = vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(mask))), 0);
  return counts * 0x0101010101010101u;
}
PARED_INLINE int set_bits(uint64_t mask) { return static_cast<int>(running_counts(mask) >> 56); }

// As for AVX2, eight bytes at a time; a place beyond the table's end gives zero.
PARED_INLINE uint8x8_t expand_eight(uint64_t mask, const int8_t* values, int i) {
  const uint64_t before = running_counts(mask) << 8;
  const auto* from = reinterpret_cast<const uint8_t*>(values) + (before >> 8 * i & 0xff);
  return vtbl1_u8(vld1_u8(from), vld1_u8(kExpandTable.place[mask >> 8 * i & 0xff]));
}

struct NeonBytes {
  static PARED_INLINE void expand(uint64_t mask, const int8_t* values, int8_t* out) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      vst1_u8(reinterpret_cast<uint8_t*>(out) + 8 * i, expand_eight(mask, values, i));
  }
};

// Operands of the products P, which are stored as they are where the caller asks for it.
template <class P>
struct NeonOperand {
  template <bool STORE>
  static PARED_INLINE typename NeonDot<P>::W expand(uint64_t mask, const int8_t* values, int8_t* out) {
    typename NeonDot<P>::W w;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t quarter =
          vcombine_u8(expand_eight(mask, values, 2 * i), expand_eight(mask, values, 2 * i + 1));
      if (STORE) vst1q_u8(reinterpret_cast<uint8_t*>(out) + 16 * i, quarter);
      w.v[i] = P::operand(quarter);
    }
    return w;
  }
  static PARED_INLINE typename NeonDot<P>::W operand(uint64_t mask, const int8_t* values, int8_t* out) {
    return expand<true>(mask, values, out);
  }
};
#else
PARED_INLINE int set_bits(uint64_t mask) { return __builtin_popcountll(mask); }
#endif

// What the sums of each token begin with: zero, but where products are biased (NeonDot).
template <class D, int TOKENS>
struct Starts {
  PARED_INLINE Starts(const uint8_t*, int64_t, int64_t) {}
  PARED_INLINE typename D::Acc operator[](int) const { return D::zero(); }
};
#if defined(__aarch64__)
template <class P, int TOKENS>
struct Starts<NeonDot<P>, TOKENS> {
  uint32_t start[TOKENS] = {};
  PARED_INLINE Starts(const uint8_t* x, int64_t x_stride, int64_t units) {
    if constexpr (P::biased)
      for (int t = 0; t < TOKENS; ++t)
        start[t] = start_of(add_bytes(vdupq_n_u32(0), x + t * x_stride, units));
  }
  PARED_INLINE typename NeonDot<P>::Acc operator[](int t) const {
    return NeonDot<P>::filled(P::biased ? start[t] : 0u);
  }
};
#endif

#if defined(__AVX512VBMI2__)
PARED_INLINE __m512i expand_bytes(uint64_t mask, const int8_t* values) {
  // The fresh zero, and the mask in a general register: see Avx512Expand in generic/bitmap.h. A zero that the
  // compiler makes would be copied from a register that it keeps. Loaded first: 6 % faster than a memory
  // operand.
  __m512i zero, packed = _mm512_loadu_si512(values);
  __asm__("vpxord %0, %0, %0" : "=v"(zero), "+v"(packed), "+r"(mask));
  return _mm512_mask_expand_epi8(zero, mask, packed);
}

struct Vbmi2Bytes {
  static PARED_INLINE __m512i operand(uint64_t mask, const int8_t* values, int8_t* out) {
    const __m512i w = expand_bytes(mask, values);
    _mm512_store_si512(out, w);
    return w;
  }
};
#endif

template <class B>
bool expand_groups(const BitmapExpandArgs& a) {
  const uint64_t* masks = a.masks;
  const int8_t* values = a.values;
  int8_t* out = a.out;
  const int64_t vectors = static_cast<int64_t>(a.groups) * a.vectors;
  for (int64_t v = 0; v < vectors;) {
    const int64_t stop = v + kByteVectorsPerCheck < vectors ? v + kByteVectorsPerCheck : vectors;
    if (!inside(masks, stop - v, values, a.end)) return false;
    for (; v < stop; v += 4) {
      fetch_ahead(masks, values);
      for (int i = 0; i < 4; ++i) {
        B::expand(*masks, values, out);
        values += set_bits(*masks++);
        out += kByteVector;
      }
    }
  }
  return true;
}

struct ScalarByteDot {
  static constexpr int kSums = 1;
  struct W {
    int8_t byte[kByteVector];
  };
  struct Acc {
    uint32_t lane[16];
  };
  static PARED_INLINE Acc zero() { return {}; }
  static PARED_INLINE void store(int32_t* p, const Acc& a, bool accumulate) {
    for (int i = 0; i < 16; ++i)
      p[i] = static_cast<int32_t>((accumulate ? static_cast<uint32_t>(p[i]) : 0u) + a.lane[i]);
  }
  static PARED_INLINE Acc add(const Acc& a, const Acc&) { return a; }
  static PARED_INLINE W expand(uint64_t mask, const int8_t* values) {
    W w;
    ScalarBytes::expand(mask, values, w.byte);
    return w;
  }
  static PARED_INLINE void dot(Acc& acc, const uint8_t* x, const W& w) {
    for (int i = 0; i < kByteVector; ++i) acc.lane[i / 4] += static_cast<uint32_t>(x[i % 4] * w.byte[i]);
  }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// The products and sums of D, Avx2Dot or AvxVnniDot of generic/gemm_u8s8.h.
template <class D>
struct Avx2ByteDot {
  static constexpr int kSums = 1;
  using W = typename D::W;
  using Acc = typename D::Acc;
  static PARED_INLINE Acc zero() { return D::zero(); }
  static PARED_INLINE void store(int32_t* p, const Acc& a, bool accumulate) { D::store(p, a, accumulate); }
  static PARED_INLINE W expand(uint64_t mask, const int8_t* values) {
    __m128i quarters[4];
    expand_quarters(mask, values, quarters);
    W w;
    constexpr bool kWiden = sizeof(w.v) == 4 * sizeof(__m256i);  // to 16 bits
    if constexpr (kWiden) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) w.v[i] = _mm256_cvtepi8_epi16(quarters[i]);
    } else {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) w.v[i] = _mm256_set_m128i(quarters[2 * i + 1], quarters[2 * i]);
    }
    return w;
  }
  static PARED_INLINE void dot(Acc& acc, const uint8_t* x, const W& w) { D::dot(acc, D::unit(x), w); }
};
#endif

#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
struct Vbmi2Dot {
  static constexpr int kSums = 4;
  using W = __m512i;
  using Acc = __m512i;
  static PARED_INLINE Acc zero() { return _mm512_setzero_si512(); }
  static PARED_INLINE void store(int32_t* p, Acc a, bool accumulate) { VnniDot::store(p, a, accumulate); }
  static PARED_INLINE Acc add(Acc a, Acc b) { return _mm512_add_epi32(a, b); }
  static PARED_INLINE W expand(uint64_t mask, const int8_t* values) { return expand_bytes(mask, values); }
  static PARED_INLINE void dot(Acc& acc, const uint8_t* x, W w) {
    int32_t unit;
    __builtin_memcpy(&unit, x, 4);
    acc = _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(unit), w);
  }
};
#endif

#if defined(__aarch64__)
template <class P>
struct NeonByteDot : NeonDot<P> {
  using D = NeonDot<P>;
  static constexpr int kSums = 1;
  static PARED_INLINE typename D::W expand(uint64_t mask, const int8_t* values) {
    return NeonOperand<P>::template expand<false>(mask, values, nullptr);
  }
  static PARED_INLINE void dot(typename D::Acc& acc, const uint8_t* x, const typename D::W& w) {
    D::dot(acc, D::unit(x), w);
  }
};
template <class P, int TOKENS>
struct Starts<NeonByteDot<P>, TOKENS> : Starts<NeonDot<P>, TOKENS> {
  using Starts<NeonDot<P>, TOKENS>::Starts;
};
#endif

template <class D, int TOKENS>
bool bitmap8_groups(const Bitmap8Args& a) {
  // Sums beside each other for each token: see partial_sums in generic/bitmap.h.
  constexpr int P = D::kSums == 1 ? 1 : TOKENS <= 2 ? 4 : TOKENS <= 7 ? 2 : 1;
  const uint64_t* masks = a.masks;
  const int8_t* values = a.values;
  int32_t* acc = a.acc;
  const Starts<D, TOKENS> starts(a.x, kBitmap8Stride, a.vectors);
  for (int g = 0; g < a.groups; ++g, acc += TOKENS * 16) {
    typename D::Acc sum[P][TOKENS];
    for (int p = 0; p < P; ++p)
      for (int t = 0; t < TOKENS; ++t) sum[p][t] = p == 0 ? starts[t] : D::zero();
    const uint8_t* x = a.x;
    for (int v = 0; v < a.vectors;) {
      const int stop = v + kByteVectorsPerCheck < a.vectors ? v + kByteVectorsPerCheck : a.vectors;
      if (!inside(masks, stop - v, values, a.end)) return false;
      for (; v < stop; v += 4, masks += 4, x += 16) {
        fetch_ahead(masks, values);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const typename D::W w = D::expand(masks[i], values);
          values += set_bits(masks[i]);
#pragma GCC unroll 16
          for (int t = 0; t < TOKENS; ++t) D::dot(sum[i % P][t], x + t * kBitmap8Stride + 4 * i, w);
        }
      }
    }
    for (int t = 0; t < TOKENS; ++t) {
      typename D::Acc s = sum[0][t];
      if constexpr (P == 2) s = D::add(s, sum[1][t]);
      if constexpr (P == 4) s = D::add(D::add(s, sum[1][t]), D::add(sum[2][t], sum[3][t]));
      D::store(acc + t * 16, s, a.accumulate);
    }
  }
  return true;
}

// The table's entries that the level has; the others stay null.
#define PARED_BITMAP8_FOUR(D) \
  bitmap8_groups<D, 1>, bitmap8_groups<D, 2>, bitmap8_groups<D, 3>, bitmap8_groups<D, 4>
#define PARED_BITMAP8_TABLE(D)                                                                 \
  {PARED_BITMAP8_FOUR(D), bitmap8_groups<D, 5>,  bitmap8_groups<D, 6>,  bitmap8_groups<D, 7>,  \
   bitmap8_groups<D, 8>,  bitmap8_groups<D, 9>,  bitmap8_groups<D, 10>, bitmap8_groups<D, 11>, \
   bitmap8_groups<D, 12>, bitmap8_groups<D, 13>, bitmap8_groups<D, 14>, bitmap8_groups<D, 15>, \
   bitmap8_groups<D, 16>}

// TOKENS tokens by GROUPS groups, whose values are read side by side: a broadcast unit serves all of them,
// and the products of one vector run beside the expansion of the next. D is a level's dot product of
// generic/gemm_u8s8.h, B its expansion.
template <class D, class B, int TOKENS, int GROUPS>
bool expand_multiply(const BitmapExpandMultiplyArgs& a) {
  for (int g = 0; g < GROUPS; ++g)
    if (!inside(a.masks + static_cast<int64_t>(g) * a.vectors, a.vectors, a.values + a.starts[g], a.end))
      return false;
  const Starts<D, TOKENS> starts(a.x, a.x_stride, a.vectors);
  typename D::Acc sum[TOKENS][GROUPS];
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; ++g) sum[t][g] = starts[t];
  const int8_t* values[GROUPS];
#pragma GCC unroll 4
  for (int g = 0; g < GROUPS; ++g) values[g] = a.values + a.starts[g];
  const uint64_t* masks = a.masks;
  const uint8_t* x = a.x;
  int8_t* out = a.out;
  const int64_t step = a.vectors;
  // Groups that are read side by side fetch each its share of what follows them all.
  const int64_t group_masks = GROUPS * step * static_cast<int64_t>(sizeof(uint64_t));
  const int64_t group_values = static_cast<int64_t>(a.starts[GROUPS]) - a.starts[0];
  const int64_t masks_ahead = group_masks > kMasksAhead ? group_masks : kMasksAhead;
  const int64_t values_ahead = group_values > kValuesAhead ? group_values : kValuesAhead;
  for (int v = 0; v < a.vectors; v += 4) {
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; ++g) fetch_ahead(masks + g * step, values[g], masks_ahead, values_ahead);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, ++masks, out += kByteVector, x += kInt8Unit) {
      typename D::W w[GROUPS];
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; ++g) {
        const uint64_t mask = masks[g * step];
        w[g] = B::operand(mask, values[g], out + g * step * kByteVector);
        values[g] += set_bits(mask);
      }
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) {
        const typename D::A unit = D::unit(x + t * a.x_stride);
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; ++g) D::dot(sum[t][g], unit, w[g]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; ++g)
      D::store(a.acc + t * a.acc_stride + g * kInt8Panel, sum[t][g], a.accumulate);
  return true;
}

// One token by one group of bytes that have been expanded.
inline void scalar_multiply(const BitmapExpandMultiplyArgs& a, int t, int g) {
  const uint8_t* x = a.x + t * a.x_stride;
  const int8_t* w = a.out + static_cast<int64_t>(g) * a.vectors * kByteVector;
  ScalarDot::Acc sum = ScalarDot::zero();
  for (int v = 0; v < a.vectors; ++v, x += kInt8Unit, w += kByteVector) ScalarDot::dot(sum, x, w);
  ScalarDot::store(a.acc + t * a.acc_stride + g * kInt8Panel, sum, a.accumulate);
}

// Byte by byte, side by side is no gain: the template above, unrolled, took a compiler 20 s.
inline bool scalar_expand_multiply(const BitmapExpandMultiplyArgs& a, int tokens, int groups) {
  for (int g = 0; g < groups; ++g) {
    const uint64_t* masks = a.masks + static_cast<int64_t>(g) * a.vectors;
    const int8_t* values = a.values + a.starts[g];
    if (!inside(masks, a.vectors, values, a.end)) return false;
    int8_t* out = a.out + static_cast<int64_t>(g) * a.vectors * kByteVector;
    for (int v = 0; v < a.vectors; ++v, ++masks, out += kByteVector) {
      ScalarBytes::expand(*masks, values, out);
      values += __builtin_popcountll(*masks);
    }
  }
  for (int t = 0; t < tokens; ++t)
    for (int g = 0; g < groups; ++g) scalar_multiply(a, t, g);
  return true;
}

template <int TOKENS, int GROUPS>
bool scalar_expand_multiply(const BitmapExpandMultiplyArgs& a) {
  return scalar_expand_multiply(a, TOKENS, GROUPS);
}

#if defined(__aarch64__)
// One group after the other: the sums of one fill the registers. More tokens than those hold find the tile
// expanded.
template <class P, int TOKENS, int GROUPS>
bool expand_multiply_lanes(const BitmapExpandMultiplyArgs& args) {
  constexpr int kFirst = TOKENS <= P::tokens ? TOKENS : (TOKENS + 1) / 2;
  BitmapExpandMultiplyArgs a = args;
  for (int g = 0; g < GROUPS; ++g) {
    if (!expand_multiply<NeonDot<P>, NeonOperand<P>, kFirst, 1>(a)) return false;
    a.masks += a.vectors;
    ++a.starts;
    a.out += static_cast<int64_t>(a.vectors) * kByteVector;
    a.acc += kInt8Panel;
  }
  if constexpr (kFirst < TOKENS)
    gemm_u8s8_lanes<P, TOKENS - kFirst, GROUPS>({args.x + kFirst * args.x_stride, args.x_stride, args.out,
                                                 static_cast<int64_t>(args.vectors) * kByteVector,
                                                 args.vectors, args.acc + kFirst * args.acc_stride,
                                                 args.acc_stride, args.accumulate});
  return true;
}
#endif

// The table's entries in its order: TILE(tokens, groups).
#define PARED_EXPAND_TOKENS(TILE, T) TILE(T, 1), TILE(T, 2), TILE(T, 3), TILE(T, 4)
#define PARED_EXPAND_TILES(TILE)                                                             \
  {PARED_EXPAND_TOKENS(TILE, 1), PARED_EXPAND_TOKENS(TILE, 2), PARED_EXPAND_TOKENS(TILE, 3), \
   PARED_EXPAND_TOKENS(TILE, 4), PARED_EXPAND_TOKENS(TILE, 5), PARED_EXPAND_TOKENS(TILE, 6)}

}  // namespace
}  // namespace pared
