// Activations that the epilogues fuse, the same algorithm on every level: a value depends neither on its lane
// nor on the vector's width.
//
// Accuracy over all of float32: relu exact, silu and gelu_tanh within 4 ulp, gelu within 8. The far tails are
// computed as such; 1 + erf(x) or 1 + tanh(x) in float32 would have cancelled to nothing there.
// NaN stays NaN; at -infinity the limit, -0 (torch gives NaN there: -inf * 0).
//
// All of them need 2^e for an e that is a product or a polynomial of x: e is carried as high + low, because
// the relative error of 2^e is the absolute error of e, and e reaches -150. Coefficients:
// tools/derive_activations.py.
#pragma once

#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

// 2^(high + low) = m * 2^n, n an integer, m in [0.7, 1.5].
template <class S>
struct Power {
  typename S::V m, n;
};

template <class S>
PARED_INLINE Power<S> power_of_two(typename S::V high, typename S::V low) {
  // Adding 1.5 * 2^23 rounds to the nearest integer.
  const auto magic = S::set1(12582912.0f);
  const auto n = S::sub(S::add(high, magic), magic);
  const auto r = S::add(S::sub(high, n), low);
  auto p = S::set1(0.000154035122f);
  p = S::fma(p, r, S::set1(0.00133907353f));
  p = S::fma(p, r, S::set1(0.00961823761f));
  p = S::fma(p, r, S::set1(0.0555035733f));
  p = S::fma(p, r, S::set1(0.240226492f));
  p = S::fma(p, r, S::set1(0.693147182f));
  return {S::fma(p, r, S::set1(1.0f)), n};
}

// x / (1 + 2^e) for x >= 0 and x 2^e / (1 + 2^e) for x < 0, where e = high + low <= 0 and `s` = -|x|,
// bounded. The power of two is applied last: a result among the denormals is rounded once.
template <class S>
PARED_INLINE typename S::V times_sigmoid(typename S::V x, typename S::V s, typename S::V high,
                                         typename S::V low) {
  const auto e = power_of_two<S>(high, low);
  const auto numerator = S::select_negative(x, S::mul(s, e.m), x);
  const auto denominator = S::add(S::set1(1.0f), S::scale2(e.m, e.n));
  return S::scale2(S::div(numerator, denominator), S::select_negative(x, e.n, S::zero()));
}

// -|x|, not below `least` (where the result has underflowed to zero); NaN stays.
template <class S>
PARED_INLINE typename S::V minus_abs(typename S::V x, float least) {
  return S::max(S::set1(least), S::minus_abs(x));
}

template <class S>
PARED_INLINE typename S::V silu(typename S::V x) {
  const auto s = minus_abs<S>(x, -120.0f);
  const auto k = S::set1(1.44269502f);  // log2(e)
  const auto e = S::mul(s, k);
  return times_sigmoid<S>(x, s, e, S::fma(s, S::set1(1.92596303e-08f), S::product_error(s, k, e)));
}

// x (1 + tanh(y)) / 2 = x sigmoid(2 y), y = sqrt(2 / pi) (x + 0.044715 x^3).
template <class S>
PARED_INLINE typename S::V gelu_tanh(typename S::V x) {
  const auto s = minus_abs<S>(x, -11.5f);
  const auto c = S::set1(0.0447149985f), one = S::set1(1.0f);
  const auto q = S::mul(s, s), q_low = S::product_error(s, s, q);
  const auto a = S::fma(c, q, one);  // 1 + 0.044715 x^2; a - 1 is exact
  const auto a_low =
      S::fma(c, q_low, S::fma(S::set1(1.54614443e-09f), q, S::product_error(c, q, S::sub(a, one))));
  const auto z = S::mul(s, a), z_low = S::fma(s, a_low, S::product_error(s, a, z));
  const auto k = S::set1(2.30220819f);  // 2 sqrt(2 / pi) log2(e)
  const auto e = S::mul(z, k);
  const auto e_low = S::fma(z, S::set1(1.29484024e-08f), S::fma(z_low, k, S::product_error(z, k, e)));
  return times_sigmoid<S>(x, s, e, e_low);
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), with Phi(-t) = exp(-t^2 / 2) G(t) and G(t) = erfcx(t / sqrt 2) / 2 as
// a quotient of polynomials.
template <class S>
PARED_INLINE typename S::V gelu(typename S::V x) {
  const auto s = minus_abs<S>(x, -14.7f);
  const auto q = S::mul(s, s), q_low = S::product_error(s, s, q);
  const auto k = S::set1(-0.721347511f);  // -log2(e) / 2
  const auto e = S::mul(q, k);
  const auto e_low = S::fma(q, S::set1(-9.62981517e-09f), S::fma(q_low, k, S::product_error(q, k, e)));
  const auto power = power_of_two<S>(e, e_low);
  // In s = -t: the odd coefficients change sign, the terms stay positive.
  auto p = S::fma(S::set1(0.00413125847f), s, S::set1(-0.0407337174f));
  p = S::fma(p, s, S::set1(0.183532864f));
  p = S::fma(p, s, S::set1(-0.438696235f));
  p = S::fma(p, s, S::set1(0.5f));
  auto d = S::fma(S::set1(-0.010355413f), s, S::set1(0.102110595f));
  d = S::fma(d, s, S::set1(-0.470256716f));
  d = S::fma(d, s, S::set1(1.20373893f));
  d = S::fma(d, s, S::set1(-1.67527747f));
  d = S::fma(d, s, S::set1(1.0f));
  const auto tail = S::scale2(S::div(S::mul(S::mul(s, power.m), p), d), power.n);
  return S::add(S::max(S::zero(), x), tail);
}

template <class S>
PARED_INLINE typename S::V activate(typename S::V x, Activation a) {
  switch (a) {
    case Activation::none: return x;
    case Activation::relu: return S::max(S::zero(), x);
    case Activation::gelu: return gelu<S>(x);
    case Activation::gelu_tanh: return gelu_tanh<S>(x);
    case Activation::silu: return silu<S>(x);
  }
  return x;
}

}  // namespace
}  // namespace pared
