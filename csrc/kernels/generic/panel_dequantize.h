// From the int32 sums of a tile to float32, in place: the zero point's correction and the scales. Every level
// computes the same bits: each operation is rounded once, nothing is fused. Corrections are modulo 2^32, for
// a corrupt weight may bring any.
#pragma once

#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

struct ScalarDequantize {
  static constexpr int width = 1;
  // float(acc - correction) * (row * position)
  static PARED_INLINE void dequantize(int32_t* acc, int32_t correction, float row, const float* position) {
    uint32_t sum;
    memcpy(&sum, acc, sizeof(sum));
    const auto corrected = static_cast<int32_t>(sum - static_cast<uint32_t>(correction));
    const float y = static_cast<float>(corrected) * (row * *position);
    memcpy(acc, &y, sizeof(y));
  }
};

#if defined(__AVX2__)
struct Avx2Dequantize {
  static constexpr int width = 8;
  static PARED_INLINE void dequantize(int32_t* acc, int32_t correction, float row, const float* position) {
    const __m256i sum = _mm256_load_si256(reinterpret_cast<const __m256i*>(acc));
    const __m256 y = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_set1_epi32(correction)));
    const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(row), _mm256_load_ps(position));
    _mm256_store_si256(reinterpret_cast<__m256i*>(acc), _mm256_castps_si256(_mm256_mul_ps(y, scale)));
  }
};
#endif

#if defined(__AVX512F__)
struct Avx512Dequantize {
  static constexpr int width = 16;
  static PARED_INLINE void dequantize(int32_t* acc, int32_t correction, float row, const float* position) {
    const __m512 y =
        _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(acc), _mm512_set1_epi32(correction)));
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(row), _mm512_load_ps(position));
    _mm512_store_si512(acc, _mm512_castps_si512(_mm512_mul_ps(y, scale)));
  }
};
#endif

#if defined(__aarch64__)
struct NeonDequantize {
  static constexpr int width = 4;
  static PARED_INLINE void dequantize(int32_t* acc, int32_t correction, float row, const float* position) {
    const float32x4_t y = vcvtq_f32_s32(vsubq_s32(vld1q_s32(acc), vdupq_n_s32(correction)));
    const float32x4_t scale = vmulq_f32(vdupq_n_f32(row), vld1q_f32(position));
    vst1q_s32(acc, vreinterpretq_s32_f32(vmulq_f32(y, scale)));
  }
};
#endif

template <class Q>
void dequantize_panel(const PanelDequantizeArgs& a) {
  for (int r = 0; r < a.rows; ++r) {
    int32_t* acc = a.acc + static_cast<int64_t>(r) * a.acc_stride;
    const auto correction =
        static_cast<int32_t>(static_cast<uint32_t>(a.offset) * static_cast<uint32_t>(a.row_sums[r]));
    const float scale = a.row_scales[r];
    for (int m = 0; m < a.positions; m += Q::width)
      Q::dequantize(acc + m, correction, scale, a.position_scales + m);
  }
}

}  // namespace
}  // namespace pared
