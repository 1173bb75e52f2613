"""The interleaved timer, on a clock that the callables themselves advance: no test depends on real time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pared import _timing
from pared._timing import interleave, rotate, watched


class FakeClock:
    """Nanoseconds that pass only when a callable says so."""

    def __init__(self) -> None:
        self.now = 0
        self.log: list[str] = []

    def __call__(self) -> int:
        return self.now

    def takes(self, name, nanoseconds):
        def call():
            self.log.append(name)
            self.now += nanoseconds(len(self.log)) if callable(nanoseconds) else nanoseconds

        return call


def test_ratio_and_medians_are_exact() -> None:
    clock = FakeClock()
    calls = {"dense": clock.takes("dense", 3_000_000), "pared": clock.takes("pared", 1_000_000)}
    t = interleave(calls, budget=0.1, clock=clock)
    assert t.median("dense") == pytest.approx(3e-3)
    assert t.p95("pared") == pytest.approx(1e-3)
    assert t.best("pared") == pytest.approx(1e-3)
    assert t.spread("pared") == 0.0
    r = t.speedup("pared", "dense")
    assert r.value == pytest.approx(3.0)
    assert r.low == pytest.approx(3.0)
    assert r.high == pytest.approx(3.0)
    assert t.rounds == 25  # 4 ms a round


def test_every_round_runs_every_call_once_in_changing_order() -> None:
    clock = FakeClock()
    names = ["a", "b", "c"]
    t = interleave(
        {n: clock.takes(n, 1_000_000) for n in names}, budget=0, min_rounds=40, warmup=0, clock=clock
    )
    timed = clock.log[-3 * t.rounds :]
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert len(rounds) == 40
    assert all(sorted(r) == names for r in rounds)
    assert len(set(rounds)) == 6


def test_a_disturbance_over_whole_rounds_leaves_the_ratio() -> None:
    """The point of interleaving: the machine gets three times slower half way, the ratio does not move."""
    clock = FakeClock()

    def at(ns):
        return lambda step: ns * (3 if step > 60 else 1)

    t = interleave(
        {"dense": clock.takes("dense", at(2_000_000)), "pared": clock.takes("pared", at(1_000_000))},
        budget=0,
        min_rounds=61,
        clock=clock,
    )
    assert t.spread("pared") > 0.5
    assert t.speedup("pared", "dense").value == pytest.approx(2.0)


def stalled(clock: FakeClock) -> dict[str, Callable[[], None]]:
    """A dense call of 1 ms that takes 20 in all rounds but a few, and a kernel of 0.8 ms."""
    return {
        "dense": clock.takes("dense", lambda n: 1_000_000 if n % 16 < 2 else 20_000_000),
        "csr": clock.takes("csr", 800_000),
    }


def test_of_a_disturbed_run_the_least_gain_counts() -> None:
    clock = FakeClock()
    waits = lambda: clock.now // 5  # noqa: E731  # a fifth of the time, threads had no core
    t = interleave(stalled(clock), budget=0, min_rounds=40, clock=clock, waits=waits)
    assert t.waited == pytest.approx(0.2)
    assert t.disturbed
    assert t.speedup("csr", "dense").value == pytest.approx(25.0)
    assert t.gain("csr", "dense") == pytest.approx(1.25)


def test_of_a_quiet_run_the_median_counts() -> None:
    clock = FakeClock()
    calls = {
        "dense": clock.takes("dense", lambda n: 2_000_000 + 50_000 * (n % 7)),
        "csr": clock.takes("csr", 1_000_000),
    }
    t = interleave(calls, budget=0, min_rounds=40, clock=clock, waits=lambda: clock.now // 20)
    assert not t.disturbed
    assert t.gain("csr", "dense") == t.speedup("csr", "dense").value > t.speedup("csr", "dense").low


def test_samples_that_differ_are_a_disturbance_where_the_system_says_nothing() -> None:
    clock = FakeClock()
    calls = {
        "dense": clock.takes("dense", lambda n: 1_000_000 * (1 + n % 3)),
        "csr": clock.takes("csr", 500_000),
    }
    t = interleave(calls, budget=0, min_rounds=40, clock=clock, waits=lambda: 0)
    assert (t.waited, t.disturbed) == (0.0, True)
    assert t.gain("csr", "dense") <= t.speedup("csr", "dense").low


def test_who_watches_sees_what_was_disturbed_inside() -> None:
    clock, waited = FakeClock(), 0
    call = {"a": clock.takes("a", 1_000_000)}
    with watched() as outer:
        interleave(call, budget=0, clock=clock, waits=lambda: waited)
        with watched() as inner:
            interleave(call, budget=0, clock=clock, waits=lambda: 2 * clock.now)
    interleave(call, budget=0, clock=clock, waits=lambda: 2 * clock.now)
    assert (outer.runs, outer.disturbed) == (2, 1)
    assert (inner.runs, inner.disturbed, inner.waited) == (1, 1, 2.0)
    assert str(outer).startswith(
        "1 of 2 timings were disturbed: for each second the process's threads waited "
    )


def test_the_system_says_how_long_threads_wait(tmp_path: Path) -> None:
    for thread, text in {"1": "100 7 1", "2": "100 20 1", "3": "", "4": "100"}.items():
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(text)
    assert _timing.waited_for_cores(tmp_path) == 27
    assert _timing.waited_for_cores(tmp_path / "none") == 0


def test_short_calls_are_repeated_inside_a_sample() -> None:
    clock = FakeClock()
    t = interleave({"short": clock.takes("short", 700)}, budget=0, min_rounds=3, clock=clock)
    assert t.inner["short"] * 700 >= 50_000
    assert t.median("short") == pytest.approx(700e-9)


def test_precision_stops_early() -> None:
    clock = FakeClock()
    calls = {"a": clock.takes("a", 1_000_000), "b": clock.takes("b", 2_000_000)}
    assert interleave(calls, budget=10, precision=0.01, clock=clock).rounds == 16
    assert interleave(calls, budget=0.3, precision=None, clock=clock).rounds == 100


def test_interval_encloses_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(400):
        noisy = np.exp(rng.normal(0, 0.3, 41)) * 2.0
        t = _timing.Timings({"a": np.ones(41), "b": noisy}, {"a": 1, "b": 1})
        r = t.speedup("a", "b")
        assert r.low <= r.value <= r.high
        hits += r.low <= 2.0 <= r.high
    assert hits >= 370  # 95 % of 400 is 380


def test_flush_times_single_calls(monkeypatch) -> None:
    monkeypatch.setattr(_timing, "last_level_cache", lambda: 1 << 12)
    clock = FakeClock()
    t = interleave({"a": clock.takes("a", 100)}, budget=0, min_rounds=5, warmup=1, flush=True, clock=clock)
    assert t.inner["a"] == 1
    assert clock.log == ["a"] * 6


def test_rotation_covers_twice_the_cache(monkeypatch) -> None:
    monkeypatch.setattr(_timing, "last_level_cache", lambda: 1000)
    seen: list[int] = []
    call = rotate(lambda i: lambda: seen.append(i), nbytes=300)
    for _ in range(9):
        call()
    assert seen == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    with pytest.raises(ValueError, match=r"nbytes: expected .* got 0"):
        rotate(lambda i: lambda: None, 0)


def test_tiny_operands_are_not_copied_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_timing, "last_level_cache", lambda: 1 << 25)
    seen: set[int] = set()
    call = rotate(lambda i: lambda: seen.add(i), nbytes=1 << 9)
    for _ in range(_timing._MOST_COPIES + 5):
        call()
    assert len(seen) == _timing._MOST_COPIES


def test_summary_is_json() -> None:
    clock = FakeClock()
    calls = {"dense": clock.takes("dense", 2_000_000), "pared": clock.takes("pared", 1_000_000)}
    s = json.loads(json.dumps(interleave(calls, budget=0, clock=clock).summary("dense")))
    assert s["pared"]["speedup"] == pytest.approx(2.0)
    assert s["dense"]["rounds"] == 9
    assert "speedup" not in s["dense"]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"calls: expected at least one"):
        interleave({})
    with pytest.raises(ValueError, match=r"min_rounds: expected .* got 5 and 2"):
        interleave({"a": lambda: None}, min_rounds=5, max_rounds=2)


def test_the_cache_size_is_a_size() -> None:
    assert _timing.last_level_cache() >= 1 << 18
