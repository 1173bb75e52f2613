"""The sparse panel kernels on every level: shapes around every tile and block, sparsities, planted faults."""

from __future__ import annotations

import numpy as np
import pytest
from linear_check import check_linear, expected

from pared import _core, ops

# Around 16 positions a vector, 64 and 128 a tile; K blocks of 80 to 256; 16 rows a group; and primes.
TOKENS = [0, 1, 2, 15, 16, 17, 24, 25, 31, 33, 48, 63, 64, 65, 80, 95, 96, 97, 100, 112, 127, 128, 129, 193]
COLS = [0, 1, 2, 3, 5, 16, 79, 80, 81, 97, 127, 128, 129, 159, 160, 161, 239, 241, 255, 256, 257, 512, 513]
ROWS = [0, 1, 2, 7, 15, 16, 17, 31, 32, 33]
SPARSITIES = [0.0, 0.5, 0.85, 0.93, 0.97, 0.99, 1.0]


def random_weight(rng, rows: int, cols: int, sparsity: float) -> np.ndarray:
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    w[rng.random(w.shape) < sparsity] = 0
    return w


def test_reduction_lengths_and_sparsities(isa, rng):
    for cols in COLS:
        for sparsity in SPARSITIES:
            for tokens in rng.choice(TOKENS, 3):
                w = random_weight(rng, int(rng.choice(ROWS)), cols, sparsity)
                x = rng.standard_normal((tokens, cols)).astype(np.float32)
                check_linear(ops.linear(x, ops.CSR.from_dense(w)), x, w)


def test_token_counts_and_row_counts(isa, rng):
    for tokens in TOKENS:
        for rows in ROWS:
            w = random_weight(rng, rows, 131, float(rng.choice([0.4, 0.9, 0.98])))
            x = rng.standard_normal((tokens, 131)).astype(np.float32)
            bias = rng.standard_normal(rows).astype(np.float32)
            check_linear(ops.linear(x, ops.CSR.from_dense(w), bias), x, w, bias)


@pytest.mark.parametrize("sparsity", [0.5, 0.92, 0.98])
def test_more_rows_than_one_pass_of_accumulators(isa, rng, sparsity):
    w = random_weight(rng, 1100, 250, sparsity)
    x = rng.standard_normal((130, 250)).astype(np.float32)
    check_linear(ops.linear(x, ops.CSR.from_dense(w)), x, w)


def test_empty_and_full_rows_and_columns(isa, rng):
    w = random_weight(rng, 50, 300, 0.9)
    w[::3] = 0  # rows without a non-zero
    w[7] = w[48] = 1.5  # rows without a zero: as many non-zeros as a count can hold
    w[:, 80:160] = 0  # a K block that no row touches
    w[16:32] = 0  # an empty row group
    w[:, 299] = 2.0
    x = rng.standard_normal((70, 300)).astype(np.float32)
    bias = rng.standard_normal(50).astype(np.float32)
    check_linear(ops.linear(x, ops.CSR.from_dense(w), bias), x, w, bias)


@pytest.mark.parametrize("cols", [1, 80, 129, 700])
def test_an_empty_weight_gives_the_bias(isa, rng, cols):
    packed = ops.CSR.from_dense(np.zeros((21, cols), np.float32))
    x = np.full((19, cols), np.nan, np.float32)  # never read into the result: nothing to multiply it with
    bias = rng.standard_normal(21).astype(np.float32)
    assert np.array_equal(ops.linear(x, packed, bias), np.tile(bias, (19, 1)))
    assert np.array_equal(ops.linear(x, packed), np.zeros((19, 21)))


def test_absent_weights_hide_infinities(isa):
    """0 * inf contributes nothing; a present weight passes inf and NaN on, to its own token and row alone."""
    w = np.zeros((17, 130), np.float32)
    w[3, 5], w[16, 129] = 2.0, -1.0
    x = np.ones((20, 130), np.float32)
    x[:, 7] = np.inf
    x[2, 5], x[4, 129] = np.inf, np.nan
    y = ops.linear(x, ops.CSR.from_dense(w))
    want = np.zeros((20, 17), np.float32)
    want[:, 3], want[:, 16] = 2.0, -1.0
    want[2, 3], want[4, 16] = np.inf, np.nan
    assert np.array_equal(y, want, equal_nan=True)


def test_magnitudes_far_apart(isa, rng):
    """The bound scales with |x||w|, not with the result: cancellation and 60 binary orders of magnitude."""
    w = random_weight(rng, 33, 240, 0.8) * np.exp2(rng.integers(-30, 30, (33, 240))).astype(np.float32)
    x = (rng.standard_normal((40, 240)) * np.exp2(rng.integers(-30, 30, (40, 240)))).astype(np.float32)
    check_linear(ops.linear(x, ops.CSR.from_dense(w)), x, w)


def test_exact_on_integers(isa, rng):
    """Small integers have no rounding: every product and sum has to be exactly there."""
    for sparsity in (0.3, 0.9, 0.97):
        w = rng.integers(-8, 9, (35, 500)).astype(np.float32)
        w[rng.random(w.shape) < sparsity] = 0
        x = rng.integers(-8, 9, (77, 500)).astype(np.float32)
        assert np.array_equal(ops.linear(x, ops.CSR.from_dense(w)), x @ w.T)


def test_a_token_does_not_depend_on_the_others(isa, rng):
    """The same bits whatever the other tokens hold, and wherever in the tile the token stands."""
    w = ops.CSR.from_dense(random_weight(rng, 40, 333, 0.8))
    for tokens in (5, 16, 100, 128):
        x = rng.standard_normal((tokens, 333)).astype(np.float32)
        y = ops.linear(x, w)
        order = rng.permutation(tokens)
        if tokens <= 64:  # one tile on every tiling
            assert np.array_equal(ops.linear(x[order], w), y[order])
        other = rng.standard_normal(x.shape).astype(np.float32)
        other[tokens // 2] = x[tokens // 2]
        assert np.array_equal(ops.linear(other, w)[tokens // 2], y[tokens // 2])


def test_one_token_alone_and_in_a_batch_agree_within_the_bound(isa, rng):
    """Not to the bit: a narrow tile sums in more partial sums than a wide one."""
    w = random_weight(rng, 40, 333, 0.8)
    packed = ops.CSR.from_dense(w)
    x = rng.standard_normal((150, 333)).astype(np.float32)
    batch = ops.linear(x, packed)
    for t in (0, 77, 149):
        check_linear(batch[t : t + 1], x[t : t + 1], w)
        check_linear(ops.linear(x[t : t + 1], packed), x[t : t + 1], w)


def test_running_twice_gives_the_same_bits(isa, rng):
    w = ops.CSR.from_dense(random_weight(rng, 200, 333, 0.8))
    x = rng.standard_normal((150, 333)).astype(np.float32)
    assert np.array_equal(ops.linear(x, w), ops.linear(x, w))


# ---- planted faults: the checks above do fail on a wrong kernel


@pytest.fixture
def case(rng):
    w = random_weight(rng, 40, 300, 0.8)
    x = rng.standard_normal((50, 300)).astype(np.float32)
    bias = rng.standard_normal(40).astype(np.float32)
    return x, w, bias


def tampered(w: np.ndarray, section: str, change) -> ops.CSR:
    """The packed weight with one section changed behind the checksum's back."""
    good = ops.CSR.from_dense(w).packed
    room = np.zeros(good.size + 64, np.uint8)
    packed = room[-room.ctypes.data % 64 :][: good.size]
    packed[:] = good
    weight = ops.CSR(packed)  # while it is right: objects are made of whole buffers alone
    at = {"values": 96, "offsets": 104}[section]
    start = int(packed[at : at + 8].view(np.uint64)[0])
    change(packed[start:].view(np.float32 if section == "values" else np.uint16))
    return weight


# Of the first sixteen the values that make the fault large: one that is nearly zero may be wrong unseen.


def swap_first_two(a: np.ndarray) -> None:
    a[[0, 1]] = a[[1, 0]]


def swap_extremes(a: np.ndarray) -> None:
    ends = [a[:16].argmin(), a[:16].argmax()]
    a[ends] = a[ends[::-1]]


def off_by_a_thousandth(a: np.ndarray) -> None:
    a[np.abs(a[:16]).argmax()] *= 1.001


def wrong_sign(a: np.ndarray) -> None:
    a[np.abs(a[:16]).argmax()] *= -1


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("values", swap_extremes),
        ("values", off_by_a_thousandth),
        ("values", wrong_sign),
        ("offsets", swap_first_two),
    ],
)
def test_a_wrong_packed_value_is_noticed(isa, case, section, change):
    x, w, bias = case
    check_linear(ops.linear(x, ops.CSR.from_dense(w), bias), x, w, bias)
    with pytest.raises(AssertionError, match="outputs are wrong"):
        check_linear(ops.linear(x, tampered(w, section, change), bias), x, w, bias)


def test_wrong_outputs_are_noticed(isa, case):
    x, w, bias = case
    packed = ops.CSR.from_dense(w)
    y = ops.linear(x, packed, bias)
    for wrong in (
        ops.linear(x, packed),  # no bias
        ops.linear(x, packed, bias, "relu"),  # an activation too many
        np.roll(y, 1, axis=0),
        np.where(np.arange(50)[:, None] == 49, 0, y),  # the last token not written
        y + np.float32(1e-4),
        np.where(y == y[3, 3], np.nan, y),
    ):
        with pytest.raises(AssertionError, match="outputs are wrong"):
            check_linear(wrong, x, w, bias)
    with pytest.raises(AssertionError):
        check_linear(y[:49], x, w, bias)


def test_the_bound_is_tight_enough(case):
    """A few hundred units in the last place of the terms' sum, no more."""
    x, w, bias = case
    _, tolerance = expected(x, w, bias)
    assert tolerance.max() < 1e-3
    assert np.median(tolerance) < 3e-4


def test_the_reference_is_numpys_product(case):
    x, w, bias = case
    want = x.astype(np.float64) @ w.T.astype(np.float64) + bias
    assert np.allclose(expected(x, w, bias)[0], want, rtol=1e-12, atol=1e-12)


def test_the_reference_checks_its_input():
    x, p, c, v = np.ones((2, 3)), np.array([0, 1]), np.array([2]), np.array([1.0])
    _core.linear_reference(x, p, c, v)
    for arguments in [
        (x, np.array([0, 2]), c, v),
        (x, p, np.array([3]), v),
        (x[0], p, c, v),
        (x, p[:0], c, v),
    ]:
        with pytest.raises(ValueError, match=r"expected"):
            _core.linear_reference(*arguments)
