"""The fused activations, reached through a product with the identity, against float64 over all of float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
from linear_check import activation

from pared import _core, ops

# Units in the last place of the exact result (least denormal where that is one).
BOUND_ULP = {"relu": 0.0, "silu": 4.0, "gelu_tanh": 4.0, "gelu": 8.0}
VECTOR_LEVELS = [level for level in _core.supported_isas() if level != "scalar"]


def exact(name: str, x: np.ndarray) -> np.ndarray:
    return activation(name, x.astype(np.float64))


def error_in_ulp(y: np.ndarray, want: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        ulp = np.spacing(np.abs(want).astype(y.dtype)).astype(np.float64)
        error = np.abs(y.astype(np.float64) - want) / ulp
    return np.where(y == want, 0.0, error)


def apply(name: str, x: np.ndarray) -> np.ndarray:
    """The epilogue on a flat array whose size is a multiple of 16."""
    identity = ops.CSR.from_dense(np.eye(16, dtype=np.float32))
    return ops.linear(x.reshape(-1, 16), identity, activation=name).reshape(-1)


def sweep() -> np.ndarray:
    """Every exponent with random mantissas, both signs; densely where the curves bend; around each edge."""
    rng = np.random.default_rng(20250)
    anywhere = rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    bent = rng.uniform(-16, 16, 1 << 17).astype(np.float32)
    tail = -np.geomspace(1e-3, 130, 1 << 15).astype(np.float32)
    edges = [
        0.0,
        1e-45,
        1.1754942e-38,
        1.17549435e-38,
        0.5,
        1,
        11.5,
        14.7,
        87.3,
        88.72,
        103.97,
        120,
        3.4028235e38,
    ]
    around = np.array(edges, np.float32).view(np.uint32)[:, None] + np.arange(-4, 5)
    around = around[around >= 0].astype(np.uint32).view(np.float32)
    x = np.concatenate([anywhere, bent, tail, around, -around])
    x = x[np.isfinite(x)]
    return x[: x.size // 16 * 16]


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return sweep()


@pytest.fixture(scope="module", params=list(BOUND_ULP))
def case(request, samples) -> tuple[str, np.ndarray]:
    return request.param, exact(request.param, samples)


def test_every_exponent(isa, case, samples):
    name, want = case
    error = error_in_ulp(apply(name, samples), want)
    worst = int(np.argmax(error))
    assert error[worst] <= BOUND_ULP[name], f"{name}({samples[worst]!r}): {error[worst]} ulp"


def test_the_check_notices_one_wrong_ulp_in_the_tail(samples):
    """The cancelling formula that is common elsewhere is far outside of the bound."""
    x = samples[(samples < -3) & (samples > -5)]
    erf = np.frompyfunc(math.erf, 1, 1)(x * np.float32(0.70710678)).astype(np.float32)
    cancelling = np.float32(0.5) * x * (np.float32(1) + erf)
    assert error_in_ulp(cancelling, exact("gelu", x)).max() > 1000


@pytest.mark.parametrize("name", list(BOUND_ULP))
def test_every_float16(isa, name):
    """All 63488 finite values: a float32 result within 8 ulp rounds to a neighbour in float16 at most."""
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    x = x[np.isfinite(x)]
    assert error_in_ulp(apply(name, x), exact(name, x)).max() <= 0.5 + 8 * 2.0**-13


@pytest.mark.parametrize("name", list(BOUND_ULP))
def test_special_values(isa, name):
    x = np.zeros(16, np.float32)
    x[:5] = [np.nan, -np.nan, np.inf, -np.inf, -200.0]
    y = apply(name, x)
    assert np.isnan(y[0])
    assert np.isnan(y[1])
    assert y[2] == np.inf
    assert y[3] == 0.0  # the limit
    assert y[4] == 0.0
    assert np.array_equal(y[5:], np.zeros(11))


@pytest.mark.parametrize("name", list(BOUND_ULP))
def test_a_value_does_not_depend_on_its_place(isa, name, rng):
    """The same bits in every lane, in whole tiles and in tails of rows and of positions."""
    values = np.concatenate([rng.standard_normal(24) * 4, [-90.0, 1e-40, 30.0]]).astype(np.float32)
    reference = {v: apply(name, np.full(16, v, np.float32))[0] for v in values}
    for width in (1, 3, 15, 16, 17, 31):
        for tokens in (1, 2, 5, 16, 97):
            x = rng.choice(values, (tokens, width)).astype(np.float32)
            y = ops.linear(x, ops.CSR.from_dense(np.eye(width, dtype=np.float32)), activation=name)
            want = np.vectorize(reference.__getitem__, otypes=[np.float32])(x)
            assert np.array_equal(y.view(np.uint32), want.view(np.uint32)), (width, tokens)


@pytest.mark.skipif(len(VECTOR_LEVELS) < 2, reason="needs two vector levels")
def test_vector_levels_give_the_same_bits(samples):
    before = _core.isa()
    try:
        for name in BOUND_ULP:
            bits = []
            for level in VECTOR_LEVELS:
                _core.set_isa(level)
                bits.append(apply(name, samples).view(np.uint32))
            for other in bits[1:]:
                assert np.array_equal(bits[0], other), name
    finally:
        _core.set_isa(before)
