"""`pared.accelerate`: measure, convert what gains, check, report."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from pared import _core
from pared._choices import Choices, Timed
from pared._fusion import activation_of, find_fusions
from pared._inputs import Difference, Example, compare, examples, forked_random, run, tolerance
from pared._report import _ATTRIBUTE, KEPT, CandidateTime, LayerReport, ModelTime, Report
from pared._select import Shortlist, facts_of
from pared._sparsity import bake, base_type, effective_weight
from pared._surgery import (
    adopt_hooks,
    copy_model,
    module_names,
    replace,
    shared_copy,
    tied_parameters,
)
from pared._target import LayerCall, Target, target_of
from pared.nn import RULES, DenseWeightError, FoldedBatchNorm2d, Fused, Linear, PackedModule
from pared.nn._attention import attend, attending, detach, pared_attention, recording, torch_attention
from pared.nn._base import off_grid, on_grid, pack
from pared.nn._foreign import Foreign, foreign, foreign_bytes
from pared.ops._estimate import Facts
from pared.ops._formats import FORMATS
from pared.ops.chain import chain_of, linear_chain
from pared.ops.int4 import Int4, int4_group
from pared.ops.int8 import QuantizedWeight
from pared.ops.packed import PackedWeight
from pared.pruning.linears import open_layers
from pared.quant.weights import quantized as quantized_weight

__all__ = ["accelerate"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A model that is this much slower than the dense one is not returned: below it, 1.0 cannot be told from
# noise.
_NEVER_SLOWER = 0.98
# Activations recorded for the error check, in bytes over all layers; shapes beyond it are checked on random
# data.
_RECORD_BYTES = 512 << 20
# Of the largest output, where max_error is not given: what 8 bits may change.
_BUDGET = {"int8": 0.1, "auto": 0.02}
# Share of zeros from which a matrix counts as pruned: an embedding's padding row does not make it so.
_PRUNED = 0.1
_LAYER_SECONDS = 0.15
# Layers are computed together when that is so many times faster.
_HAND_OVER = 1.02
_MODEL_SECONDS = 1.0


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
    exact: Variant | None = None  # what takes the place of a `variant` of 8 bits that differs too much
    refused: str | None = None  # why it is not even tried
    target: Target = field(default_factory=Target)
    four: int | None = None  # inputs that share a scale, where the layer may have 4 bits
    trial: bool = False  # that it may have them when it is quantized
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
        """From 8 bits to the best exact kernel, or to dense."""
        if self.exact is None:
            self.keep_dense(reason)
        else:
            self.choose(self.exact, f"{self.exact.speedup:.2f}x faster than dense; {reason}")

    def keep_dense(self, reason: str) -> None:
        """Give the layer up; what was measured stays in the report."""
        self.chosen = self.variant = None
        self.row.kernel = KEPT
        self.row.activation, self.row.norm = None, False
        self.row.after = self.row.before
        self.row.reason = reason


def accelerate(
    model: nn.Module,
    example_inputs: Any,
    precision: str = "float32",
    max_error: float | None = None,
    min_speedup: float = 1.05,
    *,
    formats: Sequence[str] | None = None,
    fuse: bool = True,
    progress: bool | None = None,
    cache: str | os.PathLike[str] | bool | None = None,
) -> nn.Module:
    """A copy of the model that runs packed kernels in every layer where they are measurably faster.

    Runs the example inputs, and times each ``nn.Linear`` and ``nn.Conv2d`` (dense, and the two or three
    packed formats that are estimated to be the fastest) on the shapes that it really gets, in interleaved
    rounds. What is faster by `min_speedup` is kept; a following activation is fused where the model allows
    it. Then the whole model is compared with the original, outputs and time: where the outputs differ by more
    than allowed, or the model is not faster, layers go back to dense. nn.MultiheadAttention and transformers'
    Conv1D are tried as the Linear layers that they are made of. ``print(pared.report(fast))`` says what
    was done and why, ``rich.print(pared.report(fast).candidates())`` what it was chosen from.

    Parameters
    ----------
    model : on the CPU or on one CUDA device (whose kernels take Linear layers, most of them 16-bit ones;
        times are then of CUDA graphs); pruned by any tool (true zeros, masks of ``torch.nn.utils.prune``,
        ``FakeSparsity``), or quantised by one: layers of ``torch.ao.nn.quantized.dynamic``, and Linear layers
        with torchao's int8 weights, are taken over in 8 bits, integers and scales as they are, where that is
        faster. Layers between which torch passes quantised tensors (its static quantisation) stay. It is not
        changed.
    example_inputs : a tensor, a tuple (positional arguments), a dict (keyword arguments), or a list of those
        for several shapes. Their shapes decide which kernels win.
    precision : ``"float32"``: exact kernels only, whose outputs differ by rounding. ``"int8"``, ``"auto"``:
        kernels with 8-bit weights and activations (quantized by output and by token) too, wherever they are
        faster. Where the outputs then differ by more than `max_error`, the layers whose 8 bits do most harm
        for what they gain go back to their best exact kernel, or to dense.
    max_error : largest max |new - reference| / max |reference| over the outputs, on the example inputs. None
        allows 0.1 for ``"int8"``, 0.02 for ``"auto"``, and for exact kernels
        ``8 * 2**-23 * sqrt(depth) * layers`` (depth: the longest reduction) and, for 16-bit outputs, their
        rounding.
    cache : what timing found out is kept in the process for layers and models like these, so that they are
        not timed again, and in the file that the environment variable ``PARED_CACHE`` names. A path: in that
        file instead. False: nothing is kept, and everything is timed.
    min_speedup : a layer is converted when it is this many times faster. 0 converts whatever a kernel exists
        for.
    formats : packed formats to choose from, of ``"csr"``, ``"bsr"`` (blocks of four outputs), ``"dense"``
        (packed once, where torch packs on every call), ``"bitmap"`` (few tokens) and ``"bitmap+csr"`` (both,
        by the tokens of a call), with 8 bits also ``"int8"``, ``"bitmap8"``, ``"bsr8"`` (blocks of 1x4 and
        4x4) and, for layers that `pared.quantize` has put on a grid of 4 bits, ``"int4"``; None: all that
        suit a layer's zeros and calls.
    fuse : fuse activations, fold batch normalisation into convolutions, let linear layers that follow
        each other keep the kernels' own layout between them, and compute attention modules of transformers
        (``attn_implementation="sdpa"``) with `pared.ops.attention`.
    progress : show a progress bar; None: when the work takes more than two seconds and stderr is a terminal.

    Returns
    -------
    A new model in eval mode, for inference: its parameters ask for no gradients. Threads may share it.

    Raises
    ------
    TypeError, ValueError : naming the argument; also for example inputs that the model does not run with (the
        model's own error is chained) and for weights that are not finite. Nothing has changed then.
    """
    target = _check_arguments(model, precision, max_error, min_speedup)
    formats = _check_formats(formats, precision, target.kind)
    inputs = examples(example_inputs, target.device)
    with _progress(progress) as advance, torch.no_grad(), forked_random(target.device):
        dense = copy_model(model).eval()
        advance("running the example inputs", 0.0)
        reference = [_reference(dense, e) for e in inputs]
        bake(dense)
        opened = _open(dense, inputs, reference)
        candidates = _candidates(opened.model, precision)
        _record(opened.model, inputs, candidates, fuse)
        report = Report(
            precision=precision,
            ties=tied_parameters(dense),
            trainable=[n for n, p in dense.named_parameters(remove_duplicate=False) if p.requires_grad],
            memory_before=_memory(dense),
            disk_before=_disk(dense),
            machine=target.machine(),
        )
        packed: dict[Any, PackedWeight] = {}
        timed = Choices(cache, target.machine())
        for i, c in enumerate(candidates):
            advance(f"timing {c.name or type(c.module).__name__}", 0.05 + 0.75 * i / len(candidates))
            c.four, c.target = _four(c), target
            _decide(c, packed, timed, formats, min_speedup)
        advance("checking the outputs", 0.8)
        fast = _settle(opened, inputs, reference, candidates, report, max_error)
        advance("timing the model", 0.9)
        fast = _race(
            opened,
            fast,
            inputs,
            reference,
            candidates,
            report,
            max_error,
            min(_NEVER_SLOWER, min_speedup),
            timed,
            target,
        )
        if fuse and target.kind == "cpu":
            _hand_over(fast, inputs, reference, candidates, report, timed)
            _share(fast, inputs, reference, candidates, report, timed)
            if _attend(fast, inputs, reference, candidates, report, min_speedup, timed):
                _note_times(_race_once(dense, fast, inputs, report, target), report)
        timed.save()
        report.layers = [c.row for c in candidates]
        report.notes += [*opened.notes, *_without_kernel(opened.model)]
        report.opened = {n: t for n, t in opened.types.items() if _runs_kernels(fast.get_submodule(n))}
        report.notes += _as_linears(report.opened)
        report.memory_after, report.disk_after = _memory(fast), _disk(fast)
        advance("done", 1.0)
    fast.eval().requires_grad_(False)
    setattr(fast, _ATTRIBUTE, report)
    return fast


def layer_seconds(
    model: nn.Module,
    example_inputs: Any,
    precision: str = "float32",
    formats: Sequence[str] | None = None,
    four: int | None = None,
) -> dict[str, tuple[float, float]]:
    """For each layer that a kernel may take, by name: its seconds dense in one pass over the example inputs,
    and how many times faster its best kernel is (1 where none is tried). The three input projections of an
    attention are under its name. `model` is not changed.

    `four`: try kernels of 4 bits with a scale for so many inputs, as they would be once it is quantized.
    """
    target = _check_arguments(model, precision, None, 1.0)
    inputs = examples(example_inputs, target.device)
    with torch.no_grad(), forked_random(target.device):
        dense = copy_model(model).eval()
        reference = [_reference(dense, e) for e in inputs]
        bake(dense)
        opened = _open(dense, inputs, reference)
        candidates = _candidates(opened.model, precision)
        _record(opened.model, inputs, candidates, fuse=True)
        known = _check_formats(formats, precision, target.kind)
        packed: dict[Any, PackedWeight] = {}
        timed = Choices(None, target.machine())
        found: dict[str, tuple[float, float]] = {}
        for c in candidates:
            if c.refused or _hopeless(c):
                continue
            c.four, c.trial, c.target = four, True, target
            _decide(c, packed, timed, known, 1.0)
            before = _time_layer(c, {}) if c.row.before is None else c.row.before
            found[c.name] = (before, c.row.speedup or 1.0)
        timed.save()
        for name, kind in opened.types.items():
            parts = [f"{name}.{part}" if name else part for part in ("q_proj", "k_proj", "v_proj")]
            if kind == "MultiheadAttention" and all(part in found for part in parts):
                times = [found.pop(part) for part in parts]
                before = sum(t for t, _ in times)
                found[name] = (before, before / sum(t / speedup for t, speedup in times))
    return found


def _check_arguments(model: Any, precision: Any, max_error: Any, min_speedup: Any) -> Target:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: expected an eager module, got a scripted one; accelerate it before torch.jit")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "model: expected an uncompiled module, got one from torch.compile; accelerate it before that"
        )
    if any(isinstance(m, PackedModule) for m in model.modules()):
        raise ValueError(
            "model: expected a plain model, got one with accelerated layers; pared.restore it first"
        )
    if precision not in ("float32", *_BUDGET):
        raise ValueError(f"precision: expected 'float32', 'int8' or 'auto', got {precision!r}")
    if max_error is not None and not (_is_number(max_error) and max_error >= 0):
        raise ValueError(f"max_error: expected a number of at least 0 or None, got {max_error!r}")
    if not (_is_number(min_speedup) and min_speedup >= 0):
        raise ValueError(f"min_speedup: expected a number of at least 0, got {min_speedup!r}")
    return target_of(model)


def _check_formats(formats: Any, precision: str, device: str) -> Sequence[str]:
    here = [f for f in FORMATS.values() if device in f.devices]
    known = tuple(f.name for f in here if precision != "float32" or f.precision == "float32")
    if formats is None:
        return known
    if isinstance(formats, str) or not isinstance(formats, Sequence):
        raise TypeError(f"formats: expected a list of names or None, got {formats!r}")
    for name in formats:
        if name not in known:
            raise ValueError(
                f"formats: expected names among {', '.join(known)} with precision={precision!r}, got {name!r}"
            )
    return formats


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _reference(model: nn.Module, example: Example) -> Any:
    try:
        return run(model, example)
    except Exception as e:
        raise ValueError(
            f"{example.label}: expected inputs that the model runs with, got {type(e).__name__}: {e}"
        ) from e


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


def _open(plain: nn.Module, inputs: list[Example], reference: list[Any]) -> Opened:
    model, types = open_layers(shared_copy(plain), skip=True)
    if not types:
        return Opened(plain, plain)
    kinds = " and ".join(sorted({*types.values()} - {"TransformerEncoder"}))
    note = f"no kernel is tried for {kinds}: with Linear layers instead "
    try:
        worst = _compare_all(model, inputs, reference)
    except Exception as e:  # a model's code may ask for anything that the module has
        return Opened(plain, plain, notes=[f"{note}the model raises {type(e).__name__}: {e}"])
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    allowed = tolerance(len(linears), max(m.in_features for m in linears), worst.eps)
    if not worst.relative <= allowed:
        difference = f"{worst.relative:.1e} ({worst.where}), more than {allowed:.1e}"
        return Opened(plain, plain, notes=[f"{note}outputs differ by {difference}"])
    return Opened(plain, model, types)


def _runs_kernels(module: nn.Module) -> bool:
    return any(isinstance(m, PackedModule) for m in module.modules())


def _as_linears(opened: dict[str, str]) -> list[str]:
    """A line for each type of module that was opened."""
    names: dict[str, list[str]] = {}
    for name, kind in opened.items():
        if kind != "TransformerEncoder":
            names.setdefault(kind, []).append(name or "(model)")
    return [
        f"{kind} computes with Linear layers now, which pared.restore takes back: {_listed(own)}"
        for kind, own in names.items()
    ]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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


def _candidates(model: nn.Module, precision: str) -> list[Candidate]:
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
        if weight.dtype not in _DTYPES:
            refused = f"weights of dtype {weight.dtype}; kernels take float32, bfloat16 and float16"
        zeros = 1.0 - float(torch.count_nonzero(weight)) / max(1, weight.numel())
        row = LayerReport(
            name, base_type(module).__name__, list(weight.shape), zeros, aliases=names[id(module)][1:]
        )
        found.append(Candidate(name, names[id(module)], module, row, refused=refused))
    return found


def _without_kernel(model: nn.Module) -> list[str]:
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
        f"no kernel accelerates {kind}: zeros in {_listed(names)} save no time"
        for kind, names in found.items()
    ]


def _record(model: nn.Module, inputs: list[Example], candidates: list[Candidate], fuse: bool) -> None:
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
            if x not in serial:
                serial[x] = next(count)
            c.inputs.append(serial[x])
            signature = Signature(tuple(x.shape), tuple(x.stride()), x.dtype, x.device)
            c.calls[signature] = c.calls.get(signature, 0) + 1
            if signature not in c.samples and x.nbytes <= room:
                room -= x.nbytes
                c.samples[signature] = _like(signature).copy_(x)

        return hook

    fusions = find_fusions(model, {id(c.module) for c in candidates}) if fuse else {}
    handles = [c.module.register_forward_pre_hook(watch(c), with_kwargs=True) for c in candidates]
    for fusion in fusions.values():
        handles += fusion.watch()
    try:
        for example in inputs:
            run(model, example)
    finally:
        for handle in handles:
            handle.remove()
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


def _like(s: Signature) -> Tensor:
    """An uninitialised tensor of that shape, stride and dtype; contiguous where strides overlap (expand)."""
    spans = sorted((st, sz) for sz, st in zip(s.shape, s.stride, strict=True) if sz > 1)
    reach = 1
    for stride, size in spans:
        if stride < reach:
            return torch.empty(s.shape, dtype=s.dtype, device=s.device)
        reach = stride * size
    return torch.empty_strided(s.shape, s.stride, dtype=s.dtype, device=s.device)


def _timing_input(s: Signature) -> Tensor:
    """Normal data without zeros and denormals, which slow some kernels down and speed others up."""
    generator = torch.Generator().manual_seed(len(s.shape))
    x = torch.randn(s.shape, generator=generator)
    x += torch.sign(x) * 2.0**-10 + (x == 0)
    return _like(s).copy_(x)


def _decide(
    c: Candidate,
    packed: dict[Any, PackedWeight],
    timed: Choices,
    formats: Sequence[str],
    min_speedup: float,
) -> None:
    """Find out which variant of a layer is the fastest; sets `chosen` or says why not.

    The estimates say which formats are worth timing, `timed` what is known about layers like this one. What
    has not been timed yet is packed, checked and timed; of what has, only the best variant is packed.
    """
    row = c.row
    reason = c.refused or _hopeless(c)
    if reason:
        return c.keep_dense(reason)
    facts = facts_of(cast(Tensor, c.plain.weight), getattr(c.plain, "groups", 1))
    positions = _positions(c)
    suitable = _suitable(c, facts, positions, formats, min_speedup)
    record = quantized_weight(c.module)
    if record is not None and record.bits > 8:  # that 8 are too few has been measured
        suitable = [name for name in suitable if FORMATS[name].precision == "float32"]
    if not suitable:
        return c.keep_dense(f"no kernel is faster with {100 * row.sparsity:.1f}% zeros at these shapes")
    short = c.target.shortlist(suitable, cast(Tensor, c.plain.weight), facts, positions)
    if not short.timed:
        return c.keep_dense(f"no kernel suits these zeros ({', '.join(short.passed_over.values())})")
    # Fusing saves passes over memory, but torch's own code for an activation may be faster: all are timed.
    plans = {
        _plan_text(c, plan): plan
        for plan in (Plan(name, fused) for name in short.timed for fused in range(len(c.steps) + 1))
    }
    workshop = Workshop(c, packed, {plan.precision for plan in plans.values()})
    key = _timing_key(c, facts, timed)
    known = timed.get(key)
    try:
        if known is None or not plans.keys() <= set(known.tried):
            variants = {text: v for text, plan in plans.items() if (v := workshop.make(plan)) is not None}
            if not variants:
                return c.keep_dense("8 bits are not finite in the same places")
            before = _time_layer(c, variants)
            known = Timed(c.name, before, {t: (v.after, v.speedup) for t, v in variants.items()}, [*plans])
            timed.put(key, known)
        times = {text: known.variants[text] for text in plans if text in known.variants}
        _list_candidates(c, short, plans, known)
        best, v = "", None
        while times and v is None:
            best = _best(times, plans)
            v = workshop.make(plans[best], times[best])
            if v is None:
                del times[best]  # 8 bits that another layer's inputs suit and this one's do not
        if v is None:
            return c.keep_dense("8 bits are not finite in the same places")
        row.before, row.speedup, row.error, row.bound = known.before, v.speedup, v.error, v.bound
        as_timed = "" if key is None or key in timed.here else ", as timed before"
        if known.layer != c.name:
            as_timed = f", as timed for {known.layer}"
        if v.speedup < min_speedup:
            return c.keep_dense(f"{best} is {v.speedup:.2f}x, less than {min_speedup:g}x{as_timed}")
        if v.quantized:
            exact = {t: x for t, x in times.items() if not plans[t].quantized and x[1] >= min_speedup}
            text = _best(exact, plans) if exact else None
            c.exact = workshop.make(plans[text], exact[text]) if text else None
    except UnfitError as e:
        return c.keep_dense(str(e))
    except torch.OutOfMemoryError:
        return c.keep_dense("the device has no memory left to try kernels beside the model")
    reason = f"{v.speedup:.2f}x faster than {c.foreign.tool if c.foreign else 'dense'}{as_timed}"
    if v.speedup < 1:
        reason = f"min_speedup={min_speedup:g} asks for it"
    if v.quantized:
        bits = "4-bit weights with 8-bit inputs" if v.precision == "int4" else "8 bits"
        bits = "its integers are taken over, 8-bit inputs" if c.foreign else bits
        reason += f"; {bits} change its output by {100 * v.damage:.1f}% (rms)"
    c.choose(v, reason)


class Workshop:
    """Makes the variants of one layer, each once: packed, and checked against the layer's own outputs.

    Parameters
    ----------
    packed : weights that have been packed, also by other layers.
    precisions : of the variants.
    """

    def __init__(self, c: Candidate, packed: dict[Any, PackedWeight], precisions: set[str]) -> None:
        self.c, self.packed, self.precisions = c, packed, precisions
        self.references: dict[int, list[Reference]] = {}
        self.made: dict[Plan, Variant | None] = {}

    def make(self, plan: Plan, times: tuple[float, float] | None = None) -> Variant | None:
        """The variant, with the (seconds, speed-up) that are known of it; None where there is none: a batch
        normalisation that cannot be undone, 8 bits that are not finite where the layer's outputs are.

        Raises
        ------
        UnfitError : an exact kernel, or its rounding to 8 bits, differs by more than its bound.
        """
        if plan not in self.made:
            self.made[plan] = self._make(plan)
        v = self.made[plan]
        if v is not None and times is not None:
            v.after, v.speedup = times
        return v

    def _make(self, plan: Plan) -> Variant | None:
        c = self.c
        weight = self._weight(plan.format)
        try:
            module = _convert(c, plan.format, weight, plan.fused)
            c.target.place(module)
        except ValueError:
            return None
        if plan.fused not in self.references:
            self.references[plan.fused] = _references(c, plan.fused, self.precisions)
        error, bound, damage = _layer_error(module, self.references[plan.fused], plan.precision)
        if math.isinf(error) and plan.quantized:
            return None  # a token that is not finite gives NaN in all outputs
        if math.isinf(error):
            raise UnfitError(f"{plan.format} is not finite in the same places: zeros skip inf and NaN inputs")
        if error > bound:
            raise UnfitError(f"{plan.format} differs by {error:.1e}, more than its bound {bound:.1e}")
        return Variant(module, plan.fused, error, bound, damage)

    def _weight(self, format: str) -> PackedWeight:
        c = self.c
        if c.foreign is not None:
            kind = cast(type[QuantizedWeight], FORMATS[format].weight)
            taken = ("foreign", id(c.module), format)
            if taken not in self.packed:
                self.packed[taken] = kind(torch.from_numpy(kind.from_torch(c.module).packed))
            return self.packed[taken]
        weight, groups = cast(Tensor, c.module.weight), getattr(c.module, "groups", 1)
        record = quantized_weight(c.module)
        key = (id(weight), groups, format, id(record))
        if key not in self.packed:
            try:
                if format == "int4" and c.trial:
                    return Int4.from_dense(weight, group=cast(int, c.four))
                self.packed[key] = pack(format, weight.cpu(), groups, record)
            except ValueError as e:
                raise ValueError(f"model: layer {c.name!r}: {e}") from e
        return self.packed[key]


def _best(times: dict[str, tuple[float, float]], plans: dict[str, Plan]) -> str:
    """The fastest, by (seconds, speed-up); within the noise, the one with fewer modules to call is the better
    one."""
    close = 0.98 * max(speedup for _, speedup in times.values())
    near = {text: speedup for text, (_, speedup) in times.items() if speedup >= close}
    return max(near, key=lambda text: (plans[text].fused, near[text]))


def _plan_text(c: Candidate, plan: Plan) -> str:
    norm = " + batchnorm" if c.norm(plan.fused) is not None else ""
    activation = None if plan.fused == 0 else activation_of(c.steps[plan.fused - 1][1])
    return f"{plan.format}{norm}{f' + {activation}' if activation else ''}"


def _timing_key(c: Candidate, facts: Facts, timed: Choices) -> str | None:
    """What the times of a layer's variants depend on; None where that is not known.

    Alike are layers of one geometry, called with the same inputs, whose zeros differ in number and blocks by
    no more than about 2 %: the blocks of a transformer. The whole model is timed in the end all the same.
    """
    modules = [c.module, *(m for _, m in c.steps)]
    if any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        return None
    record = quantized_weight(c.module)
    counts = (facts.nnz, facts.quads, facts.words, facts.word_quads)
    return timed.key(
        modules=[[type(m).__module__, type(m).__qualname__, m.extra_repr()] for m in modules],
        dtype=str(cast(Tensor, c.plain.weight).dtype),
        zeros=[round(50 * math.log(n)) if n else None for n in counts],
        calls=sorted([[*s.shape], [*s.stride], str(s.dtype), n] for s, n in c.calls.items()),
        fixed=record is not None and record.activation_scale is not None,
        four=c.four,
    )


def _list_candidates(c: Candidate, short: Shortlist, plans: dict[str, Plan], known: Timed) -> None:
    """Note in the report what was considered."""
    found = [CandidateTime(KEPT, None, known.before)]
    for text, plan in plans.items():
        measured = known.variants.get(text)
        found.append(
            CandidateTime(
                text,
                short.estimates.get(plan.format) if plan.fused == 0 else None,
                measured and measured[0],
                "" if measured else "not for this layer's inputs or normalisation",
            )
        )
    found += [CandidateTime(n, short.estimates.get(n), None, why) for n, why in short.passed_over.items()]
    c.row.candidates = found


def _convert(c: Candidate, format: str, weight: PackedWeight, fused: int) -> PackedModule:
    """The accelerated layer with the first `fused` steps in it."""
    norm = c.norm(fused)
    activation = None if fused == 0 else activation_of(c.steps[fused - 1][1])
    if c.foreign is not None:
        activation = activation or c.foreign.activation
    rule = RULES[type(c.plain)]
    if norm is None:
        return rule.module.from_module(c.plain, format=format, activation=activation, weight=weight)
    return rule.module.from_module(c.module, format=format, activation=activation, norm=norm)


def _hopeless(c: Candidate) -> str | None:
    """A reason to keep the layer that no kernel can change."""
    if not c.calls:
        return "not called with the example inputs"
    for s in c.calls:
        if s.dtype not in _DTYPES:
            return f"called with {s.dtype}; kernels take float32, bfloat16 and float16"
    if min(c.row.shape) == 0 or not any(math.prod(s.shape) for s in c.calls):
        return "nothing to compute"
    return None


def _positions(c: Candidate) -> dict[int, int]:
    """Output positions of a call -> calls with so many."""
    found: dict[int, int] = {}
    for s, count in c.calls.items():
        if isinstance(c.plain, nn.Conv2d):
            image = [-(-size // step) for size, step in zip(s.shape[-2:], c.plain.stride, strict=True)]
            n = math.prod(image) * (s.shape[0] if len(s.shape) == 4 else 1)
        else:
            n = math.prod(s.shape[:-1])
        found[n] = found.get(n, 0) + count
    return found


def _suitable(
    c: Candidate, facts: Facts, positions: dict[int, int], formats: Sequence[str], min_speedup: float
) -> list[str]:
    """The formats that may beat torch; all that exist when everything is to be converted."""
    known = [name for name in RULES[type(c.plain)].formats if name in formats]
    if c.foreign is not None:
        known = [name for name in known if FORMATS[name].precision == "int8"]
    if c.four is None:
        known = [name for name in known if FORMATS[name].precision != "int4"]
    if min_speedup == 0:
        return known
    density, quad_density = 1.0 - c.row.sparsity, min(1.0, 4 * facts.quads / max(1, facts.cells))
    dtype = cast(Tensor, c.plain.weight).dtype
    return [n for n in known if c.target.suits(n, density, quad_density, positions, dtype)]


@dataclass(frozen=True)
class Reference:
    """What a layer has to compute for one input, and how far from it a kernel may be."""

    x: Tensor
    output: Tensor
    bound: Tensor
    rounding: dict[str, Tensor]  # what rounding weights and inputs may add to the bound, by precision


def _references(c: Candidate, fused: int, precisions: set[str]) -> list[Reference]:
    """For each recorded input, what the layer and the steps to be fused into it give, in float32.

    Two float32 sums of the same K products in different orders differ by at most ``K * eps * S`` with S the
    sum of the products' magnitudes; an activation's slope is at most 1.13, and its own evaluation and the
    output's rounding add a few ulps. With 8 bits every weight is off by up to s_w / 2 and every input by up
    to s_x / 2, where s is the largest magnitude of the output's weights or the token's inputs over 127; with
    4 bits, and of a layer that another tool quantised, the weights are those of their grid.
    """
    eps = torch.finfo(torch.float32).eps
    whole = all(p.dtype == torch.float32 for p in c.plain.parameters())
    plain = c.plain if whole else copy_model(c.plain).float()
    # forward(), not a call: hooks that the user put on the layer are not asked.
    magnitude = shared_copy(plain)
    for name, p in plain.named_parameters():
        magnitude._parameters[name] = nn.Parameter(p.abs(), requires_grad=False)
    steps = [copy_model(m).float() for _, m in c.steps[:fused]]
    if c.foreign is not None and c.foreign.activation:
        steps.insert(0, nn.ReLU())
    depth = math.prod(c.row.shape[1:])
    found = []
    for s in c.calls:
        sample = c.samples.get(s)
        x = _timing_input(s) if sample is None else sample
        y, size = plain.forward(x.float()), magnitude.forward(x.float().abs())
        for step in steps:
            y, size = step(y), _magnitude(step, size)
        narrow = 0.0 if s.dtype == torch.float32 else torch.finfo(s.dtype).eps
        bound = 1.13 * (depth + 8) * eps * size + narrow * y.abs() + 1e-30
        if c.target.kind == "cuda":  # 8-bit weights are 16-bit ones for many tokens, with their scales
            bound += narrow * size
        rounding = {}
        for precision in precisions - {"float32"}:
            moved = _rounding(c, plain, magnitude, x.float(), precision)
            for step in steps:
                moved = moved * _scale(step)
            rounding[precision] = 1.14 * moved + 2.0**-90
        found.append(Reference(x, y, bound, rounding))
    return found


def _rounding(c: Candidate, plain: nn.Module, magnitude: nn.Module, x: Tensor, precision: str) -> Tensor:
    """How far a layer's outputs may move with weights and inputs on grids: per output, half a step of each
    weight times its input's magnitude, and of each input (a scale a token, or an image) times its weight's.
    """
    weight = cast(Tensor, plain.weight).abs().flatten(1)
    step = weight.amax(1) / (254 if c.foreign is None else math.inf)
    depth, u = weight.shape[1], x.abs()
    if isinstance(plain, nn.Linear):
        half = u.amax(-1, keepdim=True) / 254 if x.numel() else u.sum(-1, keepdim=True)
        half = torch.maximum(half, _static_error(c.module, x))
        if precision == "int4":
            steps = _steps_of_four(c, weight)
            grouped: Tensor = half * (weight + steps).sum(1) + nn.functional.linear(u, steps)
            return grouped
        linear: Tensor = half * weight.sum(1) + step * u.sum(-1, keepdim=True) + depth * half * step
        return linear
    half = u.amax((-3, -2, -1), keepdim=True) / 254
    ones = copy_model(magnitude)
    cast(Tensor, ones.weight).fill_(1)
    if ones.bias is not None:
        cast(Tensor, ones.bias).zero_()
    total, step = (t.reshape(-1, 1, 1) for t in (weight.sum(1), step))
    rounding: Tensor = half * total + step * ones.forward(u) + depth * half * step
    return rounding


def _four(c: Candidate) -> int | None:
    """Inputs that share a scale where `pared.quantize` has put the layer on a grid of at most 4 bits, and it
    is still there."""
    record = quantized_weight(c.module)
    if record is None or not isinstance(c.module, nn.Linear):
        return None
    four = int4_group(record.bits, record.symmetric, record.group, record.activation_scale)
    return None if four is None or on_grid(c.module.weight, record) is None else four


def _steps_of_four(c: Candidate, weight: Tensor) -> Tensor:
    """By weight (here without signs), how far 4 bits may move it: hardly, from a grid that is taken over."""
    record = quantized_weight(c.module)
    group = c.four or weight.shape[1]
    if record is not None and not c.trial:
        steps = off_grid(record.bits) * record.scale
        group = record.group or weight.shape[1]
    else:
        padded = nn.functional.pad(weight, (0, -weight.shape[1] % group))
        steps = padded.reshape(weight.shape[0], -1, group).amax(2) / 14
    return steps.repeat_interleave(group, 1)[:, : weight.shape[1]]


def _scale(step: nn.Module) -> Tensor | float:
    """What a step multiplies each channel with."""
    if not isinstance(step, nn.BatchNorm2d):
        return 1.0
    assert step.running_var is not None  # can_fold has looked
    scale = torch.rsqrt(step.running_var + step.eps)
    return (scale if step.weight is None else scale * step.weight.abs()).reshape(-1, 1, 1)


def _static_error(module: nn.Module, x: Tensor) -> Tensor:
    """By token, how far a fixed grid is from its inputs, where `pared.quantize` gave the layer one."""
    record = quantized_weight(module)
    if record is None or record.activation_scale is None:
        return x.new_zeros(())
    low, high = (-128, 127) if record.activation_dtype == "int8" else (0, 255)
    scale, zero = record.activation_scale, record.activation_zero
    q = (torch.round(x / scale) + zero).clamp(low, high)
    # A whole step more: the kernel multiplies with 1 / scale, and rounds the other way close to a half.
    return (x - (q - zero) * scale).abs().amax(-1, keepdim=True) + scale


def _layer_error(
    module: PackedModule, references: list[Reference], precision: str
) -> tuple[float, float, float]:
    """|new - dense| and its bound at the output where the first is the largest share of the second; and the
    root mean square of new - dense relative to that of dense."""
    worst = (0.0, 0.0)
    squares = [0.0, 0.0]
    for r in references:
        new = module(r.x).float()
        finite = r.output.isfinite()
        if not torch.equal(finite, new.isfinite()):
            return math.inf, 0.0, 0.0
        if not finite.any():
            continue
        bound = r.bound + r.rounding.get(precision, 0.0)
        difference = (new - r.output).abs()
        at = torch.where(finite, difference / bound, 0.0).argmax()
        error, limit = float(difference.flatten()[at]), float(bound.flatten()[at])
        if error > limit:
            return error, limit, 0.0
        worst = max(worst, (error, limit))
        if precision != "float32":
            for i, t in enumerate((difference, r.output)):
                squares[i] += float(t[finite].double().square().sum())
    return (*worst, math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0)


def _magnitude(step: nn.Module, size: Tensor) -> Tensor:
    """How large the terms are that make up the output of a step, given its input's."""
    if not isinstance(step, nn.BatchNorm2d):
        return size
    assert step.running_mean is not None  # can_fold has looked
    assert step.running_var is not None
    scale = torch.rsqrt(step.running_var + step.eps)
    shift = scale.new_zeros(scale.shape)
    if step.weight is not None:
        scale, shift = scale * step.weight.abs(), step.bias.abs()
    channel = (-1, 1, 1)
    return (size + step.running_mean.abs().reshape(channel)) * scale.reshape(channel) + shift.reshape(channel)


def _time_layer(c: Candidate, variants: dict[str, Variant]) -> float:
    """Time the variants; returns the dense layer's seconds. All sums are over the calls that one pass makes.

    The time of what can be fused is part of every variant.
    """
    before = 0.0
    scaled = dict.fromkeys(variants, 0.0)  # dense time over the ratio: a disturbed median does not tilt it
    for s, count in c.calls.items():
        x = _timing_input(s)
        steps = [m for _, m in c.steps]
        calls = {"dense": LayerCall(c.module, x, steps)}
        for name, v in variants.items():
            calls[name] = LayerCall(v.module, x, steps[v.fused :])
        t = c.target.time_layers(calls, _LAYER_SECONDS * len(variants) / len(c.calls))
        before += count * t.median("dense")
        for name, v in variants.items():
            v.after += count * t.median(name)
            scaled[name] += count * t.median("dense") / t.speedup(name, "dense").value
    for name, v in variants.items():
        v.speedup = before / scaled[name]
    return before


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
        if not _runs_kernels(module):
            original = dense.plain.get_submodule(name)
            fast = replace(fast, [name], closed.setdefault(id(original), shared_copy(original)))
    return fast


def _settle(
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
            worst = _compare_all(fast, inputs, reference)
        except DenseWeightError as e:
            for c in active:
                if c.chosen is e.layer:
                    c.keep_dense("the model computes with its .weight")
            continue
        quantized = [c for c in active if c.variant is not None and c.variant.quantized]
        if max_error is not None:
            allowed = max_error
        elif quantized:
            allowed = _BUDGET[report.precision]
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
    """Take as few layers out of 8 bits as bring the outputs within `allowed`, given that all are too many.

    In the order of harm for gain: the squared relative error of a layer's output, which adds up over the
    layers, by the time that its 8 bits save. How many may stay is found by bisection.
    """

    def price(c: Candidate) -> float:
        v = cast(Variant, c.variant)
        other = c.exact.after if c.exact is not None else c.row.before or 0.0
        return v.damage**2 / max(other - v.after, 1e-9)

    order = sorted(quantized, key=price)
    first = [(c.variant, c.row.reason) for c in order]
    low, high = 0, len(order)  # `low` layers are few enough (or none), `high` too many
    while high - low > 1:
        middle = (low + high) // 2
        for c in order[middle:]:
            c.retreat("")
        if _compare_all(_build(dense, candidates), inputs, reference).relative <= allowed:
            low = middle
        else:
            high = middle
        for c, (v, reason) in zip(order, first, strict=True):
            c.choose(cast(Variant, v), reason)
    for c, (v, _) in list(zip(order, first, strict=True))[low:]:
        format, speedup = cast(Variant, v).module.format, cast(Variant, v).speedup
        c.retreat(f"{format} is {speedup:.2f}x, but with it outputs would differ by more than {allowed:g}")


def _compare_all(fast: nn.Module, inputs: list[Example], reference: list[Any]) -> Difference:
    differences = [compare(r, run(fast, e)) for r, e in zip(reference, inputs, strict=True)]
    return max(differences, key=lambda d: d.relative)


def _race(
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
            known = _race_once(dense.plain, fast, inputs, report, target)
            timed.put(key, known)
        _note_times(known, report)
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
            fast = _settle(dense, inputs, reference, candidates, report, max_error)
    report.dense = report.fast = None
    report.speedup = 1.0
    return fast


def _race_once(
    dense: nn.Module, fast: nn.Module, inputs: list[Example], report: Report, target: Target
) -> Timed:
    passes = {"dense": _pass(dense, inputs), "pared": _pass(fast, inputs)}
    t, remark = target.time_models(passes, _MODEL_SECONDS)
    if remark:
        report.notes.append(remark)
    times = {
        "median": (t.median("pared"), t.speedup("pared", "dense").value),
        "p95": (t.p95("pared"), t.p95("dense")),
    }
    return Timed("model", t.median("dense"), times)


def _note_times(known: Timed, report: Report) -> None:
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
    examples = [_described([e.args, e.kwargs]) for e in inputs]
    text = json.dumps([structure, dtypes, layers, examples], sort_keys=True)
    return timed.key(model=hashlib.sha256(text.encode()).hexdigest())


def _described(value: Any) -> str:
    """Inputs as far as their times depend on them: shapes of tensors, other values as they are."""

    def leaf(x: Any) -> Any:
        return f"{list(x.shape)} {x.stride()} {x.dtype}" if isinstance(x, Tensor) else x

    return repr(torch.utils._pytree.tree_map(leaf, value))


def _hand_over(
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
        known = timed.get(key)
        if known is None:
            gain = _time_hand_over(layers, c.calls)
            known = Timed(c.name, max(gain, 1e-9))
            timed.put(key, known)
        gain = known.before
        if gain < _HAND_OVER:
            continue
        layers[0].hand_to(*layers[1:])
        heads.append(layers[0])
        c.row.reason += f"; hands over to {', '.join(r.name for r in run[1:])}: {gain:.2f}x"
        for r in run[1:]:
            r.row.reason += f"; computed with {c.name}"
    if heads and _compare_all(fast, inputs, reference).relative > report.tolerance:
        for head in heads:
            head.hand_to()
        for c in candidates:
            c.row.reason = rows[c.name]


def _chain_key(layers: list[Linear], c: Candidate, timed: Choices) -> str:
    """What the gain of a hand-over depends on; the number stands where seconds do."""
    return timed.key(
        chain=[[m.format, m.activation, m.in_features, m.out_features, m.bias is not None] for m in layers],
        zeros=[round(50 * math.log(max(1, m.packed_weight().nnz))) for m in layers],
        calls=sorted([[*s.shape], [*s.stride], str(s.dtype), n] for s, n in c.calls.items()),
    )


def _successor(c: Candidate, by_name: dict[str, Candidate]) -> Candidate | None:
    """The layer that may take the panel of `c`."""
    after = None if c.successor is None else by_name.get(c.successor)
    fits = after is not None and c.fused == len(c.steps) and len(c.names) == len(after.names) == 1
    both = (c.chosen, after.chosen) if after is not None and fits else ()
    linear = [m.packed_weight() for m in both if isinstance(m, Linear)]
    return after if len(linear) == 2 and chain_of(linear) is not None else None


def _time_hand_over(layers: list[Linear], calls: dict[Signature, int]) -> float:
    """How many times faster one call is than a call a layer, over all the calls of the first."""
    weights, biases = [m.packed_weight() for m in layers], [m.bias for m in layers]
    activations = [m.activation for m in layers]

    def apart(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    def handed(x: Tensor) -> object:
        return linear_chain(x, weights, biases, activations)

    return _gain(calls, apart, handed)


def _gain(
    calls: dict[Signature, int], apart: Callable[[Tensor], object], together: Callable[[Tensor], object]
) -> float:
    """How many times faster one way is than the other, over all the calls, in the same rounds."""
    work: dict[str, Callable[[], object]] = {}
    for i, s in enumerate(calls):
        x = _timing_input(s)
        work[f"apart {i}"], work[f"together {i}"] = partial(apart, x), partial(together, x)
    t = Target().time(work, budget=_LAYER_SECONDS, min_rounds=5, max_rounds=200, precision=0.01)
    first, second = (
        sum(n * t.median(f"{way} {i}") for i, n in enumerate(calls.values())) for way in ("apart", "together")
    )
    return first / second


@dataclass
class AttentionCalls:
    """What an attention module is called with: how often, by everything that the time depends on."""

    arguments: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, *arguments: Any) -> None:
        key = _described(arguments)
        self.counts[key] = self.counts.get(key, 0) + 1
        if key not in self.arguments:
            # Strides and what a mask hides are kept, and so is nothing of the model.
            self.arguments[key] = tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)


def _attend(
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
    calls: dict[int, AttentionCalls] = {}

    def note(module: nn.Module, *arguments: Any) -> None:
        calls.setdefault(id(module), AttentionCalls()).add(*arguments)

    with recording(note):
        worst = _compare_all(fast, inputs, reference)
    before = after = 0.0
    kept = 0
    depth = 1
    for module in sites.values():
        seen = calls.get(id(module), AttentionCalls())
        times = [_time_attention(module, a, key, timed) for key, a in seen.arguments.items()]
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
    worst = _compare_all(fast, inputs, reference)
    if worst.relative > allowed:
        for module in sites.values():
            detach(module)
        report.notes.append(f"attention stays torch's: outputs would differ by {worst.relative:.1e}")
        return False
    report.error, report.relative_error, report.tolerance = worst.absolute, worst.relative, allowed
    report.notes.append(
        f"{kept} attention module(s) run pared's kernel, {before / after:.2f}x faster than torch's: "
        f"{before * 1e3:.3g} ms -> {after * 1e3:.3g} ms"
    )
    return True


def _time_attention(
    module: nn.Module, arguments: tuple[Any, ...], described: str, timed: Choices
) -> tuple[float, float]:
    """Seconds of one call: of torch's attention as transformers calls it, and of pared's."""
    key = timed.key(attention=described, groups=getattr(module, "num_key_value_groups", 1))
    known = timed.get(key)
    if known is None:
        q, k, v, mask, scale, causal = arguments
        options = {"scaling": scale, "is_causal": causal}
        t = Target().time(
            {
                "dense": lambda: torch_attention(module, q, k, v, mask, **options),
                "pared": lambda: pared_attention(module, q, k, v, mask, **options),
            },
            budget=_LAYER_SECONDS,
            min_rounds=5,
            max_rounds=200,
            precision=0.02,
        )
        known = Timed("attention", t.median("dense"), {"pared": (t.median("pared"), 1.0)})
        timed.put(key, known)
    return known.before, known.variants["pared"][0]


def _share(
    fast: nn.Module,
    inputs: list[Example],
    reference: list[Any],
    candidates: list[Candidate],
    report: Report,
    timed: Choices,
) -> None:
    """Quantize an input once for all the layers that take it, where that is measurably faster."""
    groups: dict[tuple[int, ...], list[Candidate]] = {}
    for c in candidates:
        m = c.chosen
        alone = isinstance(m, Linear) and not m._handed and m._fed_by is None and len(c.names) == 1
        if alone and c.inputs and m is not None and m.format == "bsr8":
            groups.setdefault(tuple(c.inputs), []).append(c)
    heads: list[Linear] = []
    rows = {c.name: c.row.reason for c in candidates}
    for group in groups.values():
        first = group[0]
        layers = [cast(Linear, c.chosen) for c in group]
        alike = [_core.bsr8_shares(layers[0].packed, m.packed) for m in layers]
        if len(group) < 2 or not all(alike):
            continue
        key = timed.key(shared=_chain_key(layers, first, timed))
        known = timed.get(key)
        if known is None:
            known = Timed(first.name, max(_time_sharing(layers, first.calls), 1e-9))
            timed.put(key, known)
        if known.before < _HAND_OVER:
            continue
        layers[0].share_with(*layers[1:])
        heads.append(layers[0])
        first.row.reason += f"; computes {', '.join(c.name for c in group[1:])} too: {known.before:.2f}x"
        for c in group[1:]:
            c.row.reason += f"; computed with {first.name}"
    if heads and _compare_all(fast, inputs, reference).relative > report.tolerance:
        for head in heads:
            head.share_with()
        for c in candidates:
            c.row.reason = rows[c.name]


def _time_sharing(layers: list[Linear], calls: dict[Signature, int]) -> float:
    """How many times faster layers are that share their input, over all the calls of the first."""

    twins = [copy.copy(m) for m in layers]
    twins[0].share_with(*twins[1:])

    def run(these: list[Linear], x: Tensor) -> None:
        for layer in these:
            layer(x)

    return _gain(calls, partial(run, layers), partial(run, twins))


def _pass(model: nn.Module, inputs: list[Example]) -> Callable[[], None]:
    mine = [e.clone() for e in inputs]  # a model may write to its inputs

    def call() -> None:
        for e in mine:
            model(*e.args, **e.kwargs)

    return call


def _memory(model: nn.Module) -> int:
    """Bytes of the storages behind parameters and buffers, each counted once; of layers on a device the
    weights there, not the copies that stay in the CPU's memory."""
    storages: dict[int, int] = {}
    moved = [m for m in model.modules() if isinstance(m, PackedModule) and m._on_device is not None]
    apart = {id(m.packed) for m in moved}
    for whole in [*model.parameters(), *(b for b in model.buffers() if id(b) not in apart)]:
        inner: list[str] = whole.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(whole) else []
        for t in [getattr(whole, name) for name in inner] or [whole]:
            if t.layout == torch.strided:
                s = t.untyped_storage()
                storages[s.data_ptr()] = s.nbytes()
    on_device = sum(m._on_device.nbytes for m in moved if m._on_device is not None)
    return sum(storages.values()) + on_device + sum(foreign_bytes(m) for m in model.modules())


class _Counter:
    """A file that only counts what is written."""

    size = 0

    def flush(self) -> None:
        pass

    def write(self, data: Any) -> int:
        n = len(memoryview(data).cast("B"))
        self.size += n
        return n


def _disk(model: nn.Module) -> int:
    """Bytes of the state dict as torch.save writes it."""
    counter = _Counter()
    torch.save(model.state_dict(), cast(IO[bytes], counter))
    return counter.size


@contextmanager
def _progress(show: bool | None) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr that appears once the work has taken two seconds."""
    console = Console(stderr=True, force_terminal=show)
    if show is False or (show is None and not console.is_terminal):
        yield lambda text, share: None
        return
    bar = Progress(
        TextColumn("pared"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    )
    task = bar.add_task("", total=1.0)
    begin = time.monotonic()

    def advance(text: str, share: float) -> None:
        bar.update(task, description=text, completed=share)
        if not bar.live.is_started and (show or time.monotonic() - begin > 2.0):
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
