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

// Elements [c, c + width) of a row, those from `cols` on zero.
template <class IO>
PARED_INLINE typename IO::S::V norm_vector(const void* rows, int64_t at, int64_t c, int64_t cols,
                                           DType dtype) {
  using S = typename IO::S;
  constexpr int W = S::width;
  const bool bf16 = dtype == DType::bf16;
  if (dtype == DType::f32) {
    const float* p = static_cast<const float*>(rows) + at + c;
    if (c + W <= cols) return S::loadu(p);
    alignas(64) float rest[W] = {};
    for (int i = 0; c + i < cols; ++i) rest[i] = p[i];
    return S::load(rest);
  }
  const uint16_t* p = static_cast<const uint16_t*>(rows) + at + c;
  if (c + W <= cols) return IO::widen(p, bf16);
  alignas(64) uint16_t rest[W] = {};
  for (int i = 0; c + i < cols; ++i) rest[i] = p[i];
  return IO::widen(rest, bf16);
}

template <class IO>
PARED_INLINE void norm_store(void* rows, int64_t at, int64_t c, int64_t cols, DType dtype,
                             typename IO::S::V v) {
  constexpr int W = IO::S::width;
  const int count = cols - c < W ? static_cast<int>(cols - c) : W;
  if (dtype == DType::f32) IO::store_first(static_cast<float*>(rows) + at + c, v, count);
  else IO::store_first(static_cast<uint16_t*>(rows) + at + c, v, count, dtype == DType::bf16);
}

template <class IO>
void normalise_rows(const LayerNormArgs& a) {
  using S = typename IO::S;
  using V = typename S::V;
  constexpr int W = S::width;
  const int64_t step = kNormChains * W, padded = (a.cols + step - 1) / step * step;
  const float count = static_cast<float>(a.cols);
  for (int64_t r = 0; r < a.rows; ++r) {
    V chains[kNormChains];
    for (V& v : chains) v = S::zero();
    for (int64_t c = 0; c < padded; c += step)
      for (int i = 0; i < kNormChains; ++i) {
        const int64_t at = c + i * W;
        V v = S::zero();
        if (at < a.cols) {
          v = norm_vector<IO>(a.x, r * a.x_stride, at, a.cols, a.dtype);
          if (a.residual)
            v = S::add(v, norm_vector<IO>(a.residual, r * a.residual_stride, at, a.cols, a.dtype));
          if (a.sum) norm_store<IO>(a.sum, r * a.sum_stride, at, a.cols, a.dtype, v);
        }
        S::store(a.row + at, v);
        chains[i] = S::add(chains[i], v);
      }
    const float average = sum_of<S>(chains) / count;
    const V mean = S::set1(average);
    for (int64_t c = a.cols; c < padded; ++c) a.row[c] = average;  // no deviation
    for (V& v : chains) v = S::zero();
    for (int64_t c = 0; c < padded; c += step)
      for (int i = 0; i < kNormChains; ++i) {
        const V v = S::sub(S::load(a.row + c + i * W), mean);
        chains[i] = S::fma(v, v, chains[i]);
      }
    const V inverse = S::set1(1.0f / __builtin_sqrtf(sum_of<S>(chains) / count + a.eps));
    for (int64_t c = 0; c < a.cols; c += W) {
      V v = S::mul(S::sub(S::load(a.row + c), mean), inverse);
      if (a.weight) v = S::mul(v, norm_vector<IO>(a.weight, 0, c, a.cols, DType::f32));
      if (a.bias) v = S::add(v, norm_vector<IO>(a.bias, 0, c, a.cols, DType::f32));
      norm_store<IO>(a.y, r * a.y_stride, c, a.cols, a.dtype, v);
    }
  }
}

}  // namespace
}  // namespace pared
