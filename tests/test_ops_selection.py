"""pared.ops' selection: tensors and arrays in, the same kind out, and what is refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import selection_reference as ref
import torch

from pared.ops import Threshold, block_mask, nm_mask, select_threshold, topk, topk_mask

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(found: Threshold, expected: Threshold) -> None:
    """Equal, where a threshold may be NaN."""
    np.testing.assert_equal(tuple(found), tuple(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [100, 100_003])
@pytest.mark.parametrize("key", ["abs", "identity", "square", "abs_mul"])
def test_torch_dtypes(dtype, n, key):
    x, g = tensor((n,), dtype), tensor((n,), dtype, 1)
    other = g if key == "abs_mul" else None
    flat = ref.keys(x, key, g)
    for k in (0, 1, n // 3, n):
        assert select_threshold(x, k, key, other=other) == ref.threshold(flat, k)
        m = topk_mask(x, k, key, other=other)
        assert isinstance(m, torch.Tensor)
        assert m.dtype == torch.bool
        ref.check_mask(flat, k, m.numpy())
        v, i = topk(x, k, key, other=other)
        assert v.dtype == dtype
        assert i.dtype == torch.int64
        np.testing.assert_array_equal(i.numpy(), ref.order(flat)[:k])
        assert torch.equal(v, x[i])


@pytest.mark.parametrize("key", ["abs", "identity"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_16_bit_number(isa, dtype, key):
    """Denormals, infinities, signed zeros; NaN where that is allowed; float32 members beside them."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    x = x[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))]
    numbers = x[~x.isnan()]
    wide = tensor((500,)) * 2.0**-100
    for nan, members in (("raise", [numbers]), ("lowest", [x]), ("lowest", [wide, x])):
        flat = np.concatenate([ref.keys(m, key) for m in members])
        for k in (1, 130, flat.size // 3, flat.size // 2, flat.size - 300, flat.size):
            assert_same(select_threshold(members, k, key, nan=nan), ref.threshold(flat, k))
            masks = topk_mask(members, k, key, nan=nan)
            ref.check_mask(flat, k, torch.cat(masks).numpy())
    with pytest.raises(ValueError, match="expected no NaN"):
        select_threshold(x, 7, key)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_structures(dtype):
    w, c = tensor((12, 40), dtype), tensor((8, 12, 3, 3), dtype)
    for x in (w, c):
        score = ref.keys(x)
        np.testing.assert_array_equal(nm_mask(x, 2, 4).numpy(), ref.nm(score, 2, 4))
        got = block_mask(x, 20, (4, 2), "square")
        np.testing.assert_array_equal(got.numpy(), ref.block_mask([ref.keys(x, "square")], 20, 4, 2)[0])
        rows = topk_mask(x, 7, dim=1)
        assert rows.shape == x.shape
        np.testing.assert_array_equal(
            rows.numpy().reshape(x.shape[0], -1), ref.mask(score.reshape(x.shape[0], -1), 7)
        )


def test_members_of_several_kinds_and_dtypes():
    xs = [tensor((50, 3)), np.ones((4, 5), np.float16), tensor((1000,), torch.bfloat16, 2)]
    flat = np.concatenate([ref.keys(x).ravel() for x in xs])
    masks = topk_mask(xs, 600)
    assert [type(m) for m in masks] == [type(x) for x in xs]
    ref.check_mask(flat, 600, np.concatenate([ref.as_numpy(m).ravel() for m in masks]).astype(bool))
    assert select_threshold(tuple(xs), 600) == ref.threshold(flat, 600)


def test_other_and_scales_of_a_sequence():
    xs, gs = [tensor((6, 8)), tensor((4, 3, 2, 2))], [tensor((6, 8), seed=1), tensor((4, 3, 2, 2), seed=2)]
    flat = np.concatenate([ref.keys(x, "abs_mul", g).ravel() for x, g in zip(xs, gs, strict=True)])
    assert select_threshold(xs, 31, "abs_mul", other=gs) == ref.threshold(flat, 31)
    scales = [torch.arange(8.0), torch.arange(3.0)]
    full = [scales[0].expand(6, 8), scales[1][:, None, None].expand(4, 3, 2, 2)]
    flat = np.concatenate([ref.keys(x, "abs_mul", g).ravel() for x, g in zip(xs, full, strict=True)])
    masks = topk_mask(xs, 31, "abs_mul", col_scale=scales)
    ref.check_mask(flat, 31, torch.cat([m.flatten() for m in masks]).numpy())


def test_threshold_is_a_tuple():
    t = select_threshold(np.array([3.0, -4.0, 1.0, 3.0], np.float32), 2)
    assert t == Threshold(value=3.0, above=1, ties=1)
    assert [type(v) for v in t] == [float, int, int]


def test_a_parameter_is_welcome_where_no_gradient_is_lost():
    p = torch.nn.Parameter(tensor((4, 4)))
    assert topk_mask(p, 3).sum() == 3
    assert not topk_mask(p, 3).requires_grad
    with pytest.raises(RuntimeError, match="gradient"):
        topk(p.flatten(), 3)
    with torch.no_grad():
        assert topk(p.flatten(), 3)[0].shape == (3,)


@pytest.mark.parametrize("call", [topk_mask, lambda x, k, **a: nm_mask(x, 2, 4, **a), block_mask])
def test_out_is_filled_and_returned(call):
    x = tensor((8, 16))
    want = call(x, 5)
    out = torch.ones(8, 16, dtype=torch.bool)
    assert call(x, 5, out=out) is out
    assert torch.equal(out, want)
    outs = [torch.ones(8, 16, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)]
    got = call([x, tensor((3, 4))], 5, out=outs)
    assert all(a is b for a, b in zip(got, outs, strict=True))


def test_out_is_untouched_when_a_global_selection_fails():
    x = np.ones(100_000, np.float32)
    x[-1] = np.nan
    out = np.zeros(x.shape, bool)
    with pytest.raises(ValueError, match="NaN"):
        topk_mask(x, 50_000, out=out)
    assert not out.any()


def test_denormals_do_not_depend_on_the_thread():
    """flush_denormal is a mode of one thread; keys are the same under it, and on the pool's threads."""
    x = (tensor((100_000,)) * 1e-19).contiguous()  # squares are denormal
    want = topk_mask(x, 30_000, "square")
    ref.check_mask(ref.keys(x, "square"), 30_000, want.numpy())
    torch.set_flush_denormal(True)
    try:
        assert torch.equal(topk_mask(x, 30_000, "square"), want)
        assert torch.equal(topk_mask(x[:1000].clone(), 300, "square"), topk_mask(x[:1000], 300, "square"))
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_agree(threads):
    x = (tensor((400_000,)) * 8).round() / 8  # ties across all chunks
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for k in (1000, 123_456, 399_000):
            ref.check_mask(ref.keys(x), k, topk_mask(x, k).numpy())
    finally:
        torch.set_num_threads(before)


def test_calls_from_many_python_threads():
    xs = [tensor((60_000 + 1000 * i,), seed=i) for i in range(4)]
    want = [topk_mask(x, 5000) for x in xs]
    failed = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(topk_mask(xs[i], 5000), want[i]):
                failed.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not failed


X = np.ones((4, 6), np.float32)

REFUSED = {
    "k negative": (lambda: select_threshold(X, -1), ValueError, "k: expected 0 to 24"),
    "k too large": (lambda: topk_mask(X, 25), ValueError, "k: expected 0 to 24"),
    "k too large for a row": (lambda: topk_mask(X, 7, dim=1), ValueError, "k: expected 0 to 6"),
    "k too large for the blocks": (lambda: block_mask(X, 9), ValueError, "k: expected 0 to 8"),
    "k too large for topk": (lambda: topk(X[0], 7), ValueError, "k: expected 0 to 6"),
    "k a float": (lambda: select_threshold(X, 1.0), TypeError, "k: expected an integer, got float"),
    "k a bool": (lambda: select_threshold(X, True), TypeError, "k: expected an integer, got bool"),
    "nothing to select from": (lambda: select_threshold([], 1), ValueError, "k: expected 0 to 0"),
    "dim": (lambda: topk_mask(X, 1, dim=0), ValueError, "dim: expected None or 1, got 0"),
    "rows of a vector": (lambda: topk_mask(X[0], 1, dim=1), ValueError, "scores: expected .out, in"),
    "N:M of a vector": (lambda: nm_mask(X[0], 2, 4), ValueError, "x: expected .out, in"),
    "blocks of a vector": (lambda: block_mask(X[0], 2), ValueError, "x: expected .out, in"),
    "topk of a matrix": (lambda: topk(X, 1), ValueError, "x: expected one dimension"),
    "key": (lambda: select_threshold(X, 1, "cube"), ValueError, "key: expected one of abs"),
    "nan": (lambda: select_threshold(X, 1, nan="omit"), ValueError, 'nan: expected "raise" or "lowest"'),
    "float64": (lambda: select_threshold(X.astype(float), 1), TypeError, "scores: expected dtype float32"),
    "a member of int32": (
        lambda: select_threshold([X, X.astype(int)], 1),
        TypeError,
        r"scores\[1\]: expected dtype",
    ),
    "a list of numbers": (
        lambda: select_threshold([1.0], 1),
        TypeError,
        r"scores\[0\]: expected a numpy array",
    ),
    "strided": (lambda: select_threshold(X[:, ::2], 1), ValueError, "scores: expected contiguous memory"),
    "columns apart": (lambda: topk_mask(X[:, ::2], 1, dim=1), ValueError, "scores: expected contiguous rows"),
    "abs_mul alone": (lambda: select_threshold(X, 1, "abs_mul"), ValueError, "got neither"),
    "abs_mul with both": (
        lambda: select_threshold(X, 1, "abs_mul", other=X, col_scale=X[0]),
        ValueError,
        "got both",
    ),
    "other without abs_mul": (
        lambda: select_threshold(X, 1, other=X),
        ValueError,
        "other: expected with key='abs_mul'",
    ),
    "other of another shape": (
        lambda: select_threshold(X, 1, "abs_mul", other=X.T.copy()),
        ValueError,
        "other: expected the shape of scores",
    ),
    "other of another dtype": (
        lambda: select_threshold(X, 1, "abs_mul", other=X.astype(np.float16)),
        TypeError,
        "other: expected dtype float32",
    ),
    "other for one of two": (
        lambda: select_threshold([X, X], 1, "abs_mul", other=[X]),
        ValueError,
        "other: expected 2 tensors",
    ),
    "other not a sequence": (
        lambda: select_threshold([X], 1, "abs_mul", other=X),
        TypeError,
        "other: expected a sequence",
    ),
    "col_scale of the wrong length": (
        lambda: select_threshold(X, 1, "abs_mul", col_scale=X[:, 0].copy()),
        ValueError,
        "col_scale: expected .6. ",
    ),
    "col_scale negative": (
        lambda: select_threshold(X, 1, "abs_mul", col_scale=-X[0]),
        ValueError,
        "col_scale: expected non-negative",
    ),
    "col_scale of a vector": (
        lambda: select_threshold(X[0], 1, "abs_mul", col_scale=X[0]),
        ValueError,
        "scores: expected .out, in",
    ),
    "block not a pair": (lambda: block_mask(X, 1, 4), ValueError, "block: expected .rows, columns."),
    "block of nothing": (lambda: block_mask(X, 1, (0, 4)), ValueError, "block: expected two positive sizes"),
    "n above m": (lambda: nm_mask(X, 5, 4), ValueError, "n, m: expected 0 <= n <= m"),
    "m zero": (lambda: nm_mask(X, 0, 0), ValueError, "n, m: expected"),
    "out of another dtype": (
        lambda: topk_mask(X, 1, out=np.zeros_like(X)),
        TypeError,
        "out: expected dtype bool",
    ),
    "out of another shape": (
        lambda: topk_mask(X, 1, out=np.zeros(24, bool)),
        ValueError,
        "out: expected the shape of scores",
    ),
    "out read-only": (
        lambda: topk_mask(X, 1, out=np.broadcast_to(np.zeros(6, bool), X.shape)),
        ValueError,
        "out: expected",
    ),
    "one out for two": (
        lambda: topk_mask([X, X], 1, out=[np.zeros(X.shape, bool)]),
        ValueError,
        "out: expected 2 masks",
    ),
    "the same out twice": (
        lambda: topk_mask([X, X], 1, out=[np.zeros(X.shape, bool)] * 2),
        ValueError,
        r"does not overlap out\[0\]",
    ),
    "out not a sequence": (
        lambda: topk_mask([X], 1, out=np.zeros(X.shape, bool)),
        TypeError,
        "out: expected a sequence",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        call()


def test_refuses_sparse_tensors():
    with pytest.raises(TypeError, match="scores: expected a strided"):
        select_threshold(torch.eye(3).to_sparse(), 1)


def test_agrees_with_torch_topk():
    x = tensor((5000,))
    v, i = topk(x, 100, "identity")
    tv, ti = torch.topk(x, 100)
    assert torch.equal(v, tv)
    assert torch.equal(i, ti)
