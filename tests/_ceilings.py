"""A machine for tests in which time is estimated."""

from __future__ import annotations

from pared._machine import Ceilings, Level

# One core of a Zen 5 server: what is estimated, and so what is timed, does not hang on where the tests run.
CEILINGS = Ceilings(
    threads=1,
    isa="avx512vbmi2",
    clock=3.45e9,
    fma=220e9,
    panel=200e9,
    dot8=870e9,
    levels=(
        Level("L1", 48 << 10, 430e9, 210e9),
        Level("L2", 1 << 20, 200e9, 115e9),
        Level("L3", 32 << 20, 55e9, 36e9),
        Level("memory", 1 << 62, 35e9, 24e9),
    ),
    pack=10e9,
    store=4.5e9,
    expand=1.6e9,
)
