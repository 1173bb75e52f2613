// The block-sparse and dense panel micro-kernel: a register tile of four output rows by a run of positions.
// An entry (one reduction unit that any of the four rows uses) loads each vector of the run once and
// broadcasts four values: 6 + 4 loads for 24 multiply-adds at the full width, so the multiply-adds are the
// limit, not the loads.
#pragma once

#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

// Sums of COUNT positions of a quad, its four rows in the lanes: one multiply-add a position where a vector
// of positions takes four. Each sum is made of the same multiply-adds in the same order.
template <class S, int COUNT>
struct SideSums {
  using T = typename S::Element;
  using Rows = typename S::FourRows;
  typename Rows::V sum[COUNT];

  PARED_INLINE void load(const T* acc, int stride, bool accumulate) {
    for (int i = 0; i < COUNT; ++i) sum[i] = accumulate ? Rows::load(acc + i, stride) : Rows::zero();
  }
  PARED_INLINE void add(const T* values, const T* x) {
    for (int i = 0; i < COUNT; ++i) sum[i] = Rows::fma(values, x + i, sum[i]);
  }
  PARED_INLINE void store(T* acc, int stride) const {
    for (int i = 0; i < COUNT; ++i) Rows::store(acc + i, stride, sum[i]);
  }
};
template <class S>
struct SideSums<S, 0> {
  using T = typename S::Element;
  PARED_INLINE void load(const T*, int, bool) {}
  PARED_INLINE void add(const T*, const T*) {}
  PARED_INLINE void store(T*, int) const {}
};

// RUNS quads side by side, with vectors [FIRST, FIRST + N) of a tile of VECTORS position groups and the SIDE
// positions behind them. `at`: the first entry of the first quad; returns that behind the last.
template <class S, int VECTORS, int FIRST, int N, int SIDE, int RUNS>
PARED_INLINE int64_t quad_panel_runs(const PanelArgs<typename S::Element>& args, const PanelRun* runs,
                                     int64_t at) {
  using V = typename S::V;
  using T = typename S::Element;
  constexpr int kRow = VECTORS * kPanelGroup;  // elements
  const char* panel = reinterpret_cast<const char*>(args.panel + FIRST * S::width);
  T* acc[RUNS];
  int64_t next[RUNS];
  // In step with the entries, those that come next: the quads of the next row group, which lie elsewhere. Zen
  // 4, weights from memory, up to 32 tokens: 0.56 to 0.75 of the time of 4x1 blocks, 0.63 to 0.80 of 4x4 in 8
  // bits.
  uintptr_t ahead_values = reinterpret_cast<uintptr_t>(args.values + 4 * at) + args.values_ahead;
  uintptr_t ahead_offsets = reinterpret_cast<uintptr_t>(args.offsets + at) + args.offsets_ahead;
  V sum[RUNS][4][N + 1];  // the last is not used: N may be zero
  SideSums<S, SIDE> side[RUNS];
  LeftOut<S> left_out[RUNS];
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
    side[i].load(acc[i] + N * S::width, kRow, args.accumulate);
  }
  const auto add = [&](int i) __attribute__((always_inline)) {
    const int64_t e = next[i]++;
    const T* x = reinterpret_cast<const T*>(panel + (args.offsets[e] * scale >> 16));
    const T* values = args.values + 4 * e;
    if constexpr (kByLane<S>) {  // else from memory: a permutation for each costs more than a load
      const typename S::Four four = S::four(values);
      left_out[i].add(four);
      for (int v = 0; v < N; ++v) {
        const typename S::Operand column = S::operand(x + v * S::width);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) sum[i][r][v] = S::fma(S::nth(four, r), column, sum[i][r][v]);
      }
    } else {
      typename S::Operand column[N + 1];
      for (int v = 0; v < N; ++v) column[v] = S::operand(x + v * S::width);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const typename S::Value w = S::value(values[r]);
        for (int v = 0; v < N; ++v) sum[i][r][v] = S::fma(w, column[v], sum[i][r][v]);
      }
    }
    side[i].add(values, x + N * S::width);
  };
  for (int left = common; left > 0; --left) {
    if constexpr (FIRST == 0) {
      __builtin_prefetch(reinterpret_cast<const void*>(ahead_values));
      // A line lasts so many entries; asking for it with each costs 3 to 10 % from cache.
      if (left % (32 / RUNS) == 0) __builtin_prefetch(reinterpret_cast<const void*>(ahead_offsets));
      ahead_values += RUNS * 4 * sizeof(T);
      ahead_offsets += RUNS * sizeof(uint16_t);
    }
#pragma GCC unroll 4
    for (int i = 0; i < RUNS; ++i) add(i);
  }
#pragma GCC unroll 4
  for (int i = 0; i < RUNS; ++i) {
    for (int left = runs[i].count - common; left > 0; --left) add(i);
    for (int r = 0; r < 4; ++r) {
      const auto rest = left_out[i].of_row(r);
      for (int v = 0; v < N; ++v)
        S::store(acc[i] + r * kRow + v * S::width, LeftOut<S>::with(sum[i][r][v], rest));
    }
    side[i].store(acc[i] + N * S::width, kRow);
  }
  return at;
}

// With few vectors several quads go side by side: the four or eight chains of multiply-adds of one would wait
// for each other (4 cycles, two a cycle). They are of nearly equal length, and each sum stays in its order,
// so that an output does not depend on how many positions go with it.
template <class S>
constexpr int side_by_side(int vectors, int side) {
  if (vectors == 0) return 4;
  return S::width != kPanelGroup || vectors > 2 ? 1 : vectors == 2 || side > 1 ? 2 : 4;
}

template <class S, int VECTORS, int FIRST, int N, int SIDE = 0, int RUNS = side_by_side<S>(N, SIDE)>
PARED_INLINE void quad_panel_part(const PanelArgs<typename S::Element>& args) {
  int q = 0;
  int64_t at = 0;
  for (; q + RUNS <= args.rows; q += RUNS)
    at = quad_panel_runs<S, VECTORS, FIRST, N, SIDE, RUNS>(args, args.runs + q, at);
  if constexpr (RUNS > 1)
    for (; q < args.rows; ++q) at = quad_panel_runs<S, VECTORS, FIRST, N, SIDE, 1>(args, args.runs + q, at);
}

// The first ALL vectors of a tile and the SIDE positions behind them, at most WIDEST vectors at a time: what
// the registers hold beside four rows of sums. Parts are of equal width, or one less.
template <class S, int VECTORS, int ALL, int WIDEST, int SIDE = 0, int PART = 0>
PARED_INLINE void quad_panel_parts(const PanelArgs<typename S::Element>& args) {
  constexpr int kParts = ALL > WIDEST ? (ALL + WIDEST - 1) / WIDEST : 1;
  constexpr int kFirst = ALL * PART / kParts, kEnd = ALL * (PART + 1) / kParts;
  constexpr bool kLast = PART + 1 == kParts;
  quad_panel_part<S, VECTORS, kFirst, kEnd - kFirst, kLast ? SIDE : 0>(args);
  if constexpr (!kLast) quad_panel_parts<S, VECTORS, ALL, WIDEST, SIDE, PART + 1>(args);
}

template <class S, int VECTORS, int WIDEST>
void quad_panel_rows(const PanelArgs<typename S::Element>& args) {
  quad_panel_parts<S, VECTORS, VECTORS * kPanelGroup / S::width, WIDEST>(args);
}

#if defined(__AVX2__)
// Where positions may be left out: up to three of the last group with their rows in lanes, so that 17 take
// 1.2 times as long as 16 and not nearly twice; the upper of a group's two vectors.
template <class S, int VECTORS, int WIDEST>
void quad_panel_tile(const PanelArgs<typename S::Element>& args) {
  constexpr int kGroup = kPanelGroup / S::width, kAll = VECTORS * kGroup;
  switch (kPanelGroup - args.spare) {
    case 1: return quad_panel_parts<S, VECTORS, kAll - kGroup, WIDEST - 1, 1>(args);
    case 2: return quad_panel_parts<S, VECTORS, kAll - kGroup, WIDEST - 1, 2>(args);
    case 3: return quad_panel_parts<S, VECTORS, kAll - kGroup, WIDEST - 1, 3>(args);
  }
  if constexpr (kGroup == 2)
    if (args.spare >= S::width) return quad_panel_parts<S, VECTORS, kAll - 1, WIDEST>(args);
  quad_panel_rows<S, VECTORS, WIDEST>(args);
}
#endif

#if defined(__AVX512F__)
// The same for one and two groups of positions, where half of the last vector may be left out as well.
inline bool half_is_enough(int32_t spare) { return spare >= kPanelGroup / 2 && spare < kPanelGroup - 3; }
template <int WIDEST>
void quad_panel_one(const PanelArgs<float>& args) {
  if (half_is_enough(args.spare)) quad_panel_part<Avx512HalfF32, 1, 0, 1>(args);
  else quad_panel_tile<Avx512F32, 1, WIDEST>(args);
}
template <int WIDEST>
void quad_panel_two(const PanelArgs<float>& args) {
  if (half_is_enough(args.spare)) quad_panel_part<Avx512F32AndHalf, 2, 0, 1, 0, 2>(args);
  else quad_panel_tile<Avx512F32, 2, WIDEST>(args);
}
#endif

}  // namespace
}  // namespace pared
