"""8-bit products on CUDA: the sums are exact, the layers give the bits of the CPU's Int8."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import pared
from pared import _cuda, _cuda_int8
from pared._cuda_int8 import DeviceInt8
from pared._cuda_weight import Place


@pytest.fixture
def place(backend):
    return Place(backend.module, 0, backend.stream)


def exact(a, b):
    return a.cpu().long() @ b.cpu().long().T


def random_bytes(rng, *shape):
    return torch.from_numpy(rng.integers(-128, 128, shape).astype(np.int8))


# Tokens around every tile, outputs and reductions around the tile and the stage.
SHAPES = [
    (1, 1, 1),
    (1, 129, 16),
    (7, 3, 127),
    (15, 127, 128),
    (16, 128, 129),
    (17, 131, 255),
    (31, 64, 257),
    (33, 130, 100),
    (63, 128, 384),
    (65, 129, 513),
    (127, 128, 64),
    (129, 257, 130),
    (263, 385, 40),
]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_sums_are_exact(backend, place, rng, m, n, k):
    a, b = random_bytes(rng, m, k), random_bytes(rng, n, k)
    got = _cuda_int8.gemm_s8(a.to(backend.device), b.to(backend.device), place=place)
    assert got.dtype == torch.int32
    assert torch.equal(got.cpu().long(), exact(a, b))


def test_every_count_of_tokens(backend, place, rng):
    b = random_bytes(rng, 19, 48).to(backend.device)
    for m in range(66):
        a = random_bytes(rng, m, 48).to(backend.device)
        assert torch.equal(_cuda_int8.gemm_s8(a, b, place=place).cpu().long(), exact(a, b)), m


@pytest.mark.parametrize("m", [1, 20, 40])
def test_a_long_reduction_is_split(backend, place, rng, m):
    a, b = random_bytes(rng, m, 128 * 41 + 5), random_bytes(rng, 150, 128 * 41 + 5)
    *_, splits, workspace = backend.module.plan_int8(m, 150, a.shape[1], backend.module.multiprocessors(0))
    assert splits > 1
    assert workspace > 0
    got = _cuda_int8.gemm_s8(a.to(backend.device), b.to(backend.device), place=place)
    assert torch.equal(got.cpu().long(), exact(a, b))


def test_extremes(backend, place):
    k = 2048 + 17
    for x, y in [(-128, -128), (-128, 127), (127, 127)]:
        a, b = torch.full((3, k), x, dtype=torch.int8), torch.full((5, k), y, dtype=torch.int8)
        got = _cuda_int8.gemm_s8(a.to(backend.device), b.to(backend.device), place=place)
        assert bool((got == x * y * k).all())


def test_views(backend, place, rng):
    # Rows apart, columns apart, transposed, reversed storage offsets: all of them misaligned.
    big = random_bytes(rng, 70, 203).to(backend.device)
    views = [
        big[:40, 1:190],
        big[3:60:2, :97],
        big[:, ::3],
        big.T[:90],
        big[:33, 16:176],
        big[5:6].expand(4, 203),
    ]
    for a in views:
        b = random_bytes(rng, 21, a.shape[1]).to(backend.device)
        assert torch.equal(_cuda_int8.gemm_s8(a, b, place=place).cpu().long(), exact(a, b))
        assert torch.equal(_cuda_int8.gemm_s8(b, a, place=place).cpu().long(), exact(b, a))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 7), (5, 0, 7), (2, 3, 0)])
def test_empty(backend, place, rng, m, n, k):
    a, b = random_bytes(rng, m, k).to(backend.device), random_bytes(rng, n, k).to(backend.device)
    got = _cuda_int8.gemm_s8(a, b, place=place)
    assert got.shape == (m, n)
    assert not bool(got.any())
    one = random_bytes(rng, 1, 16).to(backend.device)
    assert torch.equal(_cuda_int8.gemm_s8(one, one, place=place).cpu().long(), exact(one, one))


def test_nothing_beyond_the_output_is_written(backend, place, rng):
    m, n, k = 37, 133, 96
    a, b = (random_bytes(rng, r, k).to(backend.device) for r in (m, n))
    x_scales = torch.rand(m).to(backend.device)
    w = DeviceInt8(b, torch.rand(n).to(backend.device), None, _cuda_int8.DYNAMIC, k)
    for dtype in ("float32", "float16", "bfloat16"):
        kind = getattr(torch, dtype)
        poison = torch.full((m * n + 64,), 7.0, dtype=kind, device=backend.device)
        out = poison[31 : 31 + m * n].view(m, n)
        _cuda_int8._product(place, a, b, k, x_scales, w, None, "", dtype, out)
        want = (exact(a, b).float() * x_scales.cpu()[:, None]) * w.scales.cpu()
        assert torch.equal(out.cpu(), want.to(kind))
        assert bool((poison[:31] == 7).all())
        assert bool((poison[31 + m * n :] == 7).all())


# ---- quantization


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cols", [1, 7, 16, 255, 1029])
def test_quantized_rows_are_those_of_the_cpu(backend, place, rng, dtype, cols):
    x = torch.from_numpy(rng.standard_normal((6, cols + 3)).astype(np.float32)).to(dtype)[:, 1 : 1 + cols]
    x[0] = 0
    x[1, cols // 2] = float("nan")
    x[2, -1] = float("-inf")
    x[3] *= 2.0**-20
    on = x.to(backend.device)
    stride = -(-cols // 16) * 16
    q = torch.full((6, stride), 99, dtype=torch.int8, device=backend.device)
    scales = torch.empty(6, device=backend.device)
    name = str(dtype).removeprefix("torch.")
    for activations in [_cuda_int8.DYNAMIC, (0.05, 128, 0, 255), (0.013, 7, 0, 255), (0.5, 200, 3, 250)]:
        place.kernels.quantize_rows(
            on.data_ptr(),
            name,
            6,
            cols,
            on.stride(0),
            activations,
            q.data_ptr(),
            stride,
            scales.data_ptr(),
            0,
            place.stream,
        )
        scale, zero, low, high = activations
        f = x.float()
        finite = torch.isfinite(f).all(dim=1)
        largest = f.abs().amax(dim=1)
        if scale == 0:
            some = finite & (largest >= 2.0**-100)
            want_scales = torch.where(some, largest / np.float32(127), torch.zeros(6))
            inverse = torch.where(some, torch.full((6,), 127.0) / largest, torch.zeros(6))
        else:
            want_scales = torch.full((6,), scale)
            inverse = torch.full((6,), 1.0) / torch.tensor(scale)
        want = ((f * inverse[:, None]).clamp(low - zero, high - zero).round() + (zero - 128)).to(torch.int8)
        got = q.cpu()
        assert torch.equal(got[finite, :cols], want[finite])
        assert not bool(got[:, cols:].any())
        assert torch.equal(scales.cpu()[finite], want_scales[finite])
        assert bool(torch.isnan(scales.cpu()[~finite]).all())


# ---- layers


def layer(rng, n, k, **options):
    w = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32))
    return pared.ops.Int8.from_dense(w, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_scale": 0.03},
        {"activation_scale": 0.02, "activation_zero": 40, "activation_dtype": "uint8"},
    ],
)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 3), (13, 130, 70), (70, 200, 300)])
def test_the_bits_of_the_cpu(backend, place, rng, dtype, options, m, n, k):
    w = layer(rng, n, k, **options)
    x = torch.from_numpy(rng.standard_normal((m, k)).astype(np.float32)).to(dtype)
    bias = torch.from_numpy(rng.standard_normal(n).astype(np.float32))
    on = DeviceInt8.from_int8(w, backend.device)
    for b in (None, bias):
        got = on.linear(x.to(backend.device), None if b is None else b.to(backend.device), place=place)
        assert got.dtype == dtype
        assert torch.equal(got.cpu(), pared.ops.linear(x, w, b))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations(backend, place, rng, activation):
    w = layer(rng, 40, 64)
    x = torch.from_numpy(rng.standard_normal((33, 64)).astype(np.float32))
    bias = torch.linspace(-30, 30, 40)
    on = DeviceInt8.from_int8(w, backend.device)
    args = x.to(backend.device), bias.to(backend.device)
    t = on.linear(*args, place=place).cpu().double()
    got = on.linear(*args, activation, place=place).cpu()
    cubic = math.sqrt(2 / math.pi) * (t + 0.044715 * t**3)
    want, steep = {  # and by how much the function magnifies a relative error of its argument
        "relu": (torch.relu(t), t * 0),
        "gelu": (t * torch.special.erfc(-t / math.sqrt(2)) / 2, t**2),
        "gelu_tanh": (t * torch.sigmoid(2 * cubic), 8 * cubic.abs()),
        "silu": (t * torch.sigmoid(t), t.abs()),
    }[activation]
    eps = torch.finfo(torch.float32).eps
    assert bool(((got.double() - want).abs() <= (16 + 2 * steep) * eps * want.abs() + 1e-37).all())


def test_a_token_with_nan_gives_nan_and_no_other(backend, place, rng):
    w = DeviceInt8.from_int8(layer(rng, 9, 33), backend.device)
    x = torch.ones(4, 33, device=backend.device)
    x[1, 5], x[3, 0] = float("nan"), float("inf")
    nan = torch.isnan(w.linear(x, place=place).cpu())
    assert nan[[1, 3]].all()
    assert not nan[[0, 2]].any()


def test_leading_dimensions_and_strides(backend, place, rng):
    cpu = layer(rng, 9, 33)
    w = DeviceInt8.from_int8(cpu, backend.device)
    x = torch.from_numpy(rng.standard_normal((2, 3, 40)).astype(np.float32))
    on = x.to(backend.device)
    for view, same in [
        (on[..., :33], x[..., :33]),
        (on[:0, :, :33], x[:0, :, :33]),
        (on[0, 0, :33], x[0, 0, :33]),
    ]:
        got = w.linear(view, place=place).cpu()
        assert got.shape == (*view.shape[:-1], 9)
        assert torch.equal(got, pared.ops.linear(same, cpu))


# ---- errors and plans: no kernel runs


def linear(x, w, *rest):
    return w.linear(x, *rest)


def test_bad_input(rng):
    w = DeviceInt8.from_int8(layer(rng, 4, 8), "cpu")
    x, bias = torch.ones(2, 8), torch.ones(4)
    three, four = (torch.ones(2, n, dtype=torch.int8) for n in (3, 4))
    gemm_s8 = _cuda_int8.gemm_s8
    dtype = "x: expected dtype float32 or float16 or bfloat16, got "
    for function, args, error, text in [
        (linear, (x.double(), w), TypeError, dtype + "torch.float64"),
        (linear, ([1.0], w), TypeError, dtype + "list"),
        (linear, (torch.ones(2, 9), w), ValueError, r"x: expected shape \[..., 8\], got \[2, 9\]"),
        (linear, (torch.ones(8, 2, 2).transpose(0, 2), w), ValueError, "x: expected rows that are contig"),
        (linear, (x.to("meta"), w), ValueError, "x: expected a tensor on cpu, got one on meta"),
        (linear, (x, w, bias.double()), TypeError, "bias: expected a float32 tensor, got torch.float64"),
        (linear, (x, w, bias[:3]), ValueError, r"bias: expected contiguous \[4\], got \[3\]"),
        (linear, (x, w, bias.to("meta")), ValueError, "bias: expected a tensor on cpu, got one on meta"),
        (linear, (torch.ones(2, 8, requires_grad=True), w), RuntimeError, "x"),
        (gemm_s8, (x, x), TypeError, "a: expected dtype int8, got torch.float32"),
        (gemm_s8, (three, x), TypeError, "b: expected dtype int8, got torch.float32"),
        (gemm_s8, (three[0], three), ValueError, r"a: expected two dimensions, got shape \[3\]"),
        (gemm_s8, (three, four), ValueError, r"b: expected \[N, 3\], got \[2, 4\]"),
    ]:
        with pytest.raises(error, match=text):
            function(*args)


def test_plans(emulated):
    tiles = emulated.INT8_TILES
    for tokens in (1, 16, 17, 64, 65, 128, 4096, 10**6):
        for outputs in (1, 128, 4096, 28672):
            for cols in (0, 1, 128, 4096, 65793):
                for sms in (1, 8, 132):
                    tile, across, along, steps, splits, workspace = emulated.plan_int8(
                        tokens, outputs, cols, sms
                    )
                    rows, columns = tiles[tile]
                    assert (across - 1) * rows < tokens <= across * rows
                    assert (along - 1) * columns < outputs <= along * columns
                    assert (steps - 1) * 128 < cols <= steps * 128
                    assert 1 <= splits <= max(1, steps // 4)
                    assert splits == 1 or across * along * splits <= 2 * sms
                    assert (workspace > 0) == (splits > 1)
                    assert workspace <= 2 * sms * rows * columns * 4 + 4 * across * along + 16
    # A long reduction of few tokens fills the device.
    assert emulated.plan_int8(1, 4096, 16384, 132)[4] >= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"activation_scale": 0.02, "activation_zero": 40}])
@pytest.mark.parametrize("tile", range(4))
def test_every_tile_gives_the_bits_of_the_cpu(backend, place, rng, tile, options, dtype):
    check_tile(place, backend.device, rng, tile, options, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"activation_scale": 0.02, "activation_zero": 40}])
@pytest.mark.parametrize("tile", [4, 5, 6])
def test_the_tiles_of_wgmma_give_the_bits_of_the_cpu(rng, tile, options, dtype):
    try:
        kernels = _cuda.kernels(0)
    except RuntimeError:
        kernels = None
    if kernels is None or not torch.cuda.is_available() or not kernels.int8_wgmma(0):
        pytest.skip("needs a GPU of compute capability 9.0, and pared built with CUTLASS")
    here = Place(kernels, 0, torch._C._cuda_getCurrentRawStream(0))
    check_tile(here, torch.device("cuda", 0), rng, tile, options, dtype)


def check_tile(place, device, rng, tile, options, dtype):
    rows, columns = place.kernels.INT8_TILES[tile]
    place.kernels.force_int8_tile(tile)
    try:
        # Around whole tiles; rows of outputs at multiples of 16 bytes, as the bulk engine wants, and others.
        for m, n, k in [(rows, columns, 256), (rows + 1, columns + 8, 130), (2 * rows - 1, columns - 3, 399)]:
            w, x = layer(rng, n, k, **options), torch.from_numpy(rng.standard_normal((m, k))).to(dtype)
            bias = torch.from_numpy(rng.standard_normal(n).astype(np.float32))
            on = DeviceInt8.from_int8(w, device)
            for b, activation in [(None, None), (bias, "relu")]:
                at = None if b is None else b.to(device)
                got = on.linear(x.to(device), at, activation, place=place)
                assert torch.equal(got.cpu(), pared.ops.linear(x, w, b, activation))
    finally:
        place.kernels.force_int8_tile(-1)


def test_the_tile_of_wgmma_is_the_one_whose_rounds_are_short(emulated):
    tiles = emulated.INT8_TILES
    assert emulated.int8_wgmma_tile(64, 4096, 132) == -1
    for tokens, outputs, want in [(65, 4096, (64, 128)), (8192, 8192, (128, 256)), (129, 8192, (128, 128))]:
        assert tiles[emulated.int8_wgmma_tile(tokens, outputs, 132)] == want
    with pytest.raises(ValueError, match="tile: expected -1 to 6, got 7"):
        emulated.force_int8_tile(7)
