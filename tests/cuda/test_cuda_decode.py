"""Products of few tokens on CUDA: what is packed comes back, and every count of tokens gives the sums."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import pared
from pared import _cuda_decode
from pared._cuda_decode import DecodeWeight
from pared._cuda_weight import Place

FORMATS = ("bitmap16", "pairs16", "bitmap8", "dense8")
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture
def place(backend):
    return Place(backend.module, 0, backend.stream)


def random_weight(rng, shape, density, format, dtype, device):
    """``(packed, what it stands for in float64)``."""
    keep = torch.from_numpy(rng.random(shape) < density)
    if format.endswith("16"):
        w = torch.from_numpy(rng.standard_normal(shape)).to(dtype) * keep
        return DecodeWeight.from_dense(w.to(device), format=format), w.double()
    q = torch.from_numpy(rng.integers(-128, 128, shape)).to(torch.int8) * keep
    scales = torch.from_numpy(rng.random(shape[0])).float() + 0.5
    packed = DecodeWeight.from_quantized(q.to(device), scales.to(device), dtype, format)
    return packed, q.double() * scales.double()[:, None]


# Of a token's largest magnitude: half a unit of its activations as integers (csrc/cuda/decode.cu).
DIGITS = 0.5 / 4161400


def assert_close(got, x, w, bias=None, digits=False):
    """Within the output's rounding, and that of sums of `in` products in float32; where activations were
    `digits`, within theirs."""
    exact = x.double() @ w.T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ w.abs().T + (0 if bias is None else bias.double().abs())
    eps = torch.finfo(got.dtype).eps / 2 * exact.abs() + (x.shape[-1] + 4) * 2.0**-23 * magnitude
    if digits:
        eps = eps + DIGITS * x.double().abs().amax(-1, keepdim=True) * w.abs().sum(1)
    assert bool(((got.cpu().double() - exact).abs() <= eps + torch.finfo(got.dtype).tiny).all())


# Around the blocks of 64, and around the tiles of tokens.
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k", "density"),
    [
        (1, 1, 1, 1.0),
        (2, 64, 64, 0.5),
        (8, 63, 65, 0.3),
        (9, 65, 63, 1.0),
        (16, 130, 200, 0.1),
        (17, 64, 97, 0.7),
        (31, 7, 129, 0.02),
    ],
)
def test_products(backend, place, rng, format, dtype, m, n, k, density):
    w, dense = random_weight(rng, (n, k), density, format, dtype, backend.device)
    x = torch.from_numpy(rng.standard_normal((m, k))).to(dtype)
    bias = torch.from_numpy(rng.standard_normal(n)).float()
    for bulk in (True, False):
        if bulk and not backend.module.bulk_copies(0):
            continue
        got = w.linear(x.to(backend.device), place=place, bulk=bulk)
        assert got.dtype == dtype
        digits = format == "bitmap8" and m <= 2
        assert_close(got, x, dense, digits=digits)
        biased = w.linear(x.to(backend.device), bias.to(backend.device), place=place, bulk=bulk)
        assert_close(biased, x, dense, bias, digits)


def test_every_count_of_tokens(backend, place, rng):
    w, dense = random_weight(rng, (20, 40), 0.5, "bitmap16", torch.bfloat16, backend.device)
    w = dataclasses.replace(w, few_tokens=37)
    for m in range(41):  # beyond 32: two reads; beyond 37: the dense weight
        x = torch.from_numpy(rng.standard_normal((m, 40))).to(torch.bfloat16)
        got = w.linear(x.to(backend.device), place=place)
        assert got.shape == (m, 20)
        assert_close(got, x, dense)


@pytest.mark.parametrize("tokens", [33, 48])
def test_the_tokens_beyond_whole_launches_are_split_where_the_others_are_not(backend, place, rng, tokens):
    # Block rows for all places of 32 tokens, and for half of those of fewer.
    sms = backend.module.multiprocessors(0)
    w, dense = random_weight(rng, (64 * (2 * sms - 1), 1024), 0.05, "pairs16", torch.float16, backend.device)
    x = torch.from_numpy(rng.standard_normal((tokens, 1024))).to(torch.float16)
    whole, rest = (
        backend.module.plan_decode(t, *w.shape, w.largest, w.format, sms, backend.module.shared_limit(0))[
            "workspace_bytes"
        ]
        for t in (32, tokens - 32)
    )
    assert rest > whole == 0
    assert_close(w.linear(x.to(backend.device), place=place), x, dense)


def test_48_kb_of_dynamic_shared_memory_and_the_static_besides(backend, place, rng):
    dense = torch.zeros(64, 64, dtype=torch.bfloat16)
    dense.view(-1)[:1200] = 1
    w = DecodeWeight.from_dense(dense.to(backend.device), format="bitmap16")
    plan = backend.module.plan_decode(1, 64, 64, w.largest, w.format, 132, 227 << 10)
    assert plan["shared_bytes"] == 48 << 10
    x = torch.from_numpy(rng.standard_normal((1, 64))).to(torch.bfloat16)
    assert_close(w.linear(x.to(backend.device), place=place), x, dense.double())


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_a_long_reduction_is_split_in_a_fixed_order(backend, place, rng, format, tokens):
    w, dense = random_weight(rng, (70, 64 * 33 + 5), 0.4, format, torch.float16, backend.device)
    x = torch.from_numpy(rng.standard_normal((tokens, dense.shape[1]))).to(torch.float16)
    sms = backend.module.multiprocessors(0)
    plan = backend.module.plan_decode(tokens, *w.shape, w.largest, format, sms, 232448)
    assert plan["splits"] > 1
    assert plan["workspace_bytes"] > 0
    assert bool(plan["digit_pitch"]) == (format == "bitmap8" and tokens < 3)
    first = w.linear(x.to(backend.device), place=place)
    assert_close(first, x, dense, digits=bool(plan["digit_pitch"]))
    for _ in range(3):
        assert torch.equal(w.linear(x.to(backend.device), place=place), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_as_integers(backend, place, rng, dtype):
    """Magnitudes that differ by far, in one token and between two; all equal; zeros; too small to be one."""
    k = 64 * 20 + 3
    w, dense = random_weight(rng, (70, k), 0.4, "bitmap8", dtype, backend.device)
    x = torch.from_numpy(rng.standard_normal((2, k))).to(dtype)
    for change in (
        lambda t: t,
        lambda t: (t * 2.0**-10).index_fill(1, torch.tensor([5, k - 1]), 30.0),
        lambda t: t.index_fill(0, torch.tensor([1]), 3.0) * torch.tensor([[1e-3], [-1.0]]).to(dtype),
        lambda t: t.sign() * torch.finfo(dtype).max / 2**20,
        lambda t: t.index_fill(0, torch.tensor([0]), 0.0),
        lambda t: t * (2.0**-14 if dtype == torch.float16 else 2.0**-110),
    ):
        these = change(x)
        for tokens in (these[:1], these[1:], these):
            got = w.linear(tokens.to(backend.device), place=place)
            exact = tokens.double() @ dense.T
            bound = torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-22 * (
                tokens.double().abs() @ dense.abs().T
            )
            largest = tokens.double().abs().amax(1, keepdim=True).clamp(min=2.0**-100)
            bound += DIGITS * largest * dense.abs().sum(1) + torch.finfo(dtype).smallest_normal
            assert bool(((got.cpu().double() - exact).abs() <= bound).all())


def test_the_largest_of_a_long_token(backend, place, rng):
    """Among columns that no other row of blocks shares, wherever it is."""
    sms, k = backend.module.multiprocessors(0), 64 * 66
    n = 64 * (2 * sms + 1)
    w, dense = random_weight(rng, (n, k), 0.01, "bitmap8", torch.float16, backend.device)
    plan = backend.module.plan_decode(1, n, k, w.largest, w.format, sms, backend.module.shared_limit(0))
    assert plan["splits"] == 1
    assert plan["digit_pitch"]
    for column in (0, 700, 1500, 1700, k - 1):
        x = torch.from_numpy(rng.standard_normal((1, k))).to(torch.float16)
        x[0, column] = 100.0
        assert_close(w.linear(x.to(backend.device), place=place), x, dense, digits=True)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_token_of_integers_that_holds_no_number(backend, place, rng, value):
    k = 64 * 20
    w, dense = random_weight(rng, (70, k), 0.4, "bitmap8", torch.bfloat16, backend.device)
    x = torch.from_numpy(rng.standard_normal((2, k))).to(torch.bfloat16)
    for token in (0, 1):
        for column in (0, 77, k - 1):
            bad = x.clone()
            bad[token, column] = value
            got = w.linear(bad.to(backend.device), place=place).cpu()
            assert bool(torch.isnan(got[token]).all())
            assert_close(got[1 - token], x[1 - token], dense, digits=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 64), (65, 130), (200, 31)])
def test_what_is_packed_comes_back(backend, place, rng, dtype, n, k):
    for density in (0.0, 0.03, 0.5, 1.0):
        w, dense = random_weight(rng, (n, k), density, "bitmap16", dtype, backend.device)
        assert torch.equal(w.to_dense(place=place).cpu().double(), dense)
        assert (
            w.nbytes <= (n + 63) // 64 * ((k + 63) // 64) * (576 + 15 + 4) + 2 * int((dense != 0).sum()) + 4
        )
        pairs, dense = random_weight(rng, (n, k), density, "pairs16", dtype, backend.device)
        assert torch.equal(pairs.to_dense(place=place).cpu().double(), dense)
        for format in ("bitmap8", "dense8"):
            q, dense8 = random_weight(rng, (n, k), density, format, dtype, backend.device)
            assert torch.equal(q.to_dense(place=place).cpu(), dense8.float().to(dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(0, 5), (3, 0), (1, 1), (64, 64), (65, 130), (200, 31), (30, 208)])
def test_the_device_packs_the_bytes_of_torch(backend, rng, format, n, k):
    for density in (0.0, 0.03, 0.5, 1.0):
        w = torch.from_numpy(rng.standard_normal((n, k + 3))).to(torch.bfloat16)
        if not format.endswith("16"):
            w = torch.from_numpy(rng.integers(-128, 128, (n, k + 3))).to(torch.int8)
        w *= torch.from_numpy(rng.random((n, k + 3)) < density)
        if format.endswith("16") and w.numel():
            w.view(-1)[0], w.view(-1)[-1] = -0.0, torch.nan
        keep = torch.from_numpy(rng.random((n, k)) < 0.7)
        for first in (0, 1):  # rows at any address
            part = w[:, first : first + k]
            for mask in (None, keep, keep.T.contiguous().T) if format.endswith("16") else (None,):
                want = _cuda_decode.pack_in_torch(part, format, mask)
                there = None if mask is None else mask.to(backend.device)
                got = _cuda_decode.pack_on_device(part.to(backend.device), format, there)
                assert torch.equal(got[0].cpu(), want[0])
                assert torch.equal(got[1].cpu(), want[1])
                assert got[2] == want[2]
    weight = torch.ones(2, 2, dtype=torch.float16, device=backend.device)  # a kernel has to run
    pared.ops.Bitmap.from_device(weight)


def test_what_the_mask_kernel_selects_is_packed_on_the_device(backend, place, rng):
    w = torch.from_numpy(rng.standard_normal((70, 90))).to(torch.float16).to(backend.device)
    mask = pared.ops.topk_mask(w, 2000)
    packed = pared.ops.Bitmap.from_device(w, mask)
    assert torch.equal(packed.to_dense(place=place), w * mask)
    for call, error, text in [
        (lambda: pared.ops.Bitmap.from_device(w, mask[1:]), ValueError, r"mask: expected \[70, 90\], got"),
        (
            lambda: pared.ops.Bitmap.from_device(w, w),
            TypeError,
            "mask: expected dtype bool, got torch.float16",
        ),
        (
            lambda: pared.ops.Bitmap.from_device(w.cpu().numpy()),
            ValueError,
            "weight: expected a tensor on a C",
        ),
    ]:
        with pytest.raises(error, match=text):
            call()


@pytest.mark.parametrize("format", ["bitmap16", "pairs16"])
def test_special_values(backend, place, format):
    w = torch.zeros(64, 64, dtype=torch.float16)
    w[0, 0], w[5, 63], w[63, 1], w[7, 7] = float("inf"), float("nan"), 6e-8, -0.0
    back = DecodeWeight.from_dense(w.to(backend.device), format=format).to_dense(place=place).cpu()
    assert torch.equal(back.nan_to_num(7.0), w.nan_to_num(7.0))
    assert torch.isnan(back).sum() == 1
    x = torch.ones(1, 64, dtype=torch.float16, device=backend.device)
    y = DecodeWeight.from_dense(w.to(backend.device), format=format).linear(x, place=place).cpu()[0]
    assert torch.isinf(y[0])
    assert torch.isnan(y[5])
    assert torch.isfinite(y[[1, 7, 63]]).all()


@pytest.mark.parametrize("format", ["bitmap16", "pairs16"])
def test_every_position_of_a_block(backend, place, format):
    # One non-zero at a time would be 4096 launches: 64 diagonals, each value its own power of two or column.
    x = torch.eye(64, dtype=torch.float16)[:32].to(backend.device)
    w = (torch.arange(4096).view(64, 64) % 2039 + 1).to(torch.float16)
    for shift in range(0, 64, 9):
        keep = (torch.arange(64)[:, None] * 5 + torch.arange(64) + shift) % 7 < 3
        packed = DecodeWeight.from_dense((w * keep).to(backend.device), format=format)
        got = packed.linear(x, place=place).cpu()
        assert torch.equal(got, (w * keep).T[:32])


def test_views_and_leading_dimensions(backend, place, rng):
    w, dense = random_weight(rng, (30, 80), 0.5, "bitmap16", torch.bfloat16, backend.device)
    x = torch.from_numpy(rng.standard_normal((2, 3, 83))).to(torch.bfloat16)
    on = x.to(backend.device)
    for cut in (slice(0, 80), slice(1, 81), slice(3, 83)):  # aligned to 16 bytes, and not
        got = w.linear(on[..., cut], place=place)
        assert got.shape == (2, 3, 30)
        assert_close(got.reshape(6, 30), x[..., cut].reshape(6, 80), dense)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations(backend, place, rng, activation):
    w, _ = random_weight(rng, (30, 64), 0.5, "bitmap16", torch.float16, backend.device)
    x = torch.from_numpy(rng.standard_normal((70, 64))).to(torch.float16).to(backend.device)
    few = w.linear(x[:32], None, activation, place=place)
    many = w.linear(x, None, activation, place=place)[:32]
    plain = w.linear(x[:32], place=place)
    # The dense path rounds to float16 before the activation; its slope is at most 1.13.
    assert bool(((few - many).abs() <= 2.0**-9 * (plain.abs() + 1e-2)).all())


def test_nothing_beyond_the_output_is_written(backend, place, rng, monkeypatch):
    w, dense = random_weight(rng, (37, 64), 0.5, "bitmap16", torch.float16, backend.device)
    x = torch.from_numpy(rng.standard_normal((5, 64))).to(torch.float16)
    poison = torch.full((37 * 5 + 64,), 7.0, dtype=torch.float16, device=backend.device)
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *a, **k: poison[31 : 31 + 185].view(5, 37) if a[0] == (5, 37) else empty(*a, **k),
    )
    assert_close(w.linear(x.to(backend.device), place=place), x, dense)
    assert bool((poison[:31] == 7).all())
    assert bool((poison[31 + 185 :] == 7).all())


# ---- errors, plans and choices: no kernel runs


def test_pairs_are_chosen_where_few_are_there():
    w = torch.ones(4, 12, dtype=torch.bfloat16)
    w[:, 4:] = 0  # columns 0 to 3 of 12: a third of the pairs
    w[:, 6] = -0.0
    assert _cuda_decode.faster_format(w) == "pairs16"
    w[3, 11] = 1
    assert _cuda_decode.faster_format(w) == "bitmap16"
    keep = torch.ones(4, 12, dtype=torch.bool)
    keep[3, 11] = False
    assert _cuda_decode.faster_format(w, keep) == "pairs16"
    assert _cuda_decode.faster_format(torch.ones(3, 1, dtype=torch.float16)) == "bitmap16"
    assert _cuda_decode.faster_format(torch.zeros(0, 5, dtype=torch.float16)) == "pairs16"


def linear(x, w, *rest):
    return w.linear(x, *rest)


def test_bad_input(rng):
    w, _ = random_weight(rng, (4, 8), 0.5, "bitmap16", torch.float16, "cpu")
    x, q = torch.ones(2, 8, dtype=torch.float16), torch.ones(4, 8, dtype=torch.int8)
    ones = torch.ones(4)
    dense, quantized = DecodeWeight.from_dense, DecodeWeight.from_quantized
    for function, args, error, text in [
        (linear, (x.float(), w), TypeError, "x: expected dtype float16, got torch.float32"),
        (linear, (x[:, :7], w), ValueError, r"x: expected shape \[..., 8\], got \[2, 7\]"),
        (linear, (x.to("meta"), w), ValueError, "x: expected a tensor on cpu, got one on meta"),
        (linear, (x, w, ones[:3]), ValueError, r"bias: expected contiguous \[4\], got \[3\]"),
        (
            dense,
            (torch.ones(4, 8),),
            TypeError,
            "weight: expected dtype float16 or bfloat16, got torch.float32",
        ),
        (dense, (x[0],), ValueError, r"weight: expected \[out, in\], got shape \[8\]"),
        (dense, (x, None, "csr"), ValueError, "format: expected 'bitmap16', 'pairs16' or None, got 'csr'"),
        (quantized, (x, ones, torch.float16), TypeError, "q: expected dtype int8, got torch.float16"),
        (quantized, (q, ones, torch.float32), TypeError, "dtype: expected float16 or bfloat16"),
        (quantized, (q, ones[:3], torch.float16), ValueError, r"scales: expected \[4\], got \[3\]"),
        (quantized, (q, ones, torch.float16, "csr"), ValueError, "format: expected 'bitmap8' or 'dense8'"),
    ]:
        with pytest.raises(error, match=text):
            function(*args)


def test_plans(emulated):
    for format in ("bitmap16", "bitmap8"):
        for tokens in (1, 2, 3, 8, 9, 16, 17, 32):
            for outputs in (1, 64, 4096, 12800, 28672):
                for cols in (0, 1, 64, 8192, 65536):
                    for largest in (512, 4608, 8704):
                        for sms, limit in ((1, 99 << 10), (108, 163 << 10), (132, 227 << 10)):
                            p = emulated.plan_decode(tokens, outputs, cols, largest, format, sms, limit)
                            assert tokens <= p["tokens"] <= max(8, 2 * tokens)
                            rows, across = p["block_rows"], p["block_cols"]
                            assert (rows - 1) * 64 < outputs <= rows * 64
                            assert (across - 1) * 64 < cols <= across * 64
                            assert 1 <= p["splits"] <= max(1, across // 8)
                            assert p["stages"] in (2, 3, 4)
                            part = 64 * -(-across // p["splits"])  # columns
                            pitch = p["digit_pitch"]
                            assert pitch in {0, part, part + 64}
                            assert pitch == 0 or (format == "bitmap8" and tokens <= 2 and pitch % 128 == 64)
                            least = p["stages"] * 4 * largest + 3 * tokens * pitch
                            sums = 4 * 64 * p["tokens"] * 4
                            assert max(least, sums) <= p["shared_bytes"] <= limit - 2048
                            assert (p["workspace_bytes"] > 0) == (p["splits"] > 1)
                            for times in (0, 2):
                                all_bytes = emulated.decode_workspace(
                                    32 * times + tokens, outputs, cols, largest, format, sms, limit
                                )
                                most = emulated.plan_decode(32, outputs, cols, largest, format, sms, limit)
                                whole = most["workspace_bytes"] if times else 0
                                assert all_bytes == max(p["workspace_bytes"], whole)
    for outputs, cols in [(8192, 8192), (28672, 8192), (8192, 28672)]:
        p = emulated.plan_decode(1, outputs, cols, 2600, "bitmap8", 132, 227 << 10)
        assert p["digit_pitch"]
        assert 3 * (p["shared_bytes"] + 2048) <= 228 << 10  # three blocks of threads a multiprocessor
    assert emulated.plan_decode(1, 8192, 8192, 4608, "bitmap16", 132, 227 << 10)["splits"] >= 2
