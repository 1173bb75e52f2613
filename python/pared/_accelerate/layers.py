"""The layers of a model that kernels may take: found, and recorded while the examples run."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from pared._fusion import find_fusions
from pared._inputs import Example, run_hooked
from pared._report import KEPT, LayerReport
from pared._sparsity import base_type, effective_weight
from pared._surgery import adopt_hooks, module_names
from pared._target import Target
from pared.nn import RULES, PackedModule
from pared.nn._foreign import Foreign, foreign
from pared.ops._formats import FORMATS
from pared.pruning.linears import Experts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Activations recorded for the error check, in bytes over all layers; shapes beyond it are checked on random
# data.
_RECORD_BYTES = 512 << 20
# Share of zeros from which a matrix counts as pruned: an embedding's padding row does not make it so.
_PRUNED = 0.1
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Signature:
    """What a layer's kernel sees of an input."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device = _CPU


@dataclass
class Variant:
    """One way to accelerate a layer, its error and its time."""

    module: PackedModule
    fused: int
    error: float
    bound: float
    damage: float = 0.0  # of 8 bits: root mean square of new - dense, relative to dense; 0 for exact kernels
    after: float = 0.0
    speedup: float = 0.0
    milder: Variant | None = None  # the fastest that does less damage: takes its place where it does too much

    @property
    def precision(self) -> str:
        return FORMATS[self.module.format].precision

    @property
    def quantized(self) -> bool:
        return self.precision != "float32"


@dataclass(frozen=True)
class Plan:
    """A variant before it is made: the packed format, and how many of the steps behind it are fused."""

    format: str
    fused: int

    @property
    def precision(self) -> str:
        return FORMATS[self.format].precision

    @property
    def quantized(self) -> bool:
        return self.precision != "float32"


class UnfitError(Exception):
    """A kernel does not compute what the layer does: a reason to keep it dense."""


@dataclass
class Candidate:
    """A layer that may be accelerated, and what has been found out about it."""

    name: str
    names: list[str]
    module: nn.Module
    row: LayerReport
    calls: dict[Signature, int] = field(default_factory=dict)
    samples: dict[Signature, Tensor] = field(default_factory=dict)
    steps: list[tuple[str, nn.Module]] = field(default_factory=list)  # what may be fused behind it
    inputs: list[int] = field(default_factory=list)  # by call, a number for each input tensor that occurred
    successor: str | None = None  # the layer that alone takes what comes out of the last step
    chosen: PackedModule | None = None
    fused: int = 0  # steps that `chosen` computes
    variant: Variant | None = None  # what `chosen` is
    refused: str | None = None  # why it is not even tried
    target: Target = field(default_factory=Target)
    four: int | None = None  # inputs that share a scale, where the layer may have 4 bits
    rounds: bool = False  # to 4 bits itself, whether or not it is on such a grid
    foreign: Foreign | None = None  # what it is, where torch.ao or torchao quantised it

    @property
    def plain(self) -> nn.Module:
        """The layer in float: what a kernel computes, up to its bound."""
        return self.module if self.foreign is None else self.foreign.plain or self.module

    def norm(self, fused: int) -> nn.BatchNorm2d | None:
        """The batch normalisation among the first `fused` steps."""
        first = self.steps[0][1] if fused else None
        return first if isinstance(first, nn.BatchNorm2d) else None

    def choose(self, v: Variant, reason: str) -> None:
        """Convert the layer."""
        adopt_hooks(v.module, self.module)
        self.variant, self.chosen, self.fused = v, v.module, v.fused
        row = self.row
        row.kernel, row.after, row.speedup = v.module.format, v.after, v.speedup
        row.error, row.bound = v.error, v.bound
        row.activation, row.norm = v.module.activation, self.norm(v.fused) is not None
        row.reason = reason

    def retreat(self, reason: str) -> None:
        """From 4 bits to 8, from 8 to the best exact kernel, or to dense."""
        milder = None if self.variant is None else self.variant.milder
        if milder is None:
            self.keep_dense(reason)
        else:
            self.choose(milder, f"{milder.speedup:.2f}x faster than dense; {reason}")

    def keep_dense(self, reason: str) -> None:
        """Give the layer up; what was measured stays in the report."""
        self.chosen = self.variant = None
        self.row.kernel = KEPT
        self.row.activation, self.row.norm = None, False
        self.row.after = self.row.before
        self.row.reason = reason


def find_candidates(model: nn.Module, precision: str) -> list[Candidate]:
    found = []
    names = module_names(model)
    for name, module in model.named_modules():
        quantised = foreign(module)
        if quantised is not None:
            found.append(_foreign_candidate(name, names[id(module)], module, quantised, precision))
            continue
        rule = RULES.get(base_type(module))
        if rule is None:
            continue
        refused = None
        try:
            weight = effective_weight(module)
        except ValueError as e:
            refused, weight = str(e), module.weight
        if weight.dtype not in DTYPES:
            refused = f"weights of dtype {weight.dtype}; kernels take float32, bfloat16 and float16"
        zeros = 1.0 - float(torch.count_nonzero(weight)) / max(1, weight.numel())
        row = LayerReport(
            name, base_type(module).__name__, list(weight.shape), zeros, aliases=names[id(module)][1:]
        )
        found.append(Candidate(name, names[id(module)], module, row, refused=refused))
    return found


def _foreign_candidate(
    name: str, names: list[str], module: nn.Module, quantised: Foreign, precision: str
) -> Candidate:
    refused = quantised.refused
    if precision == "float32":
        refused = refused or f"quantised by {quantised.tool}: taken over with precision='int8' or 'auto'"
    zeros = 0.0
    if quantised.plain is not None:
        weight = cast(Tensor, quantised.plain.weight)
        zeros = 1.0 - float(torch.count_nonzero(weight)) / max(1, weight.numel())
    kind = f"{type(module).__name__} ({quantised.tool})"
    row = LayerReport(name, kind, [*quantised.shape], zeros, aliases=names[1:])
    return Candidate(name, names, module, row, refused=refused, foreign=quantised)


def without_kernel(model: nn.Module) -> list[str]:
    """A line for each type of module whose pruned matrices no kernel takes: their zeros save no time."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        kind = base_type(module)
        if kind in RULES or issubclass(kind, PackedModule):
            continue
        own = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        zeros = sum(p.numel() - int(torch.count_nonzero(p)) for p in own)
        if zeros >= _PRUNED * max(1, sum(p.numel() for p in own)):
            found.setdefault(kind.__name__, []).append(name or "(model)")
    return [
        f"no kernel accelerates {kind}: zeros in {listed(names)} save no time"
        for kind, names in found.items()
    ]


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def record_calls(model: nn.Module, inputs: list[Example], candidates: list[Candidate], fuse: bool) -> None:
    """Run the examples once more, and note what each layer is called with and who takes its output."""
    room = _RECORD_BYTES
    # Tensors that live get numbers; one that is made later, in the same place, another.
    serial: WeakIdKeyDictionary = WeakIdKeyDictionary()
    count = itertools.count()

    def watch(c: Candidate) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal room
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor) or x.layout != torch.strided:
                c.refused = c.refused or f"called with {type(x).__name__}, not a dense tensor"
                return
            if x.is_quantized:
                c.refused = (
                    f"called with quantised tensors ({x.dtype}), as torch's static quantisation passes them "
                    "between layers; kernels take and give floats"
                )
                return
            if c.foreign is None and casts(x, c.module):
                c.refused = (
                    "called under torch.autocast, which the model turns on itself, as transformers' Trainer "
                    "makes it with bf16=True (accelerate.utils.extract_model_from_parallel(model, "
                    "keep_fp32_wrapper=False) takes that back); kernels compute in the dtype of their input"
                )
                return
            if x not in serial:
                serial[x] = next(count)
            c.inputs.append(serial[x])
            signature = Signature(tuple(x.shape), tuple(x.stride()), x.dtype, x.device)
            c.calls[signature] = c.calls.get(signature, 0) + 1
            if signature not in c.samples and x.nbytes <= room:
                room -= x.nbytes
                c.samples[signature] = like(signature).copy_(x)

        return hook

    fusions = find_fusions(model, {id(c.module) for c in candidates}) if fuse else {}
    handles = [c.module.register_forward_pre_hook(watch(c), with_kwargs=True) for c in candidates]
    for fusion in fusions.values():
        handles += fusion.watch()
    run_hooked(model, inputs, handles)
    for c in candidates:
        proposed = fusions.get(id(c.module))
        if proposed is not None and proposed.settle():
            # What a quantised layer computes already leaves no room for more; it takes no normalisation.
            norm = any(isinstance(s.module, nn.BatchNorm2d) for s in proposed.steps)
            own = c.foreign is not None and (norm or c.foreign.activation is not None)
            c.steps = [] if own else [(s.name, s.module) for s in proposed.steps]
            c.successor = proposed.successor.name if proposed.successor else None
        c.row.calls = sum(c.calls.values())
        c.row.inputs = [list(s.shape) for s in c.calls]
    _lend_calls(model, candidates)


def _lend_calls(model: nn.Module, candidates: list[Candidate]) -> None:
    """Experts that no example reaches are taken to be called as the busiest one is: which are reached depends
    on values, and others will be."""
    known = {id(c.module): c for c in candidates}
    for module in model.modules():
        if not isinstance(module, Experts):
            continue
        for layers in (module.gate_up_proj, module.down_proj):
            mine = [known[id(layer)] for layer in layers if id(layer) in known]
            busiest = max(mine, key=lambda c: sum(math.prod(s.shape) * n for s, n in c.calls.items()))
            for c in mine:
                if not c.calls and c.refused is None:
                    c.calls, c.samples = dict(busiest.calls), busiest.samples


def casts(x: Tensor, layer: nn.Module) -> bool:
    """Whether ``torch.autocast`` changes what a Linear layer or convolution computes from `x` here."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return False
    wanted = torch.get_autocast_dtype(kind)
    return x.dtype != wanted or cast(Tensor, layer.weight).dtype != wanted


def watched_calls(
    model: nn.Module, inputs: list[Example], modules: Sequence[nn.Module]
) -> dict[int, Counter[Signature]]:
    """id of a module -> what it is called with while the examples run, and how often; none for a module that
    is called with anything but one tensor of the CPU's."""
    calls: dict[int, Counter[Signature]] = {}
    others: set[int] = set()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(x, Tensor) and x.layout == torch.strided and x.dtype in DTYPES:
            signature = Signature(tuple(x.shape), tuple(x.stride()), x.dtype, x.device)
            calls.setdefault(id(module), Counter())[signature] += 1
        else:
            others.add(id(module))

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
    run_hooked(model, inputs, handles)
    return {module: seen for module, seen in calls.items() if module not in others}


def like(s: Signature) -> Tensor:
    """An uninitialised tensor of that shape, stride and dtype; contiguous where strides overlap (expand)."""
    spans = sorted((st, sz) for sz, st in zip(s.shape, s.stride, strict=True) if sz > 1)
    reach = 1
    for stride, size in spans:
        if stride < reach:
            return torch.empty(s.shape, dtype=s.dtype, device=s.device)
        reach = stride * size
    return torch.empty_strided(s.shape, s.stride, dtype=s.dtype, device=s.device)
