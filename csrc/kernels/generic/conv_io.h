// Packing and the epilogue of convolutions on channel planes. A panel row is consecutive output positions of
// one (channel, tap), which lie side by side in the input as long as neither the output row nor the image
// changes: the packer is masked vector loads, one for each such run, with padding as cleared mask bits, and
// the epilogue is a copy. A masked load does not touch the lanes that are off, so no image needs a border.
// Strided convolutions, and 16-bit images, are split into float32 planes first, one a phase of the stride, in
// which neighbouring outputs read neighbouring elements.
#pragma once

#include "kernels/generic/panel_io.h"

namespace pared {
namespace {

// How elements are read that are split off: the type, and whether they are 1, 2 or any number of elements
// apart.
enum class ConvRead { f32_1, f32_2, bf16_1, bf16_2, f16_1, f16_2, any };

PARED_INLINE ConvRead conv_read(DType t, int64_t step) {
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

// Lane l is element i + l * step where bit l is set, else zero. The lanes one by one: rare steps, and what an
// instruction set has no load for.
template <class S>
PARED_INLINE typename S::V gather_elements(const void* x, int64_t i, uint32_t bits, int64_t step, DType t) {
  alignas(64) float lanes[S::width] = {};
  for (int l = 0; l < S::width; ++l)
    if (bits >> l & 1u) lanes[l] = conv_element(x, i + l * step, t);
  return S::load(lanes);
}

struct ScalarConv {
  using Io = ScalarIo;
  using S = ScalarF32;
  using Mask = uint32_t;
  static PARED_INLINE Mask mask(uint32_t bits) { return bits & 1u; }
  static PARED_INLINE S::V load(Mask m, const float* p) { return m ? *p : 0.0f; }
  static PARED_INLINE S::V load_over(S::V into, Mask m, const float* p) { return m ? *p : into; }
  template <ConvRead R>
  static PARED_INLINE S::V gather(const void* x, int64_t i, uint32_t bits, int64_t step, DType t) {
    return bits & 1u ? conv_element(x, i, t) : 0.0f;
  }
};

#if defined(__AVX2__)
struct Avx2Conv {
  using Io = Avx2Io;
  using S = Avx2F32;
  using Mask = __m256i;
  static PARED_INLINE Mask mask(uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  }
  static PARED_INLINE S::V load(Mask m, const float* p) { return _mm256_maskload_ps(p, m); }
  static PARED_INLINE S::V load_over(S::V into, Mask m, const float* p) {
    return _mm256_blendv_ps(into, _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m));
  }
  template <ConvRead R>
  static PARED_INLINE S::V gather(const void* x, int64_t i, uint32_t bits, int64_t step, DType t) {
    if constexpr (R == ConvRead::f32_1) {
      return load(mask(bits), static_cast<const float*>(x) + i);
    } else if constexpr (R == ConvRead::f32_2) {
      // Even elements of 16: the mask bits spread to every second lane of two vectors.
      const uint32_t spread = _pdep_u32(bits, 0x5555u);
      const float* p = static_cast<const float*>(x) + i;
      const __m256 lo = load(mask(spread & 0xffu), p), hi = load(mask(spread >> 8), p + 8);
      const __m256 even = _mm256_shuffle_ps(lo, hi, 0x88);  // 0 2 | 8 10 || 4 6 | 12 14
      return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
    } else if constexpr (R == ConvRead::bf16_1 || R == ConvRead::f16_1) {
      if (bits == 0xffu) return Io::widen(static_cast<const uint16_t*>(x) + i, R == ConvRead::bf16_1);
      return gather_elements<S>(x, i, bits, step, t);
    } else {
      return gather_elements<S>(x, i, bits, step, t);
    }
  }
};
#endif

#if defined(__AVX512F__)
struct Avx512Conv {
  using Io = Avx512Io;
  using S = Avx512F32;
  using Mask = __mmask16;
  static PARED_INLINE Mask mask(uint32_t bits) { return static_cast<__mmask16>(bits); }
  static PARED_INLINE S::V load(Mask m, const float* p) { return _mm512_maskz_loadu_ps(m, p); }
  static PARED_INLINE S::V load_over(S::V into, Mask m, const float* p) {
    return _mm512_mask_loadu_ps(into, m, p);
  }
  // Pieces of equal length side by side, piece b from p + at[b] on; `m` has a piece's lanes.
  template <int PIECES>
  static PARED_INLINE S::V load_pieces(const float* p, const int64_t* at, Mask m) {
    if constexpr (PIECES == 1) {
      return _mm512_maskz_loadu_ps(m, p + at[0]);
    } else if constexpr (PIECES == 2) {
      return _mm512_insertf32x8(
          _mm512_castps256_ps512(_mm256_maskz_loadu_ps(static_cast<__mmask8>(m), p + at[0])),
          _mm256_maskz_loadu_ps(static_cast<__mmask8>(m), p + at[1]), 1);
    } else {
      const __mmask8 k = static_cast<__mmask8>(m);
      const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_maskz_loadu_ps(k, p + at[0])),
                                              _mm_maskz_loadu_ps(k, p + at[1]), 1);
      const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_maskz_loadu_ps(k, p + at[2])),
                                               _mm_maskz_loadu_ps(k, p + at[3]), 1);
      return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    }
  }
  template <ConvRead R>
  static PARED_INLINE S::V gather(const void* x, int64_t i, uint32_t bits, int64_t step, DType t) {
    if constexpr (R == ConvRead::f32_1) {
      return load(mask(bits), static_cast<const float*>(x) + i);
    } else if constexpr (R == ConvRead::f32_2) {
      const uint32_t spread = _pdep_u32(bits, 0x55555555u);
      const float* p = static_cast<const float*>(x) + i;
      const __m512 lo = load(mask(spread), p), hi = load(mask(spread >> 16), p + 16);
      const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      return _mm512_permutex2var_ps(lo, even, hi);
    } else if constexpr (R == ConvRead::bf16_1 || R == ConvRead::f16_1) {
      const __m256i h = _mm256_maskz_loadu_epi16(mask(bits), static_cast<const uint16_t*>(x) + i);
      return R == ConvRead::bf16_1 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))
                                   : _mm512_cvtph_ps(h);
    } else if constexpr (R == ConvRead::bf16_2 || R == ConvRead::f16_2) {
      // The low half of each 32-bit word is the even element.
      const __m512i pairs =
          _mm512_maskz_loadu_epi16(_pdep_u32(bits, 0x55555555u), static_cast<const uint16_t*>(x) + i);
      return R == ConvRead::bf16_2 ? _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))
                                   : _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
    } else {
      return gather_elements<S>(x, i, bits, step, t);
    }
  }
};
#endif

#if defined(__aarch64__)
// There are no masked loads: bits decide lane by lane, the branches are the same from call to call.
struct NeonConv {
  using Io = NeonIo;
  using S = NeonF32;
  using Mask = uint32_t;
  static constexpr Mask kAll = 0xf;
  static PARED_INLINE Mask mask(uint32_t bits) { return bits & kAll; }
  static PARED_INLINE S::V load(Mask m, const float* p) { return load_over(S::zero(), m, p); }
  static PARED_INLINE S::V load_over(S::V into, Mask m, const float* p) {
    if (m == kAll) return vld1q_f32(p);
    if (m & 1u) into = vld1q_lane_f32(p, into, 0);
    if (m & 2u) into = vld1q_lane_f32(p + 1, into, 1);
    if (m & 4u) into = vld1q_lane_f32(p + 2, into, 2);
    if (m & 8u) into = vld1q_lane_f32(p + 3, into, 3);
    return into;
  }
  template <ConvRead R>
  static PARED_INLINE S::V gather(const void* x, int64_t i, uint32_t bits, int64_t step, DType t) {
    if constexpr (R == ConvRead::f32_1) return load(bits, static_cast<const float*>(x) + i);
    if (R == ConvRead::any || bits != kAll) return gather_elements<S>(x, i, bits, step, t);
    // Two elements apart: the second load ends with the last of them, behind which nothing need be.
    if constexpr (R == ConvRead::f32_2) {
      const float* p = static_cast<const float*>(x) + i;
      const float32x4_t b = vld1q_f32(p + 3);
      return vuzp1q_f32(vld1q_f32(p), vextq_f32(b, b, 1));
    }
    constexpr bool kBf16 = R == ConvRead::bf16_1 || R == ConvRead::bf16_2;
    const uint16_t* p = static_cast<const uint16_t*>(x) + i;
    if constexpr (R == ConvRead::bf16_1 || R == ConvRead::f16_1) return Io::widen(p, kBf16);
    const uint16x4_t b = vld1_u16(p + 3);
    return Io::widen(vuzp1_u16(vld1_u16(p), vext_u16(b, b, 1)), kBf16);
  }
};
#endif

// Calls unit(x, row) for the panel row of each channel of one tap: x the tap's view of the channel's plane. A
// tap at a time, because its lane masks then stay in registers.
template <class F>
PARED_INLINE void for_units(const ConvPackArgs& a, int tap, F unit) {
  // The first unit from k0 on that is of this tap.
  const int64_t channel = (a.k0 + a.taps - 1 - tap) / a.taps;
  const float* x = a.x + channel * a.channel_stride + a.tap_offsets[tap];
  for (int64_t u = channel * a.taps + tap - a.k0; u < a.units; u += a.taps, x += a.channel_stride)
    unit(x, a.panel + u * a.stride);
}

// One run a vector: most tiles. VECTORS is a constant, so that nothing but loads and stores is left in the
// loop.
template <class C, int VECTORS>
void pack_whole_vectors(const ConvPackArgs& args) {
  using S = typename C::S;
  constexpr int W = S::width, N = VECTORS * kPanelGroup / W;
  const ConvPackArgs a = args;  // a copy: a store to the panel cannot change it
  int64_t offsets[VECTORS];
  for (int v = 0; v < VECTORS; ++v) offsets[v] = a.runs[v].offset;
  for (int tap = 0; tap < a.taps; ++tap) {
    const uint16_t* lanes = a.lanes + static_cast<int64_t>(tap) * VECTORS;
    typename C::Mask mask[N];
    for (int n = 0; n < N; ++n)
      mask[n] = C::mask((lanes[n * W / kPanelGroup] >> n * W % kPanelGroup) & ((1u << W) - 1u));
    for_units(a, tap, [&](const float* x, float* row) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n)
        S::store(row + n * W, C::load(mask[n], x + offsets[n * W / kPanelGroup] + n * W % kPanelGroup));
    });
  }
}

// Vectors that cross output rows or images are put together from several runs.
template <class C>
void pack_runs(const ConvPackArgs& args) {
  using S = typename C::S;
  constexpr int W = S::width;
  const ConvPackArgs a = args;
  for (int tap = 0; tap < a.taps; ++tap) {
    const uint16_t* lanes = a.lanes + static_cast<int64_t>(tap) * a.run_count;
    for (int r = 0; r < a.run_count;) {
      const int vector = a.runs[r].vector;
      int end = r + 1;
      while (end < a.run_count && a.runs[end].vector == vector) ++end;
      for (int h = 0; h < kPanelGroup; h += W)
        for_units(a, tap, [&](const float* x, float* row) __attribute__((always_inline)) {
          typename S::V v = S::zero();
          for (int i = r; i < end; ++i)
            v = C::load_over(v, C::mask((lanes[i] >> h) & ((1u << W) - 1u)), x + a.runs[i].offset + h);
          S::store(row + vector * kPanelGroup + h, v);
        });
      r = end;
    }
  }
}

template <class C>
void pack_conv(const ConvPackArgs& a) {
  static_assert(kPanelMaxGroups == 8, "a case for each number of vectors");
  if (a.run_count != a.vectors) return pack_runs<C>(a);
  switch (a.vectors) {
    case 1: return pack_whole_vectors<C, 1>(a);
    case 2: return pack_whole_vectors<C, 2>(a);
    case 3: return pack_whole_vectors<C, 3>(a);
    case 4: return pack_whole_vectors<C, 4>(a);
    case 5: return pack_whole_vectors<C, 5>(a);
    case 6: return pack_whole_vectors<C, 6>(a);
    case 7: return pack_whole_vectors<C, 7>(a);
    default: return pack_whole_vectors<C, 8>(a);
  }
}

// One vector, where some band has no such row or an instruction set no better way.
template <class C, int BANDS>
PARED_INLINE void pack_strip_vector(const float* x, const int64_t* band_at, uint32_t bands, uint32_t lanes,
                                    float* to) {
  using S = typename C::S;
  constexpr int W = S::width, kPiece = kPanelGroup / BANDS;
  for (int h = 0; h < kPanelGroup; h += W) {
    typename S::V v = S::zero();
    // The bands that have lanes of this vector.
    const int first = h / kPiece, end = kPiece % W == 0 ? first + 1 : BANDS;
    for (int b = first; b < end; ++b) {
      const uint32_t piece = bands >> b & 1u ? lanes << b * kPiece : 0u;
      v = C::load_over(v, C::mask(piece >> h & ((1u << W) - 1u)), x + band_at[b] + h - b * kPiece);
    }
    S::store(to + h, v);
  }
}

// BANDS pieces of 16 / BANDS lanes a vector. A channel at a time, its rows in the order of memory. COLUMNS of
// them, or any number (0).
template <class C, int BANDS, int COLUMNS>
void pack_strips_of(const ConvStripArgs& args) {
  const ConvStripArgs a = args;
  const float* x = a.x;
  float* panel = a.panel;
  const int columns = COLUMNS ? COLUMNS : a.column_count;
  constexpr uint32_t kAll = (1u << BANDS) - 1u;
  constexpr bool kPieces = C::S::width == kPanelGroup && COLUMNS > 0;
  typename C::Mask masks[COLUMNS ? COLUMNS : 1];
  int64_t offsets[COLUMNS ? COLUMNS : 1];
  float* strips[COLUMNS ? COLUMNS : 1];
  for (int j = 0; j < COLUMNS; ++j) {
    masks[j] = C::mask(a.columns[j].lanes);
    offsets[j] = a.columns[j].offset;
  }
  for (int c = 0; c < a.channels; ++c) {
    for (int j = 0; j < COLUMNS; ++j) strips[j] = panel + a.columns[j].line * kPanelGroup;
    for (const ConvStripRow* row = a.rows; row != a.rows + a.row_count; ++row) {
      const float* from = x + row->offset;
      const int32_t line = row->line * kPanelGroup;
      if constexpr (kPieces) {
        if (row->bands == kAll) {
#pragma GCC unroll 8
          for (int j = 0; j < COLUMNS; ++j)
            C::S::store(strips[j] + line,
                        C::template load_pieces<BANDS>(from + offsets[j], a.band_at, masks[j]));
          continue;
        }
      }
      for (int j = 0; j < columns; ++j)
        pack_strip_vector<C, BANDS>(from + a.columns[j].offset, a.band_at, row->bands, a.columns[j].lanes,
                                    panel + a.columns[j].line * kPanelGroup + line);
    }
    x += a.channel_stride;
    panel += static_cast<int64_t>(a.channel_lines) * kPanelGroup;
  }
}

template <class C, int BANDS>
void pack_strips_in(const ConvStripArgs& a) {
  switch (a.column_count) {
    case 1: return pack_strips_of<C, BANDS, 1>(a);
    case 2: return pack_strips_of<C, BANDS, 2>(a);
    case 3: return pack_strips_of<C, BANDS, 3>(a);
    default: return pack_strips_of<C, BANDS, 0>(a);
  }
}

template <class C>
void pack_strips(const ConvStripArgs& a) {
  static_assert(kMaxBands == 4, "a case for each number of bands");
  if (a.bands == 1) pack_strips_in<C, 1>(a);
  else if (a.bands == 2) pack_strips_in<C, 2>(a);
  else pack_strips_in<C, 4>(a);
}

PARED_INLINE void place_one_by_one(const ConvPlacesArgs& a) {
  for (int i = 0; i < a.count; ++i) {
    const int32_t line = (a.offsets[i] >> 8) * a.channel_lines + a.tap_lines[a.offsets[i] & 0xff];
    a.out[i] = static_cast<uint16_t>((line < a.last ? line : a.last) * kLineStep);
  }
}

template <class C>
void place_entries(const ConvPlacesArgs& args) {
  const ConvPlacesArgs a = args;
#if defined(__AVX512F__)
  if constexpr (C::S::width == 16) {
    if (a.taps <= 64) {
      const __m512i first = _mm512_loadu_si512(a.tap_lines), second = _mm512_loadu_si512(a.tap_lines + 32);
      const __m512i lines = _mm512_set1_epi16(static_cast<int16_t>(a.channel_lines));
      const __m512i last = _mm512_set1_epi16(static_cast<int16_t>(a.last));
      for (int i = 0; i < a.count; i += 32) {
        const int left = a.count - i;
        const __m512i o =
            _mm512_maskz_loadu_epi16(left < 32 ? (1u << left) - 1u : 0xffffffffu, a.offsets + i);
        const __m512i tap = _mm512_permutex2var_epi16(first, o, second);
        const __m512i line = _mm512_add_epi16(_mm512_mullo_epi16(_mm512_srli_epi16(o, 8), lines), tap);
        _mm512_storeu_si512(a.out + i, _mm512_slli_epi16(_mm512_min_epu16(line, last), 5));
      }
      return;
    }
  }
#endif
  place_one_by_one(a);
}

template <class C, ConvRead R>
void split_conv_as(const ConvSplitArgs& args) {
  using S = typename C::S;
  constexpr int W = S::width;
  const ConvSplitArgs a = args;
  const int64_t element = a.dtype == DType::f32 ? 4 : 2;
  const int64_t row_bytes = a.ahead ? ((a.count - 1) * a.step + 1) * element : 0;
  for (int64_t r = 0; r < a.rows; ++r) {
    float* y = a.y + r * a.y_stride;
    const char* next = static_cast<const char*>(a.x) + (r * a.x_stride + a.ahead) * element;
    for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(next + b);
    for (int64_t m = 0; m < a.count; m += W) {
      const uint32_t bits = a.count - m < W ? (1u << (a.count - m)) - 1u : (1u << W) - 1u;
      S::storeu(y + m, C::template gather<R>(a.x, r * a.x_stride + m * a.step, bits, a.step, a.dtype));
    }
  }
}

template <class C>
void split_conv(const ConvSplitArgs& a) {
  switch (conv_read(a.dtype, a.step)) {
    case ConvRead::f32_1: return split_conv_as<C, ConvRead::f32_1>(a);
    case ConvRead::f32_2: return split_conv_as<C, ConvRead::f32_2>(a);
    case ConvRead::bf16_1: return split_conv_as<C, ConvRead::bf16_1>(a);
    case ConvRead::bf16_2: return split_conv_as<C, ConvRead::bf16_2>(a);
    case ConvRead::f16_1: return split_conv_as<C, ConvRead::f16_1>(a);
    case ConvRead::f16_2: return split_conv_as<C, ConvRead::f16_2>(a);
    case ConvRead::any: return split_conv_as<C, ConvRead::any>(a);
  }
}

template <class C, class Store>
PARED_INLINE void store_conv_as(const ConvStoreArgs& a, const Store& finish) {
  using S = typename C::S;
  constexpr int W = S::width;
  for (int r = 0; r < a.rows; ++r) {
    const typename S::V bias = S::set1(a.bias ? a.bias[r] : 0.0f);
    for (const ConvSpan* s = a.spans; s != a.spans + a.span_count; ++s) {
      const float* acc = a.acc + static_cast<int64_t>(r) * a.acc_stride + s->first;
      const int64_t to = s->offset + r * a.row_stride;
      int m = 0;
      // Whole vectors without masks: on Zen a masked store costs several plain ones.
      for (; m + W <= s->count; m += W) finish(S::add(S::loadu(acc + m), bias), to + m, W);
      if (m == s->count) continue;
      const int n = s->count - m;
      finish(S::add(C::Io::load_first(acc + m, n), bias), to + m, n);
    }
  }
}

template <class C>
void store_conv(const ConvStoreArgs& args) {
  const ConvStoreArgs a = args;  // a copy: a store cannot change it
  with_finish<typename C::Io>(
      a, [&](const auto& finish) __attribute__((always_inline)) { store_conv_as<C>(a, finish); });
}

}  // namespace
}  // namespace pared
