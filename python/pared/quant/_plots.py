"""The page of `pared.quant.distributions`: histograms, fitted densities, the ranges that methods choose."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from pared import _svg as draw
from pared.quant.observers import OBSERVERS

if TYPE_CHECKING:
    from pared.quant.distributions import DistributionReport, TensorDistribution

__all__ = ["page"]

_BARS, _BEST = draw.COLOURS[0], draw.COLOURS[1]
_FITS = {"gaussian": draw.COLOURS[2], "laplace": draw.COLOURS[5], "poisson": draw.COLOURS[3]}
# A row of ranges below the plot.
_ROW = 15.0


def density(name: str, parameters: tuple[float, ...], x: float) -> float:
    """Of a fit: probability a unit of x; Poisson's of the nearest integer."""
    if name == "gaussian":
        mean, std = parameters
        return math.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    if name == "laplace":
        median, spread = parameters
        return math.exp(-abs(x - median) / spread) / (2 * spread)
    k = max(0, round(x))
    return math.exp(k * math.log(parameters[0]) - parameters[0] - math.lgamma(k + 1))


def _shown(n: float) -> str:
    power = round(math.log10(n))
    return f"{n:.0f}" if power < 3 else f"{n / 1e3:.0f}k" if power < 6 else f"{n / 1e6:.0f}M"


def plot(t: TensorDistribution) -> str:
    """Counts on a logarithmic axis, so that tails show; below it what each method's grid covers."""
    width, left, right, top, base = 470.0, 64.0, 58.0, 8.0, 150.0
    low, high = t.start, t.start + t.step * len(t.counts)
    most = max(max(t.counts), 2)
    decades = math.log10(most * 1.6 / 0.5)

    def at_x(x: float) -> float:
        return left + (min(max(x, low), high) - low) / (high - low) * (width - left - right)

    def at_y(n: float) -> float:
        return base - max(0.0, math.log10(max(n, 1e-9) / 0.5) / decades) * (base - top)

    parts = []
    for power in range(int(math.log10(most * 1.6)) + 1):
        y = at_y(10.0**power)
        parts.append(draw.line(left, y, width - right, y, 'class="grid"'))
        parts.append(draw.text(left - 7, y + 4, _shown(10.0**power), "end", "soft small"))
    bar = (width - left - right) / len(t.counts)
    for i, n in enumerate(t.counts):
        if n:
            tip = f"{n:,} from {t.start + i * t.step:.4g} to {t.start + (i + 1) * t.step:.4g}"
            box = (left + i * bar, at_y(n), bar + 0.15, base - at_y(n))
            parts.append(draw.rect(*box, f'fill="{_BARS}" fill-opacity="0.55"', tip))
    total = t.distribution.count
    fits = t.distribution.parameters
    spacing = max(t.step, 1.0) if "poisson" in fits else t.step  # of the values that a bar may hold
    for name in sorted(fits, key=lambda n: n == t.distribution.fit):
        points = []
        for i in range(241):
            x = low + (high - low) * i / 240
            expected = total * density(name, fits[name], x) * spacing
            if expected >= 0.5:
                points.append(f"{at_x(x):.1f},{max(at_y(expected), top):.1f}")
        best = name == t.distribution.fit
        style = 'stroke-width="2"' if best else 'stroke-width="1.2" stroke-dasharray="4 3"'
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{_FITS[name]}" {style}/>')
    parts.append(draw.line(left, base, width - right, base, 'class="axis"'))
    for x in draw.ticks(low, high, 5):
        parts.append(draw.line(at_x(x), base, at_x(x), base + 4, 'class="axis"'))
        parts.append(draw.text(at_x(x), base + 16, draw.plain(float(f"{x:.6g}")), "middle", "soft small"))
    for i, method in enumerate(OBSERVERS):
        y = base + 34 + i * _ROW
        best = method == t.best
        colour = _BEST if best else "var(--soft)"
        a, b = (at_x(v) for v in t.ranges[method])
        tip = f"{method}: {t.ranges[method][0]:.4g} to {t.ranges[method][1]:.4g}, {t.sqnr[method]:.1f} dB"
        kind = "small" if best else "soft small"
        parts.append(draw.text(left - 7, y + 4, method, "end", kind))
        parts.append(draw.rect(a, y - 2, max(b - a, 2.0), 4, f'fill="{colour}" rx="2"', tip))
        parts += [draw.line(v, y - 5, v, y + 5, f'stroke="{colour}" stroke-width="1.5"') for v in (a, b)]
        parts.append(draw.text(width - right + 8, y + 4, f"{t.sqnr[method]:.1f} dB", "start", kind))
        if best:
            style = f'stroke="{_BEST}" stroke-width="1" stroke-dasharray="2 3"'
            parts += [draw.line(v, top, v, y - 5, style) for v in (a, b)]
    return draw.svg(width, base + 34 + len(OBSERVERS) * _ROW, parts, f"{t.kind} of {t.name}")


def _panel(t: TensorDistribution) -> str:
    d = t.distribution
    text = [
        f"{d.count:,} values",
        f"std {d.std:.3g}",
        f"kurtosis {d.kurtosis:.2g}",
        f"fits best: {d.fit}",
    ]
    if t.zeros:
        text.insert(1, f"{t.zeros:.0%} zeros" + (" besides" if t.kind == "weight" else ""))
    layer = t.name.rpartition(".")[0] or "the model"
    heading = t.name if t.kind == "weight" else f"input of {layer}"
    return f"<div><h3>{escape(heading)}</h3><p>{escape(', '.join(text))}</p>{plot(t)}</div>"


def page(report: DistributionReport, title: str) -> str:
    """The whole page as text."""
    lead = (
        f"Counts on a logarithmic axis. Below each histogram the range that a grid of {report.bits} bits "
        "covers by method, and the signal over its rounding error; the best one is blue."
    )
    names = dict.fromkeys(name for t in report.tensors for name in t.distribution.parameters)
    items = [
        (_BARS, "values"),
        *((_FITS[n], n) for n in _FITS if n in names),
        (_BEST, "range with the least error"),
    ]
    # A row of the page is a layer: its weight, and what it is called with.
    by_name: dict[str, dict[str, TensorDistribution]] = {}
    for t in report.tensors:
        by_name.setdefault(t.name, {})[t.kind] = t
    kinds = [k for k in ("weight", "input") if any(k in own for own in by_name.values())]
    panels = "".join(
        _panel(own[kind]) if kind in own else "<div></div>" for own in by_name.values() for kind in kinds
    )
    body = f'<section>{draw.legend(items)}<div class="panels">{panels}</div></section>'
    return draw.document(
        title, lead, body, "Fits are by largest likelihood; the best is drawn solid. Made by pared."
    )
