"""More than 2**31 elements between two rows of a product's operands, and sizes that kernels do not count.

The memory between the rows is never touched, so that it takes none.
"""

from __future__ import annotations

import pytest
import torch

import pared
from pared._cuda_block_sparse import DeviceBlocks
from pared._cuda_decode import DecodeWeight
from pared._cuda_int8 import DeviceInt8
from pared._cuda_sparse import DeviceCSR
from pared._cuda_weight import Place

APART = (1 << 31) + 16  # elements from one row to the next
OUTPUTS, COLS = 40, 96


class Redirected:
    """The kernels, but that rows of the output go to another place, APART elements apart."""

    def __init__(self, kernels, out):
        self.kernels, self.out, self.calls = kernels, out, 0

    def __getattr__(self, name):
        found = getattr(self.kernels, name)
        if not name.endswith("_product"):
            return found

        def call(*args):
            self.calls += 1
            at = self.y_index(args)
            return found(*args[:at], self.out.data_ptr(), APART, *args[at + 2 :])

        return call

    @staticmethod
    def y_index(args):
        """Of the output's address, which its rows' length follows."""
        return max(i for i in range(len(args) - 1) if args[i + 1] == OUTPUTS and args[i] != OUTPUTS)


def two_rows(dtype, device):
    """Rows of zeros, APART elements apart, in memory that nothing else has touched."""
    rows = torch.empty(APART + 128, dtype=dtype, device=device).as_strided((2, 128), (APART, 1))
    return rows.zero_()


def weights(device):
    torch.manual_seed(0)
    dense = torch.randint(-3, 4, (OUTPUTS, COLS)) * (torch.rand(OUTPUTS, COLS) < 0.4)
    half, eight = dense.half().to(device), dense.to(torch.int8).to(device)
    ones = torch.ones(OUTPUTS, device=device)
    yield DecodeWeight.from_dense(half), {}, dense
    yield DecodeWeight.from_quantized(eight, ones, torch.float16, "bitmap8"), {}, dense
    yield DecodeWeight.from_quantized(eight, ones, torch.float16, "dense8"), {}, dense
    parts = eight.cpu().numpy(), ones.cpu().numpy(), "float16", None
    yield DeviceInt8.from_int8(pared.ops.Int8.from_parts(*parts), device), {}, dense
    yield DeviceBlocks.from_dense(half, (16, 16)), {}, dense
    yield DeviceBlocks.from_dense(eight, (16, 16), ones), {}, dense
    for near in (False, True):
        for few in (8, 0):
            yield DeviceCSR.from_dense(half, near=near), {"few": few}, dense


def test_rows_more_than_2_to_the_31_elements_apart(backend):
    x = two_rows(torch.float16, backend.device)[:, :COLS]
    x[0], x[1] = 1, torch.arange(COLS) % 3 - 1
    out = two_rows(torch.float16, backend.device)
    for w, options, dense in weights(backend.device):
        kernels = Redirected(backend.module, out)
        out.fill_(99)
        w.linear(x, place=Place(kernels, 0, backend.stream), **options)
        assert kernels.calls == 1
        want = x.cpu().float() @ dense.float().T
        torch.testing.assert_close(out[:, :OUTPUTS].cpu().float(), want, rtol=1e-3, atol=1e-3)
        assert bool((out[:, OUTPUTS:] == 99).all())


def test_sizes_that_are_not_counted(emulated):
    most = 1 << 31
    nothing = (0, 0, "bitmap16", "float16", 64 * most, 1, 512)
    with pytest.raises(ValueError, match=r"w: expected fewer than 2\^31 blocks of 64 x 64"):
        emulated.decode_expand(nothing, 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"w: expected fewer than 2\^31 blocks of 64 x 64"):
        emulated.decode_expand((*nothing[:4], 1 << 23, 1 << 20, 512), 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"x: expected fewer than 2\^31 rows"):
        emulated.pad_rows(0, most, 1, 1, 1, 0, 16, 0, 0)
    csr = (0, 0, 0, "float32", False, 32, most, 32, 0, 0, 0)
    with pytest.raises(ValueError, match=r"w: expected fewer than 2\^31 outputs"):
        emulated.csr_product(csr, 0, 1, 32, 0, "", 0, 32, 0, 0, -1, 0, 0)
