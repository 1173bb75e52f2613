// Panel packing and the epilogue that stores a tile. Both are transposes, done in registers by blocks of
// 4 columns: a vector is loaded as 128-bit lanes from different rows (lane l of vector j holds row 4l + j),
// which costs loads instead of cross-lane shuffles; then a 4x4 transpose within each lane, 8 shuffles for 4
// vectors, gives whole columns in row order. IO is one level's set of operations (Avx512Io, ...).
#pragma once

#include "kernels/generic/activation.h"
#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

struct ScalarIo {
  using S = ScalarF32;
  static PARED_INLINE void columns(const float* p, int64_t stride, S::V out[4]) {
    for (int c = 0; c < 4; ++c) out[c] = p[c];
  }
  static PARED_INLINE S::V widen(const uint16_t* p, bool bf16) {
    return bf16 ? bf16_to_float(*p) : f16_to_float(*p);
  }
  static PARED_INLINE S::V load_first(const float* p, int n) { return *p; }
  static PARED_INLINE S::V load_first(const uint16_t* p, int n, bool bf16) { return widen(p, bf16); }
  static PARED_INLINE void store_first(float* p, S::V v, int n) { *p = v; }
  static PARED_INLINE void store_first(uint16_t* p, S::V v, int n, bool bf16) {
    *p = bf16 ? float_to_bf16(v) : float_to_f16(v);
  }
};

#if defined(__AVX2__)
struct Avx2Io {
  using S = Avx2F32;
  static PARED_INLINE __m256 two_rows(const float* p, int64_t stride) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * stride), 1);
  }
  // out[c][r] = p[r * stride + c], r < 8, c < 4.
  static PARED_INLINE void columns(const float* p, int64_t stride, S::V out[4]) {
    const __m256 r0 = two_rows(p, stride), r1 = two_rows(p + stride, stride),
                 r2 = two_rows(p + 2 * stride, stride), r3 = two_rows(p + 3 * stride, stride);
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1)),
                  b = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3)),
                  c = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1)),
                  d = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
    out[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
    out[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    out[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(c, d));
    out[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(c, d));
  }
  static PARED_INLINE S::V widen(const uint16_t* p, bool bf16) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)) : _mm256_cvtph_ps(h);
  }
  // Lanes below n, the others zero.
  static PARED_INLINE S::V load_first(const float* p, int n) {
    if (n == 8) return _mm256_loadu_ps(p);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
  }
  static PARED_INLINE S::V load_first(const uint16_t* p, int n, bool bf16) {
    if (n == 8) return widen(p, bf16);
    uint16_t lanes[8] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return widen(lanes, bf16);
  }
  // Lanes below n; n = 8 stores all.
  static PARED_INLINE void store_first(float* p, S::V v, int n) {
    if (n == 8) return _mm256_storeu_ps(p, v);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane), v);
  }
  static PARED_INLINE __m128i to_bf16(S::V v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i h = _mm256_blendv_epi8(rounded, quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  }
  static PARED_INLINE void store_first(uint16_t* p, S::V v, int n, bool bf16) {
    const __m128i h = bf16 ? to_bf16(v) : _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    if (n == 8) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
    alignas(16) uint16_t lanes[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(lanes), h);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  }
};
#endif

#if defined(__AVX512F__)
struct Avx512Io {
  using S = Avx512F32;
  // Masked broadcasts with a memory operand run on a load port and any vector port; an insert would take the
  // one shuffle port of Intel's cores, which the in-lane transpose needs.
  static PARED_INLINE __m512 four_rows(const float* p, int64_t stride) {
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
    v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps(p + 4 * stride));
    v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps(p + 8 * stride));
    return _mm512_mask_broadcast_f32x4(v, 0xf000, _mm_loadu_ps(p + 12 * stride));
  }
  // out[c][r] = p[r * stride + c], r < 16, c < 4.
  static PARED_INLINE void columns(const float* p, int64_t stride, S::V out[4]) {
    const __m512 r0 = four_rows(p, stride), r1 = four_rows(p + stride, stride),
                 r2 = four_rows(p + 2 * stride, stride), r3 = four_rows(p + 3 * stride, stride);
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1)),
                  b = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3)),
                  c = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1)),
                  d = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
    out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
  static PARED_INLINE S::V widen(const uint16_t* p, bool bf16) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)) : _mm512_cvtph_ps(h);
  }
  static PARED_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static PARED_INLINE S::V load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static PARED_INLINE S::V load_first(const uint16_t* p, int n, bool bf16) {
    const __m256i h = _mm256_maskz_loadu_epi16(first(n), p);
    return bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)) : _mm512_cvtph_ps(h);
  }
  // A whole vector is stored without a mask: masked stores cost several operations on AMD's cores.
  static PARED_INLINE void store_first(float* p, S::V v, int n) {
    if (n == 16) return _mm512_storeu_ps(p, v);
    if (n == 8) return _mm256_storeu_ps(p, _mm512_castps512_ps256(v));
    if (n == 4) return _mm_storeu_ps(p, _mm512_castps512_ps128(v));
    _mm512_mask_storeu_ps(p, first(n), v);
  }
  static PARED_INLINE __m256i to_bf16(S::V v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i h = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    h = _mm512_mask_or_epi32(h, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_srli_epi32(u, 16),
                             _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(h);
  }
  static PARED_INLINE void store_first(uint16_t* p, S::V v, int n, bool bf16) {
    const __m256i h = bf16 ? to_bf16(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(p, first(n), h);
  }
};
#endif

#if defined(__aarch64__)
struct NeonIo {
  using S = NeonF32;
  // out[c][r] = p[r * stride + c], r < 4, c < 4.
  static PARED_INLINE void columns(const float* p, int64_t stride, S::V out[4]) {
    const float32x4x2_t a = vtrnq_f32(vld1q_f32(p), vld1q_f32(p + stride));
    const float32x4x2_t b = vtrnq_f32(vld1q_f32(p + 2 * stride), vld1q_f32(p + 3 * stride));
    for (int c = 0; c < 2; ++c) {
      const float64x2_t top = vreinterpretq_f64_f32(a.val[c]), bottom = vreinterpretq_f64_f32(b.val[c]);
      out[c] = vreinterpretq_f32_f64(vzip1q_f64(top, bottom));
      out[c + 2] = vreinterpretq_f32_f64(vzip2q_f64(top, bottom));
    }
  }
  static PARED_INLINE S::V widen(uint16x4_t h, bool bf16) {
    return bf16 ? vreinterpretq_f32_u32(vshll_n_u16(h, 16)) : vcvt_f32_f16(vreinterpret_f16_u16(h));
  }
  static PARED_INLINE S::V widen(const uint16_t* p, bool bf16) { return widen(vld1_u16(p), bf16); }
  // Lanes below n, the others zero.
  static PARED_INLINE S::V load_first(const float* p, int n) {
    if (n == 4) return vld1q_f32(p);
    S::V v = vld1q_lane_f32(p, S::zero(), 0);
    if (n > 1) v = vld1q_lane_f32(p + 1, v, 1);
    if (n > 2) v = vld1q_lane_f32(p + 2, v, 2);
    return v;
  }
  static PARED_INLINE S::V load_first(const uint16_t* p, int n, bool bf16) {
    if (n == 4) return widen(p, bf16);
    uint16x4_t h = vld1_lane_u16(p, vdup_n_u16(0), 0);
    if (n > 1) h = vld1_lane_u16(p + 1, h, 1);
    if (n > 2) h = vld1_lane_u16(p + 2, h, 2);
    return widen(h, bf16);
  }
  // Lanes below n; n = 4 stores all.
  static PARED_INLINE void store_first(float* p, S::V v, int n) {
    if (n == 4) return vst1q_f32(p, v);
    vst1q_lane_f32(p, v, 0);
    if (n > 1) vst1q_lane_f32(p + 1, v, 1);
    if (n > 2) vst1q_lane_f32(p + 2, v, 2);
  }
  static PARED_INLINE uint16x4_t to_bf16(S::V v) {
    const uint32x4_t u = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
  }
  static PARED_INLINE void store_first(uint16_t* p, S::V v, int n, bool bf16) {
    const uint16x4_t h = bf16 ? to_bf16(v) : vreinterpret_u16_f16(vcvt_f16_f32(v));
    if (n == 4) return vst1_u16(p, h);
    vst1_lane_u16(p, h, 0);
    if (n > 1) vst1_lane_u16(p + 1, h, 1);
    if (n > 2) vst1_lane_u16(p + 2, h, 2);
  }
};
#endif

// v, and the first n elements of the residual of `y`, which lies `shift` bytes from it (0: there is none).
template <class IO>
PARED_INLINE typename IO::S::V add_residual(typename IO::S::V v, const float* y, int64_t shift, int n) {
  if (shift == 0) return v;
  const char* at = reinterpret_cast<const char*>(y) + shift;
  return IO::S::add(v, IO::load_first(reinterpret_cast<const float*>(at), n));
}
template <class IO>
PARED_INLINE typename IO::S::V add_residual(typename IO::S::V v, const uint16_t* y, int64_t shift, int n,
                                            bool bf16) {
  if (shift == 0) return v;
  const char* at = reinterpret_cast<const char*>(y) + shift;
  return IO::S::add(v, IO::load_first(reinterpret_cast<const uint16_t*>(at), n, bf16));
}

// Adds the residual, activates and narrows: (v, at, n) stores n outputs to element `at` of y. What the call
// does not ask for is left out of the loop around it, where it would take longer than the store.
enum class FinishWith { nothing, relu, activation, residual };

template <class IO, class Args, bool F32, FinishWith WITH>
struct Finish {
  const Args& a;
  PARED_INLINE void operator()(typename IO::S::V v, int64_t at, int n) const {
    const int64_t residual = WITH == FinishWith::residual ? a.residual : 0;
    const Activation activation = WITH == FinishWith::nothing ? Activation::none
                                  : WITH == FinishWith::relu  ? Activation::relu
                                                              : a.activation;
    if constexpr (F32) {
      float* y = static_cast<float*>(a.y) + at;
      IO::store_first(y, activate<typename IO::S>(add_residual<IO>(v, y, residual, n), activation), n);
    } else {
      const bool bf16 = a.dtype == DType::bf16;
      uint16_t* y = static_cast<uint16_t*>(a.y) + at;
      v = activate<typename IO::S>(add_residual<IO>(v, y, residual, n, bf16), activation);
      IO::store_first(y, v, n, bf16);
    }
  }
};

// Calls loop(finish) with the Finish that the arguments ask for.
template <class IO, class Args, class Loop>
PARED_INLINE void with_finish(const Args& a, Loop loop) {
  using With = FinishWith;
  if (a.dtype != DType::f32) return loop(Finish<IO, Args, false, With::residual>{a});
  if (a.residual != 0) return loop(Finish<IO, Args, true, With::residual>{a});
  if (a.activation == Activation::none) return loop(Finish<IO, Args, true, With::nothing>{a});
  if (a.activation == Activation::relu) return loop(Finish<IO, Args, true, With::relu>{a});
  loop(Finish<IO, Args, true, With::activation>{a});
}

// Units that are staged at once: the deepest K block of any tiling, rounded up to a whole vector.
constexpr int kMaxUnits = 256;

// One group of W = width positions, `units` deep (a multiple of 4), from float32 rows.
template <class IO>
PARED_INLINE void pack_columns(const float* x, int64_t x_stride, int units, float* panel, int64_t stride) {
  typename IO::S::V column[4];
  for (int u = 0; u < units; u += 4, panel += 4 * stride) {
    IO::columns(x + u, x_stride, column);
    for (int c = 0; c < 4; ++c) IO::S::store(panel + c * stride, column[c]);
  }
}

template <class IO>
void pack_panel(const PanelPackArgs& a) {
  constexpr int W = IO::S::width;
  const int whole = a.units & ~3;
  // What the fast path cannot read in place (16-bit rows, missing rows, the last 1 to 3 units) goes through
  // here as float32, in strips short enough to stay in L1 beside the panel.
  alignas(64) float staged[W][kMaxUnits];
  for (int m = 0; m < a.vectors * kPanelGroup; m += W) {
    const int rows = a.positions - m < W ? (a.positions > m ? a.positions - m : 0) : W;
    float* panel = a.panel + m;
    int done = 0;
    if (a.dtype == DType::f32 && rows == W) {
      pack_columns<IO>(static_cast<const float*>(a.x) + m * a.x_stride, a.x_stride, whole, panel, a.stride);
      done = whole;
    }
    while (done < a.units) {
      const int left = a.units - done < kMaxUnits ? a.units - done : kMaxUnits;
      for (int r = 0; r < W; ++r) {
        float* to = staged[r];
        int u = 0;
        if (r >= rows) {
          for (; u < left; ++u) to[u] = 0.0f;
        } else if (a.dtype == DType::f32) {
          const float* from = static_cast<const float*>(a.x) + (m + r) * a.x_stride + done;
          for (; u < left; ++u) to[u] = from[u];
        } else {
          const bool bf16 = a.dtype == DType::bf16;
          const uint16_t* from = static_cast<const uint16_t*>(a.x) + (m + r) * a.x_stride + done;
          for (; u + W <= left; u += W) IO::S::store(to + u, IO::widen(from + u, bf16));
          for (; u < left; ++u) to[u] = bf16 ? bf16_to_float(from[u]) : f16_to_float(from[u]);
        }
        for (; u & 3; ++u) to[u] = 0.0f;
      }
      float* to = panel + static_cast<int64_t>(done) * a.stride;
      const int staged_whole = left & ~3;
      pack_columns<IO>(staged[0], kMaxUnits, staged_whole, to, a.stride);
      if (left & 3) {
        typename IO::S::V column[4];
        IO::columns(staged[0] + staged_whole, kMaxUnits, column);
        for (int c = 0; c < (left & 3); ++c)
          IO::S::store(to + static_cast<int64_t>(staged_whole + c) * a.stride, column[c]);
      }
      done += left;
    }
  }
}

template <class IO, class Store>
PARED_INLINE void store_panel_as(const PanelStoreArgs& a, Store finish) {
  using S = typename IO::S;
  constexpr int W = S::width;
  for (int m = 0; m < a.positions; m += 4) {
    const int n = a.positions - m < 4 ? a.positions - m : 4;
    for (int r = 0; r < a.rows; r += W) {
      const int rows = a.rows - r < W ? a.rows - r : W;
      const typename S::V b = a.bias ? IO::load_first(a.bias + r, rows) : S::zero();
      // Positions come in whole groups of 16 and rows in whole groups of kCsrGroup in the accumulator, so the
      // block may be read to its end; what is not real is not stored.
      typename S::V y[4];
      IO::columns(a.acc + static_cast<int64_t>(r) * a.acc_stride + m, a.acc_stride, y);
      for (int c = 0; c < n; ++c) finish(S::add(y[c], b), (m + c) * a.y_stride + r, rows);
    }
  }
}

template <class IO>
void store_panel(const PanelStoreArgs& args) {
  const PanelStoreArgs a = args;  // a copy: a store cannot change it
  with_finish<IO>(a,
                  [&](const auto& finish) __attribute__((always_inline)) { store_panel_as<IO>(a, finish); });
}

}  // namespace
}  // namespace pared
