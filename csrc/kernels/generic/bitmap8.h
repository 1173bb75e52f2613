// Masked bytes: a vector of 16 outputs by 4 inputs is 64 bytes, of which the non-zeros are stored. Expanded
// into a tile for the dense int8 kernel, or in registers for a few tokens.
#pragma once

#include "kernels/generic/bitmap.h"
#include "kernels/types.h"

namespace pared {
namespace {

constexpr int kByteVector = 64;
struct ScalarBytes {
  static PARED_INLINE void expand(uint64_t mask, const int8_t* values, int8_t* out) {
    for (int i = 0; i < kByteVector; ++i) out[i] = mask >> i & 1 ? *values++ : int8_t{0};
  }
};

#if defined(__BMI2__)
// Eight bytes at a time in general registers: vpexpandb is AVX-512 VBMI2.
struct DepositBytes {
  static PARED_INLINE void expand(uint64_t mask, const int8_t* values, int8_t* out) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, mask >>= 8) {
      uint64_t some;
      __builtin_memcpy(&some, values, 8);
      const uint64_t places = _pdep_u64(mask, 0x0101010101010101u) * 0xff;
      some = _pdep_u64(some, places);
      __builtin_memcpy(out + 8 * i, &some, 8);
      values += __builtin_popcount(static_cast<unsigned>(mask & 0xff));
    }
  }
};
#endif

#if defined(__AVX512VBMI2__)
PARED_INLINE __m512i expand_bytes(uint64_t mask, const int8_t* values) {
  // The fresh zero: see Avx512Expand in generic/bitmap.h. Loaded first: 6 % faster than a memory operand.
  __m512i zero = _mm512_setzero_si512(), packed = _mm512_loadu_si512(values);
  __asm__("" : "+v"(zero), "+v"(packed));
  return _mm512_mask_expand_epi8(zero, mask, packed);
}
struct Vbmi2Bytes {
  static PARED_INLINE void expand(uint64_t mask, const int8_t* values, int8_t* out) {
    _mm512_store_si512(out, expand_bytes(mask, values));
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
        values += __builtin_popcountll(*masks++);
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
  static PARED_INLINE Acc load(const int32_t* p) {
    Acc a;
    for (int i = 0; i < 16; ++i) a.lane[i] = static_cast<uint32_t>(p[i]);
    return a;
  }
  static PARED_INLINE Acc zero() { return {}; }
  static PARED_INLINE void store(int32_t* p, const Acc& a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int32_t>(a.lane[i]);
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

#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
struct Vbmi2Dot {
  static constexpr int kSums = 4;
  using W = __m512i;
  using Acc = __m512i;
  static PARED_INLINE Acc load(const int32_t* p) { return _mm512_load_si512(p); }
  static PARED_INLINE Acc zero() { return _mm512_setzero_si512(); }
  static PARED_INLINE void store(int32_t* p, Acc a) { _mm512_store_si512(p, a); }
  static PARED_INLINE Acc add(Acc a, Acc b) { return _mm512_add_epi32(a, b); }
  static PARED_INLINE W expand(uint64_t mask, const int8_t* values) { return expand_bytes(mask, values); }
  static PARED_INLINE void dot(Acc& acc, const uint8_t* x, W w) {
    int32_t unit;
    __builtin_memcpy(&unit, x, 4);
    acc = _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(unit), w);
  }
};
#endif

template <class D, int TOKENS>
bool bitmap8_groups(const Bitmap8Args& a) {
  // Sums beside each other for each token: see partial_sums in generic/bitmap.h.
  constexpr int P = D::kSums == 1 ? 1 : TOKENS <= 2 ? 4 : TOKENS <= 7 ? 2 : 1;
  const uint64_t* masks = a.masks;
  const int8_t* values = a.values;
  int32_t* acc = a.acc;
  for (int g = 0; g < a.groups; ++g, acc += TOKENS * 16) {
    typename D::Acc sum[P][TOKENS];
    for (int p = 0; p < P; ++p)
      for (int t = 0; t < TOKENS; ++t) sum[p][t] = a.accumulate && p == 0 ? D::load(acc + t * 16) : D::zero();
    const uint8_t* x = a.x;
    for (int v = 0; v < a.vectors;) {
      const int stop = v + kByteVectorsPerCheck < a.vectors ? v + kByteVectorsPerCheck : a.vectors;
      if (!inside(masks, stop - v, values, a.end)) return false;
      for (; v < stop; v += 4, masks += 4, x += 16) {
        fetch_ahead(masks, values);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const typename D::W w = D::expand(masks[i], values);
          values += __builtin_popcountll(masks[i]);
#pragma GCC unroll 16
          for (int t = 0; t < TOKENS; ++t) D::dot(sum[i % P][t], x + t * kBitmap8Stride + 4 * i, w);
        }
      }
    }
    for (int t = 0; t < TOKENS; ++t) {
      typename D::Acc s = sum[0][t];
      if constexpr (P == 2) s = D::add(s, sum[1][t]);
      if constexpr (P == 4) s = D::add(D::add(s, sum[1][t]), D::add(sum[2][t], sum[3][t]));
      D::store(acc + t * 16, s);
    }
  }
  return true;
}

#define PARED_BITMAP8_TABLE(D)                                                                 \
  {bitmap8_groups<D, 1>,  bitmap8_groups<D, 2>,  bitmap8_groups<D, 3>,  bitmap8_groups<D, 4>,  \
   bitmap8_groups<D, 5>,  bitmap8_groups<D, 6>,  bitmap8_groups<D, 7>,  bitmap8_groups<D, 8>,  \
   bitmap8_groups<D, 9>,  bitmap8_groups<D, 10>, bitmap8_groups<D, 11>, bitmap8_groups<D, 12>, \
   bitmap8_groups<D, 13>, bitmap8_groups<D, 14>, bitmap8_groups<D, 15>, bitmap8_groups<D, 16>}

}  // namespace
}  // namespace pared
