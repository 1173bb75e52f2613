// The epilogue of the int8 products: scales, bias, activation, narrowing. IO is a level's set of operations
// of generic/panel_io.h.
#pragma once

#include "kernels/generic/panel_io.h"

namespace pared {
namespace {

// Sums and what they are corrected by: float(a[i] - b[i]), the difference modulo 2^32.
struct ScalarSums {
  using I = uint32_t;
  static PARED_INLINE I load(const int32_t* p) { return static_cast<uint32_t>(*p); }
  static PARED_INLINE float difference(I a, I b) { return static_cast<float>(static_cast<int32_t>(a - b)); }
};
PARED_INLINE ScalarSums sums_of(ScalarF32) { return {}; }
#if defined(__AVX2__)
struct Avx2Sums {
  using I = __m256i;
  static PARED_INLINE I load(const int32_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static PARED_INLINE __m256 difference(I a, I b) { return _mm256_cvtepi32_ps(_mm256_sub_epi32(a, b)); }
};
PARED_INLINE Avx2Sums sums_of(Avx2F32) { return {}; }
#endif
#if defined(__AVX512F__)
struct Avx512Sums {
  using I = __m512i;
  static PARED_INLINE I load(const int32_t* p) { return _mm512_load_si512(p); }
  static PARED_INLINE __m512 difference(I a, I b) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(a, b)); }
};
PARED_INLINE Avx512Sums sums_of(Avx512F32) { return {}; }
#endif

#if defined(__aarch64__)
struct NeonSums {
  using I = int32x4_t;
  static PARED_INLINE I load(const int32_t* p) { return vld1q_s32(p); }
  static PARED_INLINE float32x4_t difference(I a, I b) { return vcvtq_f32_s32(vsubq_s32(a, b)); }
};
PARED_INLINE NeonSums sums_of(NeonF32) { return {}; }
#endif

template <class S>
PARED_INLINE typename S::V bias_vector(const DequantizeArgs& a, int n, int count) {
  if (!a.bias) return S::zero();
  if (count == S::width) return S::loadu(a.bias + n);
  alignas(64) float bias[S::width];
  for (int i = 0; i < S::width; ++i) bias[i] = i < count ? a.bias[n + i] : 0.0f;
  return S::load(bias);
}

PARED_INLINE float* output(const DequantizeArgs& a, int64_t at, float) {
  return static_cast<float*>(a.y) + at;
}
PARED_INLINE uint16_t* output(const DequantizeArgs& a, int64_t at, uint16_t) {
  return static_cast<uint16_t*>(a.y) + at;
}
template <class IO>
PARED_INLINE void store_output(float* p, typename IO::S::V v, int count, DType) {
  IO::store_first(p, v, count);
}
template <class IO>
PARED_INLINE void store_output(uint16_t* p, typename IO::S::V v, int count, DType dtype) {
  IO::store_first(p, v, count, dtype == DType::bf16);
}

// Outputs [n, n + VECTORS vectors), the last of them of `count` outputs. What belongs to an output stays in
// registers while the tokens pass.
template <class IO, class T, Activation ACT, int VECTORS>
PARED_INLINE void dequantize_columns(const DequantizeArgs& args, int n, int count) {
  using S = typename IO::S;
  using Sums = decltype(sums_of(S{}));
  constexpr int W = S::width;
  const DequantizeArgs a = args;  // stores to y might change the arguments, for all that the compiler knows
  typename Sums::I c[VECTORS];
  typename S::V w[VECTORS], b[VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    c[v] = Sums::load(a.compensation + n + v * W);
    w[v] = S::load(a.w_scales + n + v * W);
    b[v] = bias_vector<S>(a, n + v * W, v == VECTORS - 1 ? count : W);
  }
  for (int m = 0; m < a.tokens; ++m) {
    const auto x = S::set1(a.x_scales[m]);
    const int32_t* acc = a.acc + m * a.acc_stride + n;
    T* y = output(a, m * a.y_stride + n, T{});
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const auto sum = Sums::difference(Sums::load(acc + v * W), c[v]);
      const auto out = activate<S>(S::add(S::mul(S::mul(sum, x), w[v]), b[v]), ACT);
      store_output<IO>(y + v * W, out, v == VECTORS - 1 ? count : W, a.dtype);
    }
  }
}

template <class IO, class T, Activation ACT>
void dequantize_rows_of(const DequantizeArgs& a) {
  constexpr int W = IO::S::width;
  // As many vectors side by side as registers hold what belongs to them; an activation needs those for
  // itself.
  constexpr int V = ACT == Activation::none && (W == 4 || W == 16) ? 4 : 1;
  int n = 0;
  for (; n + V * W <= a.outputs; n += V * W) dequantize_columns<IO, T, ACT, V>(a, n, W);
  for (; n < a.outputs; n += W)
    dequantize_columns<IO, T, ACT, 1>(a, n, a.outputs - n < W ? a.outputs - n : W);
}

template <class IO, class T>
void dequantize_rows_as(const DequantizeArgs& a) {
  switch (a.activation) {
    case Activation::none: return dequantize_rows_of<IO, T, Activation::none>(a);
    case Activation::relu: return dequantize_rows_of<IO, T, Activation::relu>(a);
    case Activation::gelu: return dequantize_rows_of<IO, T, Activation::gelu>(a);
    case Activation::gelu_tanh: return dequantize_rows_of<IO, T, Activation::gelu_tanh>(a);
    case Activation::silu: return dequantize_rows_of<IO, T, Activation::silu>(a);
  }
}

// With a residual, which only convolutions have.
template <class IO, class Store>
PARED_INLINE void dequantize_and_add(const DequantizeArgs& a, const Store& finish) {
  using S = typename IO::S;
  using Sums = decltype(sums_of(S{}));
  constexpr int W = S::width;
  for (int n = 0; n < a.outputs; n += W) {
    const int count = a.outputs - n < W ? a.outputs - n : W;
    const auto b = bias_vector<S>(a, n, count), w = S::load(a.w_scales + n);
    const auto c = Sums::load(a.compensation + n);
    for (int m = 0; m < a.tokens; ++m) {
      const auto sum = Sums::difference(Sums::load(a.acc + m * a.acc_stride + n), c);
      const auto y = S::add(S::mul(S::mul(sum, S::set1(a.x_scales[m])), w), b);
      finish(y, m * a.y_stride + n, count);
    }
  }
}

template <class IO>
void dequantize_rows(const DequantizeArgs& a) {
  if (a.residual != 0)
    return with_finish<IO>(
        a, [&](const auto& finish) __attribute__((always_inline)) { dequantize_and_add<IO>(a, finish); });
  if (a.dtype == DType::f32) dequantize_rows_as<IO, float>(a);
  else dequantize_rows_as<IO, uint16_t>(a);
}

}  // namespace
}  // namespace pared
