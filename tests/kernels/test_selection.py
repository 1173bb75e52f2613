"""The selection kernels on every instruction set against a stable sort. numpy alone."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import selection_reference as ref
from hypothesis import given

from pared import _core
from pared.ops import block_mask, nm_mask, select_threshold, topk, topk_mask

KEYS = ("abs", "identity", "square", "abs_mul")
DTYPES = (np.float32, np.float16)
# Around a vector, a mask store, what one small selection holds, a sample's size, and the direct limit.
SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 1031, 4097, 32768, 32769, 70001)
DIRECT = 1 << 15  # above it a selection samples


def ranks(n: int) -> list[int]:
    return sorted({0, min(1, n), n // 10, n // 2, max(n - 1, 0), n})


def stats(x: np.ndarray, k: int, key: str = "identity", nan: str = "raise") -> dict:
    return _core.select_threshold([x], k, key, None, None, nan, False)


def check_all(x: np.ndarray, k: int, key: str = "identity", nan: str = "raise") -> dict:
    """Threshold and mask against the specification; returns what the core says of its way."""
    flat = ref.keys(x, key)
    got = stats(x, k, key, nan)
    np.testing.assert_equal((got["value"], got["above"], got["ties"]), ref.threshold(flat, k))
    ref.check_mask(flat, k, topk_mask(x, k, key, nan=nan))
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", KEYS)
def test_global(isa, rng, key, dtype):
    for n in SIZES:
        # The halves of a unit tie often, whatever the dtype.
        for x in (rng.standard_normal(n), np.round(rng.standard_normal(n) * 2) / 2):
            w, g = x.astype(dtype), rng.standard_normal(n).astype(dtype)
            other = g if key == "abs_mul" else None
            flat = ref.keys(w, key, g)
            for k in ranks(n):
                t = select_threshold(w, k, key, other=other)
                assert t == ref.threshold(flat, k), (n, k)
                ref.check_mask(flat, k, topk_mask(w, k, key, other=other))


@pytest.mark.parametrize("key", KEYS)
def test_topk_is_sorted(isa, rng, key):
    for n in (0, 1, 16, 1000, 70001):
        w = (np.round(rng.standard_normal(n) * 64) / 64).astype(np.float32)
        g = rng.standard_normal(n).astype(np.float32)
        for k in ranks(n):
            v, i = topk(w, k, key, other=g if key == "abs_mul" else None)
            want = ref.order(ref.keys(w, key, g))[:k]
            np.testing.assert_array_equal(i, want)
            np.testing.assert_array_equal(v, w[want])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", KEYS)
def test_rows(isa, rng, key, dtype):
    for rows, cols in ((0, 5), (3, 0), (1, 1), (5, 16), (4, 129), (7, 1000), (3, 4099), (2, 70001)):
        x = np.round(rng.standard_normal((rows, cols + 3)) * 8) / 8
        w = x.astype(dtype)[:, 2 : cols + 2]  # rows apart, and not aligned
        g = rng.standard_normal((rows, cols)).astype(dtype)
        flat = ref.keys(w, key, g)
        for k in ranks(cols):
            m = topk_mask(w, k, key, dim=1, other=g if key == "abs_mul" else None)
            np.testing.assert_array_equal(m, ref.mask(flat, k))


def test_long_rows(isa, rng):
    w = rng.standard_normal((2, (1 << 18) + 1)).astype(np.float32)
    np.testing.assert_array_equal(topk_mask(w, 1000, dim=1), ref.mask(ref.keys(w), 1000))


@pytest.mark.parametrize(
    ("n", "m"), [(2, 4), (1, 2), (4, 8), (1, 16), (3, 5), (7, 32), (40, 200), (0, 4), (4, 4)]
)
def test_groups(isa, rng, n, m):
    for shape in ((3, 0), (5, 64), (2, 131), (3, 400), (4, 19, 3, 3), (3, 64, 1, 1), (2, 8, 5)):
        for dtype in DTYPES:
            w = (np.round(rng.standard_normal(shape) * 2) / 2).astype(dtype)
            for key in KEYS[:3]:
                np.testing.assert_array_equal(nm_mask(w, n, m, key), ref.nm(ref.keys(w, key), n, m))


@pytest.mark.parametrize(
    "block", [(1, 4), (4, 1), (16, 1), (16, 4), (3, 5), (1, 16), (2, 2), (1, 8), (64, 64)]
)
def test_blocks(isa, rng, block):
    for shape in ((0, 4), (3, 0), (1, 1), (17, 67), (32, 64), (9, 21, 3, 3), (16, 16, 1, 1), (4, 8, 5)):
        for key in KEYS:
            w = rng.standard_normal(shape).astype(np.float32)
            g = rng.standard_normal(shape).astype(np.float32) if key == "abs_mul" else None
            score = ref.keys(w, key, g)
            for k in ranks(ref.block_scores(score, *block).size):
                got = block_mask(w, k, block, key, other=g)
                np.testing.assert_array_equal(got, ref.block_mask([score], k, *block)[0])


# ---- many tensors, one selection


def test_sequence_with_empty_members(isa, rng):
    shapes = [(0,), (300, 200), (7,), (), (0, 4), (50000,), (3, 4, 5)]
    xs = [
        np.round(rng.standard_normal(s) * 16).astype(d) / 16 for s, d in zip(shapes, DTYPES * 4, strict=False)
    ]
    xs = [np.asarray(x, dtype=d) for x, d in zip(xs, DTYPES * 4, strict=False)]
    flat = np.concatenate([ref.keys(x).ravel() for x in xs])
    for k in ranks(flat.size):
        assert select_threshold(xs, k) == ref.threshold(flat, k)
        masks = topk_mask(xs, k)
        assert [m.shape for m in masks] == shapes
        ref.check_mask(flat, k, np.concatenate([m.ravel() for m in masks]))


def test_sequence_of_nothing(isa):
    assert select_threshold([], 0) == (np.inf, 0, 0)
    assert topk_mask([np.zeros((0, 3), np.float32)], 0)[0].shape == (0, 3)
    assert topk_mask([], 0) == []


def test_sequence_of_blocks(isa, rng):
    ws = [rng.standard_normal(s).astype(np.float32) for s in ((9, 13), (0, 4), (4, 6, 3, 3))]
    scores = [ref.keys(w, "square") for w in ws]
    total = sum(ref.block_scores(s, 2, 4).size for s in scores)
    for k in ranks(total):
        for got, want in zip(
            block_mask(ws, k, (2, 4), "square"), ref.block_mask(scores, k, 2, 4), strict=True
        ):
            np.testing.assert_array_equal(got, want)


# ---- factors


@pytest.mark.parametrize("dtype", DTYPES)
def test_col_scale(isa, rng, dtype):
    """One factor a column, one an input channel, one row of factors a group."""
    for shape in ((40, 33), (300, 257), (2, 9000), (8, 6, 3, 3)):
        w = rng.standard_normal(shape).astype(dtype)
        rows, channels = shape[:2]
        taps = w.size // (rows * channels)
        for groups in (None, 1, 2):
            for width in {channels, channels * taps}:
                scale = rng.random((width,) if groups is None else (groups, width)).astype(np.float32)
                full = scale.reshape(groups or 1, width)
                if width == channels:
                    full = full.repeat(taps, axis=1)
                full = full.repeat(rows // (groups or 1), axis=0).reshape(shape)
                flat = ref.keys(w, "abs_mul", full)
                k, k_row = w.size // 3, channels * taps // 2
                assert select_threshold(w, k, "abs_mul", col_scale=scale) == ref.threshold(flat.ravel(), k)
                m = topk_mask(w, k, "abs_mul", col_scale=scale)
                ref.check_mask(flat.ravel(), k, m)
                m = topk_mask(w, k_row, "abs_mul", dim=1, col_scale=scale)
                np.testing.assert_array_equal(m.reshape(rows, -1), ref.mask(flat.reshape(rows, -1), k_row))
                np.testing.assert_array_equal(
                    nm_mask(w, 2, 4, "abs_mul", col_scale=scale), ref.nm(flat.reshape(shape), 2, 4)
                )
                if rows // (groups or 1) % 2 == 0:
                    np.testing.assert_array_equal(
                        block_mask(w, 5, (2, 4), "abs_mul", col_scale=scale),
                        ref.block_mask([flat.reshape(shape)], 5, 2, 4)[0],
                    )


# ---- distributions that try each way through the code

N = 200_003


def distributions(rng: np.random.Generator) -> dict[str, np.ndarray]:
    ramp = np.arange(N, dtype=np.float32)
    return {
        "normal": rng.standard_normal(N),
        "sorted": ramp,
        "reversed": ramp[::-1],
        "constant": np.full(N, 3.0),
        "two values": rng.integers(0, 2, N),
        "half zeros": np.where(rng.random(N) < 0.5, 0, rng.standard_normal(N)),
        "exponential": rng.exponential(size=N) ** 8,
        "periodic": ramp % 64,
        "sawtooth": (ramp * 977) % 8191,
        "one large": np.where(ramp == N // 2, 1e30, 1.0),
        "wide": np.ldexp(rng.standard_normal(N), rng.integers(-140, 120, N)),
        "few values": rng.integers(-3, 4, N),
    }


def test_distributions(isa, rng):
    paths = set()
    for name, x in distributions(rng).items():
        w = np.ascontiguousarray(x, dtype=np.float32)
        for k in (1, N // 10, N // 2, N - 1):
            got = check_all(w, k)
            paths.add(got["path"])
            # Neither ties nor order may defeat the sample: only adversaries reach the fallback.
            assert got["path"] in {"bracket_end", "bracket_inside"}, (name, k, got)
            # Where a cluster of the sample is one value, as in "periodic", it is worth one key.
            assert got["gathered"] < N // 2, (name, k, got)
    assert paths == {"bracket_end", "bracket_inside"}


def alike(rng) -> dict[str, np.ndarray]:
    """Neighbours of one value, of one scale, or on a path: a cluster of a sample is worth fewer keys."""
    return {
        "plateaus": np.repeat(rng.standard_normal(N // 64 + 1), 64)[:N],
        "long plateaus": np.repeat(rng.standard_normal(N // 1000 + 1), 1000)[:N],
        "rows of a scale": rng.standard_normal(N)
        * np.repeat(np.exp(rng.standard_normal(N // 768 + 1)), 768)[:N],
        "walk": np.cumsum(rng.standard_normal(N)),
        "bursts": rng.standard_normal(N)
        * np.where(np.repeat(rng.random(N // 100 + 1) < 0.02, 100)[:N], 50, 1),
    }


def test_neighbours_that_are_alike(isa):
    """The bracket widens with what the sample shows of itself."""
    for seed in range(4):
        for name, x in alike(np.random.default_rng(seed)).items():
            w = np.ascontiguousarray(x, dtype=np.float32)
            for k in (N // 1000, N // 10, N // 2, N - N // 8):
                got = stats(w, k, "identity")
                assert got["path"] == "bracket_inside", (seed, name, k, got)
                assert got["gathered"] < N * 2 // 3, (seed, name, k, got)
            check_all(w, N // 2)


def test_half_zero_model_gathers_no_ties(isa, rng):
    w = np.where(rng.random(N) < 0.5, 0, rng.standard_normal(N)).astype(np.float32)
    got = check_all(w, N * 3 // 4, "abs")  # the threshold is the zero that half of the elements share
    assert got["value"] == 0
    assert got["path"] == "bracket_end"
    assert got["equal"] > N // 3
    assert got["gathered"] < N // 10


def adversary(high: bool, spread: np.ndarray) -> np.ndarray:
    """Large where nothing is sampled and small where it is, or the other way round."""
    x = spread + np.float32(1000 if high else 0)
    x[_core.select_sample_positions(N)] -= np.float32(1000) if high else np.float32(-1000)
    return x


@pytest.mark.parametrize("high", [True, False])
def test_a_missed_bracket_falls_back(isa, rng, high):
    for spread in (
        rng.standard_normal(N),  # what the first 11 bits leave fits the pool
        np.full(N, 0.5),  # one key takes it all: three digits
        np.where(rng.random(N) < 0.9, 0.5, 0.5 + rng.random(N) * 1e-6),
        np.repeat(rng.standard_normal(N // 1000 + 1), 1000)[:N],
    ):
        x = adversary(high, spread.astype(np.float32))
        for k in (N // 3, N // 2, N - N // 8):
            got = check_all(x, k)
            assert got["path"] == "radix", got


def test_an_overflowing_pool_falls_back(isa, rng):
    """The sample sees a spread of keys; nearly all others crowd between the two that bracket the rank."""
    x = np.full(N, np.float32(0.5)) + rng.random(N).astype(np.float32) * np.float32(1e-3)
    x[_core.select_sample_positions(N)] = np.linspace(-1000, 1000, len(_core.select_sample_positions(N)))
    assert check_all(x, N // 2)["path"] == "radix"


def test_each_small_way(isa):
    assert stats(np.zeros(0, np.float32), 0)["path"] == "none"
    assert stats(np.zeros(DIRECT, np.float32), 1)["path"] == "direct"
    assert stats(np.zeros(DIRECT + 1, np.float32), 1)["path"] == "bracket_end"


# ---- special values

SPECIAL = np.array(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        np.inf,
        -np.inf,
        1e-45,
        -1e-45,
        1e-38,
        -1.1754944e-38,
        3.4028235e38,
        -3.4028235e38,
    ],
    np.float32,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [12, 500, 40_000])
def test_special_values(isa, rng, n, dtype):
    with np.errstate(over="ignore", under="ignore"):
        x = SPECIAL[rng.integers(0, SPECIAL.size, n)].astype(dtype)
    for key in KEYS[:3]:
        for k in range(0, n + 1, max(1, n // 12)):
            check_all(x, k, key)


def test_negative_zero_ties_with_zero(isa):
    x = np.array([0.0, -0.0] * 40 + [-1.0], np.float32)
    ref.check_mask(ref.keys(x, "identity"), 3, topk_mask(x, 3, "identity"))
    assert select_threshold(x, 3, "identity") == (0.0, 0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [5, 3000, 100_000])
def test_nan_lowest(isa, rng, n, dtype):
    x = rng.standard_normal(n).astype(dtype)
    x[rng.random(n) < 0.3] = np.nan
    x[1:3] = [dtype(np.nan), -dtype(np.nan)]
    for key in KEYS[:3]:
        for k in ranks(n):
            check_all(x, k, key, nan="lowest")
    v, i = topk(x, n, nan="lowest")
    np.testing.assert_array_equal(i, ref.order(ref.keys(x)))
    np.testing.assert_array_equal(v, x[i])
    rows = np.tile(x, (3, 1))
    np.testing.assert_array_equal(
        topk_mask(rows, n // 2, dim=1, nan="lowest"), ref.mask(ref.keys(rows), n // 2)
    )
    np.testing.assert_array_equal(nm_mask(rows, 2, 4, nan="lowest"), ref.nm(ref.keys(rows), 2, 4))
    got = block_mask(rows, 2, (1, 4), nan="lowest")
    np.testing.assert_array_equal(got, ref.block_mask([ref.keys(rows)], 2, 1, 4)[0])


@pytest.mark.parametrize("n", [4, 1000, 100_000])
@pytest.mark.parametrize("at", [0, -1])
def test_nan_raises(isa, n, at):
    x = np.ones((2, n // 2), np.float32)
    x.flat[at] = np.nan
    for call in (
        lambda: select_threshold(x, 1),
        lambda: select_threshold(x, 0),
        lambda: select_threshold(x, x.size),
        lambda: topk_mask(x, 1),
        lambda: topk_mask(x, 1, dim=1),
        lambda: topk(x.ravel(), 1),
        lambda: nm_mask(x, 2, 4),
        lambda: block_mask(x, 1),
        lambda: select_threshold(np.ones_like(x), 1, "abs_mul", other=x),
    ):
        with pytest.raises(ValueError, match="expected no NaN"):
            call()


def test_nan_of_a_product(isa):
    """inf * 0 is NaN where neither factor is."""
    w, g = np.array([np.inf, 1, 2], np.float32), np.array([0, 1, 1], np.float32)
    with pytest.raises(ValueError, match="expected no NaN"):
        select_threshold(w, 1, "abs_mul", other=g)
    assert select_threshold(w, 3, "abs_mul", other=g, nan="lowest").above == 2


def test_float16_denormals_and_products(isa):
    bits = np.arange(1 << 16, dtype=np.uint16)
    w = bits.view(np.float16)
    w = w[~np.isnan(w)]
    for key in KEYS[:3]:
        for k in (1, 1000, w.size // 2, w.size - 5):
            check_all(w, k, key)


def test_bounds_that_no_16_bit_key_equals(isa, rng):
    """Members of both widths: thresholds, and the bracket around them, are float32's where most keys are."""
    for share in (0.05, 0.5, 0.95):
        wide = rng.standard_normal(round(60_000 * share)).astype(np.float32)
        narrow = rng.standard_normal(60_000 - wide.size).astype(np.float16)
        narrow[:5] = [np.inf, -np.inf, 0.0, -0.0, 6e-8]
        for key in ("abs", "identity"):
            flat = np.concatenate([ref.keys(narrow, key), ref.keys(wide, key)])
            for k in (1, 100, 6_000, 30_000, 59_990):
                assert select_threshold([narrow, wide], k, key) == ref.threshold(flat, k)
                masks = topk_mask([narrow, wide], k, key)
                ref.check_mask(flat, k, np.concatenate(masks))


@given(data=st.data())
def test_property_global(isa, data):
    pool = data.draw(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8), label="pool")
    n = data.draw(st.sampled_from([1, 3, 64, 129, 700, DIRECT + 77]), label="n")
    seed = data.draw(st.integers(0, 2**32 - 1), label="seed")
    key = data.draw(st.sampled_from(KEYS[:3]), label="key")
    k = data.draw(st.integers(0, n), label="k")
    check_all(np.array(pool, np.float32)[np.random.default_rng(seed).integers(0, len(pool), n)], k, key)


@given(data=st.data())
def test_property_rows(isa, data):
    rows, cols = data.draw(st.integers(0, 6), label="rows"), data.draw(st.integers(0, 300), label="cols")
    seed, levels = (
        data.draw(st.integers(0, 2**32 - 1), label="seed"),
        data.draw(st.integers(1, 50), label="levels"),
    )
    k = data.draw(st.integers(0, cols), label="k")
    w = np.random.default_rng(seed).integers(-levels, levels + 1, (rows, cols)).astype(np.float32)
    np.testing.assert_array_equal(topk_mask(w, k, dim=1), ref.mask(ref.keys(w), k))


# ---- size


def test_more_than_2_to_31_elements():
    """Counts and indices are 64-bit: one array of 4 GB that is never touched, so that it takes no memory."""
    n = (1 << 31) + 100_001
    x = np.zeros(n, np.float16)
    x[[5, n - 3, n - 70_000]] = [1, 3, 2]
    t = stats(x, n - 1)
    assert (t["value"], t["above"], t["ties"], t["equal"]) == (0.0, 3, n - 4, n - 3)
    v, i = topk(x, 3)
    assert v.tolist() == [3, 2, 1]
    assert i.tolist() == [n - 3, n - 70_000, 5]


# ---- the checker itself


def test_planted_faults_are_caught(rng):
    x = rng.integers(0, 3, 1000).astype(np.float32)
    flat = ref.keys(x)
    good = topk_mask(x, 500)
    ref.check_mask(flat, 500, good)
    highest_index = np.zeros(1000, bool)  # a wrong tie rule
    highest_index[np.lexsort((-np.arange(1000), -flat))[:500]] = True
    flipped = good.copy()
    flipped[123] ^= True
    one_more = good.copy()
    one_more[np.flatnonzero(~good)[0]] = True
    not_bool = good.copy()
    not_bool.view(np.uint8)[np.flatnonzero(good)[0]] = 255
    for bad in (highest_index, flipped, one_more, not_bool, ~good):
        with pytest.raises(AssertionError):
            ref.check_mask(flat, 500, bad)
