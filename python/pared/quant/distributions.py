"""What a model's weights and activations look like, and which range a grid of few bits should cover."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pared._errors import check_indent, check_path, check_text
from pared._files import replacing
from pared.pruning import calibration
from pared.pruning.calibration import LossFn, Observer, check_loss_fn
from pared.pruning.masks import check_finite
from pared.pruning.targets import Filters, collect, unwrap
from pared.quant.grid import check_bits
from pared.quant.observers import OBSERVERS, Distribution, InputRange

__all__ = ["DistributionReport", "TensorDistribution", "distributions"]

# Bars of a plot.
BARS = 128


@dataclass(frozen=True)
class TensorDistribution:
    """A layer's weight, or what it is called with.

    Attributes
    ----------
    name : of the weight's tensor. `kind` : "weight" or "input".
    zeros : share of values that are exactly zero. A weight's zeros are in no other figure here: they lie on
        every grid.
    distribution : moments, and fits with their parameters and likelihoods.
    ranges : by method, the (low, high) that a grid over the whole tensor covers.
    sqnr : by method, ``10 log10(E[x^2] / E[(x - q(x))^2])`` in dB on a grid of the report's bits.
    start, step, counts : a histogram: bars of width `step` from `start` on. Exact zeros are left out, unless
        all values are integers that are not negative.
    """

    name: str
    kind: str
    zeros: float
    distribution: Distribution
    ranges: dict[str, tuple[float, float]]
    sqnr: dict[str, float]
    start: float
    step: float
    counts: tuple[int, ...]

    @property
    def best(self) -> str:
        """The method with the least squared error."""
        return max(self.sqnr, key=lambda method: self.sqnr[method])


@dataclass(frozen=True)
class DistributionReport:
    """The result of `distributions`. ``print(report)`` shows a table, ``report.to_html(path)`` the plots.

    Attributes
    ----------
    bits : of the grids that ranges and errors are of.
    tensors : weights and inputs in the model's order.
    """

    bits: int
    tensors: tuple[TensorDistribution, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {"bits": self.bits, "tensors": [dataclasses.asdict(t) for t in self.tensors]}

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=check_indent(indent))

    def to_html(self, path: str | os.PathLike[str], title: str = "Weights and activations") -> None:
        """Write one page with a plot of each tensor: histogram, fitted densities, ranges by method.

        Raises
        ------
        OSError : what writing the file raised. An earlier file is then still there.
        """
        from pared.quant._plots import page

        check_path("path", path)
        check_text("title", title)
        with replacing(path) as temporary:
            Path(temporary).write_text(page(self, title), encoding="utf-8")

    def __rich__(self) -> Table:
        table = Table(
            title=f"weights and activations; error of {self.bits} bits by range",
            caption="dB of signal over rounding error, higher is better; * the best. Moments and fits are of "
            "weights without their zeros.",
            caption_justify="left",
        )
        table.add_column("tensor", overflow="fold")
        for heading in ("", "fits best"):
            table.add_column(heading, no_wrap=True)
        for heading in ("zeros", "mean", "std", "low", "high", *OBSERVERS):
            table.add_column(heading, justify="right", no_wrap=True)
        for t in self.tensors:
            d = t.distribution
            numbers = [f"{v:.3g}" for v in (d.mean, d.std, d.low, d.high)]
            errors = [f"{t.sqnr[m]:.1f}{'*' if m == t.best else ' '}" for m in OBSERVERS]
            table.add_row(t.name, t.kind, d.fit, f"{t.zeros:.0%}", *numbers, *errors)
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=130, color_system=None).print(self)
        return out.getvalue().rstrip()


def distributions(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    bits: int = 8,
    loss_fn: LossFn | None = None,
    include: Filters = None,
    exclude: Filters = None,
) -> DistributionReport:
    """Histograms, fits and ranges of the weights of a model, and of what its layers are called with.

    One pass over `data`, in bounded memory: a histogram of 2048 bins and four moments a tensor. Fits are by
    largest likelihood: Gaussian, Laplace (location: the median), and Poisson for integers that are not
    negative. Ranges for a grid of few bits: least squared error, Banner et al., arXiv 1810.05723; least
    Kullback-Leibler divergence, Migacz, "8-bit inference with TensorRT" (2017).

    Parameters
    ----------
    model : any module; it is not changed. Masks of other tools are looked through.
    data : batches, as in `pared.prune`; None: weights alone.
    bits : 2 to 16.
    loss_fn : runs the batches, ``loss_fn(model, batch)``; None: ``model(batch)``.
    include, exclude : which layers, as in `pared.prune`. Of recurrent layers there are weights alone.

    Returns
    -------
    DistributionReport

    Raises
    ------
    TypeError, ValueError : naming the argument; for weights and inputs that are not finite, and for data
        without a batch.
    """
    bits = check_bits(bits)
    check_loss_fn(loss_fn)
    module = unwrap(model)
    targets, _ = collect(module, include, exclude, 0, 0)
    for target in targets:
        check_finite(target, target.weight)
    observers: dict[str, InputRange] = {}
    if data is not None:
        visible = [t for t in targets if calibration._visible(t)]
        observers = {t.name: InputRange(t) for t in visible}
        fed: dict[str, Observer] = {**observers}
        if visible:
            calibration.collect(module, visible, fed, data, loss_fn, "'distributions'")
    found = []
    for target in targets:
        own = InputRange(target)
        weight = target.weight
        zeros = 1.0 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
        values = weight[weight != 0]
        if values.numel():
            own.input(values)
            found.append(_describe(own, target.name, "weight", zeros, bits))
        seen = observers.get(target.name)
        if seen is not None and seen.count:
            found.append(_describe(seen, target.name, "input", seen.zeros / seen.count, bits))
    return DistributionReport(bits, tuple(found))


def _describe(seen: InputRange, name: str, kind: str, zeros: float, bits: int) -> TensorDistribution:
    distribution = seen.distribution()
    ranges = {method: seen.range(method, bits) for method in OBSERVERS}
    signal = float(seen.powers[1]) / seen.count
    errors = {method: seen.squared_error(low, high, bits) for method, (low, high) in ranges.items()}
    sqnr = {m: 10 * math.log10(signal / e) if signal > 0 and e > 0 else 0.0 for m, e in errors.items()}
    start, step, counts = seen.bars(BARS, "poisson" in distribution.parameters)
    return TensorDistribution(name, kind, zeros, distribution, ranges, sqnr, start, step, tuple(counts))
