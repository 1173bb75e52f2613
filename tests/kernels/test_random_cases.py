"""Many tiny random problems of every operation on every level, a batch in one call (csrc/ref/random_cases.h).

PARED_RANDOM_CASES says how many in all, half a million by default. A failure names the family and the seed
that repeats it at that level: ``pared._core.random_cases("int8", seed, 1)``.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from pared import _core

FAMILIES = _core.random_families()
ALL = int(os.environ.get("PARED_RANDOM_CASES", "500000"))
EACH = max(100, ALL // (len(FAMILIES) * len(_core.supported_isas())))
# Cases that notice one changed operand: not those where a zero, or no selection, hides it.
NOTICED = 0.5


def run(family: str, seed: int, cases: int, fault: bool = False) -> int:
    """Failures among the cases, an AssertionError for the first unless a fault was planted."""
    failed, where, what = _core.random_cases(family, seed, cases, fault)
    assert fault or not failed, (
        f"{failed} of {cases} cases of {family} failed, first with seed {where}: {what}"
    )
    return failed


@pytest.mark.parametrize("family", FAMILIES)
def test_cases(isa, rng, family):
    parts = min(4, os.cpu_count() or 1)
    seed = int(rng.integers(2**62))
    with ThreadPoolExecutor(parts) as pool:
        jobs = [pool.submit(run, family, seed + i * 2**40, -(-EACH // parts)) for i in range(parts)]
        for job in jobs:
            job.result()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_operand_is_noticed(isa, rng, family):
    seed = int(rng.integers(2**62))
    assert run(family, seed, 200, fault=True) >= NOTICED * 200


def test_the_same_seed_is_the_same_case(isa):
    """What a failure reports repeats it alone."""
    failed, seed, what = _core.random_cases("int8", 1000, 50, True)
    assert failed > 25
    assert _core.random_cases("int8", seed, 1, True) == (1, seed, what)


def test_families_are_named():
    with pytest.raises(ValueError, match=r"family: expected one of csr, .*, selection, got 'sparse'"):
        _core.random_cases("sparse", 0, 1)
