"""The attention kernels on every level, against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
from attention_check import check
from hypothesis import given, settings
from hypothesis import strategies as st

from pared import ops


def heads(rng: np.random.Generator, batch: int, count: int, positions: int, features: int) -> np.ndarray:
    """A view as models make it: of rows in which the heads lie side by side."""
    rows = rng.standard_normal((batch, positions, count, features)).astype(np.float32)
    return rows.transpose(0, 2, 1, 3)


@pytest.mark.parametrize("features", [1, 5, 32, 67])
@pytest.mark.parametrize("positions", [1, 15, 16, 17, 48, 65, 129])
def test_shapes(isa, rng, positions, features):
    q, k, v = (heads(rng, 2, 3, positions, features) for _ in range(3))
    check(ops.attention(q, k, v), q, k, v)


@settings(max_examples=40)
@given(
    sizes=st.tuples(
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(1, 90), st.integers(1, 33)
    ),
    shared=st.integers(1, 3),
    out=st.integers(1, 40),
    causal=st.booleans(),
    kind=st.sampled_from([None, "bool", "float", "by key", "by head"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_problem(isa, sizes, shared, out, causal, kind, seed):
    rng = np.random.default_rng(seed)
    batch, groups, queries, keys, features = sizes
    q = heads(rng, batch, groups * shared, queries, features)
    k, v = heads(rng, batch, groups, keys, features), heads(rng, batch, groups, keys, out)
    shape = {"by key": (batch, 1, 1, keys), "by head": (groups * shared, queries, 1)}.get(
        str(kind), (batch, 1, queries, keys)
    )
    mask = None
    if kind == "float" or kind == "by head":
        mask = (3 * rng.standard_normal(shape)).astype(np.float32)
    elif kind:
        mask = rng.random(shape) < 0.7
    options = {"mask": mask, "is_causal": causal, "scale": float(np.float32(rng.uniform(-1, 1)))}
    check(ops.attention(q, k, v, **options), q, k, v, **options)


def test_a_mask_that_differs_between_heads_and_sequences(isa, rng):
    """Consecutive heads share the panel of a mask only where it is the same."""
    q, k, v = (heads(rng, 2, 3, 70, 8) for _ in range(3))
    for shape in ((2, 3, 70, 70), (1, 3, 70, 70), (2, 1, 70, 70), (3, 70, 1), (2, 1, 1, 70)):
        mask = rng.random(shape) < 0.5
        check(ops.attention(q, k, v, mask), q, k, v, mask=mask)


@pytest.mark.parametrize("features", [255, 257, 515])
def test_wide_heads(isa, rng, features):
    """Wider than a kernel packs at once."""
    for positions in (1, 17, 33):
        q, k, v = (heads(rng, 1, 2, positions, features) for _ in range(3))
        check(ops.attention(q, k, v), q, k, v)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", [None, "bool", "float32", "own"])
def test_sixteen_bits(isa, rng, dtype, kind):
    """Widened while they are read: as the same numbers in float32, but for the rounding of the output."""
    torch = pytest.importorskip("torch")
    for queries, keys, features, out in (
        (1, 1, 1, 1),
        (17, 130, 33, 5),
        (70, 16, 64, 64),
        (5, 300, 16, 48),
        (18, 9, 301, 300),
    ):
        q, k, v = (
            torch.from_numpy(heads(rng, 2, n, positions, width)).to(getattr(torch, dtype))
            for n, positions, width in ((4, queries, features), (2, keys, features), (2, keys, out))
        )
        mask = None
        if kind == "bool":
            mask = torch.from_numpy(rng.random((2, 1, queries, keys)) < 0.7)
        elif kind:
            mask = torch.from_numpy(rng.standard_normal((2, 1, queries, keys)).astype(np.float32))
            mask = mask.to(q.dtype) if kind == "own" else mask
        y = ops.attention(q, k, v, mask)
        assert y.dtype == q.dtype
        plain = None if mask is None else mask.numpy() if kind == "bool" else mask.float().numpy()
        check(y, q.float().numpy(), k.float().numpy(), v.float().numpy(), mask=plain)
    if dtype == "float16":
        arrays = [x.numpy() for x in (q, k, v)]
        assert (ops.attention(*arrays) == ops.attention(q, k, v).numpy()).all()


def test_dtypes_do_not_mix(rng):
    x = np.zeros((1, 2, 5, 4), np.float32)
    with pytest.raises(TypeError, match="k: expected"):
        ops.attention(x, x.astype(np.float16), x)
    half = x.astype(np.float16)
    with pytest.raises(TypeError, match="mask: expected"):
        ops.attention(x, x, x, np.zeros((5, 5), np.float16))
    assert ops.attention(half, half, half, np.zeros((5, 5), np.float32)).dtype == np.float16


def test_later_blocks_of_keys_take_over(isa, rng):
    """Largest scores that grow or shrink from block to block, and blocks of which nothing is seen."""
    q, k, v = heads(rng, 1, 2, 70, 8), heads(rng, 1, 2, 400, 8), heads(rng, 1, 2, 400, 8)
    steps = np.linspace(0.1, 20, 400, dtype=np.float32)[:, None]
    for scaled in (k * steps, k * steps[::-1]):
        check(ops.attention(q, scaled, v), q, scaled, v)
    mask = np.ones((70, 400), bool)
    mask[:30, :260] = False
    mask[20:50, 130:] = False
    check(ops.attention(q, k, v, mask), q, k, v, mask=mask)
    assert (ops.attention(q, k, v, mask)[:, :, 20:30] == 0).all()


def test_many_keys(isa, rng):
    q, k, v = heads(rng, 1, 1, 64, 4), heads(rng, 1, 1, 9000, 4), heads(rng, 1, 1, 9000, 4)
    check(ops.attention(q, k, v), q, k, v)
    check(ops.attention(q, k, v, is_causal=True), q, k, v, is_causal=True)


def test_queries_that_see_nothing_give_zeros(isa, rng):
    q, k, v = (heads(rng, 1, 2, 20, 8) for _ in range(3))
    mask = np.ones((20, 20), bool)
    mask[3] = False
    y = ops.attention(q, k, v, mask)
    assert (y[:, :, 3] == 0).all()
    assert (y[:, :, 4] != 0).any()
    assert (ops.attention(q, k, v, np.where(mask, 0, -np.inf).astype(np.float32)) == y).all()


def test_the_lowest_number_as_a_mask_is_no_infinity(isa, rng):
    """Where all keys have it, they count alike: what frameworks that add it rely on."""
    q, k, v = (heads(rng, 1, 1, 20, 8) for _ in range(3))
    lowest = np.full((20, 20), np.finfo(np.float32).min)
    y = ops.attention(q, k, v, lowest)
    np.testing.assert_allclose(y, np.broadcast_to(v.mean(2, keepdims=True), y.shape), atol=1e-6)


def test_not_a_number_stays_in_its_query(isa, rng):
    q, k, v = (heads(rng, 1, 1, 40, 8).copy() for _ in range(3))
    q[0, 0, 5, 2] = np.nan
    y = ops.attention(q, k, v)
    assert np.isnan(y[0, 0, 5]).all()
    assert np.isnan(y).sum() == 8
    q[0, 0, 5, 2] = 0
    k[0, 0, 7, 0] = np.nan
    assert np.isnan(ops.attention(q, k, v)).all()


def test_large_scores_do_not_overflow(isa, rng):
    q, k, v = (heads(rng, 1, 1, 33, 8) for _ in range(3))
    check(ops.attention(100 * q, 100 * k, v), 100 * q, 100 * k, v)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_nothing_to_compute(shape):
    x = np.zeros(shape, np.float32)
    assert ops.attention(x, x, x).shape == shape


def test_no_keys(isa):
    q, none = np.ones((1, 1, 3, 4), np.float32), np.ones((1, 1, 0, 4), np.float32)
    assert (ops.attention(q, none, none) == 0).all()


def test_a_wrong_result_is_seen(isa, rng):
    q, k, v = (heads(rng, 1, 2, 20, 8) for _ in range(3))
    y = ops.attention(q, k, v)
    check(y, q, k, v)
    with pytest.raises(AssertionError):
        check(y * (1 + 1e-4), q, k, v)
    with pytest.raises(AssertionError):
        check(y, q, k, v, is_causal=True)


def test_threads_give_the_same_bits(rng):
    from pared import _core

    torch = pytest.importorskip("torch")
    q, k, v = (heads(rng, 3, 4, 130, 32) for _ in range(3))
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(ops.attention(q, k, v))
            assert _core.num_threads() == n
    finally:
        torch.set_num_threads(before)
    assert all((r == results[0]).all() for r in results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((2, 3, 4))}, "q: expected shape"),
        ({"q": np.zeros((1, 2, 5, 4))}, "q: expected"),
        ({"k": np.zeros((1, 2, 5, 3), np.float32)}, "k: expected"),
        ({"k": np.zeros((1, 3, 5, 4), np.float32), "v": np.zeros((1, 3, 5, 4), np.float32)}, "k: expected"),
        ({"v": np.zeros((1, 2, 6, 4), np.float32)}, "v: expected"),
        ({"q": np.zeros((1, 2, 5, 8), np.float32)[..., ::2]}, "q: expected a contiguous last axis"),
        ({"mask": np.zeros((5, 4), np.float32)}, "mask: expected a shape that broadcasts"),
        ({"mask": np.zeros((5, 5))}, "mask: expected"),
        ({"mask": [0]}, "mask: expected"),
        ({"scale": float("nan")}, "scale: expected"),
        ({"v": "text"}, "v: expected"),
    ],
)
def test_bad_arguments(change, message):
    x = np.zeros((1, 2, 5, 4), np.float32)
    with pytest.raises((TypeError, ValueError), match=message):
        ops.attention(**{"q": x, "k": x, "v": x, **change})


def test_outputs_lie_as_projections_take_them(rng):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(heads(rng, 2, 3, 20, 8)) for _ in range(3))
    y = ops.attention(q, k, v)
    assert y.transpose(1, 2).is_contiguous()
    assert ops.attention(q.numpy(), k.numpy(), v.numpy()).transpose(0, 2, 1, 3).flags.c_contiguous
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(y, want)
    with pytest.raises(RuntimeError, match="q: expected a tensor that needs no gradient"):
        ops.attention(q.requires_grad_(), k, v)
