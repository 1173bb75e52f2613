"""Block-sparse products on CUDA: every size of block, uneven rows, parts of rows in a fixed order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pared
from pared import _cuda
from pared._cuda_block_sparse import DeviceBlocks, blocks_per_item, work_items
from pared._cuda_weight import Place


@pytest.fixture
def place(backend):
    return Place(backend.module, 0, backend.stream)


def random_blocks(rng, shape, block, density, dtype):
    """A dense weight with whole blocks of zeros, some rows of blocks empty, others full."""
    rows, across = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    keep = rng.random((rows, across)) < density
    keep[0] = True
    keep[-1:] = rows == 1
    mask = torch.from_numpy(np.kron(keep, np.ones(block))[: shape[0], : shape[1]])
    if dtype == torch.int8:
        return torch.from_numpy(rng.integers(-128, 128, shape)).to(dtype) * mask.to(dtype)
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype) * mask.to(dtype)


def assert_close(got, x, w, bias=None):
    """Within the output's rounding, and that of sums of `in` products in float32."""
    exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ w.double().abs().T + (0 if bias is None else bias.double().abs())
    bound = torch.finfo(got.dtype).eps / 2 * exact.abs() + (x.shape[-1] + 4) * 2.0**-23 * magnitude
    assert bool(((got.cpu().double() - exact).abs() <= bound + torch.finfo(got.dtype).tiny).all())


BLOCKS = [(16, 8), (16, 16), (32, 32), (64, 64), (128, 128), (64, 128), (32, 24)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", BLOCKS)
def test_products(backend, place, rng, dtype, block):
    r, c = block
    for m, n, k, density in [
        (1, r, c, 1.0),
        (5, 3 * r, 7 * c, 0.4),
        (16, 2 * r + 5, 3 * c - 3, 0.5),
        (19, r - 1, 130, 0.6),
    ]:
        dense = random_blocks(rng, (n, k), block, density, dtype)
        w = DeviceBlocks.from_dense(dense.to(backend.device), block)
        assert torch.equal(w.to_dense().cpu(), dense)
        x = torch.from_numpy(rng.standard_normal((m, k))).to(dtype)
        bias = torch.from_numpy(rng.standard_normal(n)).float()
        on, bias_on = x.to(backend.device), bias.to(backend.device)
        assert_close(w.linear(on, place=place), x, dense)
        split = w.linear(on, bias_on, place=place, most=2)
        assert_close(split, x, dense, bias)
        assert torch.equal(w.linear(on, bias_on, place=place, most=2), split)


@pytest.mark.parametrize("block", [(16, 16), (64, 64), (128, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_gives_the_bits_of_the_dense_int8(backend, place, rng, block, dtype):
    for m, n, k in [(1, 70, 96), (18, 130, 209)]:
        q = random_blocks(rng, (n, k), block, 0.5, torch.int8)
        scales, bias = torch.rand(n) + 0.1, torch.randn(n)
        x = torch.from_numpy(rng.standard_normal((m, k))).to(dtype)
        w = DeviceBlocks.from_dense(q.to(backend.device), block, scales.to(backend.device))
        want = pared.ops.linear(x, pared.ops.Int8.from_quantized(q, scales), bias)
        for most in (None, 1):
            got = w.linear(x.to(backend.device), bias.to(backend.device), place=place, most=most)
            assert torch.equal(got.cpu(), want)


@pytest.fixture(params=[0, 128, 256], ids=["mma", "wgmma128", "wgmma256"])
def kernel(request, place):
    """mma.sync, and the tiles of wgmma."""
    if request.param and not place.kernels.block_sparse_wgmma(0):
        pytest.skip("wgmma needs a GPU of compute capability 9.0 and code for it")
    place.kernels.force_block_sparse_kernel(request.param)
    yield request.param
    place.kernels.force_block_sparse_kernel(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [(64, 64), (128, 64), (128, 128)])
def test_large_blocks(backend, place, rng, kernel, block, dtype):
    r, c = block
    # Tokens around half a tile, columns that end inside a block, more steps than stages, rows without blocks.
    sizes = [
        (17, r, c, 1.0),
        (100, r, 5 * c, 1.0),
        (129, 2 * r + 9, 5 * c - 8, 0.6),
        (260, 3 * r - 1, 8 * c, 0.5),
    ]
    for m, n, k, density in sizes:
        dense = random_blocks(rng, (n, k), block, density, dtype)
        x = torch.from_numpy(rng.standard_normal((m, k))).to(dtype)
        bias = torch.from_numpy(rng.standard_normal(n)).float()
        w = DeviceBlocks.from_dense(dense.to(backend.device), block)
        on, bias_on = x.to(backend.device), bias.to(backend.device)
        assert_close(w.linear(on, place=place), x, dense)
        split = w.linear(on, bias_on, place=place, most=2)
        assert_close(split, x, dense, bias)
        assert torch.equal(w.linear(on, bias_on, place=place, most=2), split)


def test_the_same_row_for_all_tokens(backend, place, rng, kernel):
    # Rows that overlap, of which the driver makes no tensor map.
    dense = random_blocks(rng, (64, 128), (64, 64), 1.0, torch.bfloat16)
    x = torch.from_numpy(rng.standard_normal((1, 128))).to(torch.bfloat16).expand(40, 128)
    w = DeviceBlocks.from_dense(dense.to(backend.device), (64, 64))
    on = x[:1].to(backend.device).expand(40, 128)
    assert on.stride(0) == 0
    assert_close(w.linear(on, place=place), x, dense)


@pytest.mark.parametrize("inputs", [0, 128])
def test_large_blocks_of_which_there_is_none(backend, place, kernel, inputs):
    # Values without an address, of which the driver makes no tensor map.
    w = DeviceBlocks.from_dense(
        torch.zeros(100, inputs, dtype=torch.float16, device=backend.device), (64, 64)
    )
    assert w.values.data_ptr() == 0
    bias = torch.arange(100.0, device=backend.device)
    got = w.linear(torch.ones(40, inputs, dtype=torch.float16, device=backend.device), bias, place=place)
    assert torch.equal(got, bias.half().expand(40, 100))


def test_a_list_of_work_is_there_before_a_graph_is_captured(backend, place, rng, monkeypatch):
    dense = random_blocks(rng, (64, 64), (16, 16), 1.0, torch.float16)
    w = DeviceBlocks.from_dense(dense.to(backend.device), (16, 16))
    x = torch.from_numpy(rng.standard_normal((3, 64))).to(torch.float16)
    on = x.to(backend.device)
    monkeypatch.setattr(_cuda, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="w: expected a product of as many tokens before a CUDA graph is"):
        w.linear(on, place=place)
    monkeypatch.setattr(_cuda, "capturing", lambda: False)
    assert_close(w.linear(on, place=place), x, dense)
    monkeypatch.setattr(_cuda, "capturing", lambda: True)
    assert_close(w.linear(on, place=place), x, dense)


class OneBlockLess:
    """The kernels, which are told of one block less than there is."""

    def __init__(self, kernels):
        self.kernels = kernels

    def __getattr__(self, name):
        return getattr(self.kernels, name)

    def block_sparse_product(self, w, *args):
        self.kernels.block_sparse_product((*w[:-1], w[-1] - 1), *args)


def test_the_copy_engine_reads_nothing_behind_the_last_block(backend, place, rng, kernel):
    dense = random_blocks(rng, (64, 128), (64, 64), 1.0, torch.float16)
    x = torch.from_numpy(rng.standard_normal((40, 128))).to(torch.float16)
    w = DeviceBlocks.from_dense(dense.to(backend.device), (64, 64))
    got = w.linear(x.to(backend.device), place=Place(OneBlockLess(place.kernels), 0, backend.stream))
    if kernel:  # mma.sync goes by the list of items alone
        dense[:, 64:] = 0
    assert_close(got, x, dense)


def test_large_int8_blocks(backend, place, rng, kernel):
    q = random_blocks(rng, (300, 512), (128, 128), 0.6, torch.int8)
    scales, bias = torch.rand(300) + 0.1, torch.randn(300)
    x = torch.from_numpy(rng.standard_normal((140, 512))).float()
    w = DeviceBlocks.from_dense(q.to(backend.device), (128, 128), scales.to(backend.device))
    want = pared.ops.linear(x, pared.ops.Int8.from_quantized(q, scales), bias)
    for most in (None, 1):
        got = w.linear(x.to(backend.device), bias.to(backend.device), place=place, most=most)
        assert torch.equal(got.cpu(), want)


def test_many_tokens(backend, place, rng):
    dense = random_blocks(rng, (70, 96), (32, 32), 0.5, torch.float16)
    w = DeviceBlocks.from_dense(dense.to(backend.device), (32, 32))
    for m in (15, 16, 17, 127, 129, 260):
        x = torch.from_numpy(rng.standard_normal((m, 96))).to(torch.float16)
        for most in (None, 1):
            assert_close(w.linear(x.to(backend.device), place=place, most=most), x, dense)


def test_views_and_leading_dimensions(backend, place, rng):
    dense = random_blocks(rng, (40, 61), (16, 16), 0.5, torch.bfloat16)
    w = DeviceBlocks.from_dense(dense.to(backend.device), (16, 16))
    x = torch.from_numpy(rng.standard_normal((2, 3, 72))).to(torch.bfloat16)
    on = x.to(backend.device)
    for first in (0, 1, 8):
        got = w.linear(on[..., first : first + 61], place=place)
        assert got.shape == (2, 3, 40)
        assert_close(got.reshape(6, 40), x[..., first : first + 61].reshape(6, 61), dense)
    assert w.linear(on[:0, :, :61], place=place).shape == (0, 3, 40)
    dense = random_blocks(rng, (40, 64), (16, 16), 0.5, torch.bfloat16)
    w = DeviceBlocks.from_dense(dense.to(backend.device), (16, 16))
    wide = torch.from_numpy(rng.standard_normal((2, 67))).to(torch.bfloat16)
    for first in (0, 1):  # one row of a matrix with rows at odd multiples
        one = wide.to(backend.device)[:1, first : first + 64]
        assert_close(w.linear(one, place=place), wide[:1, first : first + 64], dense)


def test_activations_and_infinities(backend, place, rng):
    dense = random_blocks(rng, (32, 32), (16, 16), 1.0, torch.float16)
    w = DeviceBlocks.from_dense(dense.to(backend.device), (16, 16))
    x = torch.from_numpy(rng.standard_normal((3, 32))).to(torch.float16)
    x[1, 0] = float("inf")
    got = w.linear(x.to(backend.device), None, "relu", place=place).cpu()
    plain = w.linear(x.to(backend.device), place=place).cpu()
    assert torch.equal(got, torch.relu(plain))
    # The rows of blocks that are absent do not see the infinity, as documented for sparse weights.
    assert torch.isfinite(plain[[0, 2]]).all()
    assert torch.isinf(plain[1, :16]).all()
    assert bool((plain[:, 16:] == 0).all())


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta state")
def test_from_bsr(backend, place, rng):
    dense = random_blocks(rng, (64, 96), (32, 16), 0.5, torch.float16)
    bsr = dense.to(backend.device).to_sparse_bsr((32, 16))
    w = DeviceBlocks.from_bsr(bsr)
    assert torch.equal(w.to_dense().cpu(), dense)
    x = torch.from_numpy(rng.standard_normal((4, 96))).to(torch.float16)
    assert_close(w.linear(x.to(backend.device), place=place), x, dense)
    with pytest.raises(TypeError, match=r"weight: expected a torch.sparse_bsr matrix, got torch.strided"):
        DeviceBlocks.from_bsr(dense)
    with pytest.raises(ValueError, match="weight: expected blocks of 16, 32, 64 or 128 rows"):
        DeviceBlocks.from_bsr(dense.to_sparse_bsr((8, 16)))
    with pytest.raises(TypeError, match="weight: expected dtype float16 or bfloat16, got"):
        DeviceBlocks.from_bsr(dense.float().to_sparse_bsr((16, 16)))


# ---- the list of work: no kernel runs


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 50))
@settings(deadline=None, max_examples=100)
def test_items_cover_every_block_once(counts, most):
    items, slots = work_items(counts, most)
    covered = np.zeros(sum(counts), int)
    rows = {}
    for row, begin, end, part, parts, slot in items.tolist():
        assert end - begin <= most
        covered[begin:end] += 1
        first = sum(counts[:row])
        assert first <= begin <= end <= first + counts[row]
        rows.setdefault(row, []).append((part, parts, slot))
    assert (covered == 1).all()
    assert sorted(rows) == list(range(len(counts)))
    used = []
    for found in rows.values():
        parts = found[0][1]
        assert sorted(p for p, _, _ in found) == list(range(parts))
        assert len({s for _, _, s in found}) == 1
        if parts > 1:
            used += range(found[0][2], found[0][2] + parts)
    assert sorted(used) == list(range(slots))
    sizes = items[:, 2] - items[:, 1]
    assert (np.diff(sizes) <= 0).all()


def test_blocks_per_item():
    # Decoding 8192 x 8192 in blocks of 64 at 80 %: 128 rows of 26 blocks are too few items for 132.
    assert blocks_per_item(128 * 26, 128, 1, 132) <= 16
    # A prefill has enough tiles: the average row is not split.
    assert blocks_per_item(64 * 13, 64, 8192, 132) >= 13
    assert blocks_per_item(0, 4, 1, 132) == 4


def linear(x, w, *rest):
    return w.linear(x, *rest)


def test_bad_input(rng):
    dense = random_blocks(rng, (32, 32), (16, 16), 1.0, torch.float16)
    w = DeviceBlocks.from_dense(dense, (16, 16))
    q, x = dense.to(torch.int8), torch.ones(2, 32, dtype=torch.float16)
    make = DeviceBlocks.from_dense
    for function, args, error, text in [
        (make, (dense.float(), (16, 16)), TypeError, "weight: expected dtype float16 or bfloat16, or int8"),
        (make, (dense, (16, 16), torch.ones(32)), TypeError, "weight: expected dtype int8 with scales"),
        (make, (dense, (8, 16)), ValueError, "block: expected 16, 32, 64 or 128 rows .* got 8x16"),
        (make, (dense, (16, 4)), ValueError, "block: expected .* got 16x4"),
        (make, (dense[0], (16, 16)), ValueError, r"weight: expected \[out, in\], got shape \[32\]"),
        (make, (q, (16, 16), torch.ones(3)), ValueError, r"scales: expected \[32\], got \[3\]"),
        (linear, (x.float(), w), TypeError, "x: expected dtype float16, got torch.float32"),
        (linear, (x[:, :8], w), ValueError, r"x: expected shape \[..., 32\], got \[2, 8\]"),
        (linear, (x.to("meta"), w), ValueError, "x: expected a tensor on cpu, got one on meta"),
        (linear, (x, w, torch.ones(3)), ValueError, r"bias: expected contiguous \[32\], got \[3\]"),
    ]:
        with pytest.raises(error, match=text):
            function(*args)
