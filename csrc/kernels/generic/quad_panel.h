// The block-sparse and dense panel micro-kernel: a register tile of four output rows by a run of positions.
// An entry (one reduction unit that any of the four rows uses) loads each vector of the run once and
// broadcasts four values: 6 + 4 loads for 24 multiply-adds at the full width, so the multiply-adds are the
// limit, not the loads.
#pragma once

#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

// The four values of an entry. Lanes of a register where multiply-adds take those as they are; else from
// memory: a permutation for each costs more than a load.
template <class S>
PARED_INLINE auto quad_values(const typename S::Element* p) {
  if constexpr (kByLane<S>) return S::four(p);
  else return p;
}
template <class S, class Four>
PARED_INLINE typename S::Value quad_value(Four four, int i) {
  if constexpr (kByLane<S>) return S::nth(four, i);
  else return S::value(four[i]);
}

// RUNS quads side by side, with vectors [FIRST, FIRST + N) of a tile of VECTORS position groups. `at`: the
// first entry of the first quad; returns that behind the last.
template <class S, int VECTORS, int FIRST, int N, int RUNS>
PARED_INLINE int64_t quad_panel_runs(const PanelArgs<typename S::Element>& args, const PanelRun* runs,
                                     int64_t at) {
  using V = typename S::V;
  using T = typename S::Element;
  constexpr int kRow = VECTORS * kPanelGroup;  // elements
  const char* panel = reinterpret_cast<const char*>(args.panel + FIRST * S::width);
  T* acc[RUNS];
  int64_t next[RUNS];
  V sum[RUNS][4][N];
  const uint64_t scale = args.scale;
  int common = runs[0].count;
  for (int i = 0; i < RUNS; ++i) {
    acc[i] = args.acc + FIRST * S::width + runs[i].slot % (kPanelMaxSlots / 4) * (4 * kRow);
    next[i] = at;
    at += runs[i].count;
    common = runs[i].count < common ? runs[i].count : common;
    for (int r = 0; r < 4; ++r)
      for (int v = 0; v < N; ++v)
        sum[i][r][v] = args.accumulate ? S::load(acc[i] + r * kRow + v * S::width) : S::zero();
  }
  const auto add = [&](int i) __attribute__((always_inline)) {
    const int64_t e = next[i]++;
    const T* x = reinterpret_cast<const T*>(panel + (args.offsets[e] * scale >> 16));
    const T* values = args.values + 4 * e;
    typename S::Operand column[N];
    for (int v = 0; v < N; ++v) column[v] = S::operand(x + v * S::width);
    const auto four = quad_values<S>(values);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const typename S::Value w = quad_value<S>(four, r);
      for (int v = 0; v < N; ++v) sum[i][r][v] = S::fma(w, column[v], sum[i][r][v]);
    }
  };
  for (int left = common; left > 0; --left) {
#pragma GCC unroll 4
    for (int i = 0; i < RUNS; ++i) add(i);
  }
#pragma GCC unroll 4
  for (int i = 0; i < RUNS; ++i) {
    for (int left = runs[i].count - common; left > 0; --left) add(i);
    for (int r = 0; r < 4; ++r)
      for (int v = 0; v < N; ++v) S::store(acc[i] + r * kRow + v * S::width, sum[i][r][v]);
  }
  return at;
}

// With few vectors several quads go side by side: the four or eight chains of multiply-adds of one would wait
// for each other (4 cycles, two a cycle). They are of nearly equal length, and each sum stays in its order,
// so that an output does not depend on how many positions go with it.
template <class S, int VECTORS, int FIRST, int N, int RUNS = S::width == kPanelGroup && N <= 2 ? 4 / N : 1>
PARED_INLINE void quad_panel_part(const PanelArgs<typename S::Element>& args) {
  int q = 0;
  int64_t at = 0;
  for (; q + RUNS <= args.rows; q += RUNS)
    at = quad_panel_runs<S, VECTORS, FIRST, N, RUNS>(args, args.runs + q, at);
  if constexpr (RUNS > 1)
    for (; q < args.rows; ++q) at = quad_panel_runs<S, VECTORS, FIRST, N, 1>(args, args.runs + q, at);
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

#if defined(__AVX512F__)
// As csr_panel_two: 17 tokens would take nearly twice as long as 16.
template <int WIDEST>
void quad_panel_two(const PanelArgs<float>& args) {
  if (args.half) quad_panel_part<Avx512F32AndHalf, 2, 0, 1, 2>(args);
  else quad_panel_rows<Avx512F32, 2, WIDEST>(args);
}
#endif

}  // namespace
}  // namespace pared
