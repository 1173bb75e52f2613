// Packing and the epilogue of convolutions on NCHW images. A panel row is consecutive output positions of one
// (channel, tap), which lie in the input at a constant step as long as neither the output row nor the image
// changes: the packer is masked vector loads, one for each such run, with padding as cleared mask bits, and
// the epilogue is a copy. A masked load does not touch the lanes that are off, so no image needs a border.
#pragma once

#include "kernels/generic/panel_io.h"

namespace pared {
namespace {

// How elements are read: the type, and whether neighbouring positions are 1, 2 or any number of elements
// apart.
enum class ConvRead { f32_1, f32_2, bf16_1, bf16_2, f16_1, f16_2, any };

PARED_INLINE ConvRead conv_read(DType t, int step) {
  if (step > 2) return ConvRead::any;
  switch (t) {
    case DType::f32: return step == 1 ? ConvRead::f32_1 : ConvRead::f32_2;
    case DType::bf16: return step == 1 ? ConvRead::bf16_1 : ConvRead::bf16_2;
    default: return step == 1 ? ConvRead::f16_1 : ConvRead::f16_2;
  }
}

PARED_INLINE float conv_element(const void* x, int64_t i, DType t) {
  if (t == DType::f32) return static_cast<const float*>(x)[i];
  const uint16_t h = static_cast<const uint16_t*>(x)[i];
  return t == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
}

// Lane l of `into` becomes element i + l * step where bit l is set, and stays otherwise (it is zero then:
// runs of a vector are disjoint). The lanes one by one: rare steps, and what an instruction set has no load
// for.
template <class S>
PARED_INLINE typename S::V merge_elements(typename S::V into, const void* x, int64_t i, uint32_t bits,
                                          int step, DType t) {
  alignas(64) float lanes[S::width];
  S::store(lanes, into);
  for (int l = 0; l < S::width; ++l)
    if (bits >> l & 1u) lanes[l] = conv_element(x, i + static_cast<int64_t>(l) * step, t);
  return S::load(lanes);
}

struct ScalarConv {
  using Io = ScalarIo;
  using S = ScalarF32;
  template <ConvRead R>
  static PARED_INLINE S::V merge(S::V into, const void* x, int64_t i, uint32_t bits, int step, DType t) {
    return bits & 1u ? conv_element(x, i, t) : into;
  }
  static PARED_INLINE S::V keep(S::V v, uint32_t bits) { return bits & 1u ? v : 0.0f; }
};

#if defined(__AVX2__)
struct Avx2Conv {
  using Io = Avx2Io;
  using S = Avx2F32;
  static PARED_INLINE __m256i lane_mask(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  }
  static PARED_INLINE S::V keep(S::V v, uint32_t bits) {
    return _mm256_and_ps(v, _mm256_castsi256_ps(lane_mask(bits)));
  }
  template <ConvRead R>
  static PARED_INLINE S::V merge(S::V into, const void* x, int64_t i, uint32_t bits, int step, DType t) {
    if constexpr (R == ConvRead::f32_1) {
      return _mm256_or_ps(into, _mm256_maskload_ps(static_cast<const float*>(x) + i, lane_mask(bits)));
    } else if constexpr (R == ConvRead::f32_2) {
      // Even elements of 16: the mask bits spread to every second lane of two vectors.
      const uint32_t spread = _pdep_u32(bits, 0x5555u);
      const float* p = static_cast<const float*>(x) + i;
      const __m256 lo = _mm256_maskload_ps(p, lane_mask(spread & 0xffu)),
                   hi = _mm256_maskload_ps(p + 8, lane_mask(spread >> 8));
      const __m256 even = _mm256_shuffle_ps(lo, hi, 0x88);  // 0 2 | 8 10 || 4 6 | 12 14
      return _mm256_or_ps(into, _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8)));
    } else if constexpr (R == ConvRead::bf16_1 || R == ConvRead::f16_1) {
      if (bits == 0xffu) return Io::widen(static_cast<const uint16_t*>(x) + i, R == ConvRead::bf16_1);
      return merge_elements<S>(into, x, i, bits, step, t);
    } else {
      return merge_elements<S>(into, x, i, bits, step, t);
    }
  }
};
#endif

#if defined(__AVX512F__)
struct Avx512Conv {
  using Io = Avx512Io;
  using S = Avx512F32;
  static PARED_INLINE S::V keep(S::V v, uint32_t bits) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v);
  }
  template <ConvRead R>
  static PARED_INLINE S::V merge(S::V into, const void* x, int64_t i, uint32_t bits, int step, DType t) {
    const __mmask16 mask = static_cast<__mmask16>(bits);
    if constexpr (R == ConvRead::f32_1) {
      return _mm512_mask_loadu_ps(into, mask, static_cast<const float*>(x) + i);
    } else if constexpr (R == ConvRead::f32_2) {
      const uint32_t spread = _pdep_u32(bits, 0x55555555u);
      const float* p = static_cast<const float*>(x) + i;
      const __m512 lo = _mm512_maskz_loadu_ps(static_cast<__mmask16>(spread), p),
                   hi = _mm512_maskz_loadu_ps(static_cast<__mmask16>(spread >> 16), p + 16);
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      return _mm512_mask_mov_ps(into, mask, _mm512_permutex2var_ps(lo, even, hi));
    } else if constexpr (R == ConvRead::bf16_1 || R == ConvRead::f16_1) {
      const __m256i h = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + i);
      const __m512 v = R == ConvRead::bf16_1
                           ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))
                           : _mm512_cvtph_ps(h);
      return _mm512_mask_mov_ps(into, mask, v);
    } else if constexpr (R == ConvRead::bf16_2 || R == ConvRead::f16_2) {
      // The low half of each 32-bit word is the even element.
      const __m512i pairs =
          _mm512_maskz_loadu_epi16(_pdep_u32(bits, 0x55555555u), static_cast<const uint16_t*>(x) + i);
      const __m512 v = R == ConvRead::bf16_2 ? _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))
                                             : _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
      return _mm512_mask_mov_ps(into, mask, v);
    } else {
      return merge_elements<S>(into, x, i, bits, step, t);
    }
  }
};
#endif

// One run a vector: most tiles of stride 1. VECTORS is a constant, so that nothing but loads, masks and
// stores is left in the loop.
template <class C, ConvRead R, int VECTORS>
PARED_INLINE void pack_whole_vectors(const ConvPackArgs& args) {
  using S = typename C::S;
  constexpr int W = S::width;
  const ConvPackArgs a = args;  // a copy: a store to the panel cannot change it
  int64_t offsets[VECTORS], low = a.runs[0].offset, high = low;
  for (int v = 0; v < VECTORS; ++v) {
    offsets[v] = a.runs[v].offset;
    low = offsets[v] < low ? offsets[v] : low;
    high = offsets[v] > high ? offsets[v] : high;
  }
  int tap = static_cast<int>(a.k0 % a.taps);
  int64_t channel = a.k0 / a.taps * a.channel_stride;
  float* row = a.panel;
  for (int u = 0; u < a.units; ++u, row += a.stride) {
    const int64_t base = channel + a.tap_offsets[tap];
    const uint16_t* lanes = a.lanes + static_cast<int64_t>(tap) * VECTORS;
    const bool inside = R == ConvRead::f32_1 && base + low >= a.begin && base + high + kPanelGroup <= a.end;
    const float* x = static_cast<const float*>(a.x) + (inside ? base : 0);
    if (inside && a.whole[tap]) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v)
        for (int h = 0; h < kPanelGroup; h += W)
          S::store(row + v * kPanelGroup + h, S::loadu(x + offsets[v] + h));
    } else if (inside) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v)
        for (int h = 0; h < kPanelGroup; h += W)
          S::store(row + v * kPanelGroup + h, C::keep(S::loadu(x + offsets[v] + h), lanes[v] >> h));
    } else {
      for (int v = 0; v < VECTORS; ++v)
        for (int h = 0; h < kPanelGroup; h += W)
          S::store(row + v * kPanelGroup + h,
                   C::template merge<R>(S::zero(), a.x, base + offsets[v] + h * a.step,
                                        (lanes[v] >> h) & ((1u << W) - 1u), a.step, a.dtype));
    }
    if (++tap == a.taps) {
      tap = 0;
      channel += a.channel_stride;
    }
  }
}

// Vectors that cross output rows or images are put together from several runs.
template <class C, ConvRead R>
PARED_INLINE void pack_runs(const ConvPackArgs& args) {
  using S = typename C::S;
  constexpr int W = S::width;
  const ConvPackArgs a = args;
  int tap = static_cast<int>(a.k0 % a.taps);
  int64_t channel = a.k0 / a.taps * a.channel_stride;
  float* row = a.panel;
  for (int u = 0; u < a.units; ++u, row += a.stride) {
    const int64_t base = channel + a.tap_offsets[tap];
    const uint16_t* lanes = a.lanes + static_cast<int64_t>(tap) * a.run_count;
    for (int r = 0; r < a.run_count;) {
      const int vector = a.runs[r].vector;
      int end = r + 1;
      while (end < a.run_count && a.runs[end].vector == vector) ++end;
      for (int h = 0; h < kPanelGroup; h += W) {
        typename S::V v = S::zero();
        for (int i = r; i < end; ++i)
          v = C::template merge<R>(v, a.x, base + a.runs[i].offset + h * a.step,
                                   (lanes[i] >> h) & ((1u << W) - 1u), a.step, a.dtype);
        S::store(row + vector * kPanelGroup + h, v);
      }
      r = end;
    }
    if (++tap == a.taps) {
      tap = 0;
      channel += a.channel_stride;
    }
  }
}

template <class C, ConvRead R>
void pack_conv_as(const ConvPackArgs& a) {
  static_assert(kPanelMaxGroups == 8, "a case for each number of vectors");
  if (a.run_count != a.vectors) return pack_runs<C, R>(a);
  switch (a.vectors) {
    case 1: return pack_whole_vectors<C, R, 1>(a);
    case 2: return pack_whole_vectors<C, R, 2>(a);
    case 3: return pack_whole_vectors<C, R, 3>(a);
    case 4: return pack_whole_vectors<C, R, 4>(a);
    case 5: return pack_whole_vectors<C, R, 5>(a);
    case 6: return pack_whole_vectors<C, R, 6>(a);
    case 7: return pack_whole_vectors<C, R, 7>(a);
    default: return pack_whole_vectors<C, R, 8>(a);
  }
}

template <class C>
void pack_conv(const ConvPackArgs& a) {
  switch (conv_read(a.dtype, a.step)) {
    case ConvRead::f32_1: return pack_conv_as<C, ConvRead::f32_1>(a);
    case ConvRead::f32_2: return pack_conv_as<C, ConvRead::f32_2>(a);
    case ConvRead::bf16_1: return pack_conv_as<C, ConvRead::bf16_1>(a);
    case ConvRead::bf16_2: return pack_conv_as<C, ConvRead::bf16_2>(a);
    case ConvRead::f16_1: return pack_conv_as<C, ConvRead::f16_1>(a);
    case ConvRead::f16_2: return pack_conv_as<C, ConvRead::f16_2>(a);
    case ConvRead::any: return pack_conv_as<C, ConvRead::any>(a);
  }
}

template <class C, bool F32>
void store_conv_as(const ConvStoreArgs& a) {
  using S = typename C::S;
  using Io = typename C::Io;
  constexpr int W = S::width;
  const bool bf16 = a.dtype == DType::bf16;
  for (int r = 0; r < a.rows; ++r) {
    const typename S::V bias = S::set1(a.bias ? a.bias[r] : 0.0f);
    for (const ConvSpan* s = a.spans; s != a.spans + a.span_count; ++s) {
      const float* acc = a.acc + static_cast<int64_t>(r) * a.acc_stride + s->first;
      const int64_t to = s->offset + r * a.row_stride;
      int m = 0;
      // Whole vectors without masks: on Zen a masked store costs several plain ones.
      for (; m + W <= s->count; m += W) {
        const typename S::V v = activate<S>(S::add(S::loadu(acc + m), bias), a.activation);
        if constexpr (F32) S::storeu(static_cast<float*>(a.y) + to + m, v);
        else Io::store_first(static_cast<uint16_t*>(a.y) + to + m, v, W, bf16);
      }
      if (m == s->count) continue;
      const int n = s->count - m;
      typename S::V v = C::template merge<ConvRead::f32_1>(S::zero(), acc, m, (1u << n) - 1u, 1, DType::f32);
      v = activate<S>(S::add(v, bias), a.activation);
      if constexpr (F32) Io::store_first(static_cast<float*>(a.y) + to + m, v, n);
      else Io::store_first(static_cast<uint16_t*>(a.y) + to + m, v, n, bf16);
    }
  }
}

template <class C>
void store_conv(const ConvStoreArgs& a) {
  if (a.dtype == DType::f32) store_conv_as<C, true>(a);
  else store_conv_as<C, false>(a);
}

}  // namespace
}  // namespace pared
