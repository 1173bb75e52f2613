"""Layer normalisation on every level, against csrc/ref in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_norm_check import check

from pared import ops

try:
    import torch
except ImportError:  # numpy has no bfloat16
    torch = None

DTYPES = ["float32", "float16"] if torch is None else ["float32", "float16", "bfloat16"]


def vector(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.standard_normal(n).astype(np.float32)


@pytest.mark.parametrize("cols", [1, 2, 7, 8, 15, 16, 17, 31, 63, 64, 65, 127, 384, 769])
def test_shapes(isa, rng, cols):
    x, r = vector(rng, 5 * cols).reshape(5, cols), vector(rng, 5 * cols).reshape(5, cols)
    w, b = vector(rng, cols), vector(rng, cols)
    check(ops.layer_norm(x, w, b, 1e-5, r), x, w, b, 1e-5, r)
    check(ops.layer_norm(x), x, None, None, 1e-5, None)


@settings(max_examples=60)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    shift=st.sampled_from([0.0, 3.0, -100.0]),
    eps=st.sampled_from([1e-12, 1e-5, 0.1]),
    stride=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_problem(isa, rows, cols, dtype, parts, shift, eps, stride, seed):
    rng = np.random.default_rng(seed)

    def kind(a: np.ndarray, dtype: str = "float32") -> Any:
        return a.astype(dtype) if torch is None else torch.from_numpy(a).to(getattr(torch, dtype))

    def matrix() -> Any:
        return kind(
            vector(rng, rows * (cols + stride)).reshape(rows, cols + stride) + np.float32(shift), dtype
        )[:, :cols]

    x = matrix()
    r = matrix() if parts[0] else None
    w, b = (kind(vector(rng, cols)) if p else None for p in parts[1:])
    check(ops.layer_norm(x, w, b, eps, r), x, w, b, eps, r)


def test_threads_share_the_rows(isa, rng):
    """More rows than one thread takes, leading axes, and a residual of other strides."""
    x = vector(rng, 2 * 150 * 384).reshape(2, 150, 384)
    r = vector(rng, 300 * 400).reshape(2, 150, 400)[:, :, 9:393]
    check(ops.layer_norm(x, eps=1e-5, residual=r), x, None, None, 1e-5, r)


def test_nothing():
    for shape in ((0, 5), (3, 0), (0,), (2, 0, 4)):
        assert ops.layer_norm(np.zeros(shape, np.float32)).shape == shape


def test_constant_rows_give_the_bias(isa, rng):
    b = vector(rng, 40)
    y = ops.layer_norm(np.full((3, 40), 2.5, np.float32), vector(rng, 40), b)
    assert (y == b).all()


def test_not_a_number_stays_in_its_row(isa, rng):
    x = vector(rng, 4 * 50).reshape(4, 50)
    y = ops.layer_norm(x)
    for row, bad in enumerate((np.nan, np.inf, -np.inf)):
        x[row, 7 * row] = bad
    z = ops.layer_norm(x)
    assert np.isnan(z[:3]).all()
    assert (z[3] == y[3]).all()


def test_the_check_catches_faults(rng):
    """A variance over n - 1, a residual left out, and a lane of another row's weight."""
    x, r = (vector(rng, 4 * 384).reshape(4, 384) for _ in range(2))
    w, b = vector(rng, 384), vector(rng, 384)
    y = ops.layer_norm(x, w, b, 1e-5, r)
    check(y, x, w, b, 1e-5, r)
    shifted = w.copy()
    shifted[100:] = w[99:-1]
    for wrong in (
        (y - b) * np.float32(np.sqrt(383 / 384)) + b,
        ops.layer_norm(x, w, b),
        ops.layer_norm(x, shifted, b, 1e-5, r),
    ):
        with pytest.raises(AssertionError):
            check(wrong, x, w, b, 1e-5, r)


def test_agrees_with_torch(isa):
    pytest.importorskip("torch")
    x, r = torch.randn(2, 9, 96), torch.randn(2, 9, 96)
    w, b = torch.randn(96), torch.randn(96)
    y = ops.layer_norm(x, w, b, 1e-12, r)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x + r, (96,), w, b, 1e-12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x: expected a numpy array or a torch tensor, got list"),
        ({"x": np.zeros((2, 3))}, "x: expected dtype"),
        ({"x": np.zeros((), np.float32)}, "x: expected one axis or more"),
        ({"weight": np.zeros(4, np.float32)}, "weight: expected shape"),
        ({"bias": np.zeros(3)}, "bias: expected dtype"),
        ({"residual": np.zeros((3, 2), np.float32)}, "residual: expected the shape of x"),
        ({"residual": np.zeros((2, 3), np.float16)}, "residual: expected dtype"),
        ({"eps": -1.0}, "eps: expected a finite number of at least 0, got -1"),
        ({"eps": float("nan")}, "eps: expected a finite number"),
        ({"x": np.zeros((3, 2), np.float32).T}, "x: expected"),
    ],
)
def test_bad_input(change, message):
    arguments = {"x": np.zeros((2, 3), np.float32), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        ops.layer_norm(**arguments)


def test_gradients_are_refused():
    pytest.importorskip("torch")
    with pytest.raises(RuntimeError, match="weight: expected a tensor that needs no gradient"):
        ops.layer_norm(torch.zeros(2, 3), torch.ones(3, requires_grad=True))
