"""What the emulator notes of shared memory: bank conflicts, of which kernels have no more than is said here,
races, and what the copy engine and wgmma would not see.
"""

from __future__ import annotations

import re

import pytest

from bench.gpu import banks
from bench.gpu.emulated import load
from bench.gpu.measure import Machine
from pared import _cuda

# Of faults.cu, by the turns that the worst instruction takes over its least.
NAMED = [
    "turns_8_load",
    "turns_8_matrices",
    "turns_1_swizzled",
    "turns_4_copies",
    "turns_5_counts",
]
PLAIN = ["turns_16_plain", "turns_2_diverged"]

# What the problems of the smoke checks may take, times the least; what is not named: NO_CONFLICT.
NO_CONFLICT = 1.03
ALLOWED = {
    r"csr_gather_\d": 1.55,  # gathers from wherever a block's columns are, in the best order of them
    r"csr_gather_near_\d": 1.8,  # and in their own
    # Lanes have up to 4 values each, in 32 words where half of them are there, 16 bits each; of pairs up to 4
    # words, here more than the format is for.
    "(decode|expand)_bitmap16": 1.1,
    "(decode|expand)_pairs16": 1.9,
    r"block_sparse_\d+x16": 1.1,  # a quarter warp reads two rows of sums
    # Counters are where the data wants them; and a thread reads several bins, from the top one down.
    "select_(radix|sample|groups|count)": 1.35,
}
CHECKS = (
    r"topk_mask (float32, 50%|bfloat16, 0%).*|topk|topk_mask of rows|block_mask|gemm_s8|"
    r"int8 mma.sync (16|128)x128 float32|decode expand|"
    r"decode \w+, (7 tokens, cp.async|16 tokens, bulk copies)|decode bitmap8, [12] tokens, .*|"
    r"blocks of 16 bits, (16|64), .*|blocks of 8 bits, 128, .*|csr (float32|bfloat16), .*"
)


@pytest.fixture(scope="module")
def accesses():
    return load(accesses=True)


def worst(module, name):
    """Of the instructions of the kernel that the name tells: the last, where others only prepare."""
    module.take_banks()
    module.record_banks(True)
    try:
        module.run_fault(name)
    finally:
        module.record_banks(False)
    uses = module.take_banks()
    assert {kernel for kernel, *_ in uses} == {name}
    return max(use[-1] for use in uses)


@pytest.mark.parametrize("name", NAMED)
def test_conflicts_of_named_accesses(emulated, name):
    assert worst(emulated, name) == int(name.split("_")[1])


@pytest.mark.parametrize("order", [0, 1, 5])
@pytest.mark.parametrize("name", NAMED + PLAIN)
def test_conflicts_of_all_accesses(accesses, name, order):
    accesses.set_order(order)
    try:
        assert worst(accesses, name) == int(name.split("_")[1])
    finally:
        accesses.set_order(0)


@pytest.mark.parametrize("order", [0, 1, 5])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wgmma_without_fence", "shared memory that threads have written"),
        ("bulk_copy_over_written", "shared memory that threads have written"),
        ("missing_barrier", "a race: it (reads|writes) shared memory that thread"),
        ("missing_syncwarp", "a race: it (reads|writes) shared memory that thread"),
        ("filled_while_read", "a race: it (reads|writes) shared memory that thread"),
    ],
)
def test_faults_that_noted_accesses_show(accesses, name, text, order):
    accesses.run_fault(name)  # where nothing is noted
    accesses.set_order(order)
    accesses.record_banks(True)
    try:
        with pytest.raises(RuntimeError, match=rf"^{name}: .* {text}"):
            accesses.run_fault(name)
    finally:
        accesses.record_banks(False)
        accesses.set_order(0)
        accesses.take_banks()


def test_nothing_is_counted_unasked(emulated):
    emulated.take_banks()
    emulated.run_fault("turns_8_load")
    assert emulated.take_banks() == []


def test_kernels_have_no_conflicts_but_those_named(accesses, monkeypatch):
    monkeypatch.setattr(_cuda, "_emulated", accesses)
    uses = banks.count(Machine("cpu", "emulator", 0, dry=True), lambda name: re.fullmatch(CHECKS, name))
    text = "\n".join(banks.table(uses))
    assert len(uses) >= 19, text
    for kernel, places in uses.items():
        allowed = [ways for pattern, ways in ALLOWED.items() if re.fullmatch(pattern, kernel)]
        assert banks.total(places.values()).ways <= (allowed or [NO_CONFLICT])[0], f"{kernel}\n{text}"
    # The places have names: of a plain access, and of one in ptx.h.
    kinds = {(place.split(":")[0], what) for places in uses.values() for place, what, _ in places}
    assert {("mma_tile.h", "write"), ("mma_tile.h", "ldmatrix"), ("csr.cu", "cp.async")} <= kinds
