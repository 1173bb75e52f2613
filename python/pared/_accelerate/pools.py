"""Max pooling of whole planes, given to pared's kernel where that is faster."""

from __future__ import annotations

from torch import nn

from pared._accelerate import timing
from pared._accelerate.layers import watched_calls
from pared._choices import Choices
from pared._inputs import Example
from pared._report import Report
from pared._surgery import module_names, replace
from pared.nn import MaxPool2d


def pool_all(
    fast: nn.Module, inputs: list[Example], report: Report, min_speedup: float, timed: Choices
) -> tuple[nn.Module, bool]:
    """Give max pooling to pared's kernel, where it is measurably faster than torch's; the model, and whether
    any has it now. Outputs are the same bits."""
    names = module_names(fast)
    pools = [m for m in fast.modules() if type(m) is nn.MaxPool2d and not m.return_indices]
    if not pools:
        return fast, False
    calls = watched_calls(fast, inputs, pools)
    before = after = 0.0
    kept = 0
    for module in pools:
        if id(module) not in calls:
            continue
        new = MaxPool2d.from_module(module)
        theirs, mine = timing.time_pool(module, new, calls[id(module)], timed)
        if theirs < min_speedup * mine:
            continue
        kept, before, after = kept + 1, before + theirs, after + mine
        fast = replace(fast, names[id(module)], new)
    if kept:
        report.notes.append(
            f"{kept} max pooling(s) run pared's kernel, {before / after:.2f}x faster than torch's: "
            f"{before * 1e3:.3g} ms -> {after * 1e3:.3g} ms"
        )
    return fast, kept > 0
