// The block-sparse and dense panel micro-kernel: a register tile of four output rows by a run of positions.
// An entry (one reduction unit that any of the four rows uses) loads each vector of the run once and
// broadcasts four values: 6 + 4 loads for 24 multiply-adds at the full width, so the multiply-adds are the
// limit, not the loads.
#pragma once

#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

// Vectors [FIRST, FIRST + N) of a tile of VECTORS position groups.
template <class S, int VECTORS, int FIRST, int N>
PARED_INLINE void quad_panel_part(const PanelArgs<typename S::Element>& args) {
  using V = typename S::V;
  using T = typename S::Element;
  constexpr int kRow = VECTORS * kPanelGroup;  // elements
  const T* values = args.values;
  const uint16_t* offsets = args.offsets;
  const char* panel = reinterpret_cast<const char*>(args.panel + FIRST * S::width);
  T* tile = args.acc + FIRST * S::width;
  for (int q = 0; q < args.rows; ++q) {
    T* acc = tile + args.runs[q].slot % (kPanelMaxSlots / 4) * (4 * kRow);
    V sum[4][N];
    for (int r = 0; r < 4; ++r)
      for (int v = 0; v < N; ++v)
        sum[r][v] = args.accumulate ? S::load(acc + r * kRow + v * S::width) : S::zero();
    for (int left = args.runs[q].count; left > 0; --left, values += 4, ++offsets) {
      const T* x = reinterpret_cast<const T*>(panel + *offsets);
      typename S::Operand column[N];
      for (int v = 0; v < N; ++v) column[v] = S::operand(x + v * S::width);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const typename S::Value w = S::value(values[r]);
        for (int v = 0; v < N; ++v) sum[r][v] = S::fma(w, column[v], sum[r][v]);
      }
    }
    for (int r = 0; r < 4; ++r)
      for (int v = 0; v < N; ++v) S::store(acc + r * kRow + v * S::width, sum[r][v]);
  }
}

// The whole tile, at most WIDEST vectors at a time: what the registers hold beside four rows of sums. Parts
// are of equal width, or one less.
template <class S, int VECTORS, int WIDEST, int PART = 0>
void quad_panel_rows(const PanelArgs<typename S::Element>& args) {
  constexpr int kAll = VECTORS * kPanelGroup / S::width;
  constexpr int kParts = (kAll + WIDEST - 1) / WIDEST;
  constexpr int kFirst = kAll * PART / kParts, kEnd = kAll * (PART + 1) / kParts;
  quad_panel_part<S, VECTORS, kFirst, kEnd - kFirst>(args);
  if constexpr (PART + 1 < kParts) quad_panel_rows<S, VECTORS, WIDEST, PART + 1>(args);
}

}  // namespace
}  // namespace pared
