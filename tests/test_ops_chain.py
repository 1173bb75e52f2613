"""pared.ops.linear_chain: the same as linear after linear; with int8 weights to the bit, with float32 ones
within a bound that is a formula.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_check import ACTIVATIONS, expected, to_float64

from pared import _core, ops
from pared.ops import BSR, CSR, Bitmap8, BSRInt8, Dense, Int4, Int8
from pared.ops._formats import FORMATS

WIDTHS = [(1, 1, 1), (16, 17, 3), (33, 128, 40), (70, 300, 129), (256, 96, 256)]


def weight(rng: np.random.Generator, rows: int, cols: int, sparsity: float) -> np.ndarray:
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    w[rng.random(w.shape) < sparsity] = 0
    return w


def chain_expected(
    x: Any, ws: list[Any], biases: list[Any], names: list[str | None], dtype: str = "float32"
) -> tuple[np.ndarray, np.ndarray]:
    """The exact result and its bound: each stage's own, plus what the stages before hand on through |W|."""
    y, tolerance = to_float64(x).reshape(-1, ws[0].shape[1]), np.zeros((1, ws[0].shape[1]))
    for i, (w, bias, name) in enumerate(zip(ws, biases, names, strict=True)):
        slope, _ = ACTIVATIONS[name]
        handed = slope * (tolerance @ np.abs(to_float64(w)).T)
        y, own = expected(y, w, bias, name, dtype if i == len(ws) - 1 else "float32")
        tolerance = (own + handed) * 1.001  # roundings of rounded values: of second order
    return y, tolerance


def check(y: Any, x: Any, ws: list[Any], biases: list[Any], names: list[Any], dtype: str = "float32") -> None:
    want, tolerance = chain_expected(x, ws, biases, names, dtype)
    assert tuple(y.shape) == (*x.shape[:-1], ws[-1].shape[0])
    error = np.abs(to_float64(y).reshape(want.shape) - want)
    assert (error <= tolerance).all(), (error - tolerance).max()


@pytest.mark.parametrize("tokens", [1, 16, 17, 63, 128, 129, 300])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_shapes(isa, rng, widths, tokens):
    a, b, c = widths
    ws = [weight(rng, b, a, 0.7), weight(rng, c, b, 0.5)]
    biases = [rng.standard_normal(b).astype(np.float32), None]
    x = rng.standard_normal((tokens, a)).astype(np.float32)
    y = ops.linear_chain(x, [CSR.from_dense(w) for w in ws], biases, ["silu", None])
    check(y, x, ws, biases, ["silu", None])


# More hidden units than are computed at a time, in blocks of 256 that end within one; more outputs than one
# pass over the sums takes; too many for the hidden ones to come in parts; a stage without a partner before.
DEEP = [(40, 1100, 70), (70, 1500, 1300), (30, 1300, 2500), (50, 700, 600, 64), (1100, 40, 1100, 40, 9)]


@pytest.mark.parametrize("tokens", [23, 64, 130])
@pytest.mark.parametrize("widths", DEEP, ids=str)
def test_wide_layers(isa, rng, widths, tokens):
    ws = [weight(rng, o, i, 0.97) for i, o in itertools.pairwise(widths)]
    biases = [rng.standard_normal(len(w)).astype(np.float32) for w in ws]
    names = ["relu", "silu", None, "relu"][: len(ws)]
    x = rng.standard_normal((tokens, widths[0])).astype(np.float32)
    packed = [CSR.from_dense(w) for w in ws]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        y = ops.linear_chain(x, packed, biases, names)
        # The same sums in the same order, where the tiles are the same.
        if tokens == 64:
            assert np.array_equal(y, one_by_one(x, packed, biases, names))
    finally:
        torch.set_num_threads(before)
    check(y, x, ws, biases, names)


def test_no_tokens_and_no_outputs(rng):
    ws = [CSR.from_dense(weight(rng, 5, 3, 0.5)), CSR.from_dense(weight(rng, 4, 5, 0.5))]
    assert ops.linear_chain(np.ones((0, 3), np.float32), ws).shape == (0, 4)
    none = [CSR.from_dense(np.ones((0, 3), np.float32)), CSR.from_dense(np.ones((4, 0), np.float32))]
    bias = np.arange(4, dtype=np.float32)
    assert (ops.linear_chain(np.ones((2, 3), np.float32), none, [None, bias]) == bias).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_stages_formats_tiles_and_threads(isa, rng, threads):
    """Formats differ in their tiles (64, 96, 128 positions): a stage's tiles straddle the next one's."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        widths = [72, 160, 96, 128, 64]
        sparsities = [0.99, 0.0, 0.8, 0.97]
        packers = [
            CSR.from_dense,
            Dense.from_dense,
            lambda w: BSR.from_dense(w, block=(4, 1)),
            CSR.from_dense,
        ]
        ws = [weight(rng, o, i, s) for (i, o), s in zip(itertools.pairwise(widths), sparsities, strict=True)]
        names = ["relu", "silu", None, "gelu_tanh"]
        biases = [rng.standard_normal(len(w)).astype(np.float32) for w in ws]
        packed = [p(w) for p, w in zip(packers, ws, strict=True)]
        for tokens in (40, 200, 777):
            x = rng.standard_normal((tokens, widths[0])).astype(np.float32)
            check(ops.linear_chain(x, packed, biases, names), x, ws, biases, names)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torch_dtypes_and_leading_dimensions(isa, rng, dtype):
    ws = [torch.from_numpy(weight(rng, 48, 40, 0.5)), torch.from_numpy(weight(rng, 24, 48, 0.5))]
    x = torch.from_numpy(rng.standard_normal((2, 3, 40)).astype(np.float32)).to(dtype)
    y = ops.linear_chain(x, [CSR.from_dense(w) for w in ws], activations=["relu", None])
    assert y.dtype == dtype
    check(y, x, ws, [None, None], ["relu", None], str(dtype).removeprefix("torch."))


def test_a_planted_fault_is_caught(rng):
    ws = [weight(rng, 64, 32, 0.5), weight(rng, 16, 64, 0.5)]
    x = rng.standard_normal((20, 32)).astype(np.float32)
    y = ops.linear_chain(x, [CSR.from_dense(w) for w in ws], None, ["gelu", None])
    y[7, 3] += 0.1
    with pytest.raises(AssertionError):
        check(y, x, ws, [None, None], ["gelu", None])


@settings(deadline=None, max_examples=40)
@given(
    widths=st.lists(st.integers(1, 90), min_size=3, max_size=5),
    tokens=st.integers(0, 150),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_random_chains(widths, tokens, sparsity, seed):
    rng = np.random.default_rng(seed)
    ws = [weight(rng, o, i, sparsity) for i, o in itertools.pairwise(widths)]
    names = [("relu", None, "silu")[i % 3] for i in range(len(ws))]
    biases = [None if i % 2 else rng.standard_normal(len(w)).astype(np.float32) for i, w in enumerate(ws)]
    x = rng.standard_normal((tokens, widths[0])).astype(np.float32)
    check(ops.linear_chain(x, [CSR.from_dense(w) for w in ws], biases, names), x, ws, biases, names)


def one_by_one(x: Any, weights: list[Any], biases: list[Any], names: list[Any]) -> Any:
    for w, b, name in zip(weights, biases, names, strict=True):
        x = ops.linear(x, w, b, name)
    return x


def same_bits(a: Any, b: Any) -> bool:
    a, b = (t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.numpy() for t in (a, b))
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


EIGHT_BITS = {
    "int8": Int8.from_dense,
    "bitmap8": Bitmap8.from_dense,
    "bsr8 1x4": lambda w: BSRInt8.from_dense(w, block=(1, 4)),
    "bsr8 4x4": lambda w: BSRInt8.from_dense(w, block=(4, 4)),
    "static": lambda w: Int8.from_dense(
        w, activation_scale=0.03, activation_zero=100, activation_dtype="uint8"
    ),
    "int4": lambda w: Int4.from_dense(w, group=32),
}


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_8_bits_are_those_of_one_layer_after_the_other(isa, rng, kind, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    pack = EIGHT_BITS[kind]
    try:
        for widths in ((1, 1, 1), (33, 128, 40), (70, 300, 129), (64, 1024, 64, 17)):
            ws = [weight(rng, o, i, 0.5) for i, o in itertools.pairwise(widths)]
            packed = [pack(w) for w in ws]
            names = ["gelu", "silu", None][: len(ws)]
            biases = [torch.from_numpy(rng.standard_normal(len(w)).astype(np.float32)) for w in ws]
            for tokens in (1, 17, 48, 97, 333):
                x = torch.from_numpy(rng.standard_normal((tokens, widths[0])).astype(np.float32))
                y = ops.linear_chain(x, packed, biases, names)
                assert same_bits(y, one_by_one(x, packed, biases, names)), (widths, tokens)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_8_bits_of_every_dtype_in_mixed_formats(isa, rng, dtype):
    ws = [weight(rng, 200, 60, 0.6), weight(rng, 90, 200, 0.6), weight(rng, 33, 90, 0.6)]
    packed = [p(w) for p, w in zip((Int8.from_dense, Int4.from_dense, Bitmap8.from_dense), ws, strict=True)]
    x = torch.from_numpy(rng.standard_normal((2, 130, 60)).astype(np.float32)).to(dtype)
    names = ["relu", "gelu_tanh", None]
    y = ops.linear_chain(x, packed, None, names)
    assert y.dtype == dtype
    assert same_bits(y, one_by_one(x, packed, [None] * 3, names))


def test_8_bits_of_tokens_that_are_not_finite(isa, rng):
    ws = [weight(rng, 64, 48, 0.5), weight(rng, 32, 64, 0.5)]
    x = torch.from_numpy(rng.standard_normal((100, 48)).astype(np.float32))
    x[3, 5], x[70, 0], x[71] = float("nan"), float("inf"), 0.0
    packed = [Int8.from_dense(w) for w in ws]
    y = ops.linear_chain(x, packed, None, ["relu", None])
    assert same_bits(y, one_by_one(x, packed, [None] * 2, ["relu", None]))
    assert torch.isnan(y).all(1).nonzero().flatten().tolist() == [3, 70]


def test_a_planted_fault_in_8_bits_is_caught(rng):
    packed = [Int8.from_dense(weight(rng, 64, 32, 0.5)), Int8.from_dense(weight(rng, 16, 64, 0.5))]
    x = torch.from_numpy(rng.standard_normal((100, 32)).astype(np.float32))
    y = ops.linear_chain(x, packed)
    y[50, 3] = np.nextafter(float(y[50, 3]), np.float32(np.inf), dtype=np.float32).item()
    assert not same_bits(y, one_by_one(x, packed, [None] * 2, [None] * 2))


@settings(deadline=None, max_examples=30)
@given(
    widths=st.lists(st.integers(1, 90), min_size=3, max_size=5),
    tokens=st.integers(0, 250),
    kinds=st.lists(st.sampled_from(sorted(EIGHT_BITS)), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_random_chains_of_8_bits(widths, tokens, kinds, seed):
    rng = np.random.default_rng(seed)
    packed = [
        EIGHT_BITS[kinds[n]](weight(rng, o, i, 0.6)) for n, (i, o) in enumerate(itertools.pairwise(widths))
    ]
    names = [("relu", None, "silu")[i % 3] for i in range(len(packed))]
    x = torch.from_numpy(rng.standard_normal((tokens, widths[0])).astype(np.float32))
    y = ops.linear_chain(x, packed, None, names)
    assert same_bits(y, one_by_one(x, packed, [None] * len(packed), names))


def test_precisions_do_not_mix(rng):
    exact, rounded = CSR.from_dense(weight(rng, 8, 8, 0.5)), Int8.from_dense(weight(rng, 8, 8, 0.5))
    with pytest.raises(TypeError, match=r"float32 weights alone or int8 weights alone, got int8 at 1"):
        ops.linear_chain(np.ones((3, 8), np.float32), [exact, rounded])


@pytest.mark.parametrize("name", FORMATS)
def test_the_extension_takes_the_formats_that_say_so(rng, name):
    w = weight(rng, 32, 32, 0.5)
    w[:, 2::4] = w[:, 3::4] = 0  # what 2:4 takes
    packed, x = FORMATS[name].weight.from_dense(w).packed, np.ones((3, 32), np.float32)
    if FORMATS[name].chain is None:
        with pytest.raises(TypeError, match=r"weights: expected linear weights .*at 0"):
            _core.linear_chain(x, [packed, packed], None, None)
    else:
        assert _core.linear_chain(x, [packed, packed], None, None).shape == (3, 32)


def test_bad_arguments_are_named(rng):
    a, b = CSR.from_dense(weight(rng, 8, 4, 0.5)), CSR.from_dense(weight(rng, 6, 8, 0.5))
    x = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"weights: expected two or more, got 1"):
        ops.linear_chain(x, [a])
    with pytest.raises(TypeError, match=r"weights: expected linear weights \(.*CSR.*\), got ndarray at 1"):
        ops.linear_chain(x, [a, np.ones((6, 8), np.float32)])
    conv = CSR.from_dense(np.ones((6, 8, 1, 1), np.float32))
    with pytest.raises(TypeError, match=r"got csr of a convolution at 1"):
        ops.linear_chain(x, [a, conv])
    with pytest.raises(ValueError, match=r"weights: expected weight 1 to take the 6 outputs .*, got 4"):
        ops.linear_chain(np.ones((3, 8), np.float32), [b, a])
    with pytest.raises(ValueError, match=r"x: expected a last dimension of 4"):
        ops.linear_chain(np.ones((3, 5), np.float32), [a, b])
    with pytest.raises(ValueError, match=r"biases: expected 2 entries, .*, got 1"):
        ops.linear_chain(x, [a, b], [None])
    with pytest.raises(ValueError, match=r"activations: expected 2 entries, .*, got 3"):
        ops.linear_chain(x, [a, b], None, ["relu"] * 3)
    with pytest.raises(ValueError, match=r"activation: expected one of relu"):
        ops.linear_chain(x, [a, b], None, ["tanh", None])
    with pytest.raises(ValueError, match=r"bias: expected"):
        ops.linear_chain(x, [a, b], [np.ones(7, np.float32), None])
    with pytest.raises(TypeError, match=r"x: expected dtype float32"):
        ops.linear_chain(x.astype(np.float64), [a, b])
