// The sparse panel micro-kernel: a register tile of one output row by a run of positions. Each non-zero is
// one broadcast and one multiply-add with a memory operand for each vector of the run. What limits it: loads
// (one for every multiply-add plus the broadcast), then, below about ten non-zeros a row and block, the
// accumulator's load and store and the mispredicted end of the inner loop.
#pragma once

#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

// Where the i-th of four 16-bit numbers begins in a 64-bit word.
constexpr int offset_bit(int i) { return 16 * (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? i : 3 - i); }

// An offset times the panel's scale over 2^16. By a power of two it is a shift, 1 to 2 % faster.
enum class OffsetScale { shift_right, shift_left, multiply };

template <OffsetScale HOW>
PARED_INLINE uint64_t scaled(uint64_t offset, uint64_t scale) {
  if constexpr (HOW == OffsetScale::multiply) return offset * scale >> 16;
  else if constexpr (HOW == OffsetScale::shift_right) return offset >> scale;
  else return offset << scale;
}

// Position groups [FIRST, FIRST + COUNT) of a tile of VECTORS groups. UNROLL non-zeros have accumulators of
// their own: with few vectors the multiply-add's latency (4 cycles, two a cycle) would otherwise leave most
// issue slots empty.
template <class S, int VECTORS, int UNROLL, OffsetScale SCALE, int FIRST, int COUNT>
PARED_INLINE void csr_panel_part(const PanelArgs<typename S::Element>& args) {
  constexpr int N = COUNT * kPanelGroup / S::width;
  using V = typename S::V;
  using T = typename S::Element;
  const T* values = args.values;
  const uint16_t* offsets = args.offsets;
  const char* panel = reinterpret_cast<const char*>(args.panel + FIRST * kPanelGroup);
  T* tile = args.acc + FIRST * kPanelGroup;
  const uint64_t scale = SCALE == OffsetScale::multiply      ? args.scale
                         : SCALE == OffsetScale::shift_right ? 16 - __builtin_ctzll(args.scale)
                                                             : __builtin_ctzll(args.scale) - 16;
  // In step with the work, the lines that come next: a prefetch takes a load's place, so not more than
  // needed.
  const auto fetch = [](const void* p, uintptr_t ahead) __attribute__((always_inline)) {
    if constexpr (FIRST == 0)
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + ahead));
  };
  int r = 0;
  if (args.accumulate)
    while (r < args.rows && args.runs[r].count == 0) ++r;
  for (; r < args.rows; ++r) {
    int left = args.runs[r].count;
    T* acc = tile + args.runs[r].slot % kPanelMaxSlots * (VECTORS * kPanelGroup);
    V sum[UNROLL][N];
    const auto add = [&](int u, typename S::Value w, uint64_t offset) __attribute__((always_inline)) {
      const T* x = reinterpret_cast<const T*>(panel + scaled<SCALE>(offset, scale));
      V* to = sum[u % UNROLL];
      for (int v = 0; v < N; ++v) to[v] = S::fma(w, S::operand(x + v * S::width), to[v]);
    };
    for (int v = 0; v < N; ++v) sum[0][v] = args.accumulate ? S::load(acc + v * S::width) : S::zero();
    for (int u = 1; u < UNROLL; ++u)
      for (int v = 0; v < N; ++v) sum[u][v] = S::zero();
    LeftOut<S> left_out;
    fetch(values, args.values_ahead);
    fetch(offsets, args.offsets_ahead);
    // Four offsets in one load: a load whose result is an address takes more than its share of the load
    // ports, which limit this loop (7 % of a float32 convolution at 80 and 90 % zeros on Zen 5).
    const auto add_four = [&](int u) __attribute__((always_inline)) {
      uint64_t four;
      __builtin_memcpy(&four, offsets, sizeof(four));
      const typename S::Four w = S::four(values);
      left_out.add(w);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) add(u + i, S::nth(w, i), four >> offset_bit(i) & 0xffff);
      values += 4;
      offsets += 4;
    };
    for (; left >= 8; left -= 8) {
      fetch(values, args.values_ahead);
      add_four(0);
      fetch(offsets, args.offsets_ahead);
      add_four(4);
    }
    if (left >= 4) {
      add_four(0);
      left -= 4;
    }
    // The rest, each on accumulators of its own where there are several: a single chain would wait out the
    // latency for every one.
#pragma GCC unroll 4
    for (int u = 0; u < 3; ++u) {
      if (u >= left) break;
      const uint64_t offset = offsets[u];
      const typename S::Value w = S::value(values[u]);
      left_out.add(w);
      add(u, w, offset);
    }
    values += left;
    offsets += left;
    const auto rest = left_out.of_all();
    for (int v = 0; v < N; ++v) {
      V total = sum[0][v];
      for (int u = 1; u < UNROLL; ++u) total = S::add(sum[u][v], total);
      S::store(acc + v * S::width, LeftOut<S>::with(total, rest));
    }
  }
}

// A panel's own scale is a power of two.
template <class S, int VECTORS, int UNROLL, int FIRST = 0, int COUNT = VECTORS>
PARED_INLINE void csr_panel_any(const PanelArgs<typename S::Element>& args) {
  if (args.scale & (args.scale - 1))
    csr_panel_part<S, VECTORS, UNROLL, OffsetScale::multiply, FIRST, COUNT>(args);
  else if (args.scale <= 1 << 16)
    csr_panel_part<S, VECTORS, UNROLL, OffsetScale::shift_right, FIRST, COUNT>(args);
  else csr_panel_part<S, VECTORS, UNROLL, OffsetScale::shift_left, FIRST, COUNT>(args);
}

template <class S, int VECTORS, int UNROLL>
void csr_panel_rows(const PanelArgs<typename S::Element>& args) {
  csr_panel_any<S, VECTORS, UNROLL>(args);
}

// Two halves, one after the other, where the whole would not fit the registers.
template <class S, int VECTORS, int UNROLL>
void csr_panel_halves(const PanelArgs<typename S::Element>& args) {
  csr_panel_any<S, VECTORS, UNROLL, 0, VECTORS / 2>(args);
  csr_panel_any<S, VECTORS, UNROLL, VECTORS / 2, VECTORS - VECTORS / 2>(args);
}
template <class S, int VECTORS, int UNROLL>
void csr_panel_thirds(const PanelArgs<typename S::Element>& args) {
  constexpr int kFirst = VECTORS / 3, kSecond = 2 * VECTORS / 3;
  csr_panel_any<S, VECTORS, UNROLL, 0, kFirst>(args);
  csr_panel_any<S, VECTORS, UNROLL, kFirst, kSecond - kFirst>(args);
  csr_panel_any<S, VECTORS, UNROLL, kSecond, VECTORS - kSecond>(args);
}

#if defined(__AVX512F__)
// One vector and two. Where the last eight positions are not asked for, half of the last is left out: on
// cores whose vector units are 256 bits wide 17 tokens would take 1.6 times as long as 16.
template <int UNROLL>
void csr_panel_one(const PanelArgs<float>& args) {
  if (args.spare >= kPanelGroup / 2) csr_panel_any<Avx512HalfF32, 1, UNROLL>(args);
  else csr_panel_any<Avx512F32, 1, UNROLL>(args);
}
template <int UNROLL>
void csr_panel_two(const PanelArgs<float>& args) {
  if (args.spare >= kPanelGroup / 2) csr_panel_any<Avx512F32AndHalf, 2, UNROLL>(args);
  else csr_panel_any<Avx512F32, 2, UNROLL>(args);
}
#endif

}  // namespace
}  // namespace pared
