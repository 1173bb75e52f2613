// Activations that the epilogues fuse, the same algorithm on every level: a value depends neither on its lane
// nor on the vector's width.
//
// Accuracy over all of float32: relu exact, silu and gelu_tanh within 4 ulp, gelu within 8. The far tails are
// computed as such; 1 + erf(x) or 1 + tanh(x) in float32 would have cancelled to nothing there.
// NaN stays NaN; at -infinity the limit, -0 (torch gives NaN there: -inf * 0).
//
// All of them need 2^e for an e that is a product or a polynomial of x. The relative error of 2^e is the
// absolute error of e, and e reaches -150: so what is left of e beyond the nearest eighth is computed from
// the unrounded product. A table has the powers of an eighth, which leaves a polynomial of degree 3.
// Coefficients: tools/derive_activations.py.
#pragma once

#include "kernels/generic/simd.h"
#include "kernels/types.h"

namespace pared {
namespace {

// 2^e = m * 2^floor(n), n a multiple of 1/8, m in [0.95, 2.1].
template <class S>
struct Power {
  typename S::V m, n;
};

// a * b to the nearest eighth, and beside it a number whose last bits say which.
template <class S>
struct Eighths {
  typename S::V n, bits;
};
template <class S>
PARED_INLINE Eighths<S> nearest_eighth(typename S::V a, typename S::V b) {
  const auto magic = S::set1(1572864.0f);  // 1.5 * 2^20: the last bit of what is added to it is an eighth
  const auto bits = S::fma(a, b, magic);
  return {S::sub(bits, magic), bits};
}

// power (1 + c1 r + c2 r^2 + c3 r^3).
template <class S>
PARED_INLINE typename S::V times_cubic(typename S::V power, typename S::V r, float c1, float c2, float c3) {
  const auto p = S::fma(S::fma(S::set1(c3), r, S::set1(c2)), r, S::set1(c1));
  return S::fma(S::mul(power, r), p, power);
}

// 2^(n + r).
template <class S>
PARED_INLINE Power<S> power_of_two(Eighths<S> e, typename S::V r) {
  return {times_cubic<S>(S::eighth_power(e.bits), r, 0.693147182f, 0.240255207f, 0.0555056743f), e.n};
}

// x / (1 + 2^e) for x >= 0 and x 2^e / (1 + 2^e) for x < 0, where `power` = 2^e, e <= 0, and `s` = -|x|,
// bounded. The power of two is applied last: a result among the denormals is rounded once.
template <class S>
PARED_INLINE typename S::V times_sigmoid(typename S::V x, typename S::V s, Power<S> power) {
  const auto numerator = S::select_negative(x, S::mul(s, power.m), x);
  const auto denominator = S::add(S::set1(1.0f), S::scale2(power.m, power.n));
  return S::scale2(S::div(numerator, denominator), S::select_negative(x, power.n, S::zero()));
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
  const auto e = nearest_eighth<S>(s, k);
  const auto r = S::fma(s, S::set1(1.92596303e-08f), S::product_error(s, k, e.n));
  return times_sigmoid<S>(x, s, power_of_two<S>(e, r));
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
  const auto e = nearest_eighth<S>(z, k);
  const auto r = S::fma(z, S::set1(1.29484024e-08f), S::fma(z_low, k, S::product_error(z, k, e.n)));
  return times_sigmoid<S>(x, s, power_of_two<S>(e, r));
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), with Phi(-t) = exp(-t^2 / 2) G(t) and G(t) = erfcx(t / sqrt 2) / 2 as
// a quotient of polynomials. exp(-q / 2) = 2^n exp(r / 2) with r = -q - 2 ln(2) n; what the constant's
// rounding does to that grows as t^2 and is part of the quotient.
template <class S>
PARED_INLINE typename S::V gelu(typename S::V x) {
  const auto s = minus_abs<S>(x, -14.7f);
  const auto q = S::mul(s, s);
  const auto e = nearest_eighth<S>(q, S::set1(-0.721347511f));
  const auto r = S::sub(S::product_error(e.n, S::set1(-1.38629436f), q), S::product_error(s, s, q));
  const auto m = times_cubic<S>(S::mul(s, S::eighth_power(e.bits)), r, 0.5f, 0.125014931f, 0.0208341684f);
  // In s = -t: the odd coefficients change sign, the terms stay positive.
  auto p = S::fma(S::set1(0.00418555457f), s, S::set1(-0.0411095582f));
  p = S::fma(p, s, S::set1(0.184667349f));
  p = S::fma(p, s, S::set1(-0.440266907f));
  p = S::fma(p, s, S::set1(0.5f));
  auto d = S::fma(S::set1(-0.0104915453f), s, S::set1(0.103051804f));
  d = S::fma(d, s, S::set1(-0.473248899f));
  d = S::fma(d, s, S::set1(1.20851409f));
  d = S::fma(d, s, S::set1(-1.67841876f));
  d = S::fma(d, s, S::set1(1.0f));
  const auto tail = S::scale2(S::div(S::mul(m, p), d), e.n);
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
