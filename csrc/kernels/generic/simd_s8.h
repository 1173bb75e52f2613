// Four products of bytes, uint8 by int8, summed into an int32 lane: the vocabulary of the int8 panel kernels.
// Every type gives the same bits for all operands. vpdpbusd does it in one instruction; without it, the bytes
// are widened to 16 bits and multiplied in pairs (vpmaddwd), which cannot saturate: vpmaddubsw would, from
// 255 * 127 + 255 * 127 on. The panel's bytes are uint8 and the weight's int8 because vpdpbusd wants them so.
// Operands need no alignment, for the sake of corrupt offsets: see generic/simd.h.
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
    return _mm_dpbusd_epi32(sum, _mm_set1_epi32(*x),
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

}  // namespace
}  // namespace pared
