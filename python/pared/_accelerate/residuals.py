"""Residual additions, given to the convolutions before them where that is faster."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from torch import nn

from pared._accelerate import timing
from pared._accelerate.layers import Candidate, Signature, watched_calls
from pared._accelerate.together import TOGETHER
from pared._choices import Choices
from pared._inputs import Example, compare_all
from pared._report import Report
from pared._residual import find_blocks, residual_block
from pared._surgery import module_names, replace
from pared.nn import PackedModule, ResidualBlock


def add_residuals(
    fast: nn.Module,
    inputs: list[Example],
    reference: list[Any],
    candidates: list[Candidate],
    report: Report,
    timed: Choices,
) -> tuple[nn.Module, bool]:
    """Let convolutions add residuals, block by block, where that is measurably faster; the model, and whether
    any does now."""
    names = module_names(fast)
    made: dict[str, ResidualBlock] = {}
    for name, module in find_blocks(fast):
        block = residual_block(module) if name else None
        if block is not None:
            fast = replace(fast, names[id(module)], block)
            made[name] = block
            names[id(block)] = names[id(module)]
    if not made:
        return fast, False
    calls = watched_calls(fast, inputs, list(made.values()))
    before = after = 0.0
    for name, block in list(made.items()):
        own = calls.get(id(block), Counter())
        plain = block.to_module()
        theirs, mine = (
            timing.time_block(plain, block, own, _key(block, own, timed), timed) if own else (0.0, 1.0)
        )
        if theirs < TOGETHER * mine:
            fast = replace(fast, names[id(block)], plain)
            del made[name]
        else:
            before, after = before + theirs, after + mine
    if made and compare_all(fast, inputs, reference).relative > report.tolerance:
        for block in made.values():
            fast = replace(fast, names[id(block)], block.to_module())
        made.clear()
    if not made:
        return fast, False
    adders = {
        ".".join((name, *step.module))
        for name, block in made.items()
        for step in block.steps
        if step.module is not None and step.residual is not None
    }
    for c in candidates:
        if adders & {*c.names}:
            c.row.reason += "; adds a residual"
    report.notes.append(
        f"{len(made)} block(s) add their residuals in convolutions, {before / after:.2f}x faster: "
        f"{before * 1e3:.3g} ms -> {after * 1e3:.3g} ms"
    )
    return fast, True


def _key(block: ResidualBlock, calls: Counter[Signature], timed: Choices) -> str | None:
    """What the times of a block depend on; alike are blocks whose layers have about as many non-zeros."""
    modules = list(block.modules())
    if any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        return None
    layers = [
        [m.format, list(m.weight_shape), m.activation, round(50 * math.log(max(1, m.packed_weight().nnz)))]
        if isinstance(m, PackedModule)
        else [type(m).__qualname__, m.extra_repr()]
        for m in modules
    ]
    return timed.key(
        block=[block.original.__module__, layers],
        steps=[[step.value, step.residual, step.activation] for step in block.steps],
        calls=sorted([[*s.shape], [*s.stride], str(s.dtype), n] for s, n in calls.items()),
    )
