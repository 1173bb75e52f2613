"""Unstructured sparse products on CUDA: every dtype, number of tokens and way of the columns, uneven and
empty rows, padding that meets no infinity, work that is shared equally."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pared
from pared import _cuda_sparse
from pared._cuda_sparse import DeviceCSR, row_order, work_items
from pared._cuda_weight import Place
from pared.ops._device import DeviceWeight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
both_ways = pytest.mark.parametrize("near", [False, True])


@pytest.fixture
def place(backend, monkeypatch):
    where = Place(backend.module, 0, backend.stream)
    monkeypatch.setattr(Place, "of", classmethod(lambda cls, x: where))
    return where


def random_weight(rng, shape, density, dtype):
    """Rows of very different lengths, one of them empty, one full."""
    keep = rng.random(shape) < density * 2 * rng.random((shape[0], 1))
    keep[0] = True
    keep[-1:] = shape[0] == 1
    return torch.from_numpy(np.where(keep, rng.standard_normal(shape), -0.0)).to(dtype)


def assert_close(got, x, w, bias=None):
    """Within the output's rounding, and that of sums of `in` products in float32."""
    exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ w.double().abs().T + (0 if bias is None else bias.double().abs())
    bound = torch.finfo(got.dtype).eps / 2 * exact.abs() + (x.shape[-1] + 4) * 2.0**-24 * magnitude
    assert bool(((got.cpu().double() - exact).abs() <= bound + torch.finfo(got.dtype).tiny).all())


def narrow_blocks(monkeypatch, place, cols):
    """Pack with blocks of so many columns, as a device with little shared memory needs: many blocks in small
    matrices."""

    class Narrow:
        def __getattr__(self, name):
            return (lambda *_: cols) if name == "csr_block_cols" else getattr(place.kernels, name)

    where = Place(Narrow(), place.device, place.stream)
    monkeypatch.setattr(Place, "of", classmethod(lambda cls, x: where))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_cols", [None, 7, 33])
@both_ways
def test_products(backend, place, rng, monkeypatch, dtype, block_cols, near):
    if block_cols:
        narrow_blocks(monkeypatch, place, block_cols)
    for m, n, k, density in [
        (1, 1, 1, 1.0),
        (2, 67, 61, 0.4),
        (3, 64, 33, 0.2),
        (8, 130, 90, 0.1),
        (19, 5, 47, 0.5),
        (4, 20, 400, 0.02),
    ]:
        dense = random_weight(rng, (n, k), density, dtype)
        w = DeviceCSR.from_dense(dense.to(backend.device), near=near)
        assert torch.equal(w.to_dense().cpu(), dense + 0.0)
        assert w.nnz == int((dense != 0).sum())
        x = torch.from_numpy(rng.standard_normal((m, k))).to(dtype)
        bias = torch.from_numpy(rng.standard_normal(n)).float()
        on, bias_on = x.to(backend.device), bias.to(backend.device)
        for few in (1 << 30, 0):
            got = w.linear(on, bias_on, few=few)
            assert_close(got, x, dense, bias)
            assert torch.equal(w.linear(on, bias_on, few=few), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_ways
def test_numbers_of_tokens(backend, place, rng, dtype, near):
    dense = random_weight(rng, (70, 96), 0.3, dtype)
    w = DeviceCSR.from_dense(dense.to(backend.device), near=near)
    for m in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 129):
        x = torch.from_numpy(rng.standard_normal((m, 96))).to(dtype)
        assert_close(w.linear(x.to(backend.device)), x, dense)


@pytest.mark.parametrize("rows", [64, 128, 256])
@both_ways
def test_sizes_of_tiles(backend, place, rng, rows, near):
    # The plan takes taller tiles as the multiprocessors have enough of them.
    n = {64: 100, 128: 257, 256: 700}[rows]
    dense = random_weight(rng, (n, 40), 0.2, torch.float16)
    plan = place.kernels.plan_csr(40, n, 40, 40, 2, 4, place.kernels.multiprocessors(0), 227 << 10, 0)
    if backend.device.type == "cpu":
        assert plan["rows"] == rows
    w = DeviceCSR.from_dense(dense.to(backend.device), near=near)
    x = torch.from_numpy(rng.standard_normal((40, 40))).to(torch.float16)
    assert_close(w.linear(x.to(backend.device), few=0), x, dense)


@both_ways
def test_many_inputs(backend, place, rng, monkeypatch, near):
    # More slots than 16 bits count, so that columns start anew; activations of a few blocks at a time.
    k = 70_000
    dense = torch.zeros(5, k)
    cols = torch.from_numpy(rng.integers(0, k, (3, 40)))
    dense[1:4].scatter_(1, cols, torch.randn(3, 40))
    dense[0, -1] = dense[4, 0] = 2.0
    w = DeviceCSR.from_dense(dense.to(backend.device), near=near)
    assert torch.equal(w.to_dense().cpu(), dense)
    x = torch.from_numpy(rng.standard_normal((2, k))).float()
    for few in (8, 0):
        assert_close(w.linear(x.to(backend.device), few=few), x, dense)
    narrow_blocks(monkeypatch, place, 5)
    w = DeviceCSR.from_dense(dense[:, :60].to(backend.device), near=near)
    assert_close(w.linear(x[:, :60].to(backend.device), few=0), x[:, :60], dense[:, :60])


@both_ways
def test_rows_shared_by_several_warps(backend, place, rng, near):
    dense = torch.zeros(40, 3000)
    dense[3] = torch.randn(3000)
    dense[30:, ::7] = torch.randn(10, 429)
    w = DeviceCSR.from_dense(dense.to(backend.device), near=near)
    assert int(w.items[:, 2].max()) > 32
    x = torch.from_numpy(rng.standard_normal((3, 3000))).float()
    got = w.linear(x.to(backend.device))
    assert_close(got, x, dense)
    assert torch.equal(w.linear(x.to(backend.device)), got)


@pytest.mark.parametrize("few", [8, 0])
@both_ways
def test_zeros_meet_no_infinity(backend, place, rng, few, near):
    dense = torch.zeros(3, 20)
    dense[0, [1, 5]] = 1.0
    dense[1, 2] = 3.0
    w = DeviceCSR.from_dense(dense.to(backend.device), near=near)
    x = torch.ones(2, 20)
    x[0, [0, 3, 7, 19]] = float("inf")
    x[1, 2] = float("nan")
    got = w.linear(x.to(backend.device), few=few).cpu()
    assert got[0].tolist() == [2.0, 3.0, 0.0]
    assert got[1, [0, 2]].tolist() == [2.0, 0.0]
    assert torch.isnan(got[1, 1])


@pytest.mark.parametrize("few", [8, 0])
def test_epilogue(backend, place, rng, few):
    dense = random_weight(rng, (66, 30), 0.4, torch.float32)
    w = DeviceCSR.from_dense(dense.to(backend.device))
    x = torch.from_numpy(rng.standard_normal((5, 30))).float()
    bias = torch.randn(66)
    plain = x.double() @ dense.double().T + bias.double()
    for name, function in [
        ("relu", torch.relu),
        ("gelu", nn.functional.gelu),
        ("gelu_tanh", lambda t: nn.functional.gelu(t, approximate="tanh")),
        ("silu", nn.functional.silu),
    ]:
        got = w.linear(x.to(backend.device), bias.to(backend.device), name, few=few)
        torch.testing.assert_close(got.cpu().double(), function(plain), rtol=1e-4, atol=1e-5)


def test_no_elements(backend, place):
    for shape in [(4, 6), (4, 0)]:
        w = DeviceCSR.from_dense(torch.zeros(shape, device=backend.device))
        bias = torch.arange(4.0)
        for few in (8, 0):
            x = torch.ones(3, shape[1], device=backend.device)
            got = w.linear(x, bias.to(backend.device), few=few)
            assert torch.equal(got.cpu(), bias.expand(3, 4))
        assert w.linear(torch.ones(0, shape[1], device=backend.device)).shape == (0, 4)
    none = DeviceCSR.from_dense(torch.zeros(0, 5, device=backend.device))
    assert none.linear(torch.ones(3, 5, device=backend.device)).shape == (3, 0)


def test_views_and_leading_dimensions(backend, place, rng):
    dense = random_weight(rng, (40, 61), 0.3, torch.bfloat16)
    w = DeviceCSR.from_dense(dense.to(backend.device))
    x = torch.from_numpy(rng.standard_normal((2, 3, 72))).to(torch.bfloat16)
    on = x.to(backend.device)
    for first in (0, 1):
        for few in (8, 0):
            got = w.linear(on[..., first : first + 61], few=few)
            assert got.shape == (2, 3, 40)
            assert_close(got.reshape(6, 40), x[..., first : first + 61].reshape(6, 61), dense)


@both_ways
@pytest.mark.parametrize("few", [8, 0])
@pytest.mark.parametrize("block_cols", [None, 40])
def test_fours_that_end_early_meet_no_infinity(backend, place, rng, monkeypatch, block_cols, few, near):
    """One non-zero in every part of a row, between columns of infinities."""
    if block_cols:
        narrow_blocks(monkeypatch, place, block_cols)
    for first in (0, 1, 29, 30, 31, 61, 62, 90):
        dense = torch.zeros(4, 200)
        for row, step in enumerate((32, 33, 64, 70)):
            dense[row, first::step] = 1.0
        w = DeviceCSR.from_dense(dense.to(backend.device), near=near)
        x = torch.where((dense != 0).any(0), 1.0, float("inf")).expand(2, 200).contiguous()
        got = w.linear(x.to(backend.device), few=few).cpu()
        assert torch.equal(got, (dense != 0).sum(1).float().expand(2, 4))


def near_positions(slots):
    """Of one segment, an entry at a time."""
    out = [0] * len(slots)
    for i in range(1, len(slots)):
        reach = (_cuda_sparse.REACH, _cuda_sparse.REACH, _cuda_sparse.LAST_REACH, -1)[out[i - 1]]
        out[i] = out[i - 1] + 1 if slots[i] - slots[i - 1] <= reach else 0
    return out


steps = st.lists(st.sampled_from([1, 2, 30, 31, 32, 62, 63, 64, 200]), max_size=40)


@given(st.lists(steps, max_size=6))
@settings(deadline=None, max_examples=200)
def test_positions_of_near_entries(segments):
    slots = [np.cumsum(s).tolist() for s in segments]
    segment = torch.tensor([i for i, s in enumerate(slots) for _ in s], dtype=torch.int64)
    flat = torch.tensor([v for s in slots for v in s], dtype=torch.int64)
    got = _cuda_sparse._near_positions(segment, flat)
    assert got.tolist() == [p for s in slots for p in near_positions(s)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_of_fewer_bytes(emulated, rng, dtype):
    place, size = Place(emulated, 0, 0), torch.finfo(dtype).bits // 8
    for zeros, near, most in [(0.5, True, 3.1), (0.8, True, 3.15), (0.9, True, 3.4), (0.99, False, 6.0)]:
        dense = torch.from_numpy(np.where(rng.random((64, 2000)) < zeros, 0, 1.0)).to(dtype)
        w = DeviceCSR.from_dense(dense, place=place)
        assert w.near is near
        # 16-bit values; 32 bits are two bytes more.
        assert w.values.nbytes + w.columns.nbytes <= (most + (size - 2) * most / 3) * w.nnz
        other = DeviceCSR.from_dense(dense, near=not near, place=place)
        assert w.nbytes < other.nbytes
        assert torch.equal(other.to_dense(), dense)


def test_ways_for_numbers_of_tokens(place, rng, backend):
    dense = random_weight(rng, (30, 300), 0.3, torch.bfloat16)
    w = DeviceCSR.from_dense(dense.to(backend.device))
    assert w.near
    for tokens, near in [(1, True), (4, True), (5, False), (32, False), (33, True), (2048, True)]:
        tuned = w.tuned(tokens)
        assert tuned.near is near
        assert torch.equal(tuned.to_dense().cpu(), dense + 0.0)
        x = torch.from_numpy(rng.standard_normal((min(tokens, 40), 300))).to(torch.bfloat16)
        assert_close(tuned.linear(x.to(backend.device)), x, dense)
    wide = DeviceCSR.from_dense(dense.float().to(backend.device), near=False)
    assert wide.tuned(1) is wide
    assert not DeviceCSR.from_dense(dense.float().to(backend.device)).tuned(4).near


@pytest.mark.parametrize(("density", "most"), [(0.5, 1.4), (0.2, 1.65), (0.1, 1.85)])
def test_neighbouring_lanes_want_different_banks(emulated, rng, density, most):
    # Ordered by column it is 2.5 turns. 1 would take as many columns of each bank in every block of a row.
    w = torch.from_numpy(rng.random((40, 3000)) < density).float()
    packed = DeviceCSR.from_dense(w, near=False, place=Place(emulated, 0, 0))
    assert torch.equal(packed.to_dense(), w)
    starts = packed.starts[:: (packed.starts.numel() - 1) // 40].tolist()
    turns = loads = 0
    for begin, end in pairwise(starts):
        for first in range(begin, end, 8):
            for lanes in packed.columns[first : min(first + 8, end)].T:
                turns += int(torch.bincount(lanes.unique() & 7).max())
                loads += 1
    assert turns <= most * loads


@given(st.lists(st.lists(st.integers(0, 7), max_size=40), max_size=6))
@settings(deadline=None, max_examples=100)
def test_every_entry_has_a_place_of_its_own(segments):
    starts = torch.tensor([0] + [-(-len(s) // 4) for s in segments]).cumsum(0)
    segment = torch.tensor([i for i, s in enumerate(segments) for _ in s], dtype=torch.int64)
    bank = torch.tensor([b for s in segments for b in s], dtype=torch.int64)
    places = _cuda_sparse._places(segment, bank, starts)
    assert places.unique().numel() == places.numel()
    assert bool((places >= 4 * starts[segment]).all())
    assert bool((places < 4 * starts[segment + 1]).all())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_from_other_forms(backend, place, rng):
    dense = random_weight(rng, (33, 50), 0.3, torch.float32)
    on = dense.to(backend.device)
    assert torch.equal(DeviceCSR.from_csr(on.to_sparse_csr()).to_dense().cpu(), dense + 0.0)
    with pytest.raises(TypeError, match=r"weight: expected a torch.sparse_csr matrix, got torch.strided"):
        DeviceCSR.from_csr(dense)
    packed = pared.ops.CSR.from_dense(dense)
    x = torch.from_numpy(rng.standard_normal((4, 50))).float()
    for dtype in DTYPES:
        w = DeviceWeight.from_parts(*packed.to(backend.device, dtype).parts())  # as operators take it
        assert w.dtype == dtype
        assert_close(pared.ops.linear(x.to(backend.device, dtype), w), x.to(dtype), dense.to(dtype))


def test_module(backend, place, rng):
    plain = nn.Linear(50, 70).to(torch.bfloat16)
    with torch.no_grad():
        plain.weight[torch.rand(70, 50) < 0.8] = 0
    module = pared.nn.Linear.from_module(plain, format="csr", activation="relu")
    if backend.device.type == "cuda":
        module.to(backend.device)
    else:
        module._on_device = module.packed_weight().to(backend.device)
    x = torch.randn(2, 3, 50).bfloat16()
    want = torch.relu(plain(x)).double()
    bound = torch.finfo(x.dtype).eps * (x.double().abs() @ plain.weight.double().abs().T + 1)
    assert bool(((module(x.to(backend.device)).cpu().double() - want).abs() <= bound).all())


def test_a_wrong_product_is_seen(backend, place, rng):
    """The comparison of these tests: a column that is one off, and a row's last entry left out."""
    dense = random_weight(rng, (20, 30), 0.5, torch.float32)
    w = DeviceCSR.from_dense(dense.to(backend.device), near=False)
    x = torch.from_numpy(rng.standard_normal((3, 30))).float()
    assert_close(w.linear(x.to(backend.device)), x, dense)
    for fault in (w.columns, w.values):
        before = fault[2, 1].clone()
        fault[2, 1] = 0 if fault is w.values else (before + 1) % 30
        with pytest.raises(AssertionError):
            assert_close(w.linear(x.to(backend.device)), x, dense)
        fault[2, 1] = before


# ---- shares of the work: no kernel runs

lengths = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 20_000)), min_size=1, max_size=300)


@given(lengths, st.integers(1, 200))
@settings(deadline=None, max_examples=100)
def test_items_cover_every_row_once(fours, multiprocessors):
    rows = np.asarray(fours, np.int64)
    items = work_items(rows, multiprocessors)
    covered = np.zeros(rows.size, int)
    work = []
    for begin, end, lanes in items.tolist():
        assert begin < end
        assert lanes in {4, 8, 16, 32, 64, 128, 256, 512}
        assert (end - begin) * max(1, lanes // 32) <= _cuda_sparse.SUMS
        covered[begin:end] += 1
        work.append(int(rows[begin:end].sum()))
    assert (covered == 1).all()
    assert work == sorted(work, reverse=True)
    share = max(64, -(-int(np.maximum(rows, 4).sum()) // (4 * multiprocessors)))
    assert max(work) <= share + rows.max()


def test_a_long_row_gets_many_lanes():
    rows = np.full(256, 3, np.int64)
    rows[100] = 5000
    items = {b: (e, lanes) for b, e, lanes in work_items(rows, 132).tolist()}
    assert next(lanes for b, (e, lanes) in items.items() if b <= 100 < e) >= 128
    assert work_items(np.zeros(0, np.int64), 132).shape == (0, 3)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=200))
@settings(deadline=None, max_examples=100)
def test_the_order_deals_rows_evenly(fours):
    rows = np.asarray(fours, np.int64)
    order = row_order(rows)
    assert sorted(order[order >= 0].tolist()) == list(range(rows.size))
    for first in range(0, order.size, _cuda_sparse.GROUP):
        group = order[first : first + _cuda_sparse.GROUP]
        kept = group[group >= 0]
        assert ((kept >= first) & (kept < first + _cuda_sparse.GROUP)).all()
        shares = np.where(group >= 0, rows[group], 0).reshape(_cuda_sparse.WARPS, -1).sum(1)
        assert shares.max() - shares.min() <= rows[kept].max()


def test_constants_are_those_of_the_kernels(emulated):
    for name, value in [
        ("FOUR", _cuda_sparse.FOUR),
        ("GROUP", _cuda_sparse.GROUP),
        ("WARPS", _cuda_sparse.WARPS),
        ("GATHER_SUMS", _cuda_sparse.SUMS),
        ("INDEX_SLOTS", _cuda_sparse.INDEX_SLOTS),
        ("REACH", _cuda_sparse.REACH),
        ("LAST_REACH", _cuda_sparse.LAST_REACH),
    ]:
        assert getattr(emulated, f"CSR_{name}") == value


# multiprocessors, shared memory that a block of threads may have: sm_90, sm_80, sm_86.
DEVICES = [(132, 227 << 10), (108, 163 << 10), (84, 99 << 10)]


@pytest.mark.parametrize(("multiprocessors", "limit"), DEVICES)
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_plans(emulated, multiprocessors, limit, item_bytes):
    for cols in (1, 100, 4096, 28672, 100_000):
        block = emulated.csr_block_cols(cols, limit)
        assert 1 <= block <= cols
        for outputs in (1, 64, 4096, 28672):
            for tokens in (1, 2, 8, 17, 64, 128, 4096, 100_000):
                p = emulated.plan_csr(tokens, outputs, cols, block, item_bytes, 500, multiprocessors, limit)
                assert p["shared_bytes"] + 5120 <= limit
                assert p["token_tiles"] * p["tokens"] >= tokens
                if p["panel"]:
                    assert p["rows"] in (64, 128, 256)
                    assert p["row_tiles"] * p["rows"] >= outputs
                    assert p["workspace_bytes"] >= tokens * cols * item_bytes
                else:
                    assert p["tokens"] <= 8
                    # Two blocks of threads a multiprocessor.
                    assert 2 * (p["shared_bytes"] + 5120) <= limit
                    assert 1 <= p["grid"] <= 500
    # A decoding step keeps all multiprocessors busy, a prefill shares its panels among many rows.
    assert emulated.plan_csr(1, 4096, 4096, 415, 2, 500, 132, 227 << 10)["grid"] >= 132
    assert emulated.plan_csr(4096, 4096, 4096, 415, 2, 500, 132, 227 << 10)["rows"] == 256


def test_bad_input(rng):
    dense = random_weight(rng, (32, 32), 0.5, torch.float32)
    x = torch.ones(2, 32)
    for weight, error, text in [
        (dense.double(), TypeError, "weight: expected dtype float32, float16 or bfloat16, got torch.float64"),
        (dense[0], ValueError, r"weight: expected \[out, in\], got shape \[32\]"),
    ]:
        with pytest.raises(error, match=text):
            DeviceCSR.from_dense(weight)
    packed = pared.ops.CSR.from_dense(dense)
    with pytest.raises(ValueError, match="dtype: expected a linear weight in float32, float16 or bfloat16"):
        packed.to("cuda", torch.float64)
    with pytest.raises(ValueError, match=r"dtype: expected a linear weight .* got shape \[4, 3, 1, 1\]"):
        pared.ops.CSR.from_dense(torch.ones(4, 3, 1, 1)).to("cuda")
    with pytest.raises(ValueError, match=r"dtype: expected one that holds all values, got torch\.float16"):
        pared.ops.CSR.from_dense(dense * 1e6).to("cpu", torch.float16)
    empty = torch.zeros(1, dtype=torch.int32)
    w = DeviceCSR(torch.zeros(1, 4), empty, empty, empty, empty, False, 32, (32, 32), 0)
    for args, error, text in [
        ((x.half(),), TypeError, "x: expected dtype float32, got torch.float16"),
        ((x[:, :8],), ValueError, r"x: expected shape \[..., 32\], got \[2, 8\]"),
        ((x.to("meta"),), ValueError, "x: expected a tensor on cpu, got one on meta"),
        ((x, torch.ones(3)), ValueError, r"bias: expected contiguous \[32\], got \[3\]"),
    ]:
        with pytest.raises(error, match=text):
            w.linear(*args)
