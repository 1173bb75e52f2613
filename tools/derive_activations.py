"""Derives the coefficients of csrc/kernels/generic/activation.h.

    python tools/derive_activations.py

Rational (or polynomial) fits of least maximal relative error: linearised least squares on a dense grid, with
the previous denominator as weight, reweighted by the error until it is level (Lawson's algorithm). The
coefficients in float32 are the best of some thousand neighbours of the rounded ones. Prints for each function
the relative error of the fit, before and after rounding, and the coefficients, lowest degree first. Needs
numpy and scipy.
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
    c = np.concatenate([p, q[1:]]).astype(np.float32) / np.float32(q[0])

    def error_of(c: NDArray[np.float32]) -> float:
        p32, q32 = c[: num + 1].astype(np.float64), np.concatenate([[1.0], c[num + 1 :].astype(np.float64)])
        return float(np.abs(polynomial.polyval(t, p32) / polynomial.polyval(t, q32) / y - 1).max())

    rng = np.random.default_rng(0)
    rounded = error_of(c)
    for _ in range(8000):
        near = c.copy()
        for k in rng.integers(0, len(c), rng.integers(1, 4)):
            near[k] += np.spacing(near[k]) * rng.integers(-3, 4)
        if (e := error_of(near)) < rounded:
            c, rounded = near, e
    return c[: num + 1], np.concatenate([[1.0], c[num + 1 :]]), worst, rounded


def show(title: str, p: Floats, q: Floats, worst: float, rounded: float) -> None:
    print(f"{title}: relative error 2^{np.log2(worst):.1f}, in float32 coefficients 2^{np.log2(rounded):.1f}")
    for name, c in (("P", p), ("Q", q)):
        if len(c) > 1:
            print(f"  {name}: " + ", ".join(f"{v:.9g}f" for v in c.astype(np.float32)))


def split(name: str, value: float) -> None:
    hi = np.float32(value)
    print(f"{name} = {hi:.9g}f + {np.float32(value - float(hi)):.9g}f")


def main() -> None:
    # e^(k r) = 1 + r P(r), exact at 0; a sixteenth of a power of two to either side, and what rounding adds.
    def expm1_over_r(k: float) -> Callable[[Floats], Floats]:
        return lambda r: np.where(r == 0, k, np.expm1(r * k) / np.where(r == 0, 1, r))

    for name, k in (("2^r", np.log(2)), ("exp(r / 2)", 0.5)):
        reach = 1.01 / 16 * np.log(2) / abs(k)
        show(f"({name} - 1) / r", *fit(expm1_over_r(k), -reach, reach, 2, 0))
    print("2^(i/8): " + ", ".join(f"{v:.9g}f" for v in np.exp2(np.arange(8) / 8).astype(np.float32)))
    # The upper tail of the normal distribution is exp(-t^2/2) G(t), G(t) = erfcx(t / sqrt 2) / 2. The
    # reduction takes 2 ln(2) rounded to float32 for itself: the power comes out as exp(-t^2/2 (1 - off)).
    off = float(np.float32(2 * np.log(2))) / (2 * np.log(2)) - 1

    def g(t: Floats) -> Floats:
        return erfcx(t / np.sqrt(2)) / 2 * np.exp(-t * t / 2 * off)

    for num, den in ((3, 4), (4, 4), (4, 5), (5, 6)):
        show(f"G on [0, 14.7], degrees {num}/{den}", *fit(g, 0.0, 14.7, num, den, bend=2.0))
    split("2 ln(2)", 2 * np.log(2))
    split("log2(e)", np.log2(np.e))
    split("log2(e) / 2", np.log2(np.e) / 2)
    split("2 sqrt(2 / pi) log2(e)", 2 * np.sqrt(2 / np.pi) * np.log2(np.e))
    split("0.044715", 0.044715)


if __name__ == "__main__":
    main()
