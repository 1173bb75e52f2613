"""The whole model: opened, put together from the chosen layers, compared with the dense one, raced."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from pared._accelerate import timing
from pared._accelerate.layers import Candidate, Variant, listed
from pared._choices import Choices, Timed
from pared._inputs import Example, compare, compare_all, described, run_hooked, tolerance
from pared._report import ModelTime, Report
from pared._surgery import module_names, replace, shared_copy
from pared._target import Target
from pared.nn import DenseWeightError, FoldedBatchNorm2d, Fused, PackedModule
from pared.nn._foreign import foreign
from pared.pruning.linears import AS_PLAIN, PLAIN, as_plain, open_layers, plain_kind

# Of the largest output, where max_error is not given: what 8 bits may change.
BUDGET = {"int8": 0.1, "auto": 0.02}


@dataclass(frozen=True)
class Opened:
    """The dense model, and the same with Linear layers in the place of attention and Conv1D modules.

    Attributes
    ----------
    plain : what the whole model is compared with; what stays of an attention whose layers all stay dense.
    model : where kernels are looked for, around the same tensors; `plain` itself where nothing is opened.
    types : by name, what was opened.
    notes : why nothing was.
    """

    plain: nn.Module
    model: nn.Module
    types: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_model(plain: nn.Module, inputs: list[Example], reference: list[Any]) -> Opened:
    model, types = open_layers(shared_copy(plain), skip=True)
    types |= as_plain(model, _alike(plain, inputs))
    if not types:
        return Opened(plain, plain)
    kinds = " and ".join(sorted({*types.values()} - {"TransformerEncoder"}))
    note = f"no kernel is tried for {kinds}: with Linear layers instead "
    try:
        worst = compare_all(model, inputs, reference)
    except Exception as e:  # a model's code may ask for anything that the module has
        return Opened(plain, plain, notes=[f"{note}the model raises {type(e).__name__}: {e}"])
    layers = [m for m in model.modules() if type(m) in PLAIN]
    depths = [cast(Tensor, m.weight)[0].numel() for m in layers]
    allowed = tolerance(len(depths), max(depths), worst.eps)
    if not worst.relative <= allowed:
        difference = f"{worst.relative:.1e} ({worst.where}), more than {allowed:.1e}"
        return Opened(plain, plain, notes=[f"{note}outputs differ by {difference}"])
    return Opened(plain, model, types)


def _alike(model: nn.Module, inputs: list[Example]) -> list[str]:
    """Names of subclasses' modules that compute what the layer of torch does, whenever they are called."""
    calls: dict[int, bool] = {}  # id of a module -> whether it did in all calls

    def compare_call(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        kind = plain_kind(module)
        weight = cast(Tensor, module.weight)
        # Subclasses with integers for weights are other tools' quantized layers.
        same = kind is not None and weight.is_floating_point()
        same = same and len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if same:
            depth, eps = weight[0].numel(), torch.finfo(weight.dtype).eps
            try:
                expected = cast(Any, kind).forward(module, args[0])
            except (RuntimeError, TypeError):  # its own forward takes what torch's does not
                same = False
            else:
                same = compare(expected, output).relative <= tolerance(1, depth, eps)
        calls[id(module)] = calls.get(id(module), True) and same

    some = [m for m in model.modules() if plain_kind(m) is not None and foreign(m) is None]
    if some:
        handles = [m.register_forward_hook(compare_call, with_kwargs=True) for m in some]
        run_hooked(model, inputs, handles)
    names = module_names(model)
    return [name for m in some if calls.get(id(m)) for name in names[id(m)]]


def runs_kernels(module: nn.Module) -> bool:
    return any(isinstance(m, PackedModule) for m in module.modules())


def as_linears(opened: dict[str, str]) -> list[str]:
    """A line for each type of module that was opened."""
    names: dict[str, list[str]] = {}
    for name, kind in opened.items():
        if kind != "TransformerEncoder":
            names.setdefault(kind, []).append(name or "(model)")
    return [
        f"{kind}, which computes the same and is what pared.restore gives: {listed(own)}"
        if AS_PLAIN in kind
        else f"{kind} computes with Linear layers now, which pared.restore takes back: {listed(own)}"
        for kind, own in names.items()
    ]


def _build(dense: Opened, candidates: list[Candidate]) -> nn.Module:
    """The model with the chosen layers in place, around the dense model's own tensors."""
    fast = shared_copy(dense.model)
    for c in candidates:
        if c.chosen is None:
            continue
        fast = replace(fast, c.names, c.chosen)
        for name, old in c.steps[: c.fused]:
            new = (
                FoldedBatchNorm2d.from_module(old, c.chosen)
                if isinstance(old, nn.BatchNorm2d)
                else Fused(old)
            )
            fast = replace(fast, [name], new)
    closed: dict[int, nn.Module] = {}
    for name in sorted(dense.types, key=len):  # what is around others first
        module = fast.get_submodule(name)
        if not runs_kernels(module):
            original = dense.plain.get_submodule(name)
            fast = replace(fast, [name], closed.setdefault(id(original), shared_copy(original)))
    return fast


def settle(
    dense: Opened,
    inputs: list[Example],
    reference: list[Any],
    candidates: list[Candidate],
    report: Report,
    max_error: float | None,
) -> nn.Module:
    """The accelerated model, with layers taken back until it runs and its outputs are as close as allowed."""
    while True:
        active = [c for c in candidates if c.chosen is not None]
        fast = _build(dense, candidates)
        if not active:
            report.error = report.relative_error = report.tolerance = 0.0
            return fast
        try:
            worst = compare_all(fast, inputs, reference)
        except DenseWeightError as e:
            for c in active:
                if c.chosen is e.layer:
                    c.keep_dense("the model computes with its .weight")
            continue
        quantized = [c for c in active if c.variant is not None and c.variant.quantized]
        if max_error is not None:
            allowed = max_error
        elif quantized:
            allowed = BUDGET[report.precision]
        else:
            depth = max(math.prod(c.row.shape[1:]) for c in active)
            allowed = tolerance(len(active), depth, worst.eps)
        report.error, report.relative_error, report.tolerance = worst.absolute, worst.relative, allowed
        if worst.relative <= allowed:
            return fast
        if quantized:
            _retreat(dense, inputs, reference, candidates, quantized, allowed)
            continue
        # The larger half by error relative to the layer's own bound goes first.
        active.sort(key=lambda c: (c.row.error or 0.0) / (c.row.bound or 1.0), reverse=True)
        text = f"outputs differ by {worst.relative:.1e} ({worst.where}), more than {allowed:.1e}"
        for c in active[: (len(active) + 1) // 2]:
            c.keep_dense(text)


def _retreat(
    dense: Opened,
    inputs: list[Example],
    reference: list[Any],
    candidates: list[Candidate],
    quantized: list[Candidate],
    allowed: float,
) -> None:
    """Take as few layers out of 4 or 8 bits as bring the outputs within `allowed`, given that all are too
    many; a step each, from 4 bits to 8, from 8 to none.

    In the order of harm for gain: the squared relative error of a layer's output, which adds up over the
    layers, by the time that its step saves. How many may stay is found by bisection.
    """

    def price(c: Candidate) -> float:
        v = cast(Variant, c.variant)
        other, damage = (c.row.before or 0.0, 0.0) if v.milder is None else (v.milder.after, v.milder.damage)
        return (v.damage**2 - damage**2) / max(other - v.after, 1e-9)

    order = sorted(quantized, key=price)
    first = [(c.variant, c.row.reason) for c in order]
    low, high = 0, len(order)  # `low` layers are few enough (or none), `high` too many
    while high - low > 1:
        middle = (low + high) // 2
        for c in order[middle:]:
            c.retreat("")
        if compare_all(_build(dense, candidates), inputs, reference).relative <= allowed:
            low = middle
        else:
            high = middle
        for c, (v, reason) in zip(order, first, strict=True):
            c.choose(cast(Variant, v), reason)
    for c, (v, _) in list(zip(order, first, strict=True))[low:]:
        format, speedup = cast(Variant, v).module.format, cast(Variant, v).speedup
        c.retreat(f"{format} is {speedup:.2f}x, but with it outputs would differ by more than {allowed:g}")


def race(
    dense: Opened,
    fast: nn.Module,
    inputs: list[Example],
    reference: list[Any],
    candidates: list[Candidate],
    report: Report,
    max_error: float | None,
    floor: float,
    timed: Choices,
    target: Target,
) -> nn.Module:
    """Time the whole model against the dense one; while it is slower, the layers that gain least go back."""
    passing = [1.25, 1.5, 2.0, 3.0]
    while any(c.chosen is not None for c in candidates):
        key = _model_key(dense.plain, inputs, candidates, timed)
        known = timed.get(key)
        if known is None or known.variants.keys() != {"median", "p95"}:
            known = timing.time_models(dense.plain, fast, inputs, report, target)
            timed.put(key, known)
        note_times(known, report)
        if report.speedup >= floor:
            return fast
        needed = passing.pop(0) if passing else math.inf
        dropped = [c for c in candidates if c.chosen is not None and (c.row.speedup or 0.0) < needed]
        for c in dropped:
            c.keep_dense(f"the whole model was {report.speedup:.2f}x with it")
        if dropped:
            report.notes.append(
                f"{len(dropped)} layer(s) went back to dense: the model was {report.speedup:.2f}x with them"
            )
            fast = settle(dense, inputs, reference, candidates, report, max_error)
    report.dense = report.fast = None
    report.speedup = 1.0
    return fast


def note_times(known: Timed, report: Report) -> None:
    (median, speedup), (p95, p95_dense) = known.variants["median"], known.variants["p95"]
    report.dense = ModelTime(known.before, p95_dense)
    report.fast = ModelTime(median, p95)
    report.speedup = speedup


def _model_key(
    dense: nn.Module, inputs: list[Example], candidates: list[Candidate], timed: Choices
) -> str | None:
    """What the times of the whole model depend on; None where hooks could do anything."""
    modules = list(dense.named_modules())
    if any(m._forward_hooks or m._forward_pre_hooks for _, m in modules):
        return None
    structure = [[name, type(m).__module__, type(m).__qualname__, m.extra_repr()] for name, m in modules]
    dtypes = [[name, str(p.dtype)] for name, p in dense.named_parameters()]
    layers = [[c.name, c.row.kernel, c.fused, round(50 * c.row.sparsity)] for c in candidates]
    examples = [described([e.args, e.kwargs]) for e in inputs]
    text = json.dumps([structure, dtypes, layers, examples], sort_keys=True)
    return timed.key(model=hashlib.sha256(text.encode()).hexdigest())
