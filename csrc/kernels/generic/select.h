// Selection kernels, written once over a vector type of keys: of int32, and, where 16-bit floats need no
// arithmetic, of int16, twice as many a vector. What limits them: memory bandwidth, once
// the data leave L2, because they prefetch further ahead than the hardware does (it stops at every page); in
// cache the number of instructions, about 12 for a vector. Measured on Zen 5, 64 bytes of float32: 0.9 ns in
// L1, and from memory 1.9 ns where a plain read takes 2.0.
#pragma once

#include <stdint.h>

#include "kernels/generic/half.h"
#include "kernels/generic/simd.h"
#include "kernels/select_types.h"

namespace pared {
namespace {

// ---- vector types. I: `width` lanes of a Key. M: the result of a comparison. inf<T> is the greatest key of
// a number of type T, and `nan` the key that a NaN gets.

struct ScalarSelect {
  static constexpr int width = 1;
  using Key = int32_t;
  static constexpr Key nan = kSelectNan;
  template <DType T>
  static constexpr Key inf = kSelectInf;
  static constexpr int mask_vectors = 1;   // vectors whose mask bytes are stored at once
  static constexpr int bits_per_lane = 1;  // of `bits`: the lowest of them is the lane's
  using I = int32_t;
  using M = bool;
  static PARED_INLINE I set1(int32_t v) { return v; }
  template <DType T>
  static PARED_INLINE I load(const void* p, int64_t i) {
    if constexpr (T == DType::f32) {
      return static_cast<I>(float_bits(static_cast<const float*>(p)[i]));
    } else {
      const uint16_t h = static_cast<const uint16_t*>(p)[i];
      return static_cast<I>(float_bits(T == DType::bf16 ? bf16_to_float(h) : f16_to_float(h)));
    }
  }
  static PARED_INLINE I load_keys(const int32_t* p) { return *p; }
  static PARED_INLINE void store(int32_t* p, I v) { *p = v; }
  static PARED_INLINE void store_float(float* p, I v) { *p = bits_float(static_cast<uint32_t>(v)); }
  static PARED_INLINE I load_float(const float* p) { return static_cast<I>(float_bits(*p)); }
  static PARED_INLINE I mul(I a, I b) {
    return static_cast<I>(
        float_bits(bits_float(static_cast<uint32_t>(a)) * bits_float(static_cast<uint32_t>(b))));
  }
  static PARED_INLINE I add_float(I a, I b) {
    return static_cast<I>(
        float_bits(bits_float(static_cast<uint32_t>(a)) + bits_float(static_cast<uint32_t>(b))));
  }
  static PARED_INLINE I magnitude(I v) { return v & 0x7fffffff; }
  static PARED_INLINE I negate_if_negative(I magnitude, I sign) { return sign < 0 ? -magnitude : magnitude; }
  static PARED_INLINE M gt(I a, I b) { return a > b; }
  static PARED_INLINE M eq(I a, I b) { return a == b; }
  static PARED_INLINE M or_(M a, M b) { return a || b; }
  static PARED_INLINE M and_(M a, M b) { return a && b; }
  static PARED_INLINE M and_not(M a, M b) { return a && !b; }
  static PARED_INLINE M and_gt(M m, I a, I b) { return m && a > b; }
  static PARED_INLINE I max(I a, I b) { return a > b ? a : b; }
  static PARED_INLINE I blend(M m, I no, I yes) { return m ? yes : no; }
  static PARED_INLINE I count(I acc, M m) { return acc + m; }
  static PARED_INLINE int64_t total(I acc) { return acc; }
  static PARED_INLINE int32_t greatest(I v) { return v; }
  static PARED_INLINE uint64_t bits(M m) { return m; }
  static PARED_INLINE int compress(int32_t* out, M m, I v) {
    *out = v;
    return m;
  }
  static PARED_INLINE void store_mask(uint8_t* p, uint64_t bits) { *p = static_cast<uint8_t>(bits); }
};

#if defined(__AVX2__)
// For each 8-bit mask the lanes that are set, packed to the front.
struct CompressTable {
  uint64_t lanes[256];
};
constexpr CompressTable make_compress_table() {
  CompressTable t{};
  for (int m = 0; m < 256; ++m) {
    uint64_t packed = 0;
    int n = 0;
    for (uint64_t lane = 0; lane < 8; ++lane)
      if (m >> lane & 1) packed |= lane << (8 * n++);
    t.lanes[m] = packed;
  }
  return t;
}
constexpr CompressTable kCompressTable = make_compress_table();

struct Avx2Select {
  static constexpr int width = 8;
  using Key = int32_t;
  static constexpr Key nan = kSelectNan;
  template <DType T>
  static constexpr Key inf = kSelectInf;
  static constexpr int mask_vectors = 4, bits_per_lane = 1;
  using I = __m256i;
  using M = __m256i;
  static PARED_INLINE I set1(int32_t v) { return _mm256_set1_epi32(v); }
  template <DType T>
  static PARED_INLINE I load(const void* p, int64_t i) {
    if constexpr (T == DType::f32) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const float*>(p) + i));
    } else {
      const __m128i h =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + i));
      if constexpr (T == DType::bf16) return _mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
      return _mm256_castps_si256(_mm256_cvtph_ps(h));
    }
  }
  static PARED_INLINE I load_keys(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static PARED_INLINE void store(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static PARED_INLINE void store_float(float* p, I v) { _mm256_storeu_ps(p, _mm256_castsi256_ps(v)); }
  static PARED_INLINE I load_float(const float* p) { return _mm256_castps_si256(_mm256_loadu_ps(p)); }
  static PARED_INLINE I mul(I a, I b) {
    return _mm256_castps_si256(_mm256_mul_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)));
  }
  static PARED_INLINE I add_float(I a, I b) {
    return _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)));
  }
  static PARED_INLINE I magnitude(I v) { return _mm256_and_si256(v, _mm256_set1_epi32(0x7fffffff)); }
  static PARED_INLINE I negate_if_negative(I magnitude, I sign) { return _mm256_sign_epi32(magnitude, sign); }
  static PARED_INLINE M gt(I a, I b) { return _mm256_cmpgt_epi32(a, b); }
  static PARED_INLINE M eq(I a, I b) { return _mm256_cmpeq_epi32(a, b); }
  static PARED_INLINE M or_(M a, M b) { return _mm256_or_si256(a, b); }
  static PARED_INLINE M and_(M a, M b) { return _mm256_and_si256(a, b); }
  static PARED_INLINE M and_not(M a, M b) { return _mm256_andnot_si256(b, a); }
  static PARED_INLINE M and_gt(M m, I a, I b) { return _mm256_and_si256(m, _mm256_cmpgt_epi32(a, b)); }
  static PARED_INLINE I max(I a, I b) { return _mm256_max_epi32(a, b); }
  static PARED_INLINE I blend(M m, I no, I yes) { return _mm256_blendv_epi8(no, yes, m); }
  static PARED_INLINE I count(I acc, M m) { return _mm256_sub_epi32(acc, m); }
  static PARED_INLINE int64_t total(I acc) {
    alignas(32) int32_t lane[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), acc);
    int64_t sum = 0;
    for (int i = 0; i < 8; ++i) sum += lane[i];
    return sum;
  }
  static PARED_INLINE int32_t greatest(I v) {
    alignas(32) int32_t lane[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), v);
    int32_t most = lane[0];
    for (int i = 1; i < 8; ++i) most = lane[i] > most ? lane[i] : most;
    return most;
  }
  static PARED_INLINE uint64_t bits(M m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(m)));
  }
  static PARED_INLINE int compress(int32_t* out, M m, I v) {
    const uint64_t b = bits(m);
    const __m256i lanes =
        _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kCompressTable.lanes[b])));
    store(out, _mm256_permutevar8x32_epi32(v, lanes));
    return __builtin_popcount(static_cast<unsigned>(b));
  }
  static PARED_INLINE void store_mask(uint8_t* p, uint64_t bits) {  // 32 bits to 32 bytes
    const __m256i spread = _mm256_shuffle_epi8(
        _mm256_set1_epi32(static_cast<int>(bits)),
        _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_and_si256(set, _mm256_set1_epi8(1)));
  }
  static PARED_INLINE I permute(I v, I lanes) { return _mm256_permutevar8x32_epi32(v, lanes); }
  static PARED_INLINE M as_mask(I lanes_all_ones) { return lanes_all_ones; }
};
#endif

#if defined(__AVX512F__)
struct Avx512Select {
  static constexpr int width = 16;
  using Key = int32_t;
  static constexpr Key nan = kSelectNan;
  template <DType T>
  static constexpr Key inf = kSelectInf;
  static constexpr int mask_vectors = 4, bits_per_lane = 1;
  using I = __m512i;
  using M = __mmask16;
  static PARED_INLINE I set1(int32_t v) { return _mm512_set1_epi32(v); }
  template <DType T>
  static PARED_INLINE I load(const void* p, int64_t i) {
    if constexpr (T == DType::f32) {
      return _mm512_loadu_si512(static_cast<const float*>(p) + i);
    } else {
      const __m256i h =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + i));
      if constexpr (T == DType::bf16) return _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
      return _mm512_castps_si512(_mm512_cvtph_ps(h));
    }
  }
  static PARED_INLINE I load_keys(const int32_t* p) { return _mm512_loadu_si512(p); }
  static PARED_INLINE void store(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static PARED_INLINE void store_float(float* p, I v) { _mm512_storeu_ps(p, _mm512_castsi512_ps(v)); }
  static PARED_INLINE I load_float(const float* p) { return _mm512_castps_si512(_mm512_loadu_ps(p)); }
  static PARED_INLINE I mul(I a, I b) {
    return _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
  }
  static PARED_INLINE I add_float(I a, I b) {
    return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
  }
  static PARED_INLINE I magnitude(I v) { return _mm512_and_si512(v, _mm512_set1_epi32(0x7fffffff)); }
  static PARED_INLINE I negate_if_negative(I magnitude, I sign) {
    return _mm512_mask_sub_epi32(magnitude, _mm512_movepi32_mask(sign), _mm512_setzero_si512(), magnitude);
  }
  static PARED_INLINE M gt(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }
  static PARED_INLINE M eq(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static PARED_INLINE M or_(M a, M b) { return _kor_mask16(a, b); }
  static PARED_INLINE M and_(M a, M b) { return _kand_mask16(a, b); }
  static PARED_INLINE M and_not(M a, M b) { return _kandn_mask16(b, a); }
  static PARED_INLINE M and_gt(M m, I a, I b) { return _mm512_mask_cmpgt_epi32_mask(m, a, b); }
  static PARED_INLINE I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static PARED_INLINE I blend(M m, I no, I yes) { return _mm512_mask_mov_epi32(no, m, yes); }
  static PARED_INLINE I count(I acc, M m) {
    return _mm512_mask_sub_epi32(acc, m, acc, _mm512_set1_epi32(-1));
  }
  static PARED_INLINE int64_t total(I acc) {
    alignas(64) int32_t lane[16];
    _mm512_store_si512(lane, acc);
    int64_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += lane[i];
    return sum;
  }
  static PARED_INLINE int32_t greatest(I v) { return _mm512_reduce_max_epi32(v); }
  static PARED_INLINE uint64_t bits(M m) { return _cvtmask16_u32(m); }
  // Compress in the register, then store all of it: the store form of vpcompressd is microcode on Zen 4.
  static PARED_INLINE int compress(int32_t* out, M m, I v) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(m, v));
    return __builtin_popcount(_cvtmask16_u32(m));
  }
  static PARED_INLINE void store_mask(uint8_t* p, uint64_t bits) {  // 64 bits to 64 bytes
    _mm512_storeu_si512(p, _mm512_maskz_set1_epi8(_cvtu64_mask64(bits), 1));
  }
  static PARED_INLINE I permute(I v, I lanes) { return _mm512_permutexvar_epi32(lanes, v); }
  static PARED_INLINE M as_mask(I lanes_all_ones) { return _mm512_movepi32_mask(lanes_all_ones); }
};
#endif

#if defined(__AVX512BW__)
// 16-bit floats as they are: their bits order as those of the float32 that they stand for.
struct Avx512Narrow {
  static constexpr int width = 32;
  using Key = int16_t;
  static constexpr Key nan = -0x7fff;
  template <DType T>
  static constexpr Key inf = T == DType::bf16 ? 0x7f80 : 0x7c00;
  static constexpr int mask_vectors = 2, bits_per_lane = 1;
  using I = __m512i;
  using M = __mmask32;
  static PARED_INLINE I set1(int16_t v) { return _mm512_set1_epi16(v); }
  template <DType T>
  static PARED_INLINE I load(const void* p, int64_t i) {
    return _mm512_loadu_si512(static_cast<const uint16_t*>(p) + i);
  }
  static PARED_INLINE I magnitude(I v) { return _mm512_and_si512(v, set1(0x7fff)); }
  static PARED_INLINE I negate_if_negative(I magnitude, I sign) {
    return _mm512_mask_sub_epi16(magnitude, _mm512_movepi16_mask(sign), _mm512_setzero_si512(), magnitude);
  }
  static PARED_INLINE M gt(I a, I b) { return _mm512_cmpgt_epi16_mask(a, b); }
  static PARED_INLINE M eq(I a, I b) { return _mm512_cmpeq_epi16_mask(a, b); }
  static PARED_INLINE M and_gt(M m, I a, I b) { return _mm512_mask_cmpgt_epi16_mask(m, a, b); }
  static PARED_INLINE I max(I a, I b) { return _mm512_max_epi16(a, b); }
  static PARED_INLINE I blend(M m, I no, I yes) { return _mm512_mask_mov_epi16(no, m, yes); }
  // Of less than 2^16 vectors: a run has less.
  static PARED_INLINE I count(I acc, M m) { return _mm512_mask_sub_epi16(acc, m, acc, set1(-1)); }
  static PARED_INLINE int64_t total(I acc) {
    const I even = _mm512_and_si512(acc, _mm512_set1_epi32(0xffff)), odd = _mm512_srli_epi32(acc, 16);
    return _mm512_reduce_add_epi32(_mm512_add_epi32(even, odd));
  }
  static PARED_INLINE Key greatest(I v) {
    const I even = _mm512_srai_epi32(_mm512_slli_epi32(v, 16), 16), odd = _mm512_srai_epi32(v, 16);
    return static_cast<Key>(_mm512_reduce_max_epi32(_mm512_max_epi32(even, odd)));
  }
  static PARED_INLINE uint64_t bits(M m) { return _cvtmask32_u32(m); }
  static PARED_INLINE void store_mask(uint8_t* p, uint64_t bits) { Avx512Select::store_mask(p, bits); }
#if defined(__AVX512VBMI2__)
  static PARED_INLINE int compress(Key* out, M m, I v) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(m, v));
    return __builtin_popcount(_cvtmask32_u32(m));
  }
  // n keys of elements of type T to int32 keys in the same memory: from the last on, so that none is written
  // over before it is read. Up to 15 beyond the last are written.
  template <DType T>
  static PARED_INLINE void widen(int32_t* keys, int64_t n) {
    const char* from = reinterpret_cast<const char*>(keys);
    for (int64_t i = (n - 1) / 16 * 16; n > 0 && i >= 0; i -= 16) {
      const __m512i k =
          _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 2 * i)));
      __m512i wide = _mm512_slli_epi32(k, 16);
      if constexpr (T == DType::f16) {
        const __m512i size = _mm512_abs_epi32(k);
        wide = _mm512_castps_si512(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(size)));
        wide = Avx512Select::negate_if_negative(wide, k);
      }
      const __mmask16 nans = _mm512_cmpeq_epi32_mask(k, _mm512_set1_epi32(nan));
      _mm512_storeu_si512(keys + i, Avx512Select::blend(nans, wide, Avx512Select::set1(kSelectNan)));
    }
  }
#endif
};
#endif

#if defined(__aarch64__)
// For each mask of four lanes the bytes of those that are set, packed to the front: of 32 and of 16 bits.
struct CompressFour {
  uint8_t lanes[16][16];
  uint8_t words[16][8];
};
constexpr CompressFour make_compress_four() {
  CompressFour t{};
  for (int m = 0; m < 16; ++m)
    for (int lane = 0, n = 0; lane < 4; ++lane) {
      if (!(m >> lane & 1)) continue;
      for (int b = 0; b < 4; ++b) t.lanes[m][4 * n + b] = static_cast<uint8_t>(4 * lane + b);
      for (int b = 0; b < 2; ++b) t.words[m][2 * n + b] = static_cast<uint8_t>(2 * lane + b);
      ++n;
    }
  return t;
}
alignas(64) constexpr CompressFour kCompressFour = make_compress_four();

// Sixteen keys, so that comparisons become masks of bytes once for four registers.
struct NeonSelect {
  static constexpr int width = 16;
  using Key = int32_t;
  static constexpr Key nan = kSelectNan;
  template <DType T>
  static constexpr Key inf = kSelectInf;
  static constexpr int mask_vectors = 1, bits_per_lane = 4;
  struct I {
    int32x4_t v[4];
  };
  struct M {
    uint32x4_t v[4];
  };
  template <class R = I, class F>
  static PARED_INLINE R each(F f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  static PARED_INLINE float32x4_t as_float(int32x4_t v) { return vreinterpretq_f32_s32(v); }
  static PARED_INLINE I set1(int32_t v) {
    return each([&](int) { return vdupq_n_s32(v); });
  }
  template <DType T>
  static PARED_INLINE I load(const void* p, int64_t i) {
    if constexpr (T == DType::f32) {
      const float* const f = static_cast<const float*>(p) + i;
      return each([&](int r) { return vreinterpretq_s32_f32(vld1q_f32(f + 4 * r)); });
    } else {
      const uint16_t* const h = static_cast<const uint16_t*>(p) + i;
      return each([&](int r) {
        const uint16x4_t four = vld1_u16(h + 4 * r);
        return T == DType::bf16 ? vreinterpretq_s32_u32(vshll_n_u16(four, 16))
                                : vreinterpretq_s32_f32(vcvt_f32_f16(vreinterpret_f16_u16(four)));
      });
    }
  }
  static PARED_INLINE I load_keys(const int32_t* p) {
    return each([&](int r) { return vld1q_s32(p + 4 * r); });
  }
  static PARED_INLINE void store(int32_t* p, I a) {
    for (int r = 0; r < 4; ++r) vst1q_s32(p + 4 * r, a.v[r]);
  }
  static PARED_INLINE void store_float(float* p, I a) {
    for (int r = 0; r < 4; ++r) vst1q_f32(p + 4 * r, as_float(a.v[r]));
  }
  static PARED_INLINE I load_float(const float* p) { return load<DType::f32>(p, 0); }
  static PARED_INLINE I mul(I a, I b) {
    return each([&](int r) { return vreinterpretq_s32_f32(vmulq_f32(as_float(a.v[r]), as_float(b.v[r]))); });
  }
  static PARED_INLINE I add_float(I a, I b) {
    return each([&](int r) { return vreinterpretq_s32_f32(vaddq_f32(as_float(a.v[r]), as_float(b.v[r]))); });
  }
  static PARED_INLINE I magnitude(I a) {
    return each([&](int r) { return vandq_s32(a.v[r], vdupq_n_s32(0x7fffffff)); });
  }
  static PARED_INLINE I negate_if_negative(I magnitude, I sign) {
    return each(
        [&](int r) { return vbslq_s32(vcltzq_s32(sign.v[r]), vnegq_s32(magnitude.v[r]), magnitude.v[r]); });
  }
  static PARED_INLINE M gt(I a, I b) {
    return each<M>([&](int r) { return vcgtq_s32(a.v[r], b.v[r]); });
  }
  static PARED_INLINE M eq(I a, I b) {
    return each<M>([&](int r) { return vceqq_s32(a.v[r], b.v[r]); });
  }
  static PARED_INLINE M and_gt(M m, I a, I b) {
    return each<M>([&](int r) { return vandq_u32(m.v[r], vcgtq_s32(a.v[r], b.v[r])); });
  }
  static PARED_INLINE I max(I a, I b) {
    return each([&](int r) { return vmaxq_s32(a.v[r], b.v[r]); });
  }
  static PARED_INLINE I blend(M m, I no, I yes) {
    return each([&](int r) { return vbslq_s32(m.v[r], yes.v[r], no.v[r]); });
  }
  static PARED_INLINE I count(I acc, M m) {
    return each([&](int r) { return vsubq_s32(acc.v[r], vreinterpretq_s32_u32(m.v[r])); });
  }
  static PARED_INLINE int64_t total(I acc) {
    return vaddlvq_s32(vaddq_s32(vaddq_s32(acc.v[0], acc.v[1]), vaddq_s32(acc.v[2], acc.v[3])));
  }
  static PARED_INLINE int32_t greatest(I a) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.v[0], a.v[1]), vmaxq_s32(a.v[2], a.v[3])));
  }
  // A byte a lane, all ones or zero.
  static PARED_INLINE uint8x16_t bytes(M m) {
    const auto half = [&](int r) {
      return vuzp1q_u16(vreinterpretq_u16_u32(m.v[r]), vreinterpretq_u16_u32(m.v[r + 1]));
    };
    return vuzp1q_u8(vreinterpretq_u8_u16(half(0)), vreinterpretq_u8_u16(half(2)));
  }
  // There is no instruction that takes a bit of each lane; a narrowing shift takes four bits of each byte.
  static PARED_INLINE uint64_t nibbles(uint8x16_t bytes) {
    const uint8x8_t four_of_each = vshrn_n_u16(vreinterpretq_u16_u8(bytes), 4);
    return vget_lane_u64(vreinterpret_u64_u8(four_of_each), 0) & 0x1111111111111111u;
  }
  static PARED_INLINE uint64_t bits(M m) { return nibbles(bytes(m)); }
  static PARED_INLINE void store_mask(uint8_t* p, uint64_t bits) {
    const uint8x8_t even = vreinterpret_u8_u64(vdup_n_u64(bits));
    const uint8x16_t all =
        vcombine_u8(vzip1_u8(even, vshr_n_u8(even, 4)), vzip2_u8(even, vshr_n_u8(even, 4)));
    vst1q_u8(p, vandq_u8(all, vdupq_n_u8(1)));
  }
  // For each four lanes a byte: their mask, and above it how many are set.
  static PARED_INLINE uint32_t fours(uint8x16_t bytes) {
    constexpr uint64_t kEight = 0x1814121118141211u;  // the lane's bit, and one
    const uint8x16_t lanes = vandq_u8(bytes, vreinterpretq_u8_u64(vdupq_n_u64(kEight)));
    const uint8x16_t twos = vpaddq_u8(lanes, lanes);
    return vgetq_lane_u32(vreinterpretq_u32_u8(vpaddq_u8(twos, twos)), 0);
  }
  static PARED_INLINE int compress(int32_t* out, M m, I a) {
    const uint32_t each_four = fours(bytes(m));
    int32_t* to = out;
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const uint8x16_t lanes = vld1q_u8(kCompressFour.lanes[each_four >> (8 * r) & 15]);
      vst1q_u8(reinterpret_cast<uint8_t*>(to), vqtbl1q_u8(vreinterpretq_u8_s32(a.v[r]), lanes));
      to += each_four >> (8 * r + 4) & 7;
    }
    return static_cast<int>(to - out);
  }
  // The lane `by` further on among each `m` lanes, and from a group's end at its beginning.
  template <int m, int by>
  static PARED_INLINE I rotate(I a) {
    if constexpr (m == 2) {
      return each([&](int r) { return vrev64q_s32(a.v[r]); });
    } else {
      constexpr int registers = m / 4;
      return each([&](int r) {
        const int first = r / registers * registers, in = r - first + by / 4;
        return vextq_s32(a.v[first + in % registers], a.v[first + (in + 1) % registers], by % 4);
      });
    }
  }
  // -1 in the lanes that `rotate` gives a lane from before them.
  template <int m, int by>
  static PARED_INLINE I wrapped() {
    return each([&](int r) {
      const auto lane = [&](int l) { return (4 * r + l) % m >= m - by ? -1 : 0; };
      return int32x4_t{lane(0), lane(1), lane(2), lane(3)};
    });
  }
  static PARED_INLINE I add(I a, I b) {
    return each([&](int r) { return vaddq_s32(a.v[r], b.v[r]); });
  }
};

// 16-bit floats as they are: their bits order as those of the float32 that they stand for.
struct NeonNarrow {
  static constexpr int width = 16;
  using Key = int16_t;
  static constexpr Key nan = -0x7fff;
  template <DType T>
  static constexpr Key inf = T == DType::bf16 ? 0x7f80 : 0x7c00;
  static constexpr int mask_vectors = 1, bits_per_lane = 4;
  struct I {
    int16x8_t v[2];
  };
  struct M {
    uint16x8_t v[2];
  };
  template <class R = I, class F>
  static PARED_INLINE R each(F f) {
    return {{f(0), f(1)}};
  }
  static PARED_INLINE I set1(int16_t v) {
    return each([&](int) { return vdupq_n_s16(v); });
  }
  template <DType T>
  static PARED_INLINE I load(const void* p, int64_t i) {
    const int16_t* const h = static_cast<const int16_t*>(p) + i;
    return each([&](int r) { return vld1q_s16(h + 8 * r); });
  }
  static PARED_INLINE I magnitude(I a) {
    return each([&](int r) { return vandq_s16(a.v[r], vdupq_n_s16(0x7fff)); });
  }
  static PARED_INLINE I negate_if_negative(I magnitude, I sign) {
    return each(
        [&](int r) { return vbslq_s16(vcltzq_s16(sign.v[r]), vnegq_s16(magnitude.v[r]), magnitude.v[r]); });
  }
  static PARED_INLINE M gt(I a, I b) {
    return each<M>([&](int r) { return vcgtq_s16(a.v[r], b.v[r]); });
  }
  static PARED_INLINE M eq(I a, I b) {
    return each<M>([&](int r) { return vceqq_s16(a.v[r], b.v[r]); });
  }
  static PARED_INLINE M and_gt(M m, I a, I b) {
    return each<M>([&](int r) { return vandq_u16(m.v[r], vcgtq_s16(a.v[r], b.v[r])); });
  }
  static PARED_INLINE I max(I a, I b) {
    return each([&](int r) { return vmaxq_s16(a.v[r], b.v[r]); });
  }
  static PARED_INLINE I blend(M m, I no, I yes) {
    return each([&](int r) { return vbslq_s16(m.v[r], yes.v[r], no.v[r]); });
  }
  // Of less than 2^16 vectors: a run has less.
  static PARED_INLINE I count(I acc, M m) {
    return each([&](int r) { return vsubq_s16(acc.v[r], vreinterpretq_s16_u16(m.v[r])); });
  }
  static PARED_INLINE int64_t total(I acc) {
    return vaddlvq_u16(vreinterpretq_u16_s16(acc.v[0])) + vaddlvq_u16(vreinterpretq_u16_s16(acc.v[1]));
  }
  static PARED_INLINE Key greatest(I a) { return vmaxvq_s16(vmaxq_s16(a.v[0], a.v[1])); }
  static PARED_INLINE uint8x16_t bytes(M m) {
    return vuzp1q_u8(vreinterpretq_u8_u16(m.v[0]), vreinterpretq_u8_u16(m.v[1]));
  }
  static PARED_INLINE uint64_t bits(M m) { return NeonSelect::nibbles(bytes(m)); }
  static PARED_INLINE void store_mask(uint8_t* p, uint64_t bits) { NeonSelect::store_mask(p, bits); }
  static PARED_INLINE int compress(Key* out, M m, I a) {
    const uint32_t each_four = NeonSelect::fours(bytes(m));
    Key* to = out;
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const int16x4_t four = r % 2 ? vget_high_s16(a.v[r / 2]) : vget_low_s16(a.v[r / 2]);
      const uint8x8_t lanes = vld1_u8(kCompressFour.words[each_four >> (8 * r) & 15]);
      vst1_u8(reinterpret_cast<uint8_t*>(to), vtbl1_u8(vreinterpret_u8_s16(four), lanes));
      to += each_four >> (8 * r + 4) & 7;
    }
    return static_cast<int>(to - out);
  }
  // n keys of elements of type T to int32 keys in the same memory: from the last on, so that none is written
  // over before it is read. Up to 7 beyond the last are written.
  template <DType T>
  static PARED_INLINE void widen(int32_t* keys, int64_t n) {
    const char* from = reinterpret_cast<const char*>(keys);
    for (int64_t i = (n - 1) / 8 * 8; n > 0 && i >= 0; i -= 8) {
      const int16x8_t k = vreinterpretq_s16_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(from + 2 * i)));
      const auto four = [](int16x4_t k) {
        int32x4_t wide = vshll_n_s16(k, 16);
        if constexpr (T == DType::f16) {
          wide = vreinterpretq_s32_f32(vcvt_f32_f16(vreinterpret_f16_s16(vabs_s16(k))));
          wide = vbslq_s32(vcltzq_s32(vmovl_s16(k)), vnegq_s32(wide), wide);
        }
        const uint32x4_t nans = vceqq_s32(vmovl_s16(k), vdupq_n_s32(nan));
        return vbslq_s32(nans, vdupq_n_s32(kSelectNan), wide);
      };
      vst1q_s32(keys + i, four(vget_low_s16(k)));
      vst1q_s32(keys + i + 4, four(vget_high_s16(k)));
    }
  }
};
#endif

// The vectors of 16-bit keys that go with S, if there are any, and whether they can gather keys.
template <class S>
struct NarrowFor {
  static constexpr bool exists = false, gathers = false;
};
#if defined(__AVX512BW__)
template <>
struct NarrowFor<Avx512Select> {
  using Type = Avx512Narrow;
  static constexpr bool exists = true;
#if defined(__AVX512VBMI2__)
  static constexpr bool gathers = true;
#else
  static constexpr bool gathers = false;
#endif
};
#endif
#if defined(__aarch64__)
template <>
struct NarrowFor<NeonSelect> {
  using Type = NeonNarrow;
  static constexpr bool exists = true, gathers = false;
};
struct NeonSelectAndNarrow : NeonSelect {};
template <>
struct NarrowFor<NeonSelectAndNarrow> {
  using Type = NeonNarrow;
  static constexpr bool exists = true, gathers = true;
};
#endif

// ---- keys

constexpr int sizeof_dtype(DType t) { return t == DType::f32 ? 4 : 2; }

// Two pages: far enough that a page's first lines are on their way when the loop gets there.
constexpr int kAhead = 8192;
template <int bytes>
PARED_INLINE void prefetch_stream(const char* p) {
  for (int b = 0; b < bytes; b += 64) __builtin_prefetch(p + kAhead + b);
}

template <SelectKey K, DType T, DType G>
struct Keyed {
  static constexpr SelectKey kind = K;
  static constexpr DType dtype = T;
  static constexpr int w_size = K == SelectKey::raw ? 4 : sizeof_dtype(T), g_size = sizeof_dtype(G);
  // Whether keys can stay 16 bits.
  static constexpr bool narrow = w_size == 2 && (K == SelectKey::abs || K == SelectKey::identity);
  // The score of element i: bits of a float32. Its sign is meaningful for `identity` alone.
  template <class S>
  static PARED_INLINE typename S::I score(const SelectRun& r, int64_t i) {
    const typename S::I w = S::template load<T>(r.w, i);
    if constexpr (K == SelectKey::identity) return w;
    if constexpr (K == SelectKey::square) return S::magnitude(S::mul(w, w));  // a NaN's sign is kept
    if constexpr (K == SelectKey::product) return S::magnitude(S::mul(w, S::template load<G>(r.g, i)));
    return S::magnitude(w);
  }
  // The key of element i; counts NaNs.
  template <class S>
  static PARED_INLINE typename S::I key(const SelectRun& r, int64_t i, typename S::I& nans) {
    if constexpr (K == SelectKey::raw) {
      return S::load_keys(static_cast<const int32_t*>(r.w) + i);
    } else {
      const typename S::I s = score<S>(r, i), magnitude = S::magnitude(s);
      const typename S::M nan = S::gt(magnitude, S::set1(S::template inf<T>));
      nans = S::count(nans, nan);
      return S::blend(nan, signed_key<S>(s, magnitude), S::set1(S::nan));
    }
  }
  // The key where there is no NaN; `greatest` tells afterwards whether that was so.
  template <class S>
  static PARED_INLINE typename S::I quick_key(const SelectRun& r, int64_t i, typename S::I& greatest) {
    if constexpr (K == SelectKey::raw) {
      return S::load_keys(static_cast<const int32_t*>(r.w) + i);
    } else {
      const typename S::I s = score<S>(r, i), magnitude = S::magnitude(s);
      greatest = S::max(greatest, magnitude);
      return signed_key<S>(s, magnitude);
    }
  }
  template <class S>
  static PARED_INLINE typename S::I signed_key(typename S::I score, typename S::I magnitude) {
    return K == SelectKey::identity ? S::negate_if_negative(magnitude, score) : magnitude;
  }
  // Asks for the elements that a loop over `count` elements at a time meets kAhead bytes later.
  template <int count>
  static PARED_INLINE void prefetch(const SelectRun& r, int64_t i) {
    if constexpr (K != SelectKey::raw) {  // raw keys are scratch memory, in cache
      prefetch_stream<count * sizeof_dtype(T)>(static_cast<const char*>(r.w) + i * sizeof_dtype(T));
      if constexpr (K == SelectKey::product)
        prefetch_stream<count * sizeof_dtype(G)>(static_cast<const char*>(r.g) + i * sizeof_dtype(G));
    }
  }
};

// Calls f with the Keyed that a run asks for.
template <DType T, class F>
PARED_INLINE auto with_key_of(const SelectRun& r, F f) {
  switch (r.key) {
    case SelectKey::identity: return f(Keyed<SelectKey::identity, T, T>{});
    case SelectKey::square: return f(Keyed<SelectKey::square, T, T>{});
    case SelectKey::product:
      return r.g_dtype == T ? f(Keyed<SelectKey::product, T, T>{})
                            : f(Keyed<SelectKey::product, T, DType::f32>{});
    default: return f(Keyed<SelectKey::abs, T, T>{});
  }
}
template <class F>
PARED_INLINE auto with_key(const SelectRun& r, F f) {
  if (r.key == SelectKey::raw) return f(Keyed<SelectKey::raw, DType::f32, DType::f32>{});
  switch (r.dtype) {
    case DType::f16: return with_key_of<DType::f16>(r, f);
    case DType::bf16: return with_key_of<DType::bf16>(r, f);
    default: return with_key_of<DType::f32>(r, f);
  }
}

// ---- kernels: the vector loop, then the same loop one by one for the rest

template <class S>
int64_t keys_of_run(const SelectRun& run, int32_t* out) {
  return with_key(run, [&](auto keyed) {
    using K = decltype(keyed);
    typename S::I nans = S::set1(0);
    int64_t i = 0;
    for (; i + S::width <= run.n; i += S::width) S::store(out + i, K::template key<S>(run, i, nans));
    int32_t rest = 0;
    for (; i < run.n; ++i) out[i] = K::template key<ScalarSelect>(run, i, rest);
    return S::total(nans) + rest;
  });
}

// A bracket in a vector type's keys. An int32 bound that no 16-bit key equals lies between two of them.
template <class S>
struct Bounds {
  typename S::Key lo, hi;               // inside: lo < key < hi
  typename S::Key above, at_lo, at_hi;  // above: key > this; ends: those equal to these

  explicit Bounds(const SelectBracketArgs& a) : lo(a.lo), hi(a.hi), above(a.hi), at_lo(a.lo), at_hi(a.hi) {}
  Bounds() = default;
};

// VECTORS vectors at a time: their masks are ready when the compress stores, whose addresses depend on each
// other, begin.
template <class S, class K, int VECTORS>
PARED_INLINE typename S::Key* bracket_with_ends(const SelectRun& run, const Bounds<S>& b, int64_t begin,
                                                int64_t end, typename S::Key* out, SelectCounts& counts) {
  using I = typename S::I;
  constexpr int64_t step = S::width * VECTORS;
  const I lo = S::set1(b.lo), hi = S::set1(b.hi);
  I above = S::set1(0), at_hi = S::set1(0), at_lo = S::set1(0), nans = S::set1(0);
  for (int64_t i = begin; i + step <= end; i += step) {
    K::template prefetch<step>(run, i);
    I key[VECTORS];
    typename S::M inside[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      key[v] = K::template key<S>(run, i + v * S::width, nans);
      above = S::count(above, S::gt(key[v], S::set1(b.above)));
      at_hi = S::count(at_hi, S::eq(key[v], S::set1(b.at_hi)));
      at_lo = S::count(at_lo, S::eq(key[v], S::set1(b.at_lo)));
      inside[v] = S::and_gt(S::gt(key[v], lo), hi, key[v]);
    }
    for (int v = 0; v < VECTORS; ++v) out += S::compress(out, inside[v], key[v]);
  }
  counts.above += S::total(above);
  counts.at_hi += S::total(at_hi);
  counts.at_lo += S::total(at_lo);
  counts.nans += S::total(nans);
  return out;
}

// Without counts of the ends, and blind to NaNs beyond telling that there are some.
template <class S, class K, int VECTORS>
PARED_INLINE typename S::Key* bracket_quick(const SelectRun& run, const Bounds<S>& b, int64_t begin,
                                            int64_t end, typename S::Key* out, int64_t& above_lo, bool& nan) {
  using I = typename S::I;
  constexpr int64_t step = S::width * VECTORS;
  const I lo = S::set1(b.lo), hi = S::set1(b.hi);
  I over = S::set1(0), most = S::set1(0);
  for (int64_t i = begin; i + step <= end; i += step) {
    K::template prefetch<step>(run, i);
    I key[VECTORS];
    typename S::M inside[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      key[v] = K::template quick_key<S>(run, i + v * S::width, most);
      const typename S::M g = S::gt(key[v], lo);
      over = S::count(over, g);
      inside[v] = S::and_gt(g, hi, key[v]);
    }
    for (int v = 0; v < VECTORS; ++v) out += S::compress(out, inside[v], key[v]);
  }
  above_lo += S::total(over);
  nan |= S::greatest(most) > S::template inf<K::dtype>;
  return out;
}

// The 16-bit key of the number, or NaN, that an int32 key stands for; `up` says where to go from one that no
// 16-bit number has.
template <DType T>
int32_t narrow_key(int32_t key, bool up) {
  // Keys in order: those of negative numbers are the negated magnitudes.
  const auto wide = [](int32_t k) {
    if (k == -0x7fff) return kSelectNan;
    const auto h = static_cast<uint16_t>(k < 0 ? -k : k);
    const auto bits = static_cast<int32_t>(float_bits(T == DType::bf16 ? bf16_to_float(h) : f16_to_float(h)));
    return k < 0 ? -bits : bits;
  };
  constexpr int32_t inf = T == DType::bf16 ? 0x7f80 : 0x7c00;
  if (key > kSelectInf) return 0x7fff;       // nor is the magnitude of a NaN above that
  int32_t below = -0x8000, above = inf + 1;  // wide(below) <= key < wide(above), were there such keys
  if (key >= kSelectNan) below = -0x7fff;
  if (below == -0x7fff && key >= wide(-inf)) {
    below = -inf;
    while (above - below > 1) {
      const int32_t middle = below + (above - below) / 2;
      if (wide(middle) <= key) below = middle;
      else above = middle;
    }
  } else {
    above = below == -0x7fff ? -inf : -0x7fff;
  }
  if (below != -0x8000 && wide(below) == key) return below;
  return up ? above : below;
}

template <class S, DType T>
Bounds<S> narrow_bounds(const SelectBracketArgs& a) {
  using Key = typename S::Key;
  const int32_t lo = narrow_key<T>(a.lo, false), hi = narrow_key<T>(a.hi, true),
                above = narrow_key<T>(a.hi, false);
  constexpr Key none = -0x8000;  // no element has this key
  Bounds<S> b;
  b.lo = static_cast<Key>(lo);
  b.hi = static_cast<Key>(hi);
  b.above = static_cast<Key>(above);
  b.at_lo = narrow_key<T>(a.lo, true) == lo ? b.lo : none;
  b.at_hi = hi == above ? b.hi : none;
  return b;
}

// Below this the bounds take longer than the narrow vectors save.
constexpr int64_t kNarrowRun = 1 << 12;

// A run in narrow vectors as far as those go; returns how far. `loop(vectors, bounds, n, out)` takes its
// first n elements and returns the end of what it wrote.
template <class S, class K, class F>
PARED_INLINE int64_t in_narrow_vectors(const SelectBracketArgs& a, int32_t*& out, F loop) {
  if constexpr (NarrowFor<S>::gathers && K::narrow) {
    using N = typename NarrowFor<S>::Type;
    constexpr int64_t step = N::width * S::mask_vectors;
    const int64_t whole = a.run.n / step * step;
    auto* const keys = reinterpret_cast<typename N::Key*>(out);
    const int64_t found = loop(N{}, narrow_bounds<N, K::dtype>(a), whole, keys) - keys;
    N::template widen<K::dtype>(out, found);
    out += found;
    return whole;
  }
  return 0;
}

template <class S, class K>
SelectCounts bracket_keyed(const SelectBracketArgs& a) {
  constexpr int many = S::mask_vectors;
  SelectCounts counts = {0, 0, 0, 0, 0};
  const Bounds<S> b(a);
  const Bounds<ScalarSelect> one(a);
  const SelectRun& run = a.run;
  const int64_t n = run.n, groups = n / (S::width * many) * (S::width * many),
                whole = n / S::width * S::width;
  if (!a.ends) {
    int64_t above_lo = 0;
    bool nan = false;
    int32_t* out = a.out;
    const int64_t begun =
        in_narrow_vectors<S, K>(a, out, [&](auto narrow, const auto& bounds, int64_t most, auto* keys) {
          return bracket_quick<decltype(narrow), K, many>(run, bounds, 0, most, keys, above_lo, nan);
        });
    out = bracket_quick<S, K, many>(run, b, begun, groups, out, above_lo, nan);
    out = bracket_quick<S, K, 1>(run, b, groups, whole, out, above_lo, nan);
    out = bracket_quick<ScalarSelect, K, 1>(run, one, whole, n, out, above_lo, nan);
    if (!nan) {
      counts.inside = out - a.out;
      counts.above = above_lo - counts.inside;
      return counts;
    }
  }
  int32_t* out = a.out;
  const int64_t begun =
      in_narrow_vectors<S, K>(a, out, [&](auto narrow, const auto& bounds, int64_t most, auto* keys) {
        return bracket_with_ends<decltype(narrow), K, many>(run, bounds, 0, most, keys, counts);
      });
  out = bracket_with_ends<S, K, many>(run, b, begun, groups, out, counts);
  out = bracket_with_ends<S, K, 1>(run, b, groups, whole, out, counts);
  out = bracket_with_ends<ScalarSelect, K, 1>(run, one, whole, n, out, counts);
  counts.inside = out - a.out;
  if (!a.ends) {
    counts.above += counts.at_hi;
    counts.at_hi = counts.at_lo = 0;
  } else if (a.lo == a.hi) {
    counts.at_lo = 0;
  }
  return counts;
}

template <class S>
SelectCounts bracket_run(const SelectBracketArgs& a) {
  return with_key(a.run, [&](auto keyed) { return bracket_keyed<S, decltype(keyed)>(a); });
}

// The runs that narrow vectors are for, and no other.
inline bool has_narrow_keys(const SelectRun& r) {
  return r.n >= kNarrowRun && r.dtype != DType::f32 &&
         (r.key == SelectKey::abs || r.key == SelectKey::identity);
}
template <class S>
SelectCounts bracket_narrow_run(const SelectBracketArgs& a) {
  const bool abs = a.run.key == SelectKey::abs;
  if (a.run.dtype == DType::bf16)
    return abs ? bracket_keyed<S, Keyed<SelectKey::abs, DType::bf16, DType::bf16>>(a)
               : bracket_keyed<S, Keyed<SelectKey::identity, DType::bf16, DType::bf16>>(a);
  return abs ? bracket_keyed<S, Keyed<SelectKey::abs, DType::f16, DType::f16>>(a)
             : bracket_keyed<S, Keyed<SelectKey::identity, DType::f16, DType::f16>>(a);
}

template <class S>
int32_t small_select(const int32_t* keys, int32_t n, int32_t k) {
  // Padded to whole steps with the key that is below all others and counts nowhere.
  constexpr int step = S::width * S::mask_vectors;
  alignas(64) int32_t padded[kSelectSmall];
  int32_t whole = 0;
  for (; whole < n; ++whole) padded[whole] = keys[whole];
  for (; whole % step != 0; ++whole) padded[whole] = kSelectNone;
  for (int32_t i = 0; i < n; ++i) {
    const typename S::I pivot = S::set1(padded[i]);
    int32_t above = 0, below = 0;
    if constexpr (S::bits_per_lane == 1) {
      for (int32_t j = 0; j < whole; j += step) {
        uint64_t over = 0, under = 0;
        for (int v = 0; v < S::mask_vectors; ++v) {
          const typename S::I key = S::load_keys(padded + j + v * S::width);
          over |= S::bits(S::gt(key, pivot)) << (v * S::width);
          under |= S::bits(S::gt(pivot, key)) << (v * S::width);
        }
        above += __builtin_popcountll(over);
        below += __builtin_popcountll(under);
      }
    } else {  // lanes are counted more easily than bits
      typename S::I over = S::set1(0), under = S::set1(0);
      for (int32_t j = 0; j < whole; j += step) {
        const typename S::I key = S::load_keys(padded + j);
        over = S::count(over, S::gt(key, pivot));
        under = S::count(under, S::gt(pivot, key));
      }
      above = static_cast<int32_t>(S::total(over));
      below = static_cast<int32_t>(S::total(under));
    }
    if (above < k && k <= whole - below) return padded[i];
  }
  return kSelectNone;  // k is not in 1..n
}

// The bits of the chosen among `equal`: all, or the lowest `left`.
PARED_INLINE uint64_t take_ties(uint64_t equal, int64_t& left) {
  if (equal == 0 || left <= 0) return 0;
  const int ties = __builtin_popcountll(equal);
  if (ties <= left) {
    left -= ties;
    return equal;
  }
  uint64_t taken = 0;
  for (; left > 0; --left, equal &= equal - 1) taken |= equal & (~equal + 1);
  return taken;
}

// One store of mask bytes: elements i .. i + width * mask_vectors, of which `valid` exist.
template <class S, class K, bool NANS>
PARED_INLINE uint64_t mask_bits(const SelectRun& run, int64_t i, typename S::I threshold, typename S::I ties,
                                uint64_t valid, int64_t& left) {
  uint64_t chosen = 0, equal = 0;
  typename S::I unused = S::set1(0);
  for (int v = 0; v < S::mask_vectors; ++v) {
    const typename S::I key = NANS ? K::template key<S>(run, i + v * S::width, unused)
                                   : K::template quick_key<S>(run, i + v * S::width, unused);
    chosen |= S::bits(S::gt(key, threshold)) << (v * S::width);
    equal |= S::bits(S::eq(key, ties)) << (v * S::width);
  }
  return chosen | take_ties(equal & valid, left);
}

// Chosen are the keys above `threshold`, and a.ties of those equal to `tie`.
template <class S, class K, bool NANS>
PARED_INLINE int64_t mask_elements(const SelectMaskArgs& a, typename S::Key threshold, typename S::Key tie) {
  constexpr int step = S::width * S::mask_vectors;
  const typename S::I above = S::set1(threshold), ties = S::set1(tie);
  int64_t left = a.ties, i = 0;
  for (; i + step <= a.run.n; i += step) {
    K::template prefetch<step>(a.run, i);
    S::store_mask(a.mask + i, mask_bits<S, K, NANS>(a.run, i, above, ties, ~uint64_t{0}, left));
  }
  if (i < a.run.n) {  // the rest, padded
    const int rest = static_cast<int>(a.run.n - i);
    alignas(64) char w[step * 4] = {}, g[step * 4] = {};
    uint8_t mask[step];
    __builtin_memcpy(w, static_cast<const char*>(a.run.w) + i * K::w_size, rest * K::w_size);
    if (K::kind == SelectKey::product)
      __builtin_memcpy(g, static_cast<const char*>(a.run.g) + i * K::g_size, rest * K::g_size);
    const SelectRun padded = {w, g, step, a.run.dtype, a.run.g_dtype, a.run.key};
    const uint64_t valid = (uint64_t{1} << (rest * S::bits_per_lane)) - 1;
    S::store_mask(mask, mask_bits<S, K, NANS>(padded, 0, above, ties, valid, left));
    __builtin_memcpy(a.mask + i, mask, rest);
  }
  return a.ties - left;
}

template <class S>
int64_t mask_run(const SelectMaskArgs& a) {
  return with_key(a.run, [&](auto keyed) {
    using K = decltype(keyed);
    if constexpr (NarrowFor<S>::exists && K::narrow) {
      using N = typename NarrowFor<S>::Type;
      if (a.run.n >= kNarrowRun) {
        const Bounds<N> b = narrow_bounds<N, K::dtype>({a.run, a.threshold, a.threshold, true, nullptr});
        return a.nans ? mask_elements<N, K, true>(a, b.above, b.at_hi)
                      : mask_elements<N, K, false>(a, b.above, b.at_hi);
      }
    }
    return a.nans ? mask_elements<S, K, true>(a, a.threshold, a.threshold)
                  : mask_elements<S, K, false>(a, a.threshold, a.threshold);
  });
}

// Of `count` keys the n largest: a key's rank is the number of keys that beat it.
inline void group_scalar(const int32_t* keys, int32_t count, int32_t n, uint8_t* mask) {
  for (int32_t i = 0; i < count; ++i) {
    int32_t rank = 0;
    for (int32_t j = 0; j < count; ++j) rank += j < i ? keys[j] >= keys[i] : keys[j] > keys[i];
    mask[i] = rank < n;
  }
}

#if defined(__aarch64__)
template <int... by>
struct Rotations {};

// Groups of M by rotations known at compile time. Returns how many of the keys it took.
template <class S, int M, int... by>
PARED_INLINE int64_t rotated_groups(const SelectGroupArgs& a, Rotations<by...>) {
  const typename S::I n = S::set1(a.n);
  int64_t i = 0;
  for (; i + S::width <= a.count; i += S::width) {
    const typename S::I key = S::load_keys(a.keys + i);
    typename S::I rank = S::set1(0);
    // A key from before wins ties: it has to be greater than what is one less.
    ((rank =
          S::count(rank, S::gt(S::template rotate<M, by>(key), S::add(key, S::template wrapped<M, by>())))),
     ...);
    S::store_mask(a.mask + i, S::bits(S::gt(n, rank)));
  }
  return i;
}
#endif

template <class S>
void group_run(const SelectGroupArgs& a) {
  int64_t i = 0;
#if defined(__aarch64__)
  if constexpr (S::width > 1) {
    switch (a.m) {
      case 2: i = rotated_groups<S, 2>(a, Rotations<1>{}); break;
      case 4: i = rotated_groups<S, 4>(a, Rotations<1, 2, 3>{}); break;
      case 8: i = rotated_groups<S, 8>(a, Rotations<1, 2, 3, 4, 5, 6, 7>{}); break;
      case 16: i = rotated_groups<S, 16>(a, Rotations<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>{});
    }
  }
#else
  if constexpr (S::width > 1) {
    // Groups that divide a vector: every lane meets the others of its group by rotation within the group.
    constexpr int64_t step = S::width * S::mask_vectors;
    if (S::width % a.m == 0 && a.m > 1) {
      typename S::I lanes[S::width];
      typename S::M earlier[S::width];  // lanes whose rotated partner stands before them: it wins ties
      for (int s = 1; s < a.m; ++s) {
        alignas(64) int32_t lane[S::width], wrapped[S::width];
        for (int l = 0; l < S::width; ++l) {
          lane[l] = l / a.m * a.m + (l % a.m + s) % a.m;
          wrapped[l] = lane[l] < l ? -1 : 0;
        }
        lanes[s] = S::load_keys(lane);
        earlier[s] = S::as_mask(S::load_keys(wrapped));
      }
      const typename S::I n = S::set1(a.n);
      for (; i + step <= a.count; i += step) {
        uint64_t chosen = 0;
        for (int v = 0; v < S::mask_vectors; ++v) {
          const typename S::I key = S::load_keys(a.keys + i + v * S::width);
          typename S::I rank = S::set1(0);
          for (int s = 1; s < a.m; ++s) {
            const typename S::I other = S::permute(key, lanes[s]);
            rank = S::count(rank, S::or_(S::gt(other, key), S::and_(S::eq(other, key), earlier[s])));
          }
          chosen |= S::bits(S::gt(n, rank)) << (v * S::width);
        }
        S::store_mask(a.mask + i, chosen);
      }
    }
  }
#endif
  for (; i < a.count; i += a.m) {
    const int64_t left = a.count - i;
    group_scalar(a.keys + i, left < a.m ? static_cast<int32_t>(left) : a.m, a.n, a.mask + i);
  }
}

template <class S, class K>
PARED_INLINE void sum_range(const SelectRun& run, int64_t begin, int64_t end, bool first, float* sums) {
  for (int64_t c = begin; c + S::width <= end; c += S::width) {
    const typename S::I s = K::template score<S>(run, c);
    S::store_float(sums + c, first ? s : S::add_float(S::load_float(sums + c), s));
  }
}

template <class S>
void sum_run(const SelectSumArgs& a) {
  with_key(a.run, [&](auto keyed) {
    using K = decltype(keyed);
    SelectRun run = a.run;
    const int64_t whole = run.n / S::width * S::width;
    for (int64_t row = 0; row < a.rows; ++row) {
      sum_range<S, K>(run, 0, whole, row == 0, a.sums);
      sum_range<ScalarSelect, K>(run, whole, run.n, row == 0, a.sums);
      run.w = static_cast<const char*>(run.w) + a.w_stride;
      if (run.g) run.g = static_cast<const char*>(run.g) + a.g_stride;
    }
    return 0;
  });
}

}  // namespace
}  // namespace pared
