"""Layers of transformer encoders, computed in one call where that is faster."""

from __future__ import annotations

from typing import Any

from torch import nn

from pared._accelerate import timing
from pared._accelerate.attention import Calls
from pared._accelerate.layers import Candidate
from pared._accelerate.together import TOGETHER, accepted
from pared._choices import Choices
from pared._inputs import Example, compare_all, run, tolerance
from pared._report import Report
from pared.nn import Linear
from pared.nn._encoder import encoding, fits, fuse_layer, separate

# Sums that a layer takes beside those of its Linear layers: two normalisations, two residuals.
_SUMS = 4


def encode_all(
    fast: nn.Module,
    inputs: list[Example],
    reference: list[Any],
    candidates: list[Candidate],
    report: Report,
    timed: Choices,
) -> bool:
    """Compute encoder layers in one call, where that is measurably faster; whether any is now."""
    sites = {n: m for n, m in fast.named_modules() if fits(m)}
    if not sites:
        return False
    calls = {id(m): Calls() for m in sites.values()}
    hooks = [
        m.register_forward_pre_hook(lambda m, a, k: calls[id(m)].add(a, k), with_kwargs=True)
        for m in sites.values()
    ]
    try:
        for e in inputs:
            run(fast, e)
    finally:
        for h in hooks:
            h.remove()
    before = after = 0.0
    for module in sites.values():
        seen = calls[id(module)]
        fuse_layer(module)
        times = [timing.time_encoder(module, a, key, timed) for key, a in seen.arguments.items()]
        apart, together = (
            sum(n * t[i] for n, t in zip(seen.counts.values(), times, strict=True)) for i in (0, 1)
        )
        if not times or apart < TOGETHER * together:
            separate(module)
            continue
        before, after = before + apart, after + together
    kept = encoding(fast)
    if not kept:
        return False
    worst = compare_all(fast, inputs, reference)
    depth = max(m.in_features for m in fast.modules() if isinstance(m, Linear))
    allowed = max(report.tolerance, tolerance(len(candidates) + _SUMS * len(kept), depth, worst.eps))

    def undo() -> None:
        for module in kept.values():
            separate(module)

    if not accepted(worst, allowed, report, undo, "encoder layers stay apart"):
        return False
    report.notes.append(
        f"{len(kept)} encoder layer(s) run in one call each, {before / after:.2f}x faster than their parts: "
        f"{before * 1e3:.3g} ms -> {after * 1e3:.3g} ms"
    )
    for c in candidates:
        if any(c.name.startswith(f"{name}." if name else "") for name in kept):
            c.row.reason += "; in one call with its encoder layer"
    return True
