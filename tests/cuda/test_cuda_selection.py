"""Selection on the device against the specification: emulated always, on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import selection_reference as ref
import torch

from pared import _cuda, _cuda_selection
from pared.ops import block_mask, nm_mask, select_threshold, topk, topk_mask

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KEYS = ("abs", "identity", "square", "abs_mul")
HALVES = DTYPES[1:]
SAMPLE = 1 << 15  # up to here a selection is direct


def random(rng, shape, dtype=torch.float32, step=None):
    x = rng.standard_normal(shape)
    if step is not None:
        x = np.round(x / step) * step
    return torch.from_numpy(np.asarray(x, np.float32)).to(dtype)


def ranks(n):
    return sorted({1, n // 10, n // 2, n - 1, n} & set(range(1, n + 1)))


def flat_keys(xs, key="abs", gs=None):
    gs = gs or [None] * len(xs)
    return np.concatenate([ref.keys(x, key, g).ravel() for x, g in zip(xs, gs, strict=True)])


def numbers(t):
    """A threshold of the device, as the specification gives it."""
    assert [v.dtype for v in t] == [torch.float32, torch.int64, torch.int64]
    assert [v.ndim for v in t] == [0, 0, 0]
    value, above, ties = (v.item() for v in t)
    return value, above, ties


def check(backend, xs, k, key="abs", gs=None, nan="raise"):
    """Threshold and masks of the tensors, taken as one, against the specification; masks start poisoned."""
    flat = flat_keys(xs, key, gs)
    here = [x.to(backend.device) for x in xs]
    other = None if gs is None else [g.to(backend.device) for g in gs]
    masks = [torch.full(x.shape, 0xEE, dtype=torch.uint8, device=backend.device).view(torch.bool) for x in xs]
    # What topk_mask does, which keeps the threshold to itself.
    run = _cuda_selection._Run(
        _cuda_selection._Selection(here, "scores", True, key, other, None, nan, False), k, masks
    )
    run.fill(masks)
    np.testing.assert_equal(
        numbers((run.value, run.counts[0], run.counts[1])), ref.threshold(flat, k), f"k={k}"
    )
    if k:
        assert run.counts[3] == np.isnan(flat).sum()
    check_masks(flat, k, masks)


def check_masks(flat, k, masks):
    got = np.concatenate([m.cpu().view(torch.uint8).numpy().ravel() for m in masks])
    assert np.all(got <= 1), "a mask holds bytes other than 0 and 1"
    ref.check_mask(flat, k, got.astype(bool))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", KEYS)
def test_direct(backend, rng, key, dtype):
    for n, step in ((1, None), (7, 0.5), (9, None), (65, 0.5), (1025, 0.25)):
        x, g = random(rng, n, dtype, step), random(rng, n, dtype, step)
        for k in sorted({0, 1, n // 2, n}):
            check(backend, [x], k, key, [g] if key == "abs_mul" else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", KEYS)
def test_sampled(backend, rng, key, dtype):
    n = SAMPLE + 12345
    x, g = random(rng, n, dtype), random(rng, n, dtype)
    check(backend, [x], n // 3, key, [g] if key == "abs_mul" else None)


@pytest.mark.parametrize("n", [SAMPLE, SAMPLE + 1, 3 * (1 << 14) - 1, 5 * (1 << 14) + 3])
def test_sizes_around_sample_and_tile(backend, rng, n):
    x = random(rng, n, step=1 / 64)
    for k in (1, n // 2, n):
        check(backend, [x], k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3, 5, 7])
def test_misaligned_views(backend, rng, dtype, offset):
    n = SAMPLE + 4097
    storage = random(rng, n + offset, dtype).to(backend.device)
    x = storage[offset:]
    out = torch.ones(n + offset + 8, dtype=torch.bool, device=backend.device)
    flat = ref.keys(x.cpu())
    k = n // 5
    topk_mask(x, k, out=out[offset : n + offset])
    check_masks(flat, k, [out[offset : n + offset]])
    assert out[:offset].all(), "wrote before the mask"
    assert out[n + offset :].all(), "wrote behind the mask"


def test_many_tensors_of_several_dtypes(backend, rng):
    shapes = [(0,), (300, 50), (7,), (), (0, 4), (20000,), (3, 4, 5), (129,)] * 5
    xs = [random(rng, s, DTYPES[i % 3], 1 / 16) for i, s in enumerate(shapes)]
    assert len(xs) > 32, "more than a launch of the table takes"
    n = sum(x.numel() for x in xs)
    assert n > SAMPLE
    for k in (0, n // 2):
        check(backend, xs, k)
    few = xs[:8]
    check(backend, few, 12345)


@pytest.mark.parametrize("k_share", [0.3, 0.5, 0.500001, 0.7, 0.9])
def test_a_pruned_model_is_half_ties(backend, rng, k_share):
    n = 3 * SAMPLE
    x = random(rng, n)
    x[rng.permutation(n)[: n // 2]] = 0.0
    x[:4] = -0.0
    check(backend, [x], int(n * k_share))


def test_constant_and_few_values(backend, rng):
    n = SAMPLE + 20000
    for x in (torch.full((n,), -2.5), torch.from_numpy(rng.integers(-2, 3, n).astype(np.float32))):
        for key, k in (("abs", n // 4), ("identity", n - 5), ("identity", 1)):
            check(backend, [x], k, key)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bracket_holds_the_threshold_and_little_else(backend, rng, dtype):
    """What is not counted or gathered the first time costs up to three more passes over the data."""
    n = 8 * SAMPLE
    x = random(rng, n, dtype).to(backend.device)
    for k in (n // 8, n // 2, n - n // 8):
        run = _cuda_selection._Run(
            _cuda_selection._Selection([x], "scores", True, "abs", None, None, "lowest", False), k, None
        )
        begin = run.workspace[0] - run.memory.data_ptr()
        # The first words of SelectState: keys above the bracket, at its ends, inside.
        above, _, _, inside = run.memory[begin : begin + 32].view(torch.int64).tolist()
        assert above < k <= above + inside
        assert inside < n / 16


def test_a_bracket_that_misses(backend, rng):
    """Positions are drawn from the index alone, so that data can be made to fool the sample."""
    n = 4 * SAMPLE
    position = sampled_positions(n)
    x = random(rng, n)
    for low, k in ((True, n // 2), (False, n // 2), (True, 5), (False, n - 5)):
        fooled = x.clone()
        # What is sampled is all smaller, or all larger, than what is not.
        fooled[position] = fooled[position].abs() * 1e-3 if low else fooled[position].abs() + 100.0
        check(backend, [fooled], k)


def magnitudes(rng, n, dtype, kind):
    """16-bit data of some kind, among them what only a comparison of bits would get wrong."""
    if kind == "normal":
        return random(rng, n, dtype)
    if kind == "half zeros":
        x = random(rng, n, dtype)
        x[rng.permutation(n)[: n // 2]] = 0.0
        x[:40] = -0.0
        return x
    if kind == "every bit pattern":  # subnormals, infinities and NaNs
        bits = rng.integers(0, 1 << 16, n).astype(np.uint16).view(np.int16)
        return torch.from_numpy(bits).view(dtype)
    if kind == "NaNs":
        return random(rng, n, dtype).masked_fill_(torch.from_numpy(rng.random(n) < 0.6), torch.nan)
    if kind == "infinities":
        return random(rng, n, dtype).masked_fill_(torch.from_numpy(rng.random(n) < 0.6), -torch.inf)
    if kind == "subnormals":
        return torch.from_numpy(rng.integers(0, 120, n).astype(np.int16)).view(dtype)
    return torch.full((n,), -2.5, dtype=dtype)  # one value


KINDS = ("normal", "half zeros", "every bit pattern", "NaNs", "infinities", "subnormals", "one value")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_counted_magnitudes(backend, rng, dtype, kind):
    n = 2 * SAMPLE + 4099
    x = magnitudes(rng, n, dtype, kind)
    numbers_in = n - int(x.isnan().sum())
    for k in sorted({5, n // 3, n // 2, numbers_in, min(n, numbers_in + 1), n}):
        check(backend, [x[1:]] if k < n else [x], k, nan="lowest")


@pytest.mark.parametrize("dtype", HALVES)
def test_counted_magnitudes_of_many_tensors(backend, rng, dtype):
    """A block's share begins and ends inside tensors, some of them without elements."""
    shapes = [(0,), (300, 50), (7,), (), (0, 4), (40000,), (0,), (3, 4, 5), (129,), (0, 1)] * 2
    xs = [random(rng, s, dtype, 1 / 16) for s in shapes]
    n = sum(x.numel() for x in xs)
    assert n > SAMPLE
    for k in (1, n // 2, n):
        check(backend, xs, k)


@pytest.mark.parametrize("dtype", HALVES)
def test_counted_magnitudes_where_the_bracket_misses(backend, rng, dtype):
    n = 4 * SAMPLE
    position = sampled_positions(n)
    x = random(rng, n, dtype)
    for low, k in ((True, n // 2), (False, n // 2), (True, 5), (False, n - 5)):
        fooled = x.clone()
        fooled[position] = fooled[position].abs() * 1e-3 if low else fooled[position].abs() + 100.0
        check(backend, [fooled], k)
    # Many keys inside the bracket, all of them counted before the right one was looked for.
    for spread, k in ((torch.linspace(2, 13, SAMPLE), n // 2), (torch.linspace(-13, -2, SAMPLE), n // 3)):
        fooled = x.sign() * (x.abs() + 1).clamp(max=3.0)
        fooled[position] = torch.exp2(spread).to(dtype)
        check(backend, [fooled.masked_fill(fooled == 2.0, torch.nan)], k, nan="lowest")


def test_which_selections_count_magnitudes(emulated, monkeypatch, rng):
    monkeypatch.setattr(_cuda, "_emulated", emulated)
    n = SAMPLE + 1
    half, brain = random(rng, n, torch.float16), random(rng, n, torch.bfloat16)
    for xs, key, kernel in [
        ([half], "abs", "select_count"),
        ([brain, brain], "abs", "select_count"),
        ([half, brain], "abs", "select_gather"),
        ([brain], "identity", "select_gather"),
        ([half], "square", "select_gather"),
        ([half.float()], "abs", "select_gather"),
    ]:
        emulated.take_launched()
        select_threshold(xs, n // 2, key)
        searched = (
            {"select_count": 2} if kernel == "select_count" else {"select_gather": 1, "select_radix": 3}
        )
        assert emulated.take_launched() == {"select_begin": 1, "select_sample": 1, **searched}


def sampled_positions(n):
    """select_threshold.cu's sample_position."""
    i = np.arange(SAMPLE, dtype=object)
    mask64 = (1 << 64) - 1

    def mix(v):
        v = ((v + 0x9E3779B97F4A7C15) & mask64) * 0xFF51AFD7ED558CCD & mask64
        v = (v ^ (v >> 33)) * 0xC4CEB9FE1A85EC53 & mask64
        return ((v ^ (v >> 33)) >> 16) & 0xFFFFFFFF

    return np.array([(int(v) * n + (mix(int(v)) * n >> 32)) // SAMPLE for v in i])


def test_more_inside_the_bracket_than_there_is_room_for(backend, rng):
    """The sample sees a spread that the data do not have."""
    n = 4 * SAMPLE
    x = torch.full((n,), 1.0) + torch.arange(n) * 2.0**-22
    position = sampled_positions(n)
    x[position] = torch.linspace(0.5, 1.6, SAMPLE)
    for k in (n // 2, n // 3):
        check(backend, [x], k)


@pytest.mark.parametrize("n", [1000, SAMPLE + 5000])
@pytest.mark.parametrize("key", ["abs", "identity"])
def test_nan(backend, rng, n, key):
    x = random(rng, n)
    bad = rng.permutation(n)[: n // 3]
    x[bad] = torch.nan
    x[bad[0]] = -torch.nan
    x[(bad[0] + 1) % n] = torch.inf
    x[(bad[0] + 2) % n] = -torch.inf
    count = int(x.isnan().sum())
    for k in (n - count, n - count + 1, n) if n > SAMPLE else (1, n // 2, n - count, n - count + 1, n):
        check(backend, [x], k, key, nan="lowest")
    here = x.to(backend.device)
    for k in (0, n // 2):
        with pytest.raises(ValueError, match=f"scores: expected no NaN among the keys, got {count} "):
            select_threshold(here, k, key)
    out = torch.ones(n, dtype=torch.bool, device=backend.device)
    with pytest.raises(ValueError, match="NaN"):
        topk_mask(here, n // 2, key, out=out)
    assert out.all(), "a mask was touched"
    with pytest.raises(ValueError, match=f"got {count} "):
        topk_mask(here.reshape(1, n), 0, key, dim=1)


def test_factors_of_columns(backend, rng):
    w, c = random(rng, (96, 401), torch.bfloat16), random(rng, (8, 12, 3, 3))
    scales = [
        torch.from_numpy(rng.random(401, np.float32)),
        torch.from_numpy(rng.random((2, 12), np.float32)),
    ]
    groups = scales[1].repeat_interleave(4, 0)[:, :, None, None].expand(8, 12, 3, 3)
    full = [scales[0].expand(96, 401).float(), groups]
    flat = np.concatenate(
        [ref.keys(x.float(), "abs_mul", g).ravel() for x, g in zip((w, c), full, strict=True)]
    )
    here = [t.to(backend.device) for t in (w, c)]
    col_scale = [s.to(backend.device) for s in scales]
    for k in (1, flat.size // 3):
        got = numbers(select_threshold(here, k, "abs_mul", col_scale=col_scale))
        assert got == ref.threshold(flat, k)
        check_masks(flat, k, topk_mask(here, k, "abs_mul", col_scale=col_scale))
    for x, s, g in zip(here, col_scale, full, strict=True):
        score = ref.keys(x.cpu().float(), "abs_mul", g).reshape(x.shape[0], -1)
        got = topk_mask(x, 17, "abs_mul", dim=1, col_scale=s).cpu().numpy()
        np.testing.assert_array_equal(got.reshape(score.shape), ref.mask(score, 17))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", KEYS)
def test_rows(backend, rng, key, dtype):
    for rows, cols in ((1, 1), (3, 129), (2, 1000)):
        storage = random(rng, (rows, cols + 3), dtype, 1 / 8).to(backend.device)
        w = storage[:, 2 : cols + 2]  # rows apart, and not aligned
        g = random(rng, (rows, cols), dtype).to(backend.device)
        flat = ref.keys(w.cpu(), key, g.cpu())
        for k in (0, 1, cols // 2, cols):
            got = topk_mask(w, k, key, dim=1, other=g if key == "abs_mul" else None)
            np.testing.assert_array_equal(got.cpu().numpy(), ref.mask(flat, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", KEYS)
def test_topk_is_sorted(backend, rng, key, dtype):
    for n in (1, 1000, SAMPLE + 3000) if (key, dtype) == ("abs", torch.float32) else (300,):
        x, g = random(rng, n, dtype, 1 / 64), random(rng, n, dtype)
        order = ref.order(ref.keys(x, key, g))
        here, other = x.to(backend.device), g.to(backend.device) if key == "abs_mul" else None
        for k in (0, 1, n // 3, n):
            v, i = topk(here, k, key, other=other)
            np.testing.assert_array_equal(i.cpu().numpy(), order[:k])
            assert torch.equal(v, here[i])


SHAPES = ((5, 37), (3, 16), (7, 8, 3, 3), (2, 75, 1, 3), (1, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", KEYS)
def test_groups(backend, rng, key, dtype):
    for i, shape in enumerate(SHAPES):
        x, g = random(rng, shape, dtype, 1 / 4), random(rng, shape, dtype)
        x.view(-1)[0] = torch.inf
        score = ref.keys(x, key, g).reshape(shape)
        other = g.to(backend.device) if key == "abs_mul" else None
        for n, m in ((2, 4), (0, 3), (1, 2), (4, 8), (7, 16), (16, 20), (5, 33 + i), (3, 3)):
            got = nm_mask(x.to(backend.device), n, m, key, other=other)
            np.testing.assert_array_equal(got.cpu().numpy(), ref.nm(score, n, m), f"{n}:{m} of {shape}")


def test_groups_of_many_tensors_and_views(backend, rng):
    storage = random(rng, (6, 50), torch.float16, 1 / 4).to(backend.device)
    xs = [storage[:, 2:46], storage[:, 1:9], random(rng, (0, 4)).to(backend.device)]
    out = [torch.full(x.shape, 0xEE, dtype=torch.uint8, device=backend.device).view(torch.bool) for x in xs]
    nm_mask(xs, 2, 4, out=out)
    for x, m in zip(xs, out, strict=True):
        got = m.cpu().view(torch.uint8).numpy()
        np.testing.assert_array_equal(got, ref.nm(ref.keys(x.cpu()).reshape(x.shape), 2, 4))


# Around the 2048 columns whose sums a block of threads holds, and taps beyond a piece.
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((5, 37), (1, 4)),
        ((9, 33), (4, 1)),
        ((40, 70), (16, 4)),
        ((3, 2050), (2, 2049)),
        ((2, 6200), (1, 3000)),
        ((130, 65), (64, 64)),
        ((7, 9, 3, 3), (2, 4)),
        ((3, 300, 3, 3), (2, 256)),
        ((2, 3, 47, 47), (1, 2)),
        ((1, 1), (3, 5)),
    ],
)
def test_blocks(backend, rng, shape, block):
    for key, dtype in (("abs", torch.float32), ("square", torch.bfloat16), ("abs_mul", torch.float16)):
        x, g = random(rng, shape, dtype, 1 / 4), random(rng, shape, dtype)
        score = ref.keys(x, key, g).reshape(shape)
        other = g.to(backend.device) if key == "abs_mul" else None
        here = x.to(backend.device)
        total = ref.block_scores(score, *block).size
        for k in sorted({0, 1, total // 2, total}):
            out = torch.full(shape, 0xEE, dtype=torch.uint8, device=backend.device).view(torch.bool)
            block_mask(here, k, block, key, other=other, out=out)
            got = out.cpu().view(torch.uint8).numpy()
            np.testing.assert_array_equal(got, ref.block_mask([score], k, *block)[0], f"k={k}")


def test_blocks_of_many_tensors(backend, rng):
    shapes = [(12, 37), (0, 5), (7, 4, 3, 3), (30, 3)]
    xs = [random(rng, s, DTYPES[i % 3], 1 / 8) for i, s in enumerate(shapes)]
    scores = [ref.keys(x, "identity").reshape(x.shape) for x in xs]
    for k in (0, 17, 60):
        got = block_mask([x.to(backend.device) for x in xs], k, (2, 4), "identity")
        for m, want in zip(got, ref.block_mask(scores, k, 2, 4), strict=True):
            np.testing.assert_array_equal(m.cpu().numpy(), want)
    masks = [torch.empty(13, dtype=torch.bool, device=backend.device)[1:].view(3, 4) for _ in xs[:1]]
    x = random(rng, (3, 4)).to(backend.device)
    want = ref.block_mask([ref.keys(x.cpu()).reshape(3, 4)], 2, 1, 3)[0]
    np.testing.assert_array_equal(block_mask([x], 2, (1, 3), out=masks)[0].cpu().numpy(), want)


def test_groups_and_blocks_with_factors_of_columns(backend, rng):
    w, c = random(rng, (8, 40), torch.bfloat16), random(rng, (8, 12, 3, 3))
    scales = [
        torch.from_numpy(rng.random(40, np.float32)),
        torch.from_numpy(rng.random((2, 12), np.float32)),
    ]
    groups = scales[1].repeat_interleave(4, 0)[:, :, None, None].expand(8, 12, 3, 3)
    for x, s, g in ((w, scales[0], scales[0].expand(8, 40)), (c, scales[1], groups)):
        score = ref.keys(x.float(), "abs_mul", g).reshape(x.shape)
        here, scale = x.to(backend.device), s.to(backend.device)
        got = nm_mask(here, 2, 4, "abs_mul", col_scale=scale)
        np.testing.assert_array_equal(got.cpu().numpy(), ref.nm(score, 2, 4))
        got = block_mask(here, 5, (2, 4), "abs_mul", col_scale=scale)
        np.testing.assert_array_equal(got.cpu().numpy(), ref.block_mask([score], 5, 2, 4)[0])
    with pytest.raises(
        ValueError, match="block: expected 3 to divide the rows of a group of col_scale, got 4"
    ):
        block_mask(c.to(backend.device), 5, (3, 4), "abs_mul", col_scale=scales[1].to(backend.device))


def test_nan_in_groups_and_blocks(backend, rng):
    x = random(rng, (6, 40))
    x[1, 3] = x[4, 39] = torch.nan
    x[2, 0], x[2, 1] = torch.inf, -torch.inf  # their sum is NaN as well
    here, score = x.to(backend.device), ref.keys(x, "identity").reshape(6, 40)
    for m in (4, 40):
        np.testing.assert_array_equal(
            nm_mask(here, 2, m, "identity", nan="lowest").cpu().numpy(), ref.nm(score, 2, m)
        )
        with pytest.raises(ValueError, match="x: expected no NaN among the keys, got 2 "):
            nm_mask(here, 2, m, "identity")
    got = block_mask(here, 28, (1, 8), "identity", nan="lowest").cpu().numpy()
    np.testing.assert_array_equal(got, ref.block_mask([score], 28, 1, 8)[0])
    with pytest.raises(ValueError, match="x: expected no NaN among the keys, got 3 "):
        block_mask(here, 28, (1, 8), "identity")


def test_arguments_of_groups_and_blocks(backend):
    x = torch.ones(2, 8, device=backend.device)
    nm_mask(x, 2, 4)
    for call, message in [
        (lambda: nm_mask(x, 5, 4), "n, m: expected 0 <= n <= m and m >= 1, got 5:4"),
        (lambda: nm_mask(x[0], 2, 4), r"x: expected \[out, in\]"),
        (lambda: block_mask(x, 1, (0, 4)), r"block: expected two positive sizes, got \(0, 4\)"),
        (lambda: block_mask(x, 5), r"k: expected 0 to 4 \(the number of blocks\), got 5"),
        (lambda: block_mask(x[0], 1), r"x: expected \[out, in\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_nothing(backend, rng):
    empty = torch.empty(0, device=backend.device)
    assert numbers(select_threshold([empty, empty], 0)) == (float("inf"), 0, 0)
    assert topk_mask(empty, 0).shape == (0,)
    assert topk_mask(torch.empty(3, 0, device=backend.device), 0, dim=1).shape == (3, 0)
    for shape in ((3, 0), (0, 4)):
        assert nm_mask(torch.empty(shape, device=backend.device), 2, 4).shape == shape
        assert block_mask(torch.empty(shape, device=backend.device), 0).shape == shape
    check(backend, [torch.ones(5)], 2)  # a kernel has to run


def test_arguments(backend, rng):
    x = random(rng, (8, 16)).to(backend.device)
    select_threshold(x, 3)
    for call, error, message in [
        (
            lambda: select_threshold(x, 129),
            ValueError,
            r"k: expected 0 to 128 \(the number of elements\), got 129",
        ),
        (lambda: select_threshold(x, -1), ValueError, "k: expected 0 to 128"),
        (lambda: select_threshold(x, 3, "max"), ValueError, "key: expected one of abs, .* got 'max'"),
        (lambda: select_threshold(x, 3, nan="no"), ValueError, "nan: expected"),
        (
            lambda: select_threshold(x.double(), 3),
            TypeError,
            "scores: expected dtype float32 or .* torch.float64",
        ),
        (lambda: select_threshold(x.T, 3), ValueError, "scores: expected contiguous memory"),
        (
            lambda: select_threshold([x, np.ones(3, np.float32)], 3),
            TypeError,
            r"scores\[1\]: expected a torch",
        ),
        (
            lambda: select_threshold(x, 3, "abs_mul"),
            ValueError,
            "exactly one of other and col_scale .* neither",
        ),
        (lambda: select_threshold(x, 3, other=x), ValueError, "other: expected with key='abs_mul' only"),
        (lambda: select_threshold(x, 3, "abs_mul", other=x.half()), TypeError, "other: expected dtype"),
        (lambda: select_threshold(x, 3, "abs_mul", other=x[1:]), ValueError, "other: expected the shape"),
        (
            lambda: select_threshold(x, 3, "abs_mul", col_scale=x[0, :5]),
            ValueError,
            r"col_scale: expected \[16\]",
        ),
        (
            lambda: topk_mask(x, 17, dim=1),
            ValueError,
            r"k: expected 0 to 16 \(the length of a row of scores\)",
        ),
        (lambda: topk_mask(x.flatten(), 1, dim=1), ValueError, r"scores: expected \[out, in\]"),
        (lambda: topk_mask(x, 1, out=x), TypeError, "out: expected dtype bool"),
        (lambda: topk_mask(x, 1, out=x[1:] > 0), ValueError, "out: expected the shape"),
        (lambda: topk_mask([x, x], 1, out=[x > 0]), ValueError, "out: expected 2 masks, got 1"),
        (lambda: topk_mask(x.view(torch.float32), 1, out=x.view(torch.bool)[:, :16]), ValueError, "out"),
        (lambda: topk(x, 1), ValueError, "x: expected one dimension"),
    ]:
        with pytest.raises(error, match=message):
            call()
    m = x > 0
    with pytest.raises(ValueError, match=r"out\[1\]: expected memory of its own, got some of out\[0\]'s"):
        topk_mask([x, x], 3, out=[m, m])


def test_overlap_is_judged_by_what_is_reached():
    x = torch.zeros(100)
    assert _cuda_selection._overlap(x[:50], x[49:])
    assert not _cuda_selection._overlap(x[:50], x[50:])
    assert not _cuda_selection._overlap(x[:0], x)


# ---- the host's part


@pytest.mark.parametrize("n", [1, 100, SAMPLE, SAMPLE + 1, 10**6, 2**27, 2**33 + 5])
def test_plan(emulated, n):
    for k in ranks(n) if n < 10**5 else (1, n // 1000, n // 2, n - 1, n):
        p = emulated.plan_select([n], k, 132)
        assert p["elements"] == n
        assert p["tiles"] == -(-n // (1 << 14))
        assert p["sample"] == min(n, SAMPLE)
        assert 1 <= p["blocks"] <= 132 * 3
        if n <= SAMPLE:
            assert p["hi_rank"] == p["lo_rank"] == k
            assert p["capacity"] == 0
        else:
            expected = k / n * SAMPLE
            assert p["hi_rank"] < expected < p["lo_rank"]
            assert p["capacity"] <= n
            # Room for what the bracket holds on average.
            width = min(p["lo_rank"], SAMPLE) - max(p["hi_rank"], 0)
            assert p["capacity"] >= min(n, width / SAMPLE * n)
            assert p["bytes"] < 0.2 * 4 * n + (1 << 20)
