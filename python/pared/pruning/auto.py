"""``pattern="auto"``: for each layer the coarsest restriction of its zeros that the device rewards.

The finer a pattern, the less accuracy a sparsity costs; the coarser, the faster some kernels are. So a
coarser one has to be estimated a good deal faster before it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pared import _core
from pared._errors import check_choice, check_count
from pared._inputs import examples, first_run
from pared._select import shortlist
from pared._sparsity import base_type
from pared.nn import RULES
from pared.ops._estimate import Facts
from pared.ops._formats import FORMATS
from pared.pruning.patterns import Pattern, parse_pattern
from pared.pruning.targets import Target

__all__ = ["MIN_GAIN", "Layer", "PatternChoice", "cpu_seconds", "cuda_seconds", "decide", "planned_facts"]

# Times that a coarser pattern has to be faster than the best finer one.
MIN_GAIN = 1.15
PRECISIONS = ("float32", "int8")
# By what they cost in accuracy, the least first.
_CPU = {"float32": ("unstructured", "4x1"), "int8": ("unstructured", "1x4", "4x4")}
# 64x128 is not among them: what a loaded activation is multiplied with are the 64 rows of a block, however
# many columns it has, so that by bytes it is no faster than 64x64.
_CUDA = ("unstructured", "2:4", "64x64", "128x128")


@dataclass(frozen=True)
class Layer:
    """What the time of a pruned layer depends on.

    Attributes
    ----------
    kind : nn.Linear, nn.Conv1d or nn.Conv2d.
    shape : of the weight.
    groups : of a convolution.
    item_bytes : of a weight as the model has it.
    calls : positions (tokens, output pixels) of a call -> how many such calls.
    """

    kind: type[nn.Module]
    shape: tuple[int, ...]
    groups: int
    item_bytes: int
    calls: Mapping[int, int]


@dataclass(frozen=True)
class PatternChoice:
    """The pattern of one layer.

    Attributes
    ----------
    name : of the tensor.
    pattern : what was chosen.
    estimates : seconds of the layer's calls by pattern, and "dense"; empty where nothing was to choose.
    reason : why.
    """

    name: str
    pattern: str
    estimates: Mapping[str, float]
    reason: str


def planned_facts(layer: Layer, pattern: Pattern, sparsity: float) -> Facts:
    """What a weight will be like that is pruned with a block pattern, zeros falling where they may."""
    rows, depth = layer.shape[0], layer.shape[1]
    taps = math.prod(layer.shape[2:]) if len(layer.shape) > 2 else 0
    cells = math.prod(layer.shape)

    def occupied(r: int, c: int) -> int:
        """Blocks of r x c that hold a non-zero: none of the pattern's blocks that they meet may be kept."""
        meets = math.ceil(r / pattern.rows) * math.ceil(c / pattern.cols)
        return round(cells / (r * c) * (1.0 - sparsity**meets))

    return Facts(
        rows,
        depth * max(1, taps) * layer.groups,
        cells,
        occupied(1, 1),
        occupied(4, 1),
        occupied(1, 4),
        occupied(4, 4),
        taps,
        {2: 0, 3: 1, 4: layer.shape[-2]}[len(layer.shape)],
        layer.item_bytes,
    )


def cpu_seconds(layer: Layer, pattern: str | None, sparsity: float, precision: str) -> float:
    """Seconds of the fastest kernel for the layer's calls on this processor; None: without zeros."""
    density = 1.0 - sparsity if pattern else 1.0
    facts = planned_facts(layer, parse_pattern(pattern or "unstructured"), 1.0 - density)
    quads = 4 * facts.quads / max(1, facts.cells)
    names = [
        n
        for n in RULES[layer.kind].formats
        if (precision == "int8" or FORMATS[n].precision == "float32")
        and (FORMATS[n].worth_trying(density, quads, layer.calls) or n == "dense")
    ]
    return min(shortlist(names, facts, layer.calls, _core.num_threads()).estimates.values())


# An H200: bytes and operations a second, by the bytes of a weight, and a launch. What decides is ratios,
# which differ less between devices than rates do.
_MEMORY, _LAUNCH = 4.3e12, 4e-6
_DENSE = {1: 1540e12, 2: 770e12, 4: 50e12}
_GATHERED = {2: 15.2e12, 4: 11.8e12}  # unstructured products of many tokens
# Share of the tensor cores' rate that products of blocks reach, by their rows.
_BLOCK_SHARE = {64: 0.39, 128: 0.65}
_TWO_FOUR_GAIN = 1.5


def cuda_seconds(layer: Layer, pattern: str | None, sparsity: float, precision: str) -> float:
    """The same on an NVIDIA GPU, by bytes and operations: a table that no measurement has confirmed yet."""
    rows, cells = layer.shape[0], float(math.prod(layer.shape))
    cols = cells / max(1, rows)
    item = 1 if precision == "int8" else layer.item_bytes
    rate = _DENSE[item]
    density = 1.0 - sparsity
    total = 0.0
    for n, count in layer.calls.items():
        moved = max(2, item) * n * (rows + cols)

        def limit(nbytes: float, operations: float, rate: float, moved: float = moved) -> float:
            return max((nbytes + moved) / _MEMORY, operations / rate) + _LAUNCH

        work = 2.0 * cells * n
        dense = limit(item * cells, work, rate)
        if pattern is None:
            found = dense
        elif pattern == "unstructured":
            gathered = limit(
                (item + 2) * density * cells * (math.ceil(n / 8) if n <= 16 else 1),
                density * work,
                _GATHERED[max(2, item)],
            )
            expanded = dense + (item * (1 + density) + 1 / 8) * cells / _MEMORY
            masked = limit((1 / 8 + item * density) * cells, work, rate) if n <= 32 else expanded
            found = min(gathered, dense if item == 4 else masked)
        elif pattern == "2:4":
            found = limit((item / 2 + 1 / 8) * cells, work, _TWO_FOUR_GAIN * rate)
        else:
            rows_of_block = parse_pattern(pattern).rows
            found = limit(item * density * cells, density * work, _BLOCK_SHARE[rows_of_block] * rate)
        total += count * found
    return total


Seconds = Callable[[Layer, "str | None", float, str], float]


def candidates(layer: Layer, sparsity: float, device: str, precision: str) -> list[str]:
    """The patterns that kernels of the device tell apart for such a layer, the finest first."""
    if device == "cpu":
        return [*_CPU[precision]]
    found = []
    for text in _CUDA:
        p = parse_pattern(text)
        fits = p.rows <= layer.shape[0] and p.cols <= layer.shape[1]
        needs16 = text != "unstructured" and layer.item_bytes == 4 and precision != "int8"
        rule = p.kind != "nm" or (
            math.isclose(sparsity, p.rule_sparsity, abs_tol=1e-9) and precision != "int8"
        )
        if fits and rule and not needs16:
            found.append(text)
    return found


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def decide(
    name: str,
    layer: Layer | None,
    sparsity: float,
    device: str,
    precision: str,
    seconds: Seconds | None = None,
) -> PatternChoice:
    """The pattern of a layer; None for a layer without kernels."""
    if layer is None or not layer.calls:
        why = (
            "no kernel makes zeros of this layer faster"
            if layer is None
            else "the example inputs do not reach it"
        )
        return PatternChoice(name, "unstructured", {}, f"{why}: the most accurate pattern")
    if device != "cpu" and (math.prod(layer.shape[2:]) != 1 or layer.groups != 1):
        return PatternChoice(
            name, "unstructured", {}, "no CUDA kernel for this convolution: the most accurate"
        )
    measure = seconds or (cpu_seconds if device == "cpu" else cuda_seconds)
    times: dict[str, float] = {"dense": measure(layer, None, 0.0, precision)}
    chosen, reason = "unstructured", ""
    for text in candidates(layer, sparsity, device, precision):
        times[text] = measure(layer, text, sparsity, precision)
        if text == "unstructured":
            continue
        gain = times[chosen] / times[text] if times[text] else 1.0
        if gain >= MIN_GAIN:
            reason = (
                f"{text} {gain:.2f} times as fast as {chosen}: {_time(times[text])}, {_time(times[chosen])}"
            )
            chosen = text
    if not reason:
        others = [t for t in times if t not in ("dense", "unstructured")]
        best = min(others, key=lambda t: times[t], default=None)
        reason = "the one pattern for such a layer"
        if best is not None:
            gain = times["unstructured"] / times[best] if times[best] else 1.0
            reason = f"{best} only {gain:.2f} times as fast, less than {MIN_GAIN}"
    if times["dense"] <= times[chosen]:
        reason += f"; dense is as fast ({_time(times['dense'])}), {sparsity:.0%} zeros save no time"
    return PatternChoice(name, chosen, times, reason)


def check_options(
    example_inputs: object, tokens: object, device: object, precision: object, model: nn.Module
) -> str:
    """The device's type. Raises ``TypeError`` or ``ValueError`` naming the argument."""
    if (example_inputs is None) == (tokens is None):
        got = "neither" if tokens is None else "both"
        raise ValueError(f"tokens: expected it or example_inputs with pattern='auto', got {got}")
    if tokens is not None:
        check_count("tokens", tokens, "tokens")
    check_choice("precision", precision, PRECISIONS)
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        kind = torch.device(device).type  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as e:
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}") from e
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {device!r}")
    return str(kind)


def layers(
    model: nn.Module, targets: Sequence[Target], example_inputs: Any, tokens: int | None
) -> list[Layer | None]:
    """What each target's time depends on; None where no kernel accelerates it."""
    known = [base_type(t.module) in RULES and t.parameter == "weight" for t in targets]
    calls: list[dict[int, int]] = [{tokens: 1} if tokens else {} for _ in targets]
    if example_inputs is not None:
        given = examples(example_inputs)
        handles = []
        for seen, target, ok in zip(calls, targets, known, strict=True):
            if not ok:
                continue

            def count(
                module: nn.Module,
                inputs: Any,
                output: Any,
                seen: dict[int, int] = seen,
                channels: int = target.tensor.shape[0],
            ) -> None:
                n = output.numel() // max(1, channels)
                seen[n] = seen.get(n, 0) + 1

            # Modules that share the weight are its calls, too.
            handles += [m.register_forward_hook(count) for m, _ in target.places if base_type(m) in RULES]
        modes = [(m, m.training) for m in model.modules()]
        try:
            model.eval()
            for example in given:
                first_run(model, example)
        finally:
            for handle in handles:
                handle.remove()
            for m, mode in modes:
                m.training = mode
    return [
        Layer(
            base_type(t.module),
            tuple(t.tensor.shape),
            t.groups,
            t.tensor.element_size(),
            seen,
        )
        if ok
        else None
        for t, ok, seen in zip(targets, known, calls, strict=True)
    ]


def agree(choices: Sequence[PatternChoice], why: str) -> list[PatternChoice]:
    """One pattern for all: of those that were chosen, the one with the least time in total; `why` ends the
    reasons."""
    timed = [c for c in choices if c.estimates]
    names = dict.fromkeys(c.pattern for c in timed) or {"unstructured": None}
    shared = [n for n in names if all(n in c.estimates for c in timed)] or ["unstructured"]
    best = min(shared, key=lambda n: sum(c.estimates[n] for c in timed))
    return [
        c
        if c.pattern == best
        else PatternChoice(c.name, best, c.estimates, f"{c.reason}; {best} as in most of the time, {why}")
        for c in choices
    ]
