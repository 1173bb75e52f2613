"""What a call costs beside the arithmetic: modules so small that nothing else is left.

The goal is at most 3 us over the plain module's call in eager mode; the last line of each benchmark says how
much it is. The way through the dispatcher, which torch.compile and torch.export take, is printed beside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pared.nn import Conv2d, Linear
from pared.nn._chains import bind_chains
from pared.ops import linear
from pared.ops._library import conv2d_op, linear_op

GOAL_US = 3.0


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def report(
    versus: Callable[..., Any], benchmark: Any, capsys: Any, case: str, calls: dict[str, Callable[[], Any]]
) -> None:
    plain = next(iter(calls))
    t = versus(
        calls, suite="call overhead", case=case, cell="ratio", rivals=(plain,), budget=1.0, min_sample=1e-3
    )
    extra = {name: (t.median(name) - t.median(plain)) * 1e6 for name in calls if name != plain}
    benchmark.extra_info["overhead_us"] = extra
    with capsys.disabled():
        added = ", ".join(f"{name} {us:+.2f} us" for name, us in extra.items())
        verdict = "reached" if extra["pared"] <= GOAL_US else "missed"
        print(f"\n{case}: {plain} {t.median(plain) * 1e6:.2f} us; {added}; goal +{GOAL_US:g} us {verdict}")


@pytest.mark.parametrize("activation", [None, "relu"])
def test_linear(versus: Any, benchmark: Any, capsys: Any, threads: int, activation: str | None) -> None:
    layer = nn.Linear(16, 16).eval()
    fast = Linear.from_module(layer, activation=activation)
    weight = fast.packed_weight()
    x = torch.randn(1, 16)
    plain = layer if activation is None else nn.Sequential(layer, nn.ReLU()).eval()
    name = "nn.Linear" if activation is None else "nn.Sequential(nn.Linear, nn.ReLU)"
    calls = {
        name: lambda: plain(x),
        "pared": lambda: fast(x),
        "ops.linear": lambda: linear(x, weight, fast.bias, activation),
        "dispatched": lambda: linear_op(x, fast.packed, fast.bias, 16, activation or ""),
    }
    report(versus, benchmark, capsys, f"{name} 16x16, 1 token", calls)


def test_chain(versus: Any, benchmark: Any, capsys: Any, threads: int) -> None:
    """Two layers in one call, as `pared.accelerate` leaves them; and without what says when they may."""
    plain = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    fast, free, apart = (nn.Sequential(*(Linear.from_module(m) for m in plain)) for _ in range(3))
    for model in (fast, free):
        model[0].hand_to(model[1])
    bind_chains(fast)
    x = torch.randn(1, 16)
    calls = {
        "nn.Sequential": lambda: plain(x),
        "pared": lambda: fast(x),
        "always in one call": lambda: free(x),
        "one by one": lambda: apart(x),
    }
    report(versus, benchmark, capsys, "nn.Sequential of two nn.Linear 16x16, 1 token", calls)


def test_conv2d(versus: Any, benchmark: Any, capsys: Any, threads: int) -> None:
    layer = nn.Conv2d(2, 2, 1).eval()
    fast = Conv2d.from_module(layer)
    x = torch.randn(1, 2, 4, 4)
    calls = {
        "nn.Conv2d": lambda: layer(x),
        "pared": lambda: fast(x),
        "dispatched": lambda: conv2d_op(
            x, fast.packed, fast.bias, 2, fast.kernel_size, (1, 1), (0, 0, 0, 0), (1, 1), ""
        ),
    }
    report(versus, benchmark, capsys, "nn.Conv2d 2x2x1x1, 4x4 pixels", calls)
