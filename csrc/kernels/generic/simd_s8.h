// Four products of bytes, uint8 by int8, summed into an int32 lane: the vocabulary of the int8 panel kernels.
// Every type gives the same bits for all operands. vpdpbusd and usdot do it in one instruction; without them,
// the bytes are widened to 16 bits and multiplied in pairs (vpmaddwd), which cannot saturate: vpmaddubsw
// would, from 255 * 127 + 255 * 127 on; Arm's older instructions take bytes of one sign. The panel's bytes
// are uint8 and the weight's int8 because vpdpbusd wants them so. Operands need no alignment, for the sake of
// corrupt offsets: see generic/simd.h.
#pragma once

#include <string.h>

#include "kernels/generic/simd.h"

namespace pared {
namespace {

struct ScalarS8 : FourInMemory<ScalarS8, int32_t> {
  static constexpr int width = 1;
  using Element = int32_t;
  using V = int32_t;
  using Operand = uint32_t;
  using Value = int32_t;
  static PARED_INLINE V zero() { return 0; }
  // The panel was written as float32 words: read as bytes, not through another type.
  static PARED_INLINE V load(const int32_t* p) {
    V v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  static PARED_INLINE void store(int32_t* p, V v) { *p = v; }
  // Modulo 2^32, as vectors are: a corrupt weight may add to what memory held before.
  static PARED_INLINE V add(V a, V b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
  }
  static PARED_INLINE V minus(V v, int32_t c) {
    return static_cast<int32_t>(static_cast<uint32_t>(v) - static_cast<uint32_t>(c));
  }
  static PARED_INLINE Operand operand(const int32_t* p) { return static_cast<uint32_t>(load(p)); }
  static PARED_INLINE Value value(int32_t word) { return word; }
  static PARED_INLINE V fma(Value w, Operand x, V sum) {
    for (int i = 0; i < 32; i += 8)
      sum = add(sum,
                static_cast<int8_t>(static_cast<uint32_t>(w) >> i) * static_cast<int32_t>((x >> i) & 0xffu));
    return sum;
  }
};

#if defined(__AVX2__)
// 16-bit halves: bytes 0 and 2 of each word in `even`, 1 and 3 in `odd`.
struct Avx2S8 : FourInMemory<Avx2S8, int32_t> {
  static constexpr int width = 8;
  using Element = int32_t;
  using V = __m256i;
  struct Operand {
    __m256i even, odd;
  };
  using Value = Operand;
  static PARED_INLINE V zero() { return _mm256_setzero_si256(); }
  static PARED_INLINE V load(const int32_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static PARED_INLINE void store(int32_t* p, V v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
  static PARED_INLINE V add(V a, V b) { return _mm256_add_epi32(a, b); }
  static PARED_INLINE V minus(V v, int32_t c) { return _mm256_sub_epi32(v, _mm256_set1_epi32(c)); }
  static PARED_INLINE Operand operand(const int32_t* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_and_si256(x, _mm256_set1_epi16(0x00ff)), _mm256_srli_epi16(x, 8)};
  }
  static PARED_INLINE Value value(int32_t word) {
    const __m256i w = _mm256_set1_epi32(word);
    return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
  }
  static PARED_INLINE V fma(const Value& w, const Operand& x, V sum) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x.even, w.even));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x.odd, w.odd));
    // In the order written: compilers would begin with the products of all rows, and have no registers left.
    __asm__ volatile("" : "+x"(sum));
    return sum;
  }
};
#endif

#if defined(__AVXVNNI__)
struct AvxVnniS8 : FourInMemory<AvxVnniS8, int32_t> {
  static constexpr int width = 8;
  using Element = int32_t;
  using V = __m256i;
  using Operand = V;
  using Value = V;
  static PARED_INLINE V zero() { return Avx2S8::zero(); }
  static PARED_INLINE V load(const int32_t* p) { return Avx2S8::load(p); }
  static PARED_INLINE void store(int32_t* p, V v) { Avx2S8::store(p, v); }
  static PARED_INLINE V add(V a, V b) { return Avx2S8::add(a, b); }
  static PARED_INLINE V minus(V v, int32_t c) { return Avx2S8::minus(v, c); }
  static PARED_INLINE Operand operand(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static PARED_INLINE Value value(int32_t word) { return _mm256_set1_epi32(word); }
  static PARED_INLINE V fma(Value w, Operand x, V sum) { return _mm256_dpbusd_avx_epi32(sum, x, w); }
};
#endif

#if defined(__AVX512BW__)
struct Avx512S8 : FourInMemory<Avx512S8, int32_t> {
  static constexpr int width = 16;
  using Element = int32_t;
  using V = __m512i;
  struct Operand {
    __m512i even, odd;
  };
  using Value = Operand;
  static PARED_INLINE V zero() { return _mm512_setzero_si512(); }
  static PARED_INLINE V load(const int32_t* p) { return _mm512_load_si512(p); }
  static PARED_INLINE void store(int32_t* p, V v) { _mm512_store_si512(p, v); }
  static PARED_INLINE V add(V a, V b) { return _mm512_add_epi32(a, b); }
  static PARED_INLINE V minus(V v, int32_t c) { return _mm512_sub_epi32(v, _mm512_set1_epi32(c)); }
  static PARED_INLINE Operand operand(const int32_t* p) {
    const __m512i x = _mm512_loadu_si512(p);
    return {_mm512_and_si512(x, _mm512_set1_epi16(0x00ff)), _mm512_srli_epi16(x, 8)};
  }
  static PARED_INLINE Value value(int32_t word) {
    const __m512i w = _mm512_set1_epi32(word);
    return {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
  }
  static PARED_INLINE V fma(const Value& w, const Operand& x, V sum) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(x.even, w.even));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(x.odd, w.odd));
  }
};
#endif

#if defined(__AVX512VNNI__)
// As FourRowsF32.
struct FourRowsVnni {
  using V = __m128i;
  static PARED_INLINE V zero() { return _mm_setzero_si128(); }
  static PARED_INLINE V load(const int32_t* p, int stride) {
    return _mm_setr_epi32(p[0], p[stride], p[2 * stride], p[3 * stride]);
  }
  static PARED_INLINE void store(int32_t* p, int stride, V v) {
    alignas(16) int32_t rows[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(rows), v);
    for (int r = 0; r < 4; ++r) p[r * stride] = rows[r];
  }
  static PARED_INLINE V fma(const int32_t* values, const int32_t* x, V sum) {
    return _mm_dpbusd_epi32(sum, _mm_set1_epi32(ScalarS8::load(x)),
                            _mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  }
};

struct VnniS8 {
  static constexpr int width = 16;
  using Element = int32_t;
  using V = __m512i;
  using Operand = V;
  using Value = V;
  using FourRows = FourRowsVnni;
  using Four = __m128i;
  static PARED_INLINE Four four(const int32_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static PARED_INLINE Value nth(Four f, int i) {
    return _mm512_permutexvar_epi32(_mm512_set1_epi32(i), _mm512_castsi128_si512(f));
  }
  static PARED_INLINE V zero() { return _mm512_setzero_si512(); }
  static PARED_INLINE V load(const int32_t* p) { return _mm512_load_si512(p); }
  static PARED_INLINE void store(int32_t* p, V v) { _mm512_store_si512(p, v); }
  static PARED_INLINE V add(V a, V b) { return _mm512_add_epi32(a, b); }
  static PARED_INLINE V minus(V v, int32_t c) { return _mm512_sub_epi32(v, _mm512_set1_epi32(c)); }
  static PARED_INLINE Operand operand(const int32_t* p) { return _mm512_loadu_si512(p); }
  static PARED_INLINE Value value(int32_t word) { return _mm512_set1_epi32(word); }
  static PARED_INLINE V fma(Value w, Operand x, V sum) { return _mm512_dpbusd_epi32(sum, x, w); }
};
#endif

#if defined(__aarch64__)
// Weights as they lie, four words, and the word that is asked for.
struct NeonWord {
  int8x16_t four;
  int lane;
};

// What the types for Arm have in common.
struct NeonWords {
  static constexpr int width = 4;
  using Element = int32_t;
  using Value = NeonWord;
  using Four = int8x16_t;
  static PARED_INLINE Four four(const int32_t* p) { return vld1q_s8(reinterpret_cast<const int8_t*>(p)); }
  static PARED_INLINE Value nth(Four f, int i) { return {f, i}; }
  static PARED_INLINE Value value(int32_t word) {
    // The other words zero: see LeftOut.
    const uint64x1_t low = vcreate_u64(static_cast<uint32_t>(word));
    return {vreinterpretq_s8_u64(vcombine_u64(low, vdup_n_u64(0))), 0};
  }
  static PARED_INLINE uint8x16_t bytes(const int32_t* p) {
    return vld1q_u8(reinterpret_cast<const uint8_t*>(p));
  }
  // Word `row` of v, in all lanes.
  static PARED_INLINE int32x4_t row_of(int32x4_t v, int row) {
    switch (row) {  // known where loops are unrolled
      case 0: return vdupq_laneq_s32(v, 0);
      case 1: return vdupq_laneq_s32(v, 1);
      case 2: return vdupq_laneq_s32(v, 2);
      default: return vdupq_laneq_s32(v, 3);
    }
  }
};

// One register of sums.
struct NeonWordSums : NeonWords {
  using V = int32x4_t;
  static PARED_INLINE V zero() { return vdupq_n_s32(0); }
  static PARED_INLINE V load(const int32_t* p) { return vld1q_s32(p); }
  static PARED_INLINE void store(int32_t* p, V v) { vst1q_s32(p, v); }
  static PARED_INLINE V add(V a, V b) { return vaddq_s32(a, b); }
  static PARED_INLINE V minus(V v, int32_t c) { return vsubq_s32(v, vdupq_n_s32(c)); }
};

// Without a dot product. Products of bytes (smull) are added in pairs to two sums a word (sadalp), whose sum
// is taken at the end: half the multiplications of 16-bit operands, and none can overflow. The signs: see
// NeonSdotS8.
struct NeonWideS8 : NeonWords {
  struct V {
    int32x4_t low, high;  // of words 0 and 1, 2 and 3
  };
  using Operand = int8x16_t;
  static PARED_INLINE V spread(int32x4_t v) {
    const int32x4_t none = vdupq_n_s32(0);
    return {vzip1q_s32(v, none), vzip2q_s32(v, none)};
  }
  static PARED_INLINE V zero() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
  static PARED_INLINE V load(const int32_t* p) { return spread(vld1q_s32(p)); }
  static PARED_INLINE int32x4_t sums(V v) { return vpaddq_s32(v.low, v.high); }
  static PARED_INLINE void store(int32_t* p, V v) { vst1q_s32(p, sums(v)); }
  static PARED_INLINE V add(V a, V b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
  static PARED_INLINE V minus(V v, int32_t c) {
    const V s = spread(vdupq_n_s32(c));
    return {vsubq_s32(v.low, s.low), vsubq_s32(v.high, s.high)};
  }
  static PARED_INLINE Operand operand(const int32_t* p) {
    return vreinterpretq_s8_u8(veorq_u8(bytes(p), vdupq_n_u8(0x80)));
  }
  static PARED_INLINE V fma(Value w, Operand x, V sum) {
    const int8x16_t all = vreinterpretq_s8_s32(row_of(vreinterpretq_s32_s8(w.four), w.lane));
    return {vpadalq_s16(sum.low, vmull_s8(vget_low_s8(x), vget_low_s8(all))),
            vpadalq_s16(sum.high, vmull_high_s8(x, all))};
  }
};
template <>
constexpr bool kByLane<NeonWideS8> = true;
template <>
struct LeftOut<NeonWideS8> {
  using S = NeonWideS8;
  using Sum = S::V;
  int32x4_t sums = vdupq_n_s32(0);  // of each word's bytes
  PARED_INLINE void add(S::Four w) { sums = vpadalq_s16(sums, vpaddlq_s8(w)); }
  PARED_INLINE void add(S::Value w) { add(w.four); }
  PARED_INLINE Sum of_all() const { return S::spread(vshlq_n_s32(vdupq_n_s32(vaddvq_s32(sums)), 7)); }
  PARED_INLINE Sum of_row(int row) const { return S::spread(vshlq_n_s32(S::row_of(sums, row), 7)); }
  static PARED_INLINE S::V with(S::V v, Sum rest) { return S::add(v, rest); }
};
#endif

#if defined(__ARM_FEATURE_DOTPROD)
// sdot takes signed bytes alone: x ^ 0x80 is x - 128, and what that leaves out, 128 times the sum of the
// weights, comes back at the end of a row.
struct NeonSdotS8 : NeonWordSums {
  using Operand = int8x16_t;
  static PARED_INLINE Operand operand(const int32_t* p) {
    return vreinterpretq_s8_u8(veorq_u8(bytes(p), vdupq_n_u8(0x80)));
  }
  static PARED_INLINE V fma(Value w, Operand x, V sum) {
    switch (w.lane) {
      case 0: return vdotq_laneq_s32(sum, x, w.four, 0);
      case 1: return vdotq_laneq_s32(sum, x, w.four, 1);
      case 2: return vdotq_laneq_s32(sum, x, w.four, 2);
      default: return vdotq_laneq_s32(sum, x, w.four, 3);
    }
  }
};
template <>
constexpr bool kByLane<NeonSdotS8> = true;
template <>
struct LeftOut<NeonSdotS8> {
  using S = NeonSdotS8;
  using Sum = S::V;
  int32x4_t sums = vdupq_n_s32(0);  // of each word's bytes, times -128, for which there is a register anyway
  PARED_INLINE void add(S::Four w) { sums = vdotq_s32(sums, w, vreinterpretq_s8_u8(vdupq_n_u8(0x80))); }
  PARED_INLINE void add(S::Value w) { add(w.four); }
  PARED_INLINE Sum of_all() const { return vdupq_n_s32(vaddvq_s32(sums)); }
  PARED_INLINE Sum of_row(int row) const { return S::row_of(sums, row); }
  static PARED_INLINE S::V with(S::V v, Sum rest) { return vsubq_s32(v, rest); }
};
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)
struct NeonUsdotS8 : NeonWordSums {
  using Operand = uint8x16_t;
  static PARED_INLINE Operand operand(const int32_t* p) { return bytes(p); }
  static PARED_INLINE V fma(Value w, Operand x, V sum) {
    switch (w.lane) {
      case 0: return vusdotq_laneq_s32(sum, x, w.four, 0);
      case 1: return vusdotq_laneq_s32(sum, x, w.four, 1);
      case 2: return vusdotq_laneq_s32(sum, x, w.four, 2);
      default: return vusdotq_laneq_s32(sum, x, w.four, 3);
    }
  }
};
template <>
constexpr bool kByLane<NeonUsdotS8> = true;
#endif

}  // namespace
}  // namespace pared
