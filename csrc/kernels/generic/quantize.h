// Activations to unsigned bytes, rows: one pass for the largest magnitude, one for the bytes, both over a row
// that stays in L1; channel planes: the two as operations of their own. Bit-identical at every level:
// magnitudes are compared as integers, which orders NaN above infinity above everything else, and a product
// is rounded to the nearest even integer.
#pragma once

#include "kernels/generic/half.h"
#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

// The bytes that a row's elements become: clamp(round(v * inverse) + zero, low, high).
struct ByteRange {
  int32_t zero, low, high;
};

struct ScalarBytes {
  static constexpr int width = 1;
  using V = float;
  using I = uint32_t;
  static PARED_INLINE V load(const float* p) { return *p; }
  static PARED_INLINE V load(const uint16_t* p, bool bf16) {
    return bf16 ? bf16_to_float(*p) : f16_to_float(*p);
  }
  static PARED_INLINE I zero() { return 0; }
  static PARED_INLINE I max_magnitude(I m, V v) {
    const uint32_t b = float_bits(v) & 0x7fffffffu;
    return b > m ? b : m;
  }
  static PARED_INLINE uint32_t reduce(I m) { return m; }
  // clamp(v * inverse, low, high), rounded, plus zero.
  static PARED_INLINE I quantized(V v, float inverse, float low, float high, int32_t zero) {
    float q = v * inverse;
    q = q > low ? q : low;  // NaN becomes low, as vmaxps has it
    q = q < high ? q : high;
    // Adding 1.5 * 2^23 rounds to the nearest even integer.
    return float_bits(q + 12582912.0f) - 0x4b400000u + static_cast<uint32_t>(zero);
  }
  static PARED_INLINE void store_four(uint8_t* out, const V v[4], float inverse, const ByteRange& r) {
    for (int i = 0; i < 4; ++i)
      out[i] = static_cast<uint8_t>(quantized(v[i], inverse, static_cast<float>(r.low - r.zero),
                                              static_cast<float>(r.high - r.zero), r.zero));
  }
  template <int BITS>
  static PARED_INLINE I with(I word, I byte) {
    return word | byte << BITS;
  }
  static PARED_INLINE void store_words(uint32_t* out, I words) { *out = words; }
};

#if defined(__AVX2__)
struct Avx2Bytes {
  static constexpr int width = 8;
  using V = __m256;
  using I = __m256i;
  static PARED_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  static PARED_INLINE V load(const uint16_t* p, bool bf16) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)) : _mm256_cvtph_ps(h);
  }
  static PARED_INLINE I zero() { return _mm256_setzero_si256(); }
  static PARED_INLINE I max_magnitude(I m, V v) {
    return _mm256_max_epi32(m, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)));
  }
  static PARED_INLINE uint32_t reduce(I m) {
    __m128i a = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    a = _mm_max_epi32(a, _mm_shuffle_epi32(a, 0x4e));
    a = _mm_max_epi32(a, _mm_shuffle_epi32(a, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(a));
  }
  static PARED_INLINE I quantized(V v, float inverse, float low, float high, int32_t zero) {
    const __m256 q = _mm256_min_ps(
        _mm256_max_ps(_mm256_mul_ps(v, _mm256_set1_ps(inverse)), _mm256_set1_ps(low)), _mm256_set1_ps(high));
    return _mm256_add_epi32(_mm256_cvtps_epi32(q), _mm256_set1_epi32(zero));
  }
  template <int BITS>
  static PARED_INLINE I with(I word, I byte) {
    return _mm256_or_si256(word, _mm256_slli_epi32(byte, BITS));
  }
  static PARED_INLINE void store_words(uint32_t* out, I words) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words);
  }
  // Upper bounds are for the conversion, which turns what is beyond int32, and NaN, into the least integer;
  // lower ones are applied to the bytes.
  static PARED_INLINE void store_four(uint8_t* out, const V v[4], float inverse, const ByteRange& r) {
    const __m256 most = _mm256_set1_ps(static_cast<float>(r.high - r.zero));
    __m256i i[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      i[k] = _mm256_cvtps_epi32(_mm256_min_ps(most, _mm256_mul_ps(v[k], _mm256_set1_ps(inverse))));
    const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(r.zero));
    const __m256i low = _mm256_adds_epi16(_mm256_packs_epi32(i[0], i[1]), zero);
    const __m256i high = _mm256_adds_epi16(_mm256_packs_epi32(i[2], i[3]), zero);
    const __m256i u =
        _mm256_max_epu8(_mm256_packus_epi16(low, high), _mm256_set1_epi8(static_cast<char>(r.low)));
    // Packing goes by 128-bit lanes.
    const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(u, lanes));
  }
};
#endif

#if defined(__AVX512F__)
struct Avx512Bytes {
  static constexpr int width = 16;
  using V = __m512;
  using I = __m512i;
  static PARED_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  static PARED_INLINE V load(const uint16_t* p, bool bf16) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)) : _mm512_cvtph_ps(h);
  }
  static PARED_INLINE I zero() { return _mm512_setzero_si512(); }
  static PARED_INLINE I max_magnitude(I m, V v) {
    return _mm512_max_epi32(m, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
  }
  static PARED_INLINE uint32_t reduce(I m) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(m)); }
  static PARED_INLINE I quantized(V v, float inverse, float low, float high, int32_t zero) {
    const __m512 q = _mm512_min_ps(
        _mm512_max_ps(_mm512_mul_ps(v, _mm512_set1_ps(inverse)), _mm512_set1_ps(low)), _mm512_set1_ps(high));
    return _mm512_add_epi32(_mm512_cvtps_epi32(q), _mm512_set1_epi32(zero));
  }
  template <int BITS>
  static PARED_INLINE I with(I word, I byte) {
    return _mm512_or_si512(word, _mm512_slli_epi32(byte, BITS));
  }
  static PARED_INLINE void store_words(uint32_t* out, I words) { _mm512_storeu_si512(out, words); }
  // As Avx2Bytes.
  static PARED_INLINE void store_four(uint8_t* out, const V v[4], float inverse, const ByteRange& r) {
    const __m512 most = _mm512_set1_ps(static_cast<float>(r.high - r.zero));
    __m512i i[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      i[k] = _mm512_cvtps_epi32(_mm512_min_ps(most, _mm512_mul_ps(v[k], _mm512_set1_ps(inverse))));
    const __m512i zero = _mm512_set1_epi16(static_cast<int16_t>(r.zero));
    const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(i[0], i[1]), zero);
    const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(i[2], i[3]), zero);
    const __m512i u =
        _mm512_max_epu8(_mm512_packus_epi16(low, high), _mm512_set1_epi8(static_cast<char>(r.low)));
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi32(lanes, u));
  }
};
#endif

#if defined(__aarch64__)
struct NeonBytes {
  static constexpr int width = 4;
  using V = float32x4_t;
  using I = uint32x4_t;
  static PARED_INLINE V load(const float* p) { return vld1q_f32(p); }
  static PARED_INLINE V load(const uint16_t* p, bool bf16) {
    const uint16x4_t h = vld1_u16(p);
    return bf16 ? vreinterpretq_f32_u32(vshll_n_u16(h, 16)) : vcvt_f32_f16(vreinterpret_f16_u16(h));
  }
  static PARED_INLINE I zero() { return vdupq_n_u32(0); }
  static PARED_INLINE I max_magnitude(I m, V v) { return vmaxq_u32(m, vreinterpretq_u32_f32(vabsq_f32(v))); }
  static PARED_INLINE uint32_t reduce(I m) { return vmaxvq_u32(m); }
  // fmaxnm gives the number where the other is NaN.
  static PARED_INLINE V scaled(V v, float inverse, float low) {
    return vmaxnmq_f32(vmulq_f32(v, vdupq_n_f32(inverse)), vdupq_n_f32(low));
  }
  static PARED_INLINE I quantized(V v, float inverse, float low, float high, int32_t zero) {
    const V q = vminnmq_f32(scaled(v, inverse, low), vdupq_n_f32(high));
    return vreinterpretq_u32_s32(vaddq_s32(vcvtnq_s32_f32(q), vdupq_n_s32(zero)));
  }
  template <int BITS>
  static PARED_INLINE I with(I word, I byte) {
    if constexpr (BITS == 0) return byte;
    else return vsliq_n_u32(word, byte, BITS);
  }
  static PARED_INLINE void store_words(uint32_t* out, I words) { vst1q_u32(out, words); }
  // Lower bounds are for NaN; conversion and narrowing saturate, so that upper ones are applied to the bytes.
  static PARED_INLINE void store_four(uint8_t* out, const V v[4], float inverse, const ByteRange& r) {
    const auto low = static_cast<float>(r.low - r.zero);
    const int16x8_t zero = vdupq_n_s16(static_cast<int16_t>(r.zero));
    const auto eight = [&](V a, V b) __attribute__((always_inline)) {
      const int16x4_t narrow = vqmovn_s32(vcvtnq_s32_f32(scaled(a, inverse, low)));
      const int16x8_t both = vqmovn_high_s32(narrow, vcvtnq_s32_f32(scaled(b, inverse, low)));
      return vqaddq_s16(both, zero);
    };
    const uint8x16_t bytes = vqmovun_high_s16(vqmovun_s16(eight(v[0], v[1])), eight(v[2], v[3]));
    vst1q_u8(out, vminq_u8(bytes, vdupq_n_u8(static_cast<uint8_t>(r.high))));
  }
};
#endif

// Elements [c, c + width) of a row, those beyond its end zero: `tail` is scratch of `width` elements.
template <class B>
PARED_INLINE typename B::V row_vector(const float* row, int64_t c, int64_t cols, bool, float* tail) {
  if (c + B::width <= cols) return B::load(row + c);
  for (int i = 0; i < B::width; ++i) tail[i] = c + i < cols ? row[c + i] : 0.0f;
  return B::load(tail);
}
template <class B>
PARED_INLINE typename B::V row_vector(const uint16_t* row, int64_t c, int64_t cols, bool bf16,
                                      uint16_t* tail) {
  if (c + B::width <= cols) return B::load(row + c, bf16);
  for (int i = 0; i < B::width; ++i) tail[i] = c + i < cols ? row[c + i] : uint16_t{0};
  return B::load(tail, bf16);
}

template <class B, class T>
PARED_INLINE uint32_t magnitude_of(const MagnitudeArgs& a) {
  constexpr int W = B::width;
  const bool bf16 = a.dtype == DType::bf16;
  const T* x = static_cast<const T*>(a.x);
  T tail[W];
  // Four chains: a chain of maxima waits for each of them.
  typename B::I m[4] = {B::zero(), B::zero(), B::zero(), B::zero()};
  int64_t i = 0;
  for (; i + 4 * W <= a.count; i += 4 * W)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      m[j] = B::max_magnitude(m[j], row_vector<B>(x, i + j * W, a.count, bf16, tail));
  for (; i < a.count; i += W) m[0] = B::max_magnitude(m[0], row_vector<B>(x, i, a.count, bf16, tail));
  uint32_t most = 0;
  for (int j = 0; j < 4; ++j) {
    const uint32_t b = B::reduce(m[j]);
    most = b > most ? b : most;
  }
  return most;
}

template <class B, class T>
PARED_INLINE void quantize_rows_of(const QuantizeArgs& a) {
  constexpr int W = B::width;
  const bool bf16 = a.dtype == DType::bf16;
  const float nan = bits_float(0x7fc00000u);
  const ByteRange range = a.scale == 0.0f ? ByteRange{128, 1, 255} : ByteRange{a.zero, a.low, a.high};
  T tail[W];
  for (int r = 0; r < a.rows; ++r) {
    const T* row = static_cast<const T*>(a.x) + r * a.x_stride;
    uint8_t* out = a.out + r * a.out_stride;
    const uint32_t bits = magnitude_of<B, T>({row, a.dtype, a.cols, nullptr});
    const bool finite = bits < 0x7f800000u;
    const float largest = bits_float(bits);
    float inverse;
    if (a.scale == 0.0f) {
      const bool some = finite && largest >= kSmallestMax;
      inverse = some ? 127.0f / largest : 0.0f;
      a.scales[r] = !finite ? nan : some ? largest / 127.0f : 0.0f;
    } else {
      inverse = 1.0f / a.scale;
      a.scales[r] = finite ? a.scale : nan;
    }
    const auto four = [&](int c, uint8_t* to) __attribute__((always_inline)) {
      typename B::V v[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) v[k] = row_vector<B>(row, c + k * W, a.cols, bf16, tail);
      B::store_four(to, v, inverse, range);
    };
    int c = 0;
    for (; c + 4 * W <= a.cols; c += 4 * W) four(c, out + c);
    if (c < a.cols) {
      uint8_t bytes[4 * W];
      four(c, bytes);
      for (int i = 0; c < a.cols; ++i, ++c) out[c] = bytes[i];
    }
    for (; c % kInt8Unit; ++c) out[c] = 0;
  }
}

template <class B>
void quantize_rows(const QuantizeArgs& a) {
  if (a.dtype == DType::f32) quantize_rows_of<B, float>(a);
  else quantize_rows_of<B, uint16_t>(a);
}

template <class B>
void magnitude(const MagnitudeArgs& a) {
  *a.largest = a.dtype == DType::f32 ? magnitude_of<B, float>(a) : magnitude_of<B, uint16_t>(a);
}

template <class B, class T>
PARED_INLINE uint32_t quantize_planes_of(const QuantizePlanesArgs& a) {
  constexpr int W = B::width;
  const bool bf16 = a.dtype == DType::bf16;
  const float inverse = 1.0f / a.scale;
  const float low = static_cast<float>(a.low - a.zero), high = static_cast<float>(a.high - a.zero);
  T tail[W];
  typename B::I most = B::zero();
  for (int c = 0; c < a.channels; c += kInt8Unit) {
    const T* x = static_cast<const T*>(a.x) + c * a.channel_stride;
    uint32_t* out = a.out + c / kInt8Unit * a.out_stride;
    const int left = a.channels - c;
    for (int64_t m = 0; m < a.count; m += W) {
      typename B::I word = B::zero();
      const auto byte = [&](int i) __attribute__((always_inline)) {
        const typename B::V v = row_vector<B>(x + i * a.channel_stride, m, a.readable, bf16, tail);
        most = B::max_magnitude(most, v);
        return B::quantized(v, inverse, low, high, a.zero);
      };
      word = B::template with<0>(word, byte(0));
      if (left > 1) word = B::template with<8>(word, byte(1));
      if (left > 2) word = B::template with<16>(word, byte(2));
      if (left > 3) word = B::template with<24>(word, byte(3));
      B::store_words(out + m, word);
    }
  }
  return B::reduce(most);
}

template <class B>
void quantize_plane_words(const QuantizePlanesArgs& a) {
  *a.largest = a.dtype == DType::f32 ? quantize_planes_of<B, float>(a) : quantize_planes_of<B, uint16_t>(a);
}

}  // namespace
}  // namespace pared
