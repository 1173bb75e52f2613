"""This machine's ceilings: what any kernel could reach. Measured once, in well under a second.

`pared.ops` estimates times from them, and bench/roofline.py prints them and the limits that follow.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pared import _core
from pared._store import JsonStore, user_cache
from pared._timing import last_level_cache

__all__ = ["Ceilings", "Level", "ceilings", "measure"]

# Of the probes' meaning and of how their results are kept.
_VERSION = 3
# Seconds of one sample: long against the clock and the start of a thread, short against other processes.
_SAMPLE = 2e-3
_MIN_SAMPLES, _MAX_SAMPLES, _AGREE = 4, 16, 0.98
# Reading memory needs twice the last cache, but no more than this of it.
_MEMORY_BYTES = 256 << 20
_measuring = threading.Lock()


@dataclass(frozen=True)
class Level:
    """A level of the memory hierarchy, with the rates in bytes a second of all threads together."""

    name: str
    size: int  # what one thread can count on
    load: float
    store: float


@dataclass(frozen=True)
class Ceilings:
    """Rates of `threads` threads together."""

    threads: int
    isa: str
    clock: float  # cycles/s of one thread, whatever the others do
    fma: float  # FLOP/s, operands in registers
    panel: float  # FLOP/s, one operand from a panel in L1, a broadcast for every eight vectors
    dot8: float  # OP/s, byte products in registers
    levels: tuple[Level, ...]
    pack: float  # elements/s that the package packs into panels
    store: float  # elements/s that it stores from accumulators
    expand: float  # masked vectors/s (16 outputs by one input) that it expands and multiplies with one token

    def level(self, nbytes: float) -> Level:
        """The innermost level whose size holds `nbytes`."""
        return next((level for level in self.levels if nbytes <= level.size), self.levels[-1])


def ceilings() -> Ceilings:
    """One thread's ceilings on the instruction set in force: of this process, the user's cache, or measured.

    More threads are not measured: that takes all of them at the same moment, which a busy machine does not
    give, and what is estimated from it would then be wrong for as long as the file lives.
    """
    # Threads that measured at the same time would measure each other.
    with _measuring:
        return _ceilings(_core.isa())


@lru_cache(maxsize=16)
def _ceilings(isa: str) -> Ceilings:
    from pared import __version__

    folder = user_cache()
    store = JsonStore(folder / "machine.json", "pared machine", _VERSION, warn=False) if folder else None
    key = f"{_core.cpu_brand()} | {isa} | {__version__}"
    known = _parse(store.read().get(key)) if store else None
    if known is None or known.threads != 1 or known.isa != isa:
        known = measure(1)
        if store:
            store.add({key: dataclasses.asdict(known)})
    return known


def _parse(entry: Any) -> Ceilings | None:
    """What `dataclasses.asdict` made of ceilings; None for anything else."""
    try:
        found = Ceilings(**{**entry, "levels": tuple(Level(**level) for level in entry["levels"])})
        rates = [found.clock, found.fma, found.panel, found.dot8, found.pack, found.store, found.expand]
        rates += [r for level in found.levels for r in (level.size, level.load, level.store)]
        return found if found.levels and all(0 < r < 1e30 for r in rates) else None
    except (TypeError, KeyError):
        return None


@lru_cache(maxsize=8)
def measure(threads: int = 1) -> Ceilings:
    """Measure the ceilings of that many threads together. Torch's thread count is left as it is."""
    l1, l2 = _cache("index0", 32 << 10), _cache("index2", 1 << 20)
    l3 = last_level_cache() // threads
    sizes = (("L1", l1), ("L2", l2), ("L3", l3), ("memory", 1 << 62))
    levels = []
    for name, size in sizes:
        # Two thirds of a level: the rest belongs to stacks, code and other processes.
        nbytes = size * 2 // 3
        if name == "memory":
            nbytes = min(_MEMORY_BYTES, 2 * last_level_cache()) // threads
        rates = (4 * _rate(probe, nbytes, threads) for probe in ("load", "store"))
        levels.append(Level(name, size, *rates))
    pack, store, expand = _kernel_rates()
    return Ceilings(
        threads=threads,
        isa=_core.isa(),
        clock=_best_rate(_core.clock_probe),
        fma=2 * _rate("fma", 4096, threads),
        panel=2 * _rate("panel", l1 * 2 // 3, threads),
        # A vector of the probe's floats stands for 64 byte products.
        dot8=2 * 64 / _width() * _rate("dot8", 4096, threads),
        levels=tuple(levels),
        pack=pack * threads,
        store=store * threads,
        expand=expand * threads,
    )


def _cache(index: str, default: int) -> int:
    file = Path(f"/sys/devices/system/cpu/cpu0/cache/{index}/size")
    text = file.read_text().strip() if file.exists() else ""
    return int(text[:-1]) << 10 if text.endswith("K") else default


def _rate(probe: str, nbytes: int, threads: int) -> float:
    """Elements a second of a probe over a buffer of so many bytes a thread."""
    return _best_rate(lambda repeats: _core.machine_probe(probe, nbytes, repeats, threads)[:2])


def _best_rate(run: Callable[[int], tuple[float, float]]) -> float:
    """What is done a second, the best of several samples: a ceiling is what is possible, not what is usual.

    On a busy machine samples are taken until the two best agree. `run` is given a number of repeats and gives
    the seconds that they took and what was done in them.
    """
    repeats = 1
    while True:
        seconds, done = run(repeats)
        if seconds >= _SAMPLE / 4 or repeats > 1 << 24:
            break
        repeats *= 4
    found = [done / seconds]
    repeats = max(1, round(repeats * _SAMPLE / seconds))
    while len(found) < _MAX_SAMPLES:
        seconds, done = run(repeats)
        found = sorted([*found, done / seconds], reverse=True)
        if len(found) >= _MIN_SAMPLES and found[1] >= _AGREE * found[0]:
            break
    return found[0]


def _kernel_rates() -> tuple[float, float, float]:
    """Elements a second that one thread packs and stores, and vectors that it expands, through weights with
    nothing else to do. They are too small for a second thread.
    """
    from pared._timing import interleave
    from pared.ops.bitmap import Bitmap
    from pared.ops.csr import CSR

    tokens, width = 192, 768  # a power of two would put every row of the output into the same cache sets
    x = np.ones((tokens, width), np.float32)
    # One non-zero in every K block of one row: everything is packed, next to nothing multiplied or stored.
    touch = np.zeros((1, width), np.float32)
    touch[0, ::16] = 1.0
    outputs = 384
    side = 512
    # Masks that fit L1, and no values to load: the expansions are all that is left.
    cases: dict[str, tuple[Any, Any]] = {
        "pack": (x, CSR.from_dense(touch)),
        "store": (x[:, :16], CSR.from_dense(np.zeros((outputs, 16), np.float32))),
        "expand": (
            np.ones((1, side), np.float32),
            Bitmap.from_dense(np.zeros((side, side), np.float32)),
        ),
    }
    calls = {}
    for name, (given, weight) in cases.items():
        out = np.empty((given.shape[0], weight.shape[0]), np.float32)
        calls[name] = lambda x=given, w=weight, y=out: _core.linear(x, w.packed, None, None, y)
    t = interleave(calls, budget=0.02)
    return (
        x.size / t.best("pack"),
        tokens * outputs / t.best("store"),
        side * side / 16 / t.best("expand"),
    )


def _width() -> int:
    """Floats in a vector of the level in force."""
    return {"scalar": 1, "avx2": 8, "avxvnni": 8, "neon": 4, "neondot": 4, "neoni8mm": 4}.get(_core.isa(), 16)
