"""The page of `pared.evaluate`: one HTML file, tables and SVG plots, light and dark, no scripts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from pared import _svg as draw
from pared._report import _bytes, _seconds

if TYPE_CHECKING:
    from pared._evaluate import Evaluation, Histogram, Interval, LayerFigures, ModelFigures

__all__ = ["page"]

_LAYERS = 40
_PANELS = 12
_TIMES = "\N{MULTIPLICATION SIGN}"


def _duration(seconds: float) -> str:
    return _seconds(seconds).replace(" us", " µs")


def _colour(index: int) -> str:
    return draw.COLOURS[index % len(draw.COLOURS)] if index else draw.COLOURS[0]


def _legend(models: Sequence[tuple[int, str]]) -> str:
    return draw.legend([(_colour(i), name) for i, name in models])


def _time_unit(seconds: float) -> tuple[float, str]:
    """What to multiply seconds with, and the unit that it gives, for an axis that reaches to `seconds`."""
    return (1e6, "µs") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1.0, "s")


# ---------------------------------------------------------------- plots


def _accuracy_speed(e: Evaluation) -> str:
    """Metric against latency, a point a model, with the metric's interval."""
    width, height, left, right, top, bottom = 980.0, 440.0, 70.0, 30.0, 14.0, 52.0
    name = next(iter(e.models[0].metrics))
    factor, unit = _time_unit(max(m.p50 for m in e.models))
    xs = [m.p50 * factor for m in e.models]
    ys = [m.metrics[name] for m in e.models]
    scale = 100.0 if e.percent else 1.0
    low, high = min(y.low for y in ys) * scale, max(y.high for y in ys) * scale
    pad = 0.12 * (high - low) or 1.0
    low, high = low - pad, high + pad
    if e.percent:
        low, high = max(low, 0.0), min(high, 100.0)
    wide = max(xs) / min(xs) > 5
    x_low, x_high = (min(xs) / 1.5, max(xs) * 1.7) if wide else (0.0, max(xs) * 1.25)

    def at_x(x: float) -> float:
        share = math.log(x / x_low) / math.log(x_high / x_low) if wide else (x - x_low) / (x_high - x_low)
        return left + share * (width - left - right)

    def at_y(y: float) -> float:
        return top + (high - y) / (high - low) * (height - top - bottom)

    parts = []
    for t in draw.ticks(low, high):
        parts.append(draw.line(left, at_y(t), width - right, at_y(t), 'class="grid"'))
        parts.append(draw.text(left - 8, at_y(t) + 4, draw.plain(t), "end", "soft"))
    for t in draw.log_ticks(x_low, x_high) if wide else draw.ticks(x_low, x_high, 7):
        parts.append(draw.line(at_x(t), top, at_x(t), height - bottom, 'class="grid"'))
        parts.append(draw.text(at_x(t), height - bottom + 18, draw.plain(t), "middle", "soft"))
    parts.append(draw.line(left, height - bottom, width - right, height - bottom, 'class="axis"'))
    parts.append(draw.line(left, top, left, height - bottom, 'class="axis"'))
    times = "a sample" if e.batch == 1 else f"for {e.batch} samples"
    axis = f"latency {times}, p50 ({unit}{', logarithmic' if wide else ''}); left is faster"
    parts.append(draw.text((left + width - right) / 2, height - 12, axis, "middle"))
    middle = (top + height - bottom) / 2
    label = f"{name} ({'%' if e.percent else 'higher is better'})"
    parts.append(
        f'<text x="16" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 16 {middle:.0f})">'
        f"{escape(label)}</text>"
    )
    points = [(at_x(x), at_y(y.value * scale)) for x, y in zip(xs, ys, strict=True)]
    # What names must not cover: points, and the intervals through them.
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in points]
    taken += [
        (x - 5, at_y(y.high * scale), x + 5, at_y(y.low * scale))
        for (x, _), y in zip(points, ys, strict=True)
    ]
    for i, ((x, y), m, own) in enumerate(zip(points, e.models, ys, strict=True)):
        style = f'stroke="{_colour(i)}" stroke-width="2"'
        for edge in (own.low, own.high):
            parts.append(draw.line(x - 5, at_y(edge * scale), x + 5, at_y(edge * scale), style))
        parts.append(draw.line(x, at_y(own.low * scale), x, at_y(own.high * scale), style))
        tip = f"{m.name}: {_duration(m.p50)}, {e._interval(own)}"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{_colour(i)}" stroke="var(--card)" '
            f'stroke-width="1.5"><title>{escape(tip)}</title></circle>'
        )
    for (x, y), m in zip(points, e.models, strict=True):
        parts.append(_label(x, y, m.name, taken, (left, top, width - right, height - bottom)))
    return draw.svg(width, height, parts, f"{name} against latency")


Box = tuple[float, float, float, float]


def _label(x: float, y: float, text: str, taken: list[Box], inside: Box) -> str:
    """The name of a point, where it covers no other one."""
    w = draw.CHARACTER * len(text) + 4
    for reach in range(0, 241, 12):
        for side in (1, -1):
            for below in (1, -1) if reach else (1,):
                # Far ones stand aside of what they belong to, at the end of a line that leads there.
                px, py = x + side * (12 + 0.6 * reach), y + 4 + below * reach
                start = px if side > 0 else px - w
                box = (start, py - 12, start + w, py + 5)
                if box[0] < inside[0] or box[2] > inside[2] or box[1] < inside[1] or box[3] > inside[3]:
                    continue
                if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                    continue
                taken.append(box)
                lead = "" if not reach else draw.line(x, y, px - side * 3, py - 4, 'class="lead"')
                return lead + draw.text(px, py, text, "start" if side > 0 else "end")
    return ""  # the legend and the tooltip still name it


def _robustness(e: Evaluation) -> str:
    """The metric on each kind of input: a dot and its interval for each model."""
    name = next(iter(e.models[0].metrics))
    kinds: list[tuple[str, Callable[[ModelFigures], Interval]]] = [("as they are", lambda m: m.metrics[name])]
    kinds += [(d, lambda m, d=d: m.robustness[d]) for d in e.models[0].robustness]  # type: ignore[misc]
    scale = 100.0 if e.percent else 1.0
    row = 18.0 * len(e.models) + 18.0
    width, left, right, top = 980.0, 170.0, 30.0, 8.0
    bottom = top + row * len(kinds)
    values = [f(m) for _, f in kinds for m in e.models]
    low, high = min(v.low for v in values) * scale, max(v.high for v in values) * scale
    pad = 0.05 * (high - low) or 1.0
    low, high = low - pad, high + pad
    if e.percent:
        low, high = max(0.0, low), min(100.0, high)

    def at(v: float) -> float:
        return left + (v - low) / (high - low) * (width - left - right)

    parts = []
    for t in draw.ticks(low, high, 7):
        parts.append(draw.line(at(t), top, at(t), bottom, 'class="grid"'))
        parts.append(draw.text(at(t), bottom + 18, draw.plain(t), "middle", "soft"))
    for k, (kind, get) in enumerate(kinds):
        y = top + k * row
        if k:
            parts.append(draw.line(12, y, width - right, y, 'class="axis"'))
        parts.append(draw.text(left - 12, y + row / 2 + 4, kind, "end"))
        for i, m in enumerate(e.models):
            v, at_y = get(m), y + 18.0 * (i + 1)
            tip = f"{m.name}, {kind}: {e._interval(v)}"
            parts.append(
                draw.line(
                    at(v.low * scale),
                    at_y,
                    at(v.high * scale),
                    at_y,
                    f'stroke="{_colour(i)}" stroke-width="2"',
                )
            )
            parts.append(
                f'<circle cx="{at(v.value * scale):.1f}" cy="{at_y:.1f}" r="5" fill="{_colour(i)}">'
                f"<title>{escape(tip)}</title></circle>"
            )
    label = f"{name} ({'%' if e.percent else 'higher is better'}), with 95 % intervals"
    parts.append(draw.text((left + width - right) / 2, bottom + 40, label, "middle"))
    return draw.svg(width, bottom + 50, parts, f"{name} on distorted inputs")


def _layer_bars(e: Evaluation, index: int) -> str:
    """For each layer its zeros, and its time beside the first model's."""
    model = e.models[index]
    first = {x.name: x for x in e.models[0].layers} if index else {}
    shown = _largest(model.layers, _LAYERS)
    row, width, top = (30.0 if index else 24.0), 980.0, 30.0
    name_w, shape_w, kernel_w, zeros_w = 230.0, 130.0, 90.0, 170.0
    zeros_x = name_w + shape_w + kernel_w
    time_x = zeros_x + zeros_w + 30.0
    time_w = width - time_x - 80.0
    pairs = [(x.seconds, first[x.name].seconds if x.name in first else None) for x in shown]
    longest = max((t for pair in pairs for t in pair if t), default=1e-9)
    factor, unit = _time_unit(longest)
    bottom = top + row * len(shown)
    parts = [
        draw.text(0, 14, "layer"),
        draw.text(name_w, 14, "weight"),
        draw.text(name_w + shape_w, 14, "kernel"),
    ]
    parts += [draw.text(zeros_x, 14, "zeros (%)"), draw.text(time_x, 14, f"time in a pass ({unit})")]
    ticks = draw.ticks(0.0, longest * factor, 4)
    for t in ticks:
        x = time_x + t / (longest * factor) * time_w
        parts.append(draw.line(x, top - 6, x, bottom, 'class="grid"'))
        parts.append(draw.text(x, bottom + 14, draw.plain(t), "middle", "soft small"))
    for t in (0, 50, 100):
        x = zeros_x + t / 100 * (zeros_w - 40)
        parts.append(draw.line(x, top - 6, x, bottom, 'class="grid"'))
        parts.append(draw.text(x, bottom + 14, str(t), "middle", "soft small"))
    for i, layer in enumerate(shown):
        y = top + i * row
        base = y + row / 2 + 4
        parts.append(draw.text(0, base, draw.fit(layer.name, name_w - 14), tip=layer.name))
        parts.append(draw.text(name_w, base, _TIMES.join(map(str, layer.shape)), "start", "soft"))
        parts.append(draw.text(name_w + shape_w, base, layer.kernel, "start", "soft"))
        zeros = layer.sparsity * (zeros_w - 40)
        style = f'fill="{_colour(index)}" fill-opacity="0.45" rx="2"'
        parts.append(draw.rect(zeros_x, y + row / 2 - 6, zeros, 12, style, f"{layer.sparsity:.1%} zeros"))
        parts.append(draw.text(zeros_x + zeros + 6, base, f"{100 * layer.sparsity:.0f}", "start", "soft"))
        bars = [(index, layer.seconds)]
        if layer.name in first:
            bars.insert(0, (0, first[layer.name].seconds))
        size = 11.0
        for b, (which, spent) in enumerate(bars):
            if spent is None:
                continue
            t = spent
            at = y + row / 2 + (b - len(bars) / 2) * (size + 1)
            length = t / longest * time_w
            tip = f"{e.models[which].name}: {_duration(t)}"
            parts.append(draw.rect(time_x, at, length, size, f'fill="{_colour(which)}" rx="2"', tip))
            parts.append(
                draw.text(
                    time_x + length + 5, at + 9.5, draw.plain(_short(t * factor)), "start", "soft small"
                )
            )
    return draw.svg(width, bottom + 22, parts, f"zeros and time of each layer of {model.name}")


def _short(x: float) -> float:
    """To three digits."""
    return float(f"{x:.3g}")


def _largest(layers: Sequence[LayerFigures], n: int) -> list[LayerFigures]:
    """The `n` layers with the most work, in their order."""
    by_work = sorted(range(len(layers)), key=lambda i: (-(layers[i].seconds or 0.0), -layers[i].macs))[:n]
    return [layers[i] for i in sorted(by_work)]


def _histogram(series: Sequence[tuple[int, Histogram]], label: str) -> str:
    """Outlines of histograms over each other, each to its own height."""
    width, top, base, bottom = 250.0, 22.0, 92.0, 108.0
    low, high = min(h.low for _, h in series), max(h.high for _, h in series)
    span = (high - low) or 1.0
    parts = [draw.text(0, 12, label, "start", "small")]
    zeros = series[-1][1]
    total = sum(zeros.counts) + zeros.zeros
    if zeros.zeros:
        parts.append(draw.text(width, 12, f"{zeros.zeros / total:.0%} zero", "end", "soft small"))
    for order, (index, h) in enumerate(series):
        most = max(h.counts) or 1
        step = (h.high - h.low) / len(h.counts)
        points = [f"{(h.low - low) / span * width:.1f},{base:.1f}"]
        for i, c in enumerate(h.counts):
            y = base - c / most * (base - top)
            for edge in (h.low + i * step, h.low + (i + 1) * step):
                points.append(f"{(edge - low) / span * width:.1f},{y:.1f}")
        points.append(f"{(h.high - low) / span * width:.1f},{base:.1f}")
        last = order == len(series) - 1
        fill = f'fill="{_colour(index)}" fill-opacity="0.35"' if last else 'fill="none"'
        parts.append(
            f'<polyline points="{" ".join(points)}" {fill} stroke="{_colour(index)}" stroke-width="1.2"/>'
        )
    parts.append(draw.line(0, base, width, base, 'class="axis"'))
    ends = [draw.plain(float(f"{v:.2g}")) if abs(v) > 0.005 * span else "0" for v in (low, high)]
    parts.append(draw.text(0, bottom, ends[0], "start", "soft small"))
    parts.append(draw.text(width, bottom, ends[1], "end", "soft small"))
    if low < 0 < high:
        zero = -low / span * width
        parts.append(draw.line(zero, base, zero, base + 4, 'class="axis"'))
        if 30 < zero < width - 30:
            parts.append(draw.text(zero, bottom, "0", "middle", "soft small"))
    return draw.svg(width, 112, parts, label)


def _histograms(e: Evaluation) -> str:
    """Weights and inputs of the layers with the most work: the first model's and the last one's."""
    indices = [0, len(e.models) - 1] if len(e.models) > 1 else [0]
    by_name = [{x.name: x for x in e.models[i].layers} for i in indices]
    panels = []
    for layer in _largest(e.models[indices[0]].layers, _PANELS):
        found = [(i, own[layer.name]) for i, own in zip(indices, by_name, strict=True) if layer.name in own]
        weights = _histogram([(i, x.weights) for i, x in found], "weights")
        given = [(i, x.inputs) for i, x in found if x.inputs is not None]
        inputs = _histogram(given, "inputs") if given else "<div></div>"
        panels.append(f'<div><h3>{escape(layer.name)}</h3><div class="pair">{weights}{inputs}</div></div>')
    return f'{_legend([(i, e.models[i].name) for i in indices])}<div class="panels">{"".join(panels)}</div>'


# ---------------------------------------------------------------- tables and text


def _table(e: Evaluation) -> str:
    from pared._evaluate import count

    names = list(e.models[0].metrics)

    def interval(x: Interval) -> str:
        return f"{e.metric(x.value)} <small>{e.metric(x.low)} to {e.metric(x.high)}</small>"

    def change(m: ModelFigures) -> str:
        if m is e.models[0]:
            return ""
        x = m.difference
        return f"{e.change(x.value)} <small>{e.change(x.low)} to {e.change(x.high)}</small>"

    rows: list[tuple[str, Callable[[ModelFigures], str]]] = [
        ("parameters", lambda m: f"{m.parameters:,}"),
        ("of them not zero", lambda m: f"{m.nonzeros:,} <small>{1 - m.sparsity:.1%}</small>"),
        ("file", lambda m: "-" if m.file_bytes is None else _bytes(m.file_bytes)),
        ("memory", lambda m: _bytes(m.memory_bytes)),
        ("multiply-adds a pass", lambda m: count(m.macs)),
        ("latency p50", lambda m: _duration(m.p50)),
        ("latency p95", lambda m: _duration(m.p95)),
        ("samples a second", lambda m: count(m.throughput)),
        (
            "speed-up",
            lambda m: f"{m.speedup[0]:.2f}{_TIMES} <small>{m.speedup[1]:.2f} to {m.speedup[2]:.2f}</small>",
        ),
    ]
    breaks = {len(rows) - 1}
    rows += [(name, lambda m, n=name: interval(m.metrics[n])) for name in names]  # type: ignore[misc]
    if len(e.models) > 1:
        rows.append((f"{names[0]}, change" + (" (points)" if e.percent else ""), change))
    breaks.add(len(rows) - 1)
    rows += [
        (f"{names[0]}, {d}", lambda m, d=d: interval(m.robustness[d]))  # type: ignore[misc]
        for d in e.models[0].robustness
    ]
    head = "".join(
        f'<th><i class="dot" style="background:{_colour(i)}"></i>{escape(m.name)}</th>'
        for i, m in enumerate(e.models)
    )
    body = "".join(
        f"<tr{' class=rule' if i in breaks and i < len(rows) - 1 else ''}><td>{escape(label)}</td>"
        + "".join(f"<td>{show(m)}</td>" for m in e.models)
        + "</tr>"
        for i, (label, show) in enumerate(rows)
    )
    head = f"<thead><tr><th></th>{head}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _tiles(e: Evaluation) -> str:
    first, last = e.models[0], e.models[-1]
    name = next(iter(first.metrics))
    if first is last:
        own = first.metrics[name]
        tiles = [
            (_duration(first.p50), f"latency p50, {e.batch} samples"),
            (e.metric(own.value), f"{name}, {e.metric(own.low)} to {e.metric(own.high)}"),
            (_bytes(first.memory_bytes), "memory of the weights"),
            (f"{first.sparsity:.0%}", f"of {first.parameters:,} parameters are zero"),
        ]
    else:
        change = e.change(last.difference.value) + (" points" if e.percent else "")
        size = (
            (f"{last.file_bytes / first.file_bytes:.0%}", f"of the file: {_bytes(last.file_bytes)}")
            if first.file_bytes and last.file_bytes
            else (
                f"{last.memory_bytes / first.memory_bytes:.0%}",
                f"of the memory: {_bytes(last.memory_bytes)}",
            )
        )
        tiles = [
            (f"{last.speedup[0]:.2f}{_TIMES}", f"as fast: {_duration(first.p50)} to {_duration(last.p50)}"),
            (
                change,
                f"{name}: {e.metric(first.metrics[name].value)} to {e.metric(last.metrics[name].value)}",
            ),
            size,
            (f"{last.sparsity:.0%}", f"of {last.parameters:,} parameters are zero"),
        ]
    items = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    return f'<div class="tiles">{items}</div>'


def page(e: Evaluation, title: str) -> str:
    """The whole page as text."""
    first, last = e.models[0], e.models[-1]
    names = [(i, m.name) for i, m in enumerate(e.models)]
    lead = f"{first.name}" if first is last else f"{last.name} compared with {first.name}"
    sections = [
        ("Models", f"{e.samples:,} samples; intervals are 95 %.", _table(e)),
        (
            "Accuracy against speed",
            "One point a model; the bar is the 95 % interval of the metric.",
            _legend(names) + _accuracy_speed(e),
        ),
    ]
    if first.robustness:
        text = "The same samples, distorted; every model sees the same distortions."
        sections.append(("Robustness", text, _legend(names) + _robustness(e)))
    for i, m in enumerate(e.models):
        if i == 0 and len(e.models) > 1:
            continue
        shown = min(_LAYERS, len(m.layers))
        text = "Share of zeros, and median time of the layer in a pass, with what is fused into it."
        if shown < len(m.layers):
            text += f" The {shown} layers of {len(m.layers)} that take longest."
        legend = _legend([(0, first.name), (i, m.name)] if i else [(0, m.name)])
        sections.append((f"Layers: {m.name}", text, legend + _layer_bars(e, i)))
    text = "Values that are not zero, each histogram to its own height."
    if len(first.layers) > _PANELS:
        text += f" The {_PANELS} layers of {len(first.layers)} that take longest."
    sections.append(("Weights and activations", text, _histograms(e)))
    body = "".join(
        f"<section><h2>{escape(h)}</h2><p>{escape(text)}</p>{content}</section>"
        for h, text, content in sections
    )
    machine = f"{e.machine.get('cpu')}, {e.machine.get('isa')}, {e.machine.get('threads')} thread(s)"
    version = f"torch {e.machine.get('torch')}"
    lead = f"{lead}, on {machine}"
    footer = f"Measured by pared: {machine}, {version}. Times are medians over interleaved rounds."
    return draw.document(title, lead, _tiles(e) + body, footer)
