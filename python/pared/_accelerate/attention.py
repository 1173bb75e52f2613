"""Attention modules of transformers, given to `pared.ops.attention` where that is faster."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pared._accelerate import timing
from pared._accelerate.layers import Candidate
from pared._accelerate.together import accepted
from pared._choices import Choices
from pared._inputs import Example, compare_all, described, tolerance
from pared._report import Report
from pared.nn._attention import attend, attending, detach, recording


@dataclass
class Calls:
    """What a module is called with: how often, by everything that the time depends on."""

    arguments: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, *arguments: Any) -> None:
        key = described(arguments)
        self.counts[key] = self.counts.get(key, 0) + 1
        if key not in self.arguments:
            # Strides and what a mask hides are kept, and so is nothing of the model.
            self.arguments[key] = tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, arguments)


def attend_all(
    fast: nn.Module,
    inputs: list[Example],
    reference: list[Any],
    candidates: list[Candidate],
    report: Report,
    min_speedup: float,
    timed: Choices,
) -> bool:
    """Give the attention modules of transformers pared's kernel, where it is measurably faster than torch's;
    whether any has it now."""
    for module in fast.modules():
        attend(module)
    sites = attending(fast)
    if not sites:
        return False
    calls: dict[int, Calls] = {}

    def note(module: nn.Module, *arguments: Any) -> None:
        calls.setdefault(id(module), Calls()).add(*arguments)

    with recording(note):
        worst = compare_all(fast, inputs, reference)
    before = after = 0.0
    kept = 0
    depth = 1
    for module in sites.values():
        seen = calls.get(id(module), Calls())
        times = [timing.time_attention(module, a, key, timed) for key, a in seen.arguments.items()]
        theirs, mine = (
            sum(n * t[i] for n, t in zip(seen.counts.values(), times, strict=True)) for i in (0, 1)
        )
        if not times or theirs < min_speedup * mine:
            detach(module)
            continue
        kept += 1
        before, after = before + theirs, after + mine
        depth = max(depth, *(max(a[0].shape[3], a[1].shape[2]) for a in seen.arguments.values()))
    if not kept:
        return False
    allowed = max(report.tolerance, tolerance(len(candidates) + kept, depth, worst.eps))
    worst = compare_all(fast, inputs, reference)

    def undo() -> None:
        for module in sites.values():
            detach(module)

    if not accepted(worst, allowed, report, undo, "attention stays torch's"):
        return False
    report.notes.append(
        f"{kept} attention module(s) run pared's kernel, {before / after:.2f}x faster than torch's: "
        f"{before * 1e3:.3g} ms -> {after * 1e3:.3g} ms"
    )
    return True
