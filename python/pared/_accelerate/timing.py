"""What `accelerate` times: layers, layers computed together, attention, models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pared._accelerate.layers import Candidate, Signature, Variant, like
from pared._choices import Choices, Timed
from pared._inputs import Example, one_pass
from pared._report import Report
from pared._target import LayerCall, Target
from pared.nn import Linear, MaxPool2d
from pared.nn._attention import pared_attention, torch_attention
from pared.nn._encoder import own_class
from pared.ops.chain import linear_chain

LAYER_SECONDS = 0.15
MODEL_SECONDS = 1.0


def time_layer(c: Candidate, variants: dict[str, Variant]) -> float:
    """Time the variants; returns the dense layer's seconds. All sums are over the calls that one pass makes.

    The time of what can be fused is part of every variant.
    """
    before = 0.0
    scaled = dict.fromkeys(variants, 0.0)  # dense time over the ratio: a disturbed median does not tilt it
    for s, count in c.calls.items():
        x = timing_input(s)
        steps = [m for _, m in c.steps]
        calls = {"dense": LayerCall(c.module, x, steps)}
        for name, v in variants.items():
            calls[name] = LayerCall(v.module, x, steps[v.fused :])
        t = c.target.time_layers(calls, LAYER_SECONDS * len(variants) / len(c.calls))
        before += count * t.median("dense")
        for name, v in variants.items():
            v.after += count * t.median(name)
            scaled[name] += count * t.median("dense") / t.gain(name, "dense")
    for name, v in variants.items():
        v.speedup = before / scaled[name]
    return before


def timing_input(s: Signature) -> Tensor:
    """Normal data without zeros and denormals, which slow some kernels down and speed others up."""
    generator = torch.Generator().manual_seed(len(s.shape))
    x = torch.randn(s.shape, generator=generator, device="cpu")
    x += torch.sign(x) * 2.0**-10 + (x == 0)
    return like(s).copy_(x)


def time_hand_over(layers: list[Linear], calls: dict[Signature, int]) -> float:
    """How many times faster one call is than a call a layer, over all the calls of the first."""
    weights, biases = [m.packed_weight() for m in layers], [m.bias for m in layers]
    activations = [m.activation for m in layers]

    def apart(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    def handed(x: Tensor) -> object:
        return linear_chain(x, weights, biases, activations)

    return _gain(calls, apart, handed, Target())


def time_sharing(layers: list[Linear], calls: dict[Signature, int], target: Target) -> float:
    """How many times faster layers are that share their input, over all the calls of the first."""
    twins = [copy.copy(m) for m in layers]
    twins[0].share_with(*twins[1:])

    def run(these: list[Linear], x: Tensor) -> None:
        for layer in these:
            layer(x)

    return _gain(calls, partial(run, layers), partial(run, twins), target)


def _gain(
    calls: dict[Signature, int],
    apart: Callable[[Tensor], object],
    together: Callable[[Tensor], object],
    target: Target,
) -> float:
    """How many times faster one way is than the other, over all the calls."""
    first, second = _both_ways(calls, apart, together, target)
    return first / second


def _both_ways(
    calls: Mapping[Signature, int],
    apart: Callable[[Tensor], object],
    together: Callable[[Tensor], object],
    target: Target,
) -> tuple[float, float]:
    """Seconds of all the calls in one way, and in the other by what it gains, in the same rounds."""
    work: dict[str, Callable[[], object]] = {}
    for i, s in enumerate(calls):
        x = timing_input(s)
        work[f"apart {i}"], work[f"together {i}"] = partial(apart, x), partial(together, x)
    t = target.time(work, budget=LAYER_SECONDS, min_rounds=5, max_rounds=200, precision=0.01)
    first = [n * t.median(f"apart {i}") for i, n in enumerate(calls.values())]
    return sum(first), sum(s / t.gain(f"together {i}", f"apart {i}") for i, s in enumerate(first))


def time_attention(
    module: nn.Module, arguments: tuple[Any, ...], described: str, timed: Choices
) -> tuple[float, float]:
    """Seconds of one call: of torch's attention as transformers calls it, and of pared's."""
    key = timed.key(attention=described, groups=getattr(module, "num_key_value_groups", 1))
    q, k, v, mask, scale, causal = arguments
    options = {"scaling": scale, "is_causal": causal}
    return _one_call(
        "attention",
        lambda: torch_attention(module, q, k, v, mask, **options),
        lambda: pared_attention(module, q, k, v, mask, **options),
        key,
        timed,
    )


def _one_call(
    name: str, dense: Callable[[], object], pared: Callable[[], object], key: str | None, timed: Choices
) -> tuple[float, float]:
    """Seconds of a call of each, in the same rounds."""
    known = timed.get(key)
    if known is None:
        t = Target().time(
            {"dense": dense, "pared": pared},
            budget=LAYER_SECONDS,
            min_rounds=5,
            max_rounds=200,
            precision=0.02,
        )
        before = t.median("dense")
        known = Timed(name, before, {"pared": (before / t.gain("pared", "dense"), 1.0)})
        timed.put(key, known)
    return known.before, known.variants["pared"][0]


def time_pool(
    module: nn.MaxPool2d, new: MaxPool2d, calls: Mapping[Signature, int], timed: Choices
) -> tuple[float, float]:
    """Seconds of all the calls of a max pooling: torch's and pared's."""
    key = timed.key(
        pool=module.extra_repr(),
        calls=sorted([[*s.shape], [*s.stride], str(s.dtype), n] for s, n in calls.items()),
    )
    return time_block(module, new, calls, key, timed)


def time_block(
    plain: nn.Module, new: nn.Module, calls: Mapping[Signature, int], key: str | None, timed: Choices
) -> tuple[float, float]:
    """Seconds of all the calls of a module and of what may take its place, in the same rounds."""
    known = timed.get(key)
    if known is None:
        theirs, mine = _both_ways(calls, plain, new, Target())
        known = Timed(type(plain).__name__, theirs, {"pared": (mine, 1.0)})
        timed.put(key, known)
    return known.before, known.variants["pared"][0]


def time_encoder(
    layer: nn.Module, arguments: tuple[Any, ...], described: str, timed: Choices
) -> tuple[float, float]:
    """Seconds of one call of a transformer's layer: part by part, and in one call."""
    parts = [m for m in layer.modules() if isinstance(m, Linear)]
    key = timed.key(encoder=described, parts=[layer_key(m) for m in parts])
    args, kwargs = arguments
    plain: Any = own_class(layer)
    return _one_call(
        "encoder", lambda: plain.forward(layer, *args, **kwargs), lambda: layer(*args, **kwargs), key, timed
    )


def layer_key(m: Linear) -> list[Any]:
    """What the time of a linear layer depends on beside its calls; counts of non-zeros within two percent."""
    zeros = round(50 * math.log(max(1, m.packed_weight().nnz)))
    return [m.format, m.activation, m.in_features, m.out_features, m.bias is not None, zeros]


def time_models(
    dense: nn.Module, fast: nn.Module, inputs: list[Example], report: Report, target: Target
) -> Timed:
    passes = {"dense": one_pass(dense, inputs), "pared": one_pass(fast, inputs)}
    t, remark = target.time_models(passes, MODEL_SECONDS)
    if remark:
        report.notes.append(remark)
    times = {
        "median": (t.median("pared"), t.gain("pared", "dense")),
        "p95": (t.p95("pared"), t.p95("dense")),
    }
    return Timed("model", t.median("dense"), times)
