"""Products of random shapes on CUDA: sizes around those of tiles, rows in wider matrices, rows in parts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import pared
from pared._cuda_block_sparse import DeviceBlocks
from pared._cuda_decode import DecodeWeight
from pared._cuda_int8 import DeviceInt8
from pared._cuda_sparse import DeviceCSR
from pared._cuda_weight import Place

CASES = 20
HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALVES]


def size(rng, most):
    around = 2 ** rng.integers(3, 9) + rng.integers(-1, 2)
    return int(min(most, rng.choice([around, rng.integers(1, most + 1)])))


def pick(rng, choices):
    return choices[rng.integers(len(choices))]


def rows_of(rng, tokens, inputs, dtype, device):
    """Rows of activations, and the same within wider ones, aligned or not, with NaN on either side."""
    x = torch.from_numpy(rng.standard_normal((tokens, inputs))).to(dtype)
    first = int(pick(rng, [0, 8, rng.integers(9)]))
    more = int(pick(rng, [-(first + inputs) % 8, rng.integers(9)]))
    wide = torch.full((tokens, first + inputs + more), torch.nan, dtype=dtype, device=device)
    wide[:, first : first + inputs] = x.to(device)
    return x, wide[:, first : first + inputs]


def random_weight(rng, outputs, inputs, block=(1, 1), integers=False):
    """Rows of one density or of many."""
    rows, cols = (-(-n // b) for n, b in zip((outputs, inputs), block, strict=True))
    share = pick(rng, [0.0, 0.05, 0.3, 0.5, 0.72, 1.0]) * pick(
        rng, [np.ones((rows, 1)), 2 * rng.random((rows, 1))]
    )
    keep = torch.from_numpy(rng.random((rows, cols)) < share)
    keep = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:outputs, :inputs]
    shape = (outputs, inputs)
    w = rng.integers(-127, 128, shape) if integers else rng.standard_normal(shape)
    return torch.from_numpy(w) * keep


# Each: (weight on the device, its options, dtype of the activations, dense weight in float64); instead of the
# last a packed CPU weight, whose bits are expected.


def decode(rng, place, device, shape):
    dtype, format = pick(rng, HALVES), pick(rng, ["bitmap16", "pairs16", "bitmap8", "dense8"])
    if format.endswith("16"):
        dense = random_weight(rng, *shape).to(dtype)
        w = DecodeWeight.from_dense(dense.to(device), format=format)
    else:
        q, scales = random_weight(rng, *shape, integers=True), torch.from_numpy(rng.random(shape[0])) + 0.5
        w = DecodeWeight.from_quantized(q.to(device, torch.int8), scales.float().to(device), dtype, format)
        dense = q * scales.float()[:, None].double()
    bulk = bool(rng.integers(2)) and place.kernels.bulk_copies(0)
    return dataclasses.replace(w, few_tokens=400), {"bulk": bulk}, dtype, dense.double()


def csr(rng, place, device, shape):
    dense = random_weight(rng, *shape).to(pick(rng, FLOATS))
    few, near = pick(rng, [-1, 0, 8, 64]), pick(rng, [None, False, True])
    w = DeviceCSR.from_dense(dense.to(device), near=near, place=place)
    return w, {"few": few}, dense.dtype, dense.double()


def blocks(rng, place, device, shape):
    block = (pick(rng, [16, 32, 64, 128]), pick(rng, [8, 16, 64, 128]))
    dense = random_weight(rng, *shape, block).to(pick(rng, HALVES))
    w = DeviceBlocks.from_dense(dense.to(device), block)
    return w, {"most": pick(rng, [None, 1, 3])}, dense.dtype, dense.double()


def blocks8(rng, place, device, shape):
    block = (pick(rng, [16, 32, 64, 128]), pick(rng, [16, 64, 128, 256]))
    q = random_weight(rng, *shape, block, integers=True).to(torch.int8)
    scales = torch.from_numpy(rng.random(shape[0]) + 0.5).float()
    w = DeviceBlocks.from_dense(q.to(device), block, scales.to(device))
    packed = pared.ops.Int8.from_quantized(q, scales)
    return w, {"most": pick(rng, [None, 1, 3])}, pick(rng, FLOATS), packed


def int8(rng, place, device, shape):
    packed = pared.ops.Int8.from_dense(random_weight(rng, *shape).float())
    return DeviceInt8.from_int8(packed, device), {}, pick(rng, FLOATS), packed


@pytest.mark.parametrize("family", [decode, csr, blocks, blocks8, int8])
def test_products(backend, rng, family):
    place = Place(backend.module, 0, backend.stream)
    force = place.kernels.force_block_sparse_kernel
    for _ in range(CASES):
        tokens, shape = size(rng, 200), (size(rng, 400), size(rng, 1300))
        w, options, dtype, expected = family(rng, place, backend.device, shape)
        x, view = rows_of(rng, tokens, shape[1], dtype, backend.device)
        bias = torch.from_numpy(rng.standard_normal(shape[0])).float()
        what = f"{tokens} tokens, {shape}, {dtype}, {w.format if family is decode else ''} {options}"
        force(pick(rng, [-1, 0, 128, 256]) if place.kernels.block_sparse_wgmma(0) else -1)
        try:
            got = w.linear(view, bias.to(backend.device), place=place, **options).cpu()
        finally:
            force(-1)
        if isinstance(expected, torch.Tensor):
            # Within the output's rounding, and that of sums of `in` products in float32.
            exact = x.double() @ expected.T + bias
            magnitude = x.double().abs() @ expected.abs().T + bias.abs()
            finfo = torch.finfo(dtype)
            bound = finfo.eps / 2 * exact.abs() + (shape[1] + 4) * 2.0**-23 * magnitude + finfo.tiny
            last = tokens % 32
            if getattr(w, "format", None) == "bitmap8" and 0 < last <= 2:  # as integers of 22 bits
                largest = x[-last:].double().abs().amax(1, keepdim=True)
                bound[-last:] += 0.5 / 4161400 * largest * expected.abs().sum(1)
            assert bool(((got.double() - exact).abs() <= bound).all()), what
        else:
            assert torch.equal(got, pared.ops.linear(x, expected, bias)), what
