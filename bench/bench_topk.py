"""Selection against torch.kthvalue, torch.topk and numpy's partitions: thresholds, masks, blocks, N:M groups.

The baselines get the magnitudes ready made, of 16-bit types as the integers that order as they do (torch and
numpy both select faster among those); pared takes the weights and fuses the absolute value. A baseline that
only compares with a threshold gives a mask of more than k where keys tie, and counts all the same. The goal
for a threshold is stated for each baseline apart, so each is a suite of its own; masks count against the
fastest. The limit is every byte read and written as often as the operation has to, at the rates that
bench.roofline measures for memory at its best; "one read" is torch.sum of the same memory in the same rounds.
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

FULL = pytest.mark.full
SIZES = [pytest.param(20_000_000, id="2e7"), pytest.param(100_000_000, id="1e8")]
CELLS = {20_000_000: "2*10^7 keys", 100_000_000: "10^8 keys"}
DENSITIES = [0.1, 0.5]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIXTEEN = ["bfloat16", pytest.param("float16", marks=FULL)]
# Masks: the baselines take seconds a round.
MASKS = ["float32", *(pytest.param(name, marks=FULL) for name in ("bfloat16", "float16"))]
MASK_THREADS = pytest.mark.parametrize(
    "threads", [1, pytest.param(2, marks=FULL)], indirect=True, ids="{}t".format
)
THREADS = pytest.mark.parametrize("threads", [1, 2], indirect=True, ids="{}t".format)
# A round with a baseline of seconds is long: few rounds, as the spread that is reported will show.
TIMING = {"min_rounds": 3, "budget": 1.0, "precision": 0.05}
SHAPE = (4096, 4096)


@lru_cache(maxsize=1)
def weights(n: int, dtype: str = "float32") -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian weights, and their magnitudes as the baselines get them."""
    w = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    return w, w.abs() if dtype == "float32" else w.abs().view(torch.int16)


def baseline(name: str, magnitudes: torch.Tensor, k: int) -> Callable[[], Any]:
    n = magnitudes.numel()
    if name == "torch.kthvalue":
        return lambda: magnitudes.kthvalue(n - k + 1).values
    if name == "torch.topk":
        return lambda: magnitudes.topk(k, sorted=False).values.amin()
    array = magnitudes.numpy()
    return lambda: np.partition(array, n - k)[n - k]


def one_read(w: torch.Tensor) -> Callable[[], Any]:
    return lambda: w.view(torch.float32).sum()


def threshold(versus: Any, n: int, name: str, density: float, dtype: str, threads: int) -> None:
    w, magnitudes = weights(n, dtype)
    k = round(n * density)
    calls = {
        "pared": lambda: pared.ops.select_threshold(w, k).value,
        name: baseline(name, magnitudes, k),
        "one read": one_read(w),
    }
    found = torch.as_tensor(calls[name]())
    assert calls["pared"]() == float(found if dtype == "float32" else found.view(DTYPES[dtype]))
    read = measure(threads).levels[-1].load
    kind = "" if dtype == "float32" else f", {dtype}"
    versus(
        calls,
        suite=f"selection, against {name}{kind}",
        case=f"{density:.0%} kept",
        cell=CELLS[n],
        rivals=(name,),
        moved=float(w.nbytes),
        limit_s=w.nbytes / read,
        facts={"n": n, "density": density, "dtype": dtype},
        **TIMING,
    )


@THREADS
@pytest.mark.parametrize("density", DENSITIES, ids="{:.0%}".format)
@pytest.mark.parametrize("name", ["torch.kthvalue", "torch.topk", "numpy.partition"])
@pytest.mark.parametrize("n", SIZES)
def test_threshold(versus: Any, n: int, name: str, density: float, threads: int) -> None:
    threshold(versus, n, name, density, "float32", threads)


@THREADS
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("name", ["torch.kthvalue", "numpy.partition"])
def test_threshold_16_bits(versus: Any, name: str, dtype: str, threads: int) -> None:
    threshold(versus, 20_000_000, name, 0.5, dtype, threads)


def scattered(magnitudes: torch.Tensor, k: int) -> Callable[[], torch.Tensor]:
    """The mask of the k largest along the last axis, by their indices."""

    def run() -> torch.Tensor:
        at = magnitudes.topk(k, dim=-1, sorted=False).indices
        return torch.zeros(magnitudes.shape, dtype=torch.bool).scatter_(-1, at, True)

    return run


def mask_baselines(magnitudes: torch.Tensor, k: int) -> dict[str, Callable[[], Any]]:
    """Masks of the k largest along the last axis."""
    n, array = magnitudes.shape[-1], magnitudes.numpy()

    def argpartition() -> Any:
        mask = np.zeros(array.shape, bool)
        np.put_along_axis(mask, np.argpartition(array, n - k)[..., n - k :], True, axis=-1)
        return mask

    return {
        "torch.topk": scattered(magnitudes, k),
        "torch.kthvalue": lambda: magnitudes >= magnitudes.kthvalue(n - k + 1, keepdim=True).values,
        "numpy.partition": lambda: array >= np.partition(array, n - k)[..., n - k : n - k + 1],
        "numpy.argpartition": argpartition,
    }


def mask_row(
    versus: Any, calls: dict[str, Callable[[], Any]], w: torch.Tensor, kept: int, reads: int, **row: Any
) -> None:
    """One row: `calls` with pared's own among them, whose mask has `kept` elements."""
    assert int(calls["pared"]().sum()) == kept
    for call in calls.values():
        assert kept <= int(torch.as_tensor(call()).sum()) <= kept * (1.02 if w.itemsize == 4 else 1.5)
    memory = measure(row.pop("threads")).levels[-1]
    versus(
        calls,
        suite="selection, masks",
        rivals=[name for name in calls if name != "pared"],
        moved=float(reads * w.nbytes + w.numel()),
        limit_s=reads * w.nbytes / memory.load + w.numel() / memory.store,
        **row,
        **TIMING,
    )


@MASK_THREADS
@pytest.mark.parametrize("dtype", MASKS)
def test_mask(versus: Any, dtype: str, threads: int) -> None:
    """The whole tensor: a threshold, then the mask, so that the keys are read twice."""
    n = 20_000_000
    w, magnitudes = weights(n, dtype)
    calls = {"pared": lambda: pared.ops.topk_mask(w, n // 2), **mask_baselines(magnitudes, n // 2)}
    mask_row(
        versus, calls, w, n // 2, 2, case=f"{dtype}, 50 % kept", cell="topk_mask, 2*10^7", threads=threads
    )


@MASK_THREADS
@pytest.mark.parametrize("dtype", MASKS)
def test_mask_of_rows(versus: Any, dtype: str, threads: int) -> None:
    w, magnitudes = (t.view(SHAPE) for t in weights(SHAPE[0] * SHAPE[1], dtype))
    k = SHAPE[1] // 2
    calls = {"pared": lambda: pared.ops.topk_mask(w, k, dim=1), **mask_baselines(magnitudes, k)}
    mask_row(
        versus,
        calls,
        w,
        w.numel() // 2,
        1,
        case=f"{dtype}, 50 % kept",
        cell="of rows, 4096^2",
        threads=threads,
    )


@MASK_THREADS
def test_block_mask(versus: Any, threads: int) -> None:
    """Blocks of 1x4 by the sum of their magnitudes, which the baselines have to add up."""
    w, magnitudes = (t.view(SHAPE) for t in weights(SHAPE[0] * SHAPE[1]))
    k = w.numel() // 8

    def spread(of: Callable[[torch.Tensor, int], Callable[[], Any]]) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            blocks = torch.as_tensor(of(magnitudes.view(-1, 4).sum(1), k)())
            return blocks.view(-1, 1).expand(-1, 4).reshape(SHAPE)

        return run

    calls: dict[str, Callable[[], Any]] = {"pared": lambda: pared.ops.block_mask(w, k, block=(1, 4))}
    for name in mask_baselines(magnitudes[:1], 1):
        calls[name] = spread(lambda scores, k, name=name: mask_baselines(scores, k)[name])
    mask_row(
        versus, calls, w, 4 * k, 1, case="float32, 50 % kept", cell="block_mask 1x4, 4096^2", threads=threads
    )


@MASK_THREADS
@pytest.mark.parametrize("dtype", MASKS)
def test_nm_mask(versus: Any, dtype: str, threads: int) -> None:
    w, magnitudes = (t.view(SHAPE) for t in weights(SHAPE[0] * SHAPE[1], dtype))
    groups = magnitudes.view(-1, 4)
    calls = {"pared": lambda: pared.ops.nm_mask(w, 2, 4), **mask_baselines(groups, 2)}
    mask_row(
        versus, calls, w, w.numel() // 2, 1, case=f"{dtype}, 2:4", cell="nm_mask, 4096^2", threads=threads
    )
