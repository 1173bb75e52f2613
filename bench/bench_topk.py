"""select_threshold against torch.kthvalue, torch.topk and numpy.partition, on float32 magnitudes.

The baselines get the magnitudes ready made; pared takes the weights and fuses the absolute value. The goal is
stated for each baseline apart, so each is a suite of its own. The limit is one read of the data, at the rate
that bench.roofline measures for memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

import pared
from bench.roofline import measure

SIZES = [pytest.param(20_000_000, id="2e7"), pytest.param(100_000_000, id="1e8")]
CELLS = {20_000_000: "2*10^7 keys", 100_000_000: "10^8 keys"}
DENSITIES = [0.1, 0.5]
THREADS = pytest.mark.parametrize("threads", [1, 2], indirect=True, ids="{}t".format)
# A round with a baseline of seconds is long: few rounds, as the spread that is reported will show.
TIMING = {"min_rounds": 3, "budget": 1.0, "precision": 0.05}


@lru_cache(maxsize=1)
def weights(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    w = torch.randn(n, generator=torch.Generator().manual_seed(0))
    return w, w.abs()


def baseline(name: str, magnitudes: torch.Tensor, k: int) -> Callable[[], Any]:
    n = magnitudes.numel()
    if name == "torch.kthvalue":
        return lambda: magnitudes.kthvalue(n - k + 1).values
    if name == "torch.topk":
        return lambda: magnitudes.topk(k, sorted=False).values.amin()
    array = magnitudes.numpy()
    return lambda: np.partition(array, n - k)[n - k]


@THREADS
@pytest.mark.parametrize("density", DENSITIES, ids="{:.0%}".format)
@pytest.mark.parametrize("name", ["torch.kthvalue", "torch.topk", "numpy.partition"])
@pytest.mark.parametrize("n", SIZES)
def test_threshold(versus, n: int, name: str, density: float, threads: int) -> None:
    w, magnitudes = weights(n)
    k = round(n * density)
    calls = {
        "pared": lambda: pared.ops.select_threshold(w, k).value,
        name: baseline(name, magnitudes, k),
    }
    assert calls["pared"]() == float(calls[name]())
    read = measure(threads).levels[-1].load
    versus(
        calls,
        suite=f"selection, against {name}",
        case=f"{density:.0%} kept",
        cell=CELLS[n],
        rivals=(name,),
        moved=4.0 * n,
        limit_s=4.0 * n / read,
        facts={"n": n, "density": density, "dtype": "float32"},
        **TIMING,
    )
