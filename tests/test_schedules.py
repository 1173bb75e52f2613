"""pared.schedules: closed forms, ends, bad arguments."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pared import schedules
from pared.schedules import Exponential, Linear, OneShot, Polynomial

RAMPS = [Linear, Polynomial, Exponential]


def test_the_cubic_of_zhu_and_gupta() -> None:
    s = Polynomial(0.5, 0.8, begin=1000, end=2000)
    assert s(1500) == pytest.approx(0.7625, abs=1e-15)
    assert s(1250) == pytest.approx(0.8 - 0.3 * 0.75**3, abs=1e-15)
    assert [s(t) for t in (0, 999, 1000, 2000, 10**9)] == [0.0, 0.0, 0.5, 0.8, 0.8]


def test_closed_forms() -> None:
    assert Linear(0.0, 0.9, begin=0, end=10)(5) == pytest.approx(0.45)
    assert Polynomial(0.2, 0.8, begin=0, end=4, power=1)(1) == pytest.approx(0.35)
    # 1 -> 0.25 of the weights in two steps: each halves what is left.
    assert Exponential(0.0, 0.75, begin=0, end=2)(1) == pytest.approx(0.5)
    assert Exponential(0.5, 0.875, begin=10, end=12)(11) == pytest.approx(0.75)
    assert [OneShot(0.9, at=3)(t) for t in (0, 2, 3, 4)] == [0.0, 0.0, 0.9, 0.9]


@pytest.mark.parametrize("ramp", RAMPS)
@given(
    a=st.floats(0, 0.99),
    b=st.floats(0, 0.99),
    begin=st.integers(0, 10**6),
    length=st.integers(1, 10**6),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_ramps_stay_between_their_ends_and_are_monotone(ramp, a, b, begin, length, data) -> None:  # type: ignore[no-untyped-def]
    s = ramp(a, b, begin=begin, end=begin + length)
    t = sorted(data.draw(st.lists(st.integers(begin, begin + length), min_size=2, max_size=8)))
    values = [s(step) for step in t]
    low, high = min(a, b), max(a, b)
    slack = 1e-12  # a few roundings of numbers below 1
    assert all(low - slack <= v <= high + slack for v in values)
    rising = values if b >= a else values[::-1]
    assert all(x <= y + slack for x, y in itertools.pairwise(rising))
    assert s(begin) == a or begin == begin + length
    assert s(begin + length) == b
    if begin:
        assert s(begin - 1) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Polynomial(0.5, 1.0, begin=0, end=1), r"final: expected a sparsity in \[0, 1\), got 1\.0"),
        (
            lambda: Polynomial(-0.1, 0.5, begin=0, end=1),
            r"initial: expected a sparsity in \[0, 1\), got -0\.1",
        ),
        (lambda: Linear(0.0, float("nan"), begin=0, end=1), "final: expected a sparsity"),
        (lambda: Linear(0.0, 0.5, begin=10, end=10), "end: expected a step after begin=10, got 10"),
        (lambda: Exponential(0.0, 0.5, begin=-1, end=10), "begin: expected a step >= 0, got -1"),
        (lambda: OneShot(90), r"sparsity: expected a sparsity in \[0, 1\), got 90"),
        (lambda: OneShot(0.5, at=-1), "at: expected a step >= 0, got -1"),
        (lambda: Polynomial(0.1, 0.5, begin=0, end=10, power=0), "power: expected a number > 0, got 0"),
    ],
)
def test_bad_values(make, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OneShot("0.9"), "sparsity: expected a number"),
        (lambda: OneShot(True), "sparsity: expected a number"),
        (lambda: Linear(0.0, 0.5, begin=1.5, end=10), "begin: expected a step number, got float"),
        (lambda: Polynomial(0.0, 0.5, begin=0, end=10, power="3"), "power: expected a number > 0, got str"),
    ],
)
def test_bad_types(make, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TypeError, match=message):
        make()


def test_schedules_are_values() -> None:
    s = Polynomial(0.5, 0.8, begin=1, end=2)
    assert s == Polynomial(0.5, 0.8, begin=1, end=2)
    assert hash(s) == hash(Polynomial(0.5, 0.8, begin=1, end=2))
    assert s != Polynomial(0.5, 0.8, begin=1, end=2, power=2.0)
    assert eval(repr(s), vars(schedules)) == s


def test_torch_is_not_needed() -> None:
    code = "import sys, pared; pared.schedules.OneShot(0.5)(1); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
