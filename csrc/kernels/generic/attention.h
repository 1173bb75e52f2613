// The two micro-kernels of attention. Queries are in lanes, so that keys and values are read where they are,
// one broadcast element at a time, and the softmax never crosses lanes.
#pragma once

#include "kernels/generic/activation.h"
#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

#define PARED_INLINE_LAMBDA __attribute__((always_inline))

// ROWS rows of `a` by vectors [FIRST, FIRST + N) of a panel of GROUPS groups: 6 rows by 4 vectors load 4 + 6
// operands for 24 multiply-adds, which are the limit then.
template <class S, int GROUPS, int FIRST, int N, int ROWS>
PARED_INLINE void rows_panel_tile(const RowsPanelArgs& args, const float* a, float* acc) {
  constexpr int kRow = GROUPS * kPanelGroup;  // elements
  const float* x = args.panel + FIRST * S::width;
  typename S::V sum[ROWS][N];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < N; ++v) sum[r][v] = S::zero();
  const auto step = [&](auto element) PARED_INLINE_LAMBDA {
    typename S::V column[N];
    for (int v = 0; v < N; ++v) column[v] = S::load(x + v * S::width);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const auto w = S::set1(element(r));
      for (int v = 0; v < N; ++v) sum[r][v] = S::fma(w, column[v], sum[r][v]);
    }
    x += kRow;
  };
  const int64_t stride = args.a_stride;
  if (args.by_columns) {
    for (int64_t k = 0; k < args.units; ++k, a += stride)
      step([&](int r) PARED_INLINE_LAMBDA { return a[r]; });
  } else {
    const float* rows[ROWS];
    for (int r = 0; r < ROWS; ++r) rows[r] = a + r * stride;
    for (int64_t k = 0; k < args.units; ++k) step([&](int r) PARED_INLINE_LAMBDA { return rows[r][k]; });
  }
  for (int v = 0; v < N; ++v) {
    const int at = (FIRST + v) * S::width;
    if (args.keep) {
      const auto keep = S::load(args.keep + at);
      for (int r = 0; r < ROWS; ++r) sum[r][v] = S::fma(keep, S::load(acc + r * kRow + at), sum[r][v]);
    }
    const auto scale = args.scale ? S::load(args.scale + at) : S::set1(1.0f);
    for (int r = 0; r < ROWS; ++r) S::store(acc + r * kRow + at, S::mul(sum[r][v], scale));
  }
}

// Rows in runs of nearly equal length, at most MOST; ROWS counts down to the length of this run.
template <class S, int GROUPS, int FIRST, int N, int ROWS>
PARED_INLINE void rows_panel_run(int32_t rows, const RowsPanelArgs& args, const float* a, float* acc) {
  if (rows == ROWS) return rows_panel_tile<S, GROUPS, FIRST, N, ROWS>(args, a, acc);
  if constexpr (ROWS > 1) rows_panel_run<S, GROUPS, FIRST, N, ROWS - 1>(rows, args, a, acc);
}

// All rows; at most WIDEST vectors at a time, and as many rows as REGISTERS then hold sums.
template <class S, int GROUPS, int WIDEST, int REGISTERS, int PART = 0>
void rows_panel(const RowsPanelArgs& args) {
  constexpr int kAll = GROUPS * kPanelGroup / S::width;
  constexpr int kParts = (kAll + WIDEST - 1) / WIDEST;
  constexpr int kFirst = kAll * PART / kParts, kVectors = kAll * (PART + 1) / kParts - kFirst;
  constexpr int kMost = REGISTERS / kVectors < 8 ? REGISTERS / kVectors : 8;
  const int32_t runs = (args.rows + kMost - 1) / kMost;
  for (int32_t i = 0; i < runs; ++i) {
    const int32_t r0 = static_cast<int32_t>(int64_t{args.rows} * i / runs);
    const int32_t r1 = static_cast<int32_t>(int64_t{args.rows} * (i + 1) / runs);
    rows_panel_run<S, GROUPS, kFirst, kVectors, kMost>(r1 - r0, args,
                                                       args.a + (args.by_columns ? r0 : r0 * args.a_stride),
                                                       args.acc + r0 * GROUPS * kPanelGroup);
  }
  if constexpr (PART + 1 < kParts) rows_panel<S, GROUPS, WIDEST, REGISTERS, PART + 1>(args);
}

template <class S>
void softmax_lanes(const SoftmaxArgs& args) {
  const int32_t row = args.groups * kPanelGroup;  // elements
  // exp(x). Below 2^-152 a weight is zero anyway. A NaN passes.
  const auto exponential = [](typename S::V x) PARED_INLINE_LAMBDA {
    x = S::max(S::set1(-105.36f), x);
    const auto k = S::set1(1.44269502f);  // log2(e)
    const auto e = nearest_eighth<S>(x, k);
    const auto power = power_of_two<S>(e, S::product_error(x, k, e.n));
    return S::scale2(power.m, power.n);
  };
  for (int32_t m = 0; m < row; m += S::width) {
    float* s = args.s + m;
    const float* mask = args.mask ? args.mask + m : nullptr;
    // The largest of the lane, in four chains. Never -infinity, lest x - largest be NaN for masked keys.
    const auto least = S::set1(-3.402823466e38f);
    const auto before = args.first ? least : S::load(args.largest + m);
    typename S::V most[4] = {before, least, least, least};
    const auto look = [&](int64_t k, int chain) PARED_INLINE_LAMBDA {
      auto x = S::load(s + k * row);
      if (mask) {
        x = S::add(x, S::load(mask + k * row));
        S::store(s + k * row, x);
      }
      most[chain] = S::max(x, most[chain]);
    };
    int64_t k = 0;
    for (; k + 4 <= args.keys; k += 4) {
      look(k, 0);
      look(k + 1, 1);
      look(k + 2, 2);
      look(k + 3, 3);
    }
    for (; k < args.keys; ++k) look(k, 0);
    const auto largest = S::max(S::max(most[0], most[1]), S::max(most[2], most[3]));
    auto sum = S::zero();
    for (k = 0; k < args.keys; ++k) {
      const auto p = exponential(S::sub(S::load(s + k * row), largest));
      S::store(s + k * row, p);
      sum = S::add(sum, p);
    }
    if (!args.first) {
      const auto keep = exponential(S::sub(before, largest));
      S::store(args.keep + m, keep);
      sum = S::fma(keep, S::load(args.sum + m), sum);
    }
    S::store(args.largest + m, largest);
    S::store(args.sum + m, sum);
    // The sum is 1 or more, unless all keys are masked: the weights are 0 then, and so is what they give.
    S::store(args.inverse + m, S::div(S::set1(1.0f), S::max(S::set1(1e-30f), sum)));
  }
}

}  // namespace
}  // namespace pared
