"""Ranges of activations from a streaming histogram: min-max, percentile, least squared error, least
divergence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pared._errors import (
    as_float,
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_positive,
    is_integer,
    is_real,
)
from pared.pruning.calibration import INPUT, Observer
from pared.pruning.criteria import Histogram
from pared.pruning.distributed import Processes
from pared.pruning.patterns import Pattern
from pared.pruning.targets import Target
from pared.quant.grid import check_bits, check_tensor

__all__ = ["OBSERVERS", "ActivationGrid", "Distribution", "InputRange"]

OBSERVERS = ("minmax", "percentile", "mse", "kl")
BINS = 2048


@dataclass(frozen=True)
class ActivationGrid:
    """``x ~ scale * (q - zero)``, q of `dtype` "int8" (-128..127, zero 0) or "uint8" (0..255)."""

    scale: float
    zero: int
    dtype: str

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)
        check_choice("dtype", self.dtype, ("int8", "uint8"))
        low, high = self._codes
        if not is_integer(self.zero):
            raise TypeError(f"zero: expected a code, an integer, got {type(self.zero).__name__}")
        if not low <= self.zero <= high:
            raise ValueError(f"zero: expected a code from {low} to {high}, got {self.zero!s:.20}")

    @property
    def _codes(self) -> tuple[int, int]:
        return (-128, 127) if self.dtype == "int8" else (0, 255)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        check_tensor("x", x)
        low, high = self._codes
        codes = (torch.round(x / self.scale) + self.zero).clamp(low, high)
        return (codes - self.zero) * self.scale


@dataclass(frozen=True)
class Distribution:
    """What a layer's inputs look like.

    Attributes
    ----------
    count, low, high, mean, std : of all values seen.
    kurtosis : excess, 0 for a Gaussian, 3 for a Laplace distribution.
    fit : of "gaussian", "laplace" and (integers >= 0 only) "poisson" the one with the largest likelihood.
    log_likelihood : per value, by name of the distribution.
    parameters : of each: mean and standard deviation; median and mean distance from it; rate.
    """

    count: int
    low: float
    high: float
    mean: float
    std: float
    kurtosis: float
    fit: str
    log_likelihood: dict[str, float]
    parameters: dict[str, tuple[float, ...]]


class InputRange(Observer):
    """Histogram and moments of a layer's input, one series for the whole tensor."""

    events = frozenset({INPUT})

    def __init__(self, target: Target, pattern: Pattern | None = None) -> None:
        if not isinstance(target, Target):
            raise TypeError(f"target: expected a pared.pruning.targets.Target, got {type(target).__name__}")
        self.target = target
        self.histogram = Histogram(BINS)
        self.low, self.high = math.inf, -math.inf
        self.count = self.zeros = 0
        self.powers = torch.zeros(4, dtype=torch.float64, device="cpu")
        self.deviation = 0.0
        self.integers = True

    def input(self, x: torch.Tensor) -> None:
        check_tensor("x", x)
        flat = x.reshape(-1, 1).to(torch.float64)
        if not flat.numel():
            return
        self.histogram.add(flat)
        low, high = torch.aminmax(flat)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        self.count += flat.numel()
        self.zeros += flat.numel() - int(torch.count_nonzero(flat))
        self.powers += torch.stack([flat.pow(p).sum() for p in (1, 2, 3, 4)]).cpu()
        self.integers = self.integers and bool((flat == flat.round()).all())

    def reduce(self, processes: Processes) -> None:
        if not isinstance(processes, Processes):
            raise TypeError(
                f"processes: expected those of pared.pruning.distributed, got {type(processes).__name__}"
            )
        self.histogram.reduce(processes)
        seen = processes.gather((self.low, self.high, self.count, self.zeros, self.integers))
        lows, highs, counts, zeros, integers = zip(*seen, strict=True)
        self.low, self.high = min(lows), max(highs)
        self.count, self.zeros, self.integers = sum(counts), sum(zeros), all(integers)
        processes.add_(self.powers)

    def result(self) -> InputRange:
        if not self.count:
            raise ValueError(
                f"data: expected batches that reach layer {self.target.layer!r}, got none that do"
            )
        return self

    # Ranges

    def range(self, method: str, bits: int = 8, share: float = 0.9999) -> tuple[float, float]:
        """The part of the range that the grid should cover; a percentile's `share` lies between its ends."""
        check_choice("method", method, OBSERVERS)
        check_bits(bits)
        self.result()  # something has been seen
        if not 0.5 < check_number("share", share) <= 1:
            raise ValueError(f"share: expected a number in (0.5, 1], got {share!r}")
        if method == "minmax":
            return self.low, self.high
        if method == "percentile":
            return self._quantile(1 - share), self._quantile(share)
        scores = {}
        for part in range(32, 1, -1):
            low, high = self.low * part / 32, self.high * part / 32
            scores[low, high] = (self.squared_error if method == "mse" else self._divergence)(low, high, bits)
        return min(scores, key=lambda pair: scores[pair])

    def grid(self, method: str, *, symmetric: bool = False, bits: int = 8) -> ActivationGrid:
        """Grid of 8 bits: uint8 for inputs >= 0, or with a zero point; int8 when `symmetric`."""
        check_flag("symmetric", symmetric)
        low, high = self.range(method, bits)
        low, high = min(low, 0.0), max(high, 0.0)
        if symmetric and low < 0:
            return ActivationGrid(max(-low, high) / 127 or 1.0, 0, "int8")
        scale = (high - low) / 255 or 1.0
        return ActivationGrid(scale, round(-low / scale), "uint8")

    def bars(self, most: int, zeros: bool) -> tuple[float, float, list[int]]:
        """Where the histogram begins, the width of a bar, and counts in at most so many bars.

        `zeros` : whether those that are exactly zero are counted.
        """
        most = check_count("most", most, "bars")
        check_flag("zeros", zeros)
        self.result()
        width = 2 * self.histogram.limit / BINS
        first = int((self.low + self.histogram.limit) / width)
        last = min(int((self.high + self.histogram.limit) / width), BINS - 1)
        counts = self.histogram.counts[0, :, 0].cpu().clone()
        if not zeros:
            counts[BINS // 2] -= self.zeros
        joined = -(-(last - first + 1) // most)
        padded = torch.zeros(-(-(last - first + 1) // joined) * joined, dtype=torch.int64, device="cpu")
        padded[: last - first + 1] = counts[first : last + 1]
        start = first * width - self.histogram.limit
        return start, joined * width, [int(n) for n in padded.reshape(-1, joined).sum(1)]

    def _bins(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts, and the bins' centres."""
        limit = self.histogram.limit
        edges = torch.linspace(-limit, limit, BINS + 1, dtype=torch.float64, device="cpu")
        return self.histogram.counts[0, :, 0].cpu().to(torch.float64), (edges[1:] + edges[:-1]) / 2

    def _quantile(self, share: float) -> float:
        counts, centres = self._bins()
        reached = counts.cumsum(0) >= share * counts.sum()
        half = self.histogram.limit / BINS
        edge = float(centres[int(reached.int().argmax())]) + (half if share > 0.5 else -half)
        return min(max(edge, self.low), self.high)

    def squared_error(self, low: float, high: float, bits: int) -> float:
        """Mean squared error of a value on a grid over [low, high] and zero."""
        for name, edge in (("low", low), ("high", high)):
            if not is_real(edge):
                raise TypeError(f"{name}: expected a finite number, got {type(edge).__name__}")
            if not math.isfinite(as_float(edge)):
                raise ValueError(f"{name}: expected a finite number, got {edge!s:.20}")
        if low > high:
            raise ValueError(f"high: expected a number >= low={low!r}, got {high!r}")
        check_bits(bits)
        self.result()
        counts, x = self._bins()
        counts[BINS // 2] -= self.zeros  # zero lies on the grid
        low, high = min(low, 0.0), max(high, 0.0)
        scale, width = (high - low) / (2**bits - 1) or 1.0, 2 * self.histogram.limit / BINS
        q = x.clamp(low, high)
        if scale > width:
            q = torch.round(q / scale) * scale
        # A step that is finer than a bin shows in no centre: values lie uniformly within it.
        fine = scale**2 / 12 * float(counts.sum()) if scale <= width else 0.0
        return (float((counts * (q - x).square()).sum()) + fine) / self.count

    def _divergence(self, low: float, high: float, bits: int) -> float:
        """Kullback-Leibler divergence of the clipped and quantised histogram from what was seen."""
        counts, x = self._bins()
        inside = (x >= low) & (x <= high)
        if not bool(inside.any()):
            return math.inf
        p = counts * inside
        first, last = int(inside.int().argmax()), len(x) - 1 - int(inside.flip(0).int().argmax())
        p[first] += counts[:first].sum()  # what is clipped comes out at the ends
        p[last] += counts[last + 1 :].sum()
        levels = 2**bits
        group = (
            ((x - x[first]) / (x[last] - x[first] + 1e-300) * (levels - 1))
            .round()
            .long()
            .clamp(0, levels - 1)
        )
        filled = (counts > 0) & inside
        total = torch.zeros(levels, dtype=torch.float64, device="cpu").index_add_(
            0, group[inside], counts[inside]
        )
        share = torch.zeros(levels, dtype=torch.float64, device="cpu").index_add_(
            0, group[filled], torch.ones(int(filled.sum()), dtype=torch.float64, device="cpu")
        )
        q = torch.where(filled, total[group] / share[group].clamp(min=1), 0.0)
        p, q = p / p.sum(), q / q.sum().clamp(min=1e-300)
        return float(torch.where(p > 0, p * (p.clamp(min=1e-300) / q.clamp(min=1e-12)).log(), 0.0).sum())

    # Distribution

    def distribution(self) -> Distribution:
        """Moments, and which of the usual distributions fits best."""
        self.result()
        n = self.count
        m1, m2, m3, m4 = (float(v) / n for v in self.powers)
        variance = max(m2 - m1**2, 0.0)
        std = math.sqrt(variance)
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        counts, x = self._bins()
        weights = counts / counts.sum()
        likely: dict[str, float] = {}
        parameters: dict[str, tuple[float, ...]] = {}
        if std > 0:
            likely["gaussian"] = -0.5 * math.log(2 * math.pi * variance) - 0.5
            parameters["gaussian"] = m1, std
            median = float(x[int((weights.cumsum(0) >= 0.5).int().argmax())])
            spread = float((weights * (x - median).abs()).sum())
            likely["laplace"] = -math.log(2 * spread) - 1.0 if spread > 0 else -math.inf
            parameters["laplace"] = median, spread
        if self.integers and self.low >= 0 and m1 > 0:
            width = 2 * self.histogram.limit / BINS
            # The integer that a bin begins with, or the middle of those that it holds.
            k = (x - min(width, 1.0) / 2).clamp(min=0)
            likely["poisson"] = float((weights * (k * math.log(m1) - m1 - torch.lgamma(k + 1))).sum())
            parameters["poisson"] = (m1,)
        best = max(likely, key=lambda name: likely[name]) if likely else "constant"
        kurtosis = fourth / variance**2 - 3 if variance > 0 else 0.0
        return Distribution(n, self.low, self.high, m1, std, kurtosis, best, likely, parameters)
