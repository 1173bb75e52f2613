"""Derives the coefficients of csrc/kernels/generic/activation.h.

    python tools/derive_activations.py

Rational (or polynomial) fits of least maximal relative error: linearised least squares on a dense grid, with
the previous denominator as weight, reweighted by the error until it is level (Lawson's algorithm). Prints for
each function the relative error of the fit, before and after its coefficients are rounded to float32, and the
coefficients, lowest degree first. Needs numpy and scipy.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.polynomial import chebyshev, polynomial
from numpy.typing import NDArray
from scipy.special import erfcx

Floats = NDArray[np.float64]


def fit(
    f: Callable[[Floats], Floats], a: float, b: float, num: int, den: int, bend: float = 1.0
) -> tuple[Floats, Floats, float, float]:
    """P of degree `num`, Q of degree `den` with Q(0) = 1, and the relative errors of P / Q.

    Grid points crowd towards `a` with the power `bend`.
    """
    u = (1 - np.cos(np.pi * np.arange(2001) / 2000)) / 2
    t = a + (b - a) * u**bend
    y = f(t)
    scaled = 2 * (t - a) / (b - a) - 1
    basis_p = chebyshev.chebvander(scaled, num)
    basis_q = chebyshev.chebvander(scaled, den)
    weight = np.ones_like(t)
    q = np.ones_like(t)
    best = (np.inf, None, None)
    for _ in range(200):
        # P - f (Q - 1 T0) = f: Q's T0 coefficient is 1, the rest unknown.
        rows = np.concatenate([basis_p / y[:, None], -basis_q[:, 1:]], axis=1)
        scale = np.sqrt(weight) / np.abs(q)
        x = np.linalg.lstsq(rows * scale[:, None], scale, rcond=None)[0]
        cp, cq = x[: num + 1], np.concatenate([[1.0], x[num + 1 :]])
        q = basis_q @ cq
        error = np.abs(basis_p @ cp / q / y - 1)
        if error.max() < best[0]:
            best = (error.max(), cp, cq)
        weight *= error / error.max() + 1e-3
        weight /= weight.mean()
    worst, cp, cq = best

    def monomial(c: Floats) -> Floats:
        # Chebyshev in `scaled` to powers of t.
        out = np.zeros(1)
        for k in reversed(chebyshev.cheb2poly(c)):
            out = polynomial.polyadd(polynomial.polymul(out, [-(a + b) / (b - a), 2 / (b - a)]), [k])
        return out[: len(c)]

    p, q = monomial(cp), monomial(cq)
    p, q = p / q[0], q / q[0]
    p32, q32 = (c.astype(np.float32).astype(np.float64) for c in (p, q))
    rounded = np.abs(polynomial.polyval(t, p32) / polynomial.polyval(t, q32) / y - 1).max()
    return p, q, worst, rounded


def show(title: str, p: Floats, q: Floats, worst: float, rounded: float) -> None:
    print(f"{title}: relative error 2^{np.log2(worst):.1f}, in float32 coefficients 2^{np.log2(rounded):.1f}")
    for name, c in (("P", p), ("Q", q)):
        if len(c) > 1:
            print(f"  {name}: " + ", ".join(f"{v:.9g}f" for v in c.astype(np.float32)))


def split(name: str, value: float) -> None:
    hi = np.float32(value)
    print(f"{name} = {hi:.9g}f + {np.float32(value - float(hi)):.9g}f")


def main() -> None:
    # 2^r = 1 + r P(r), exact at 0.
    def expm1_over_r(r: Floats) -> Floats:
        return np.where(r == 0, np.log(2), np.expm1(r * np.log(2)) / np.where(r == 0, 1, r))

    show("(2^r - 1) / r on [-1/2, 1/2]", *fit(expm1_over_r, -0.5, 0.5, 5, 0))
    # The upper tail of the normal distribution is exp(-t^2/2) G(t), G(t) = erfcx(t / sqrt 2) / 2.
    for num, den in ((3, 4), (4, 5), (5, 6)):
        show(
            f"G on [0, 14.7], degrees {num}/{den}",
            *fit(lambda t: erfcx(t / np.sqrt(2)) / 2, 0.0, 14.7, num, den, bend=2.0),
        )
    split("log2(e)", np.log2(np.e))
    split("log2(e) / 2", np.log2(np.e) / 2)
    split("2 sqrt(2 / pi) log2(e)", 2 * np.sqrt(2 / np.pi) * np.log2(np.e))
    split("0.044715", 0.044715)


if __name__ == "__main__":
    main()
