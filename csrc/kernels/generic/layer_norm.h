// Layer normalisation of rows that stay in L1: a pass for the sum, one for the deviations from the mean, one
// for the result. Deviations in a pass of their own do not cancel as E[x^2] - mean^2 would.
#pragma once

#include "kernels/generic/panel_io.h"

namespace pared {
namespace {

// Sums in four chains: an addition takes as long as four can be started in.
constexpr int kNormChains = 4;

template <class S>
PARED_INLINE float sum_of(const typename S::V chains[kNormChains]) {
  alignas(64) float lanes[S::width];
  S::store(lanes, S::add(S::add(chains[0], chains[1]), S::add(chains[2], chains[3])));
  for (int half = S::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Vectors of a row of elements T: whole ones, and the last, of `count` elements, with zeros behind them.
template <class IO>
PARED_INLINE typename IO::S::V load_whole(const float* p, bool) {
  return IO::S::loadu(p);
}
template <class IO>
PARED_INLINE typename IO::S::V load_whole(const uint16_t* p, bool bf16) {
  return IO::widen(p, bf16);
}
template <class IO, class T>
PARED_INLINE typename IO::S::V load_part(const T* p, int count, bool bf16) {
  alignas(64) T rest[IO::S::width] = {};
  for (int i = 0; i < count; ++i) rest[i] = p[i];
  return load_whole<IO>(rest, bf16);
}
template <class IO>
PARED_INLINE void store_part(float* p, typename IO::S::V v, int count, bool) {
  IO::store_first(p, v, count);
}
template <class IO>
PARED_INLINE void store_part(uint16_t* p, typename IO::S::V v, int count, bool bf16) {
  IO::store_first(p, v, count, bf16);
}

// Vector i of the row, and of its sums: all but the last are whole.
template <class IO, class T, bool RESIDUAL>
PARED_INLINE typename IO::S::V norm_sum(const T* x, const T* residual, T* sum, int64_t i, int count,
                                        bool bf16) {
  constexpr int W = IO::S::width;
  const auto load = [&](const T* p) __attribute__((always_inline)) {
    return count == W ? load_whole<IO>(p + i * W, bf16) : load_part<IO>(p + i * W, count, bf16);
  };
  typename IO::S::V v = load(x);
  if (RESIDUAL) v = IO::S::add(v, load(residual));
  if (sum) store_part<IO>(sum + i * W, v, count, bf16);
  return v;
}

template <class IO, class T, bool RESIDUAL>
void normalise_rows_of(const LayerNormArgs& a) {
  using S = typename IO::S;
  using V = typename S::V;
  constexpr int W = S::width;
  const int64_t whole = a.cols / W, fours = whole / kNormChains * kNormChains;
  const int rest = static_cast<int>(a.cols % W);
  const float count = static_cast<float>(a.cols);
  const bool bf16 = a.dtype == DType::bf16;
  const float *const weight = a.weight, *const bias = a.bias;
  float* const row = a.row;
  for (int64_t r = 0; r < a.rows; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_stride;
    const T* residual = RESIDUAL ? static_cast<const T*>(a.residual) + r * a.residual_stride : nullptr;
    T* sum = a.sum ? static_cast<T*>(a.sum) + r * a.sum_stride : nullptr;
    T* y = static_cast<T*>(a.y) + r * a.y_stride;
    V chains[kNormChains];
    const auto each = [&](const auto& f) __attribute__((always_inline)) {
      for (V& v : chains) v = S::zero();
      int64_t i = 0;
      for (; i < fours; i += kNormChains)
        for (int j = 0; j < kNormChains; ++j) chains[j] = f(chains[j], i + j, W);
      for (; i < whole; ++i) chains[0] = f(chains[0], i, W);
      if (rest) chains[0] = f(chains[0], i, rest);
      return sum_of<S>(chains);
    };
    const float total = each([&](V all, int64_t i, int n) __attribute__((always_inline)) {
      const V v = norm_sum<IO, T, RESIDUAL>(x, residual, sum, i, n, bf16);
      S::store(row + i * W, v);
      return S::add(all, v);
    });
    const float average = total / count;
    const V mean = S::set1(average);
    for (int i = rest; rest && i < W; ++i) row[whole * W + i] = average;  // no deviation
    const float squares = each([&](V all, int64_t i, int) __attribute__((always_inline)) {
      const V v = S::sub(S::load(row + i * W), mean);
      return S::fma(v, v, all);
    });
    const V inverse = S::set1(1.0f / __builtin_sqrtf(squares / count + a.eps));
    const auto result = [&](int64_t i, int n, auto load) __attribute__((always_inline)) {
      V v = S::mul(S::sub(S::load(row + i * W), mean), inverse);
      if (weight) v = S::mul(v, load(weight + i * W));
      if (bias) v = S::add(v, load(bias + i * W));
      store_part<IO>(y + i * W, v, n, bf16);
    };
    for (int64_t i = 0; i < whole; ++i)
      result(i, W, [](const float* p) __attribute__((always_inline)) { return S::loadu(p); });
    if (rest)
      result(whole, rest,
             [&](const float* p) __attribute__((always_inline)) { return load_part<IO>(p, rest, false); });
  }
}

template <class IO, class T>
void normalise_rows_from(const LayerNormArgs& a) {
  if (a.residual) normalise_rows_of<IO, T, true>(a);
  else normalise_rows_of<IO, T, false>(a);
}

template <class IO>
void normalise_rows(const LayerNormArgs& a) {
  if (a.dtype == DType::f32) normalise_rows_from<IO, float>(a);
  else normalise_rows_from<IO, uint16_t>(a);
}

}  // namespace
}  // namespace pared
