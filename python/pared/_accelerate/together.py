"""Layers that are computed together: one hands its panel to the next, or several share an input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch import nn

from pared._accelerate import timing
from pared._accelerate.layers import Candidate
from pared._choices import Choices, Timed
from pared._fusion import between
from pared._inputs import Difference, Example, compare_all
from pared._report import Report
from pared._target import Target
from pared.nn import Linear
from pared.ops.chain import chain_of

# Layers are computed together when that is so many times faster.
TOGETHER = 1.02


def hand_over(
    fast: nn.Module,
    inputs: list[Example],
    reference: list[Any],
    candidates: list[Candidate],
    report: Report,
    timed: Choices,
) -> None:
    """Compute layers that follow each other in one call, where that is measurably faster."""
    by_name = {c.name: c for c in candidates}
    taken: set[str] = set()
    heads: list[Linear] = []
    rows = {c.name: c.row.reason for c in candidates}
    for c in candidates:
        if c.name in taken:
            continue
        run = [c]
        while (after := _successor(run[-1], by_name)) is not None and after.name not in taken:
            run.append(after)
            taken.add(after.name)
        if len(run) < 2:
            continue
        taken.add(c.name)
        layers = [cast(Linear, r.chosen) for r in run]
        key = _chain_key(layers, c, timed)
        gain = _known_gain(c, key, timed, partial(timing.time_hand_over, layers, c.calls))
        if gain < TOGETHER:
            continue
        layers[0].hand_to(*layers[1:], between=between(fast, [r.name for r in run]))
        heads.append(layers[0])
        c.row.reason += f"; hands over to {', '.join(r.name for r in run[1:])}: {gain:.2f}x"
        for r in run[1:]:
            r.row.reason += f"; computed with {c.name}"
    if heads and compare_all(fast, inputs, reference).relative > report.tolerance:
        for head in heads:
            head.hand_to()
        for c in candidates:
            c.row.reason = rows[c.name]


def _known_gain(c: Candidate, key: str | None, timed: Choices, measure: Callable[[], float]) -> float:
    """How many times faster layers are together, measured unless it is known; the number stands where seconds
    do."""
    known = timed.get(key)
    if known is None:
        known = Timed(c.name, max(measure(), 1e-9))
        timed.put(key, known)
    return known.before


def accepted(worst: Difference, allowed: float, report: Report, undo: Callable[[], None], stays: str) -> bool:
    """Note how far the outputs are now; where that is more than allowed, `undo` what was done, and note what
    `stays` as it was."""
    if worst.relative > allowed:
        undo()
        report.notes.append(f"{stays}: outputs would differ by {worst.relative:.1e}")
        return False
    report.error, report.relative_error, report.tolerance = worst.absolute, worst.relative, allowed
    return True


def _successor(c: Candidate, by_name: dict[str, Candidate]) -> Candidate | None:
    """The layer that may take the panel of `c`."""
    after = None if c.successor is None else by_name.get(c.successor)
    fits = after is not None and c.fused == len(c.steps) and len(c.names) == len(after.names) == 1
    both = (c.chosen, after.chosen) if after is not None and fits else ()
    linear = [m.packed_weight() for m in both if isinstance(m, Linear)]
    return after if len(linear) == 2 and chain_of(linear) is not None else None


def _chain_key(layers: list[Linear], c: Candidate, timed: Choices) -> str:
    """What the gain of a hand-over depends on."""
    return timed.key(
        chain=[timing.layer_key(m) for m in layers],
        calls=sorted([[*s.shape], [*s.stride], str(s.dtype), n] for s, n in c.calls.items()),
    )


def share(
    fast: nn.Module,
    inputs: list[Example],
    reference: list[Any],
    candidates: list[Candidate],
    report: Report,
    timed: Choices,
    target: Target,
) -> None:
    """Compute layers that take the same input together, where that is measurably faster: the input is packed
    or quantized once, or one launch reads all the weights."""
    groups: dict[tuple[int, ...], list[list[Candidate]]] = {}
    for c in candidates:
        m = c.chosen
        alone = isinstance(m, Linear) and not m._handed and m._fed_by is None and len(c.names) == 1
        if not (alone and c.inputs):
            continue
        alike = groups.setdefault(tuple(c.inputs), [])
        for group in alike:
            if target.computes_together(cast(Linear, group[-1].chosen), cast(Linear, m)):
                group.append(c)
                break
        else:
            alike.append([c])
    heads: list[Linear] = []
    rows = {c.name: c.row.reason for c in candidates}
    for group in (g for alike in groups.values() for g in alike if len(g) > 1):
        first = group[0]
        layers = [cast(Linear, c.chosen) for c in group]
        key = timed.key(shared=_chain_key(layers, first, timed))
        gain = _known_gain(first, key, timed, partial(timing.time_sharing, layers, first.calls, target))
        if gain < TOGETHER:
            continue
        layers[0].share_with(*layers[1:])
        heads.append(layers[0])
        first.row.reason += f"; computes {', '.join(c.name for c in group[1:])} too: {gain:.2f}x"
        for c in group[1:]:
            c.row.reason += f"; computed with {first.name}"
    if heads and compare_all(fast, inputs, reference).relative > report.tolerance:
        for head in heads:
            head.share_with()
        for c in candidates:
            c.row.reason = rows[c.name]
