// float32 vectors, one type for each level: the vocabulary that the generic kernels are written in. A
// translation unit gets the widest type its flags allow, plus the scalar one. Everything is in an unnamed
// namespace: the same name means other instructions in another translation unit.
#pragma once

#include <math.h>
#include <stdint.h>

#include "core/dtype.h"
#include "kernels/generic/half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pared {
namespace {

#define PARED_INLINE inline __attribute__((always_inline))

// Four values that lie together, and the i-th of them, broadcast: from memory, where a level has nothing
// better.
template <class S, class Element>
struct FourInMemory {
  using Four = const Element*;
  static PARED_INLINE Four four(const Element* p) { return p; }
  static PARED_INLINE auto nth(Four f, int i) { return S::value(f[i]); }
};

// Whether multiply-adds of S take a value from a lane of a register (its `nth`), without an instruction for
// it.
template <class S>
constexpr bool kByLane = false;

// 2^(i/8).
alignas(32) constexpr float kEighthPowers[8] = {1.0f,        1.09050775f, 1.18920708f, 1.29683959f,
                                                1.41421354f, 1.54221082f, 1.68179286f, 1.8340081f};

// What the products of a level leave out of the sums of a row (NeonSdotS8 has the reason): of all rows alike,
// or of each of four whose values are a Four. Nothing, for most.
template <class S>
struct LeftOut {
  struct Sum {};
  PARED_INLINE void add(typename S::Four) {}
  PARED_INLINE void add(typename S::Value) {}
  PARED_INLINE Sum of_all() const { return {}; }
  PARED_INLINE Sum of_row(int) const { return {}; }
  static PARED_INLINE typename S::V with(typename S::V v, Sum) { return v; }
};

struct ScalarF32 : FourInMemory<ScalarF32, float> {
  static constexpr int width = 1;
  using V = float;
  using Element = float;
  using Operand = V;  // of the panel, as fma takes it
  using Value = V;    // a broadcast value
  // A panel is aligned and so are the offsets into it, unless the packed weight is corrupt, which is to give
  // wrong numbers at worst: no level's operand asks for the alignment.
  static PARED_INLINE Operand operand(const float* p) {
    float f;
    __builtin_memcpy(&f, p, sizeof(f));
    return f;
  }
  static PARED_INLINE Value value(float f) { return set1(f); }
  static PARED_INLINE V zero() { return 0.0f; }
  static PARED_INLINE V set1(float f) { return f; }
  static PARED_INLINE V load(const float* p) { return *p; }
  static PARED_INLINE V loadu(const float* p) { return *p; }
  static PARED_INLINE void store(float* p, V v) { *p = v; }
  static PARED_INLINE void storeu(float* p, V v) { *p = v; }
  static PARED_INLINE V add(V a, V b) { return a + b; }
  static PARED_INLINE V sub(V a, V b) { return a - b; }
  static PARED_INLINE V mul(V a, V b) { return a * b; }
  static PARED_INLINE V div(V a, V b) { return a / b; }
  // b where either is NaN, and of two zeros.
  static PARED_INLINE V max(V a, V b) { return a > b ? a : b; }
  static PARED_INLINE V minus_abs(V a) { return bits_float(float_bits(a) | 0x80000000u); }
  static PARED_INLINE V select_negative(V x, V a, V b) { return float_bits(x) >> 31 ? a : b; }
  // a * b - p, rounded once: what the rounded product p = a * b has lost.
  static PARED_INLINE V product_error(V a, V b, V p) {
    return static_cast<float>(static_cast<double>(a) * b - p);
  }
  // 2^(i/8), i the three low bits of `bits`.
  static PARED_INLINE V eighth_power(V bits) { return kEighthPowers[float_bits(bits) & 7]; }
  // v * 2^floor(n) for n in [-250, 250], a multiple of 1/8; rounded once where v 2^(n/2) is normal. In two
  // factors, since 2^n alone may be a denormal; the integer by its bits, since converting a NaN is undefined.
  static PARED_INLINE V scale2(V v, V n) {
    const int32_t i = static_cast<int32_t>(float_bits(n + 1572864.0f) - 0x49c00000u) >> 3, half = i >> 1;
    const auto power = [](int32_t k) { return bits_float((static_cast<uint32_t>(k) + 127u) << 23); };
    return v * power(half) *
           power(static_cast<int32_t>(static_cast<uint32_t>(i) - static_cast<uint32_t>(half)));
  }
  // Rounded twice, as portable C++ is without a fused instruction.
  static PARED_INLINE V fma(V a, V b, V c) { return a * b + c; }
};

#if defined(__AVX2__)
// One position of four rows: what the quad kernel does with positions that would leave most of a vector
// empty.
struct FourRowsF32 {
  using V = __m128;
  static PARED_INLINE V zero() { return _mm_setzero_ps(); }
  // Of rows `stride` elements apart.
  static PARED_INLINE V load(const float* p, int stride) {
    return _mm_setr_ps(p[0], p[stride], p[2 * stride], p[3 * stride]);
  }
  static PARED_INLINE void store(float* p, int stride, V v) {
    alignas(16) float rows[4];
    _mm_store_ps(rows, v);
    for (int r = 0; r < 4; ++r) p[r * stride] = rows[r];
  }
  // The rows' values, times x.
  static PARED_INLINE V fma(const float* values, const float* x, V sum) {
    return _mm_fmadd_ps(_mm_loadu_ps(values), _mm_set1_ps(ScalarF32::operand(x)), sum);
  }
};

struct Avx2F32 : FourInMemory<Avx2F32, float> {
  static constexpr int width = 8;
  using V = __m256;
  using FourRows = FourRowsF32;
  using Element = float;
  using Operand = V;  // of the panel, as fma takes it
  using Value = V;    // a broadcast value
  static PARED_INLINE Operand operand(const float* p) { return loadu(p); }
  static PARED_INLINE Value value(float f) { return set1(f); }
  static PARED_INLINE V zero() { return _mm256_setzero_ps(); }
  static PARED_INLINE V set1(float f) { return _mm256_set1_ps(f); }
  static PARED_INLINE V load(const float* p) { return _mm256_load_ps(p); }
  static PARED_INLINE V loadu(const float* p) { return _mm256_loadu_ps(p); }
  static PARED_INLINE void store(float* p, V v) { _mm256_store_ps(p, v); }
  static PARED_INLINE void storeu(float* p, V v) { _mm256_storeu_ps(p, v); }
  static PARED_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
  static PARED_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static PARED_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static PARED_INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
  static PARED_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
  static PARED_INLINE V minus_abs(V a) { return _mm256_or_ps(a, _mm256_set1_ps(-0.0f)); }
  static PARED_INLINE V select_negative(V x, V a, V b) { return _mm256_blendv_ps(b, a, x); }
  static PARED_INLINE V product_error(V a, V b, V p) { return _mm256_fmsub_ps(a, b, p); }
  static PARED_INLINE V eighth_power(V bits) {
    return _mm256_permutevar8x32_ps(loadu(kEighthPowers), _mm256_castps_si256(bits));
  }
  static PARED_INLINE V scale2(V v, V n) {
    const __m256i i = _mm256_cvtps_epi32(_mm256_floor_ps(n)), half = _mm256_srai_epi32(i, 1),
                  bias = _mm256_set1_epi32(127);
    const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, half), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(v, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
  }
  static PARED_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
};
#endif

#if defined(__AVX512F__)
struct Avx512F32 {
  static constexpr int width = 16;
  using V = __m512;
  using FourRows = FourRowsF32;
  using Element = float;
  using Operand = V;  // of the panel, as fma takes it
  using Value = V;    // a broadcast value
  static PARED_INLINE Operand operand(const float* p) { return loadu(p); }
  static PARED_INLINE Value value(float f) { return set1(f); }
  using Four = __m128;
  static PARED_INLINE Four four(const float* p) { return _mm_loadu_ps(p); }
  static PARED_INLINE Value nth(Four f, int i) {
    return _mm512_permutexvar_ps(_mm512_set1_epi32(i), _mm512_castps128_ps512(f));
  }
  static PARED_INLINE V zero() { return _mm512_setzero_ps(); }
  static PARED_INLINE V set1(float f) { return _mm512_set1_ps(f); }
  static PARED_INLINE V load(const float* p) { return _mm512_load_ps(p); }
  static PARED_INLINE V loadu(const float* p) { return _mm512_loadu_ps(p); }
  static PARED_INLINE void store(float* p, V v) { _mm512_store_ps(p, v); }
  static PARED_INLINE void storeu(float* p, V v) { _mm512_storeu_ps(p, v); }
  static PARED_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
  static PARED_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static PARED_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static PARED_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
  static PARED_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
  static PARED_INLINE V minus_abs(V a) { return _mm512_or_ps(a, _mm512_set1_ps(-0.0f)); }
  static PARED_INLINE V select_negative(V x, V a, V b) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), b, a);
  }
  static PARED_INLINE V product_error(V a, V b, V p) { return _mm512_fmsub_ps(a, b, p); }
  static PARED_INLINE V eighth_power(V bits) {
    const V powers = _mm512_broadcast_f32x8(_mm256_loadu_ps(kEighthPowers));
    return _mm512_permutexvar_ps(_mm512_castps_si512(bits), powers);
  }
  static PARED_INLINE V scale2(V v, V n) { return _mm512_scalef_ps(v, n); }
  static PARED_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
};

// Half a vector, for 8 positions of a group of 16.
struct Avx512HalfF32 : Avx2F32 {
  static constexpr int width = 16;
  using Four = __m128;
  static PARED_INLINE Four four(const float* p) { return _mm_loadu_ps(p); }
  static PARED_INLINE Value nth(Four f, int i) {
    return _mm256_permutexvar_ps(_mm256_set1_epi32(i), _mm256_castps128_ps256(f));
  }
};

// A vector and half of one, for 24 positions.
struct Avx512F32AndHalf {
  static constexpr int width = 24;
  struct V {
    __m512 whole;
    __m256 half;
  };
  using Element = float;
  using Operand = V;
  using Value = __m512;
  using Four = __m128;
  static PARED_INLINE Operand operand(const float* p) { return load(p); }
  static PARED_INLINE Value value(float f) { return Avx512F32::value(f); }
  static PARED_INLINE Four four(const float* p) { return Avx512F32::four(p); }
  static PARED_INLINE Value nth(Four f, int i) { return Avx512F32::nth(f, i); }
  static PARED_INLINE V zero() { return {_mm512_setzero_ps(), _mm256_setzero_ps()}; }
  static PARED_INLINE V load(const float* p) { return {_mm512_loadu_ps(p), _mm256_loadu_ps(p + 16)}; }
  static PARED_INLINE void store(float* p, V v) {
    _mm512_storeu_ps(p, v.whole);
    _mm256_storeu_ps(p + 16, v.half);
  }
  static PARED_INLINE V add(V a, V b) {
    return {_mm512_add_ps(a.whole, b.whole), _mm256_add_ps(a.half, b.half)};
  }
  static PARED_INLINE V fma(Value w, V b, V c) {
    return {_mm512_fmadd_ps(w, b.whole, c.whole), _mm256_fmadd_ps(_mm512_castps512_ps256(w), b.half, c.half)};
  }
};
#endif

#if defined(__aarch64__)
struct NeonF32 {
  static constexpr int width = 4;
  using V = float32x4_t;
  using Element = float;
  using Operand = V;  // of the panel, as fma takes it
  // A broadcast value is a lane of a register, which multiply-adds take as it is: neither a load nor an
  // instruction of its own.
  struct Value {
    float32x4_t four;
    int lane;
  };
  using Four = float32x4_t;
  static PARED_INLINE Operand operand(const float* p) { return loadu(p); }
  static PARED_INLINE Value value(float f) { return {set1(f), 0}; }
  static PARED_INLINE Four four(const float* p) { return vld1q_f32(p); }
  static PARED_INLINE Value nth(Four f, int i) { return {f, i}; }
  static PARED_INLINE V zero() { return vdupq_n_f32(0.0f); }
  static PARED_INLINE V set1(float f) { return vdupq_n_f32(f); }
  static PARED_INLINE V load(const float* p) { return vld1q_f32(p); }
  static PARED_INLINE V loadu(const float* p) { return vld1q_f32(p); }
  static PARED_INLINE void store(float* p, V v) { vst1q_f32(p, v); }
  static PARED_INLINE void storeu(float* p, V v) { vst1q_f32(p, v); }
  static PARED_INLINE V add(V a, V b) { return vaddq_f32(a, b); }
  static PARED_INLINE V sub(V a, V b) { return vsubq_f32(a, b); }
  static PARED_INLINE V mul(V a, V b) { return vmulq_f32(a, b); }
  static PARED_INLINE V div(V a, V b) { return vdivq_f32(a, b); }
  // Arm's own maximum is NaN where either is.
  static PARED_INLINE V max(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static PARED_INLINE V minus_abs(V a) { return vnegq_f32(vabsq_f32(a)); }
  static PARED_INLINE V select_negative(V x, V a, V b) {
    return vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(x)), a, b);
  }
  static PARED_INLINE V product_error(V a, V b, V p) { return vfmaq_f32(vnegq_f32(p), a, b); }
  static PARED_INLINE V eighth_power(V bits) {
    // The four bytes of each lane's power among the 32 of the table.
    const uint32x4_t first = vmulq_n_u32(vandq_u32(vreinterpretq_u32_f32(bits), vdupq_n_u32(7)), 0x04040404u);
    const uint8x16_t bytes = vreinterpretq_u8_u32(vaddq_u32(first, vdupq_n_u32(0x03020100u)));
    const uint8x16x2_t powers = {
        {vreinterpretq_u8_f32(vld1q_f32(kEighthPowers)), vreinterpretq_u8_f32(vld1q_f32(kEighthPowers + 4))}};
    return vreinterpretq_f32_u8(vqtbl2q_u8(powers, bytes));
  }
  static PARED_INLINE V scale2(V v, V n) {
    const int32x4_t i = vcvtmq_s32_f32(n), half = vshrq_n_s32(i, 1), bias = vdupq_n_s32(127);
    const auto power = [](int32x4_t e) { return vreinterpretq_f32_s32(vshlq_n_s32(e, 23)); };
    return vmulq_f32(vmulq_f32(v, power(vaddq_s32(half, bias))), power(vaddq_s32(vsubq_s32(i, half), bias)));
  }
  static PARED_INLINE V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static PARED_INLINE V fma(Value w, V b, V c) {
    switch (w.lane) {  // known where loops are unrolled
      case 0: return vfmaq_laneq_f32(c, b, w.four, 0);
      case 1: return vfmaq_laneq_f32(c, b, w.four, 1);
      case 2: return vfmaq_laneq_f32(c, b, w.four, 2);
      default: return vfmaq_laneq_f32(c, b, w.four, 3);
    }
  }
};
template <>
constexpr bool kByLane<NeonF32> = true;
#endif

}  // namespace
}  // namespace pared
