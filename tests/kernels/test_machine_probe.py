"""The ceilings' loops do all the work that they are timed for."""

from __future__ import annotations

import pytest

from pared import _core

WIDTH = {"scalar": 1, "avx2": 8, "avxvnni": 8, "neon": 4, "neondot": 4, "neoni8mm": 4}


@pytest.mark.parametrize("probe", ["fma", "load", "store", "panel", "dot8"])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_step_is_carried_out(isa, probe, threads):
    kernel_isa = isa if isa in WIDTH else "avx512"
    for size, repeats in ((1, 1), (512, 3), (4096, 7), (40000, 5), (2_100_000, 1)):
        floats = (size + 511) // 512 * 128
        seconds, elements, done = _core.machine_probe(probe, size, repeats, threads, size > 4096)
        assert seconds > 0
        assert elements == floats * repeats * threads
        assert done == floats * repeats / (8 * WIDTH.get(kernel_isa, 16))


def test_every_cycle_is_counted():
    for steps in (1, 7, 8, 1000, 1_000_001):
        seconds, done = _core.clock_probe(steps)
        assert seconds >= 0
        assert done == steps
    # No processor runs at 10 GHz: a chain that the compiler took apart would seem to.
    seconds, done = _core.clock_probe(10_000_000)
    assert done / seconds < 1e10
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        _core.clock_probe(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("walk", 1, 1), r"probe: expected one of fma, load, store, panel, dot8, got 'walk'"),
        (("fma", 0, 1), r"bytes: expected 1 to .*, got 0"),
        (("fma", 1, 0), r"repeats: expected at least 1, got 0"),
        (("fma", 1, 1, 0), r"threads: expected 1 to 1024, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        _core.machine_probe(*arguments)
