"""`pared.quantize`: weights onto integer grids, layer by layer, with what `accelerate` needs to realise
it.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pared._checkpoint import Item
from pared._errors import check_choice, check_count, check_flag, check_number, check_path
from pared._sparsity import weight_format
from pared.ops import Int8
from pared.ops.int4 import int4_group
from pared.pruning import calibration, obs, reconstruct
from pared.pruning.calibration import LossFn, Observer, check_loss_fn, columns
from pared.pruning.distributed import Processes
from pared.pruning.masks import check_finite, check_writable
from pared.pruning.oneshot import check_sparsity
from pared.pruning.patterns import Pattern, parse_pattern
from pared.pruning.targets import Filters, Target, _matchers, collect, unwrap
from pared.quant.grid import METHODS, GridRounding, QuantizedWeight, check_bits, fit
from pared.quant.observers import OBSERVERS, ActivationGrid, InputRange
from pared.quant.report import QuantLayer, QuantReport

__all__ = ["int8_weight", "quantize", "quantized", "simulate"]

_RECORD = "_pared_quantized"
# What "auto" chooses from.
AUTO = (4, 8, 16)
# Which argument of its layer a weight is multiplied with, where it is not the first one's only weight.
_ARGUMENTS = {"q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}
# Within so much of the faster one, the narrower width is taken.
_AS_FAST = 1.02


def quantized(module: nn.Module, parameter: str | None = None) -> QuantizedWeight | None:
    """What `pared.quantize` left on a layer.

    Parameters
    ----------
    module : the layer.
    parameter : which of its weights, for a layer with several, as nn.MultiheadAttention with `kdim` is.

    Returns
    -------
    Bits, scales and zero points; None where the layer has not been quantized, and for several weights
    without `parameter`.

    Raises
    ------
    TypeError, ValueError : not a module; no such attribute.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch module, got {module!r:.60}")
    if parameter is not None and not (isinstance(parameter, str) and hasattr(module, parameter)):
        raise ValueError(f"parameter: expected the name of one of the module's own, got {parameter!r}")
    records = _records(module)
    if parameter is not None:
        return records.get(parameter)
    return next(iter(records.values())) if len(records) == 1 else None


def _records(module: nn.Module) -> dict[str, QuantizedWeight]:
    """By the weight's name in the layer."""
    records: dict[str, QuantizedWeight] = module.__dict__.get(_RECORD, {})
    return records


def _put(module: nn.Module, parameter: str, record: QuantizedWeight) -> None:
    module.__dict__[_RECORD] = _records(module) | {parameter: record}


def pass_on(old: nn.Module, new: nn.Module, rows: slice = slice(None), parameter: str | None = None) -> None:
    """Give a layer that takes the place of `old`, or of a part of it, what `quantize` left on that part."""
    record = quantized(old, parameter)
    if record is not None:
        _put(new, "weight", dataclasses.replace(record, scale=record.scale[rows], zero=record.zero[rows]))


def _to_item(record: QuantizedWeight) -> Item:
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return Item(values, {name: values.pop(name) for name in ("scale", "zero")})


def _from_item(item: Item) -> QuantizedWeight:
    fields: dict[str, Any] = {**item.values, **item.tensors}
    return QuantizedWeight(**fields)


def take_records(model: nn.Module) -> Item:
    """What `quantize` left on the model's layers, by their names, for a checkpoint."""
    items = {
        f"{name}:{parameter}": _to_item(record)
        for name, module in model.named_modules()
        for parameter, record in _records(module).items()
    }
    tensors = {f"{name}/{k}": t for name, item in items.items() for k, t in item.tensors.items()}
    return Item({name: item.values for name, item in items.items()}, tensors)


def put_records(model: nn.Module, kept: Item) -> None:
    """Put back what `take_records` gave."""
    for name, values in kept.values.items():
        tensors = {k: kept.tensors[f"{name}/{k}"] for k in ("scale", "zero")}
        module, _, parameter = name.rpartition(":")
        _put(model.get_submodule(module), parameter, _from_item(Item(values, tensors)))


def int8_weight(layer: nn.Linear) -> Int8:
    """The packed int8 weight of a quantised Linear layer: its own codes and scales, nothing is rounded again.

    Parameters
    ----------
    layer : an ``nn.Linear`` of [out, in] after `pared.quantize`.

    Returns
    -------
    The weight, [out, in], for `pared.ops.linear`; with the layer's static activation grid where it has one.

    Raises
    ------
    TypeError : not an ``nn.Linear``.
    ValueError : the layer is not on a symmetric grid of at most 8 bits with one scale a row.
    """
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"layer: expected an nn.Linear, got {layer!r:.60}")
    record = quantized(layer)
    if record is None or record.bits > 8 or not record.symmetric or record.group is not None:
        raise ValueError(
            "layer: expected one that quantize has put on a symmetric grid of at most 8 bits with one "
            "scale a row, "
            f"got {'none' if record is None else record}"
        )
    weight = layer.weight.detach()
    return Int8.from_quantized(
        record.codes(weight),
        record.scale.reshape(-1).cpu(),
        activation_scale=record.activation_scale,
        activation_zero=record.activation_zero,
        activation_dtype=record.activation_dtype,
    )


def quantize(
    model: nn.Module,
    data: Iterable[Any],
    *,
    bits: int | str | Mapping[str, int] = "auto",
    method: str = "gptq",
    sparsity: float | None = None,
    pattern: str = "unstructured",
    symmetric: bool = True,
    group: int | None = None,
    scales: str | None = None,
    activations: str = "token",
    observer: str = "mse",
    bias_correction: bool = False,
    max_error: float = 0.01,
    example_inputs: Any = None,
    damping: float = 0.01,
    loss_fn: LossFn | None = None,
    include: Filters = None,
    exclude: Filters = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> QuantReport:
    """Put a model's weights onto integer grids, in place, so that each layer's outputs stay.

    The weights are then floating-point numbers that lie on their grids; what the grids are stays with the
    layers (`pared.quant.quantized`), for `pared.accelerate` to realise without a second calibration. A width
    without a kernel is stored and is not promised to be faster.

    Parameters
    ----------
    model : as in `pared.prune`; embeddings need an include filter of their own.
    data : batches that can be gone through several times, as in `pared.prune`.
    bits : 2 to 16; a mapping from filters (globs over names) to bits, the first match counts and what none
        matches stays as it is; or "auto": for each layer 4, 8 or 16, of those whose measured error is at most
        `max_error` the one whose kernels are measured to be the fastest (with `example_inputs`), and of
        equally fast ones (without: of all) the narrowest; the most exact where none is good enough.
    method : "gptq", columns from left to right, errors made up by those to the right (arXiv 2210.17323); or
        "rtn", each weight to its nearest.
    sparsity, pattern : prune in the same pass, SparseGPT and GPTQ together. Weights that are zero already
        stay exactly zero, with every method.
    symmetric, group : a grid with or without a zero point; columns that share a scale (a divisor of 128),
        None for one scale a row.
    scales : "minmax", of the whole range; "mse", of the part with the least squared error. None: min-max from
        8 bits on, else mse.
    activations : "token", inputs are quantised as they come; "static", by one scale and zero point a layer,
        which `observer` takes from the data: "minmax", "percentile", "mse" or "kl" (arXiv 1810.05723).
    bias_correction : add ``(W - W_q) E[x]`` to the biases, so that mean outputs stay.
    max_error : relative output error that "auto" accepts, ``|y - y_q| / |y|``.
    example_inputs : as in `pared.accelerate`, for "auto": each layer is timed on these with the kernels of
        each width, on this machine. 16 bits have none of their own: they run as floating-point numbers.
    damping, resume, progress : as in `pared.pruning.SparseGPT`.
    loss_fn, include, exclude : as in `pared.prune`.

    Returns
    -------
    QuantReport : per layer bits, zeros, relative output error on the data, and the input's grid.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came. The model is then untouched.
    """
    module = unwrap(model)
    chosen, parsed, target_sparsity = _check(
        bits, method, sparsity, pattern, group, scales, activations, observer
    )
    for name, flag in (
        ("symmetric", symmetric),
        ("bias_correction", bias_correction),
        ("progress", progress),
    ):
        check_flag(name, flag)
    max_error, damping = check_number("max_error", max_error), check_number("damping", damping)
    group = None if group is None else int(group)
    check_loss_fn(loss_fn)
    if resume is not None:
        check_path("resume", resume, "or None")
    targets, kept = collect(module, include, exclude, 0, 0)
    assigned = _assign(module, targets, chosen)
    seconds: dict[str, dict[int, float]] = {}
    if chosen == "auto" and example_inputs is not None:
        four = int4_group(4, symmetric, group, None if activations == "token" else 1.0)
        seconds = _time_widths(module, targets, example_inputs, four)
        assigned = {name: _by_time(widths, seconds.get(name, {})) for name, widths in assigned.items()}
    kept += [(t.name, "no filter in bits matches") for t in targets if t.name not in assigned]
    targets = [t for t in targets if t.name in assigned]
    for target in targets:
        check_writable(target)
        check_finite(target, target.weight)
        if any(weight_format(m, p) != "plain" for m, p in target.places):
            raise ValueError(
                f"model: expected plain weights, which quantisation rewrites, got masks of another tool on "
                f"{target.name!r}; make them permanent first, for example with pared.prune(model, 0.0)"
            )
    reconstruct.check_repeatable(data, "'quantize'")
    ranges: dict[str, Observer] = {t.name: InputRange(t) for t in targets}
    means: dict[str, Observer] = {t.name: InputMean(t) for t in targets} if bias_correction else {}
    calibration.collect(module, targets, ranges, data, loss_fn, "'quantize'")
    if means:
        calibration.collect(module, targets, means, data, loss_fn, "'quantize'")

    settled: dict[str, tuple[QuantizedWeight, dict[int, float]]] = {}
    before = {t.name: t.weight.clone() for t in targets} if bias_correction else {}

    def settle(target: Target, hessians: list[torch.Tensor]) -> torch.Tensor:
        new, record, errors = _settle(
            target,
            hessians,
            assigned[target.name],
            sweep=method == "gptq" or target_sparsity is not None,
            sparsity=target_sparsity,
            pattern=parsed,
            symmetric=symmetric,
            group=group,
            scales=scales,
            max_error=max_error,
            damping=damping,
        )
        seen = ranges[target.name].result()
        if activations == "static":
            grid = seen.grid(observer, symmetric=False)
            record = _with_input(record, grid)
        settled[target.name] = record, errors
        return new

    def save(target: Target) -> Item:
        record, errors = settled[target.name]
        item = _to_item(record)
        return Item({"record": item.values, "errors": [*errors.items()]}, item.tensors)

    def load(target: Target, item: Item) -> None:
        record = _from_item(Item(item.values["record"], item.tensors))
        settled[target.name] = record, {int(bits): error for bits, error in item.values["errors"]}

    reconstruct.walk(
        module,
        targets,
        settle,
        data,
        loss_fn,
        why="'quantize'",
        settings={
            "method": method,
            "sparsity": target_sparsity,
            "pattern": str(parsed),
            "grid": [symmetric, group, scales, activations, observer],
            "max_error": max_error,
            "damping": damping,
            "bits": {name: sorted(widths) for name, widths in assigned.items()},
        },
        resume=resume,
        extra=reconstruct.Extra(save, load),
        progress=progress,
    )
    layers = []
    for target in targets:
        record, errors = settled[target.name]
        for owner, parameter in target.places:
            _put(owner, parameter, record)
        if target.name in before:
            _correct_bias(target, before[target.name], means[target.name].result())
        layers.append(
            _layer_report(target, record, errors, seconds.get(target.name, {}), ranges[target.name].result())
        )
    return QuantReport(method, observer if activations == "static" else None, tuple(layers), tuple(kept))


def _check(
    bits: object,
    method: object,
    sparsity: object,
    pattern: object,
    group: object,
    scales: object,
    activations: object,
    observer: object,
) -> tuple[int | str | dict[str, int], Pattern, float | None]:
    check_choice("method", method, ("gptq", "rtn"))
    if scales is not None:
        check_choice("scales", scales, METHODS, "None")
    check_choice("activations", activations, ("token", "static"))
    check_choice("observer", observer, OBSERVERS)
    if group is not None and obs.SPAN % check_count("group", group, "columns, or None,"):
        raise ValueError(f"group: expected a divisor of {obs.SPAN} or None, got {group}")
    parsed = parse_pattern(pattern)
    target = None if sparsity is None and parsed.kind != "nm" else check_sparsity(sparsity, parsed)
    if isinstance(bits, Mapping):
        if not bits:
            raise ValueError("bits: expected at least one filter, got an empty mapping")
        return {str(k): check_bits(v, f"bits[{k!r}]") for k, v in bits.items()}, parsed, target
    if isinstance(bits, str):
        if bits != "auto":
            raise ValueError(
                f"bits: expected 2 to 16, a mapping from filters to bits or 'auto', got {bits!r}"
            )
        return bits, parsed, target
    return check_bits(bits), parsed, target


def _assign(
    model: nn.Module, targets: Sequence[Target], bits: int | str | dict[str, int]
) -> dict[str, tuple[int, ...]]:
    """For each tensor the widths to try, narrowest first."""
    if isinstance(bits, str):
        return {t.name: AUTO for t in targets}
    if isinstance(bits, int):
        return {t.name: (bits,) for t in targets}
    modules = dict(model.named_modules(remove_duplicate=False))
    assigned: dict[str, tuple[int, ...]] = {}
    for text, width in bits.items():
        (matcher,) = _matchers("bits", text)
        found = [t for t in targets if matcher.selects(t, modules)]
        if not found:
            names = ", ".join(t.name for t in targets[:5])
            raise ValueError(
                f"bits: expected filters that match a selected weight, got {text!r}; weights: {names}"
            )
        for target in found:
            assigned.setdefault(target.name, (width,))
    return assigned


def _settle(
    target: Target,
    hessians: list[torch.Tensor],
    widths: tuple[int, ...],
    *,
    sweep: bool,
    sparsity: float | None,
    pattern: Pattern,
    symmetric: bool,
    group: int | None,
    scales: str | None,
    max_error: float,
    damping: float,
) -> tuple[torch.Tensor, QuantizedWeight, dict[int, float]]:
    """The weight on the first grid that is good enough (or the most exact), that grid, and the output errors
    of the widths that were tried.
    """
    errors: dict[int, float] = {}
    best: tuple[torch.Tensor, QuantizedWeight] | None = None
    matrices = obs.Matrices(target)
    parts = [w.to(h.dtype) for w, h in zip(matrices.split(target.weight), hessians, strict=True)]
    inverses = [obs.invert(h, damping, f" at layer {target.layer!r}") for h in hessians] if sweep else []
    width = 1 if pattern.kind == "unstructured" else pattern.cols
    units = matrices.units(width) if sparsity is not None else None
    for bits in widths:
        how = scales or ("minmax" if bits >= 8 else "mse")
        rounded, grids = [], []
        for i, w in enumerate(parts):
            rounding = GridRounding(bits, symmetric=symmetric, group=group, method=how)
            if sweep:
                new, _ = obs.sweep(
                    w,
                    inverses[i],
                    units=units,
                    sparsity=sparsity or 0.0,
                    pattern=None if sparsity is None else pattern,
                    alive=w != 0 if sparsity is not None or bool((w == 0).any()) else None,
                    rounding=rounding,
                )
                own = rounding.grids
            else:
                own = [
                    fit(part, bits, symmetric=symmetric, method=how)
                    for part in torch.split(w, group or max(1, w.shape[1]), dim=1)
                ]
                size = group or max(1, w.shape[1])
                pieces = [g.round(p) for g, p in zip(own, torch.split(w, size, dim=1), strict=True)]
                new = torch.cat(pieces, 1)
            rounded.append(new)
            grids.append((torch.cat([g.scale for g in own], 1), torch.cat([g.zero for g in own], 1)))
        lost = sum(obs.output_error(a, b, h) for a, b, h in zip(rounded, parts, hessians, strict=True))
        size2 = sum(obs.output_error(w, torch.zeros_like(w), h) for w, h in zip(parts, hessians, strict=True))
        error = math.sqrt(max(lost, 0.0) / size2) if size2 > 0 else 0.0
        record = QuantizedWeight(
            bits,
            symmetric,
            group,
            torch.cat([s for s, _ in grids]).float(),
            torch.cat([z for _, z in grids]).float(),
        )
        errors[bits] = error
        if best is None or error <= max_error or error < min(e for b, e in errors.items() if b != bits):
            best = matrices.join(rounded), record
        if error <= max_error:
            break
    assert best is not None  # there is one width at least
    return (*best, errors)


def _time_widths(
    model: nn.Module, targets: Sequence[Target], example_inputs: Any, four: int | None
) -> dict[str, dict[int, float]]:
    """Seconds of one pass over the example inputs, by tensor and width, with the width's fastest kernel.

    `four`: inputs that share a scale with 4 bits; None for a grid that has no kernel of 4 bits. Layers that
    no kernel takes are left out.
    """
    from pared._accelerate import layer_seconds  # which imports this module
    from pared.nn import RULES
    from pared.ops._formats import FORMATS

    known = {name for rule in RULES.values() for name in rule.formats}
    here = [n for n, f in FORMATS.items() if n in known and "cpu" in f.devices]
    eight, nibbles = ([n for n in here if FORMATS[n].precision == p] for p in ("int8", "int4"))
    # A grid of 4 bits with one scale a row is a grid of 8 bits too: its codes run on the same kernels.
    formats = {16: None, 8: eight, 4: eight if four is None else [*eight, *nibbles]}
    found: dict[str, dict[int, float]] = {}
    timed: dict[tuple[str, ...], dict[str, tuple[float, float]]] = {}
    for bits in AUTO:
        names = formats[bits]
        key = tuple(names or ())
        if key not in timed:
            timed[key] = layer_seconds(
                model, example_inputs, "float32" if names is None else "int8", names, four
            )
        for target in targets:
            if target.layer in timed[key]:
                before, speedup = timed[key][target.layer]
                found.setdefault(target.name, {})[bits] = before / speedup
    return found


def _by_time(widths: Sequence[int], seconds: Mapping[int, float]) -> tuple[int, ...]:
    """The widths in the order in which they are to be tried: fastest first, and of equally fast ones the
    narrowest.
    """
    left, order = sorted(widths), list[int]()
    while left and all(w in seconds for w in left):
        fastest = min(seconds[w] for w in left)
        order.append(next(w for w in left if seconds[w] <= _AS_FAST * fastest))
        left.remove(order[-1])
    return (*order, *left)


def _with_input(record: QuantizedWeight, grid: ActivationGrid) -> QuantizedWeight:
    return dataclasses.replace(
        record, activation_scale=grid.scale, activation_zero=grid.zero, activation_dtype=grid.dtype
    )


def _layer_report(
    target: Target,
    record: QuantizedWeight,
    errors: Mapping[int, float],
    seconds: Mapping[int, float],
    seen: InputRange,
) -> QuantLayer:
    weight = target.weight
    zeros = 1.0 - int(torch.count_nonzero(weight)) / max(1, weight.numel())
    grid = None
    if record.activation_scale is not None:
        grid = (record.activation_scale, record.activation_zero, record.activation_dtype)
    return QuantLayer(
        target.name,
        target.type,
        tuple(weight.shape),
        record.bits,
        zeros,
        errors[record.bits],
        grid,
        seen.distribution().fit,
        tuple((bits, errors.get(bits), seconds.get(bits)) for bits in sorted({*errors, *seconds})),
    )


class InputMean(Observer):
    """Mean of every column of a layer's input matrix, in the order of `obs.Matrices`, one a part."""

    events = frozenset({calibration.INPUT})

    def __init__(self, target: Target) -> None:
        self.target, self.matrices = target, obs.Matrices(target)
        self.sums = [
            torch.zeros(self.matrices.inputs, dtype=torch.float64, device="cpu")
            for _ in range(self.matrices.parts)
        ]
        self.rows = [0] * self.matrices.parts
        self.turn = 0

    def input(self, x: torch.Tensor) -> None:
        module = self.target.module
        if isinstance(module, calibration._CONVOLUTIONS):
            taps = torch.stack(
                [c.transpose(0, 1).flatten(1).sum(1, dtype=torch.float64) for c in columns(module, x)]
            )
            n = next(iter(columns(module, x)))[:, 0].numel()
            for part, own in enumerate(taps.chunk(self.matrices.parts, dim=1)):
                self.sums[part] += own.reshape(-1).cpu()
                self.rows[part] += n
        else:
            part = self.turn % len(self.sums)
            self.sums[part] += x.sum(0, dtype=torch.float64).cpu()
            self.rows[part] += x.shape[0]
            self.turn += 1

    def reduce(self, processes: Processes) -> None:
        self.sums, self.rows = processes.add(self.sums), processes.total(*self.rows)

    def result(self) -> list[torch.Tensor]:
        return [s / max(1, n) for s, n in zip(self.sums, self.rows, strict=True)]


def _correct_bias(target: Target, before: torch.Tensor, means: list[torch.Tensor]) -> None:
    """``bias += (W - W_q) E[x]``: Nagel et al., arXiv 1906.04721. Layers without a bias stay as they are."""
    bias = target.module._parameters.get("bias" if target.parameter == "weight" else "in_proj_bias")
    if bias is None or len(target.places) > 1:
        return
    part = _ARGUMENTS.get(target.parameter)
    own = bias if part is None else bias.chunk(3)[part]
    matrices = obs.Matrices(target)
    shift = torch.cat(
        [
            (old - new).double().cpu() @ mean
            for old, new, mean in zip(
                matrices.split(before), matrices.split(target.weight), means, strict=True
            )
        ]
    )
    with torch.no_grad():
        own.add_(shift.to(bias.device, bias.dtype))


@contextmanager
def simulate(model: nn.Module) -> Iterator[None]:
    """Inside, the inputs of quantised layers are rounded as int8 kernels round them: to measure accuracy
    anywhere.

    Static inputs by their grid; others by token, symmetrically, by the token's own largest magnitude (of a
    convolution's input, by the sample's).

    Parameters
    ----------
    model : with layers that `pared.quantize` has put on grids of at most 8 bits; others are left alone.

    Raises
    ------
    TypeError : not a module.
    """
    handles = []

    def hook(record: QuantizedWeight, argument: int) -> Callable[..., Any]:
        def rounded(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            if record.activation_scale is not None:
                grid = ActivationGrid(
                    record.activation_scale, record.activation_zero, record.activation_dtype
                )
                return grid.round(x)
            over = list(range(1, x.ndim)) if isinstance(module, calibration._CONVOLUTIONS) else [-1]
            scale = x.abs().amax(over, keepdim=True) / 127
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            return (x / scale).round().clamp(-127, 127) * scale

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = rounded(module, args[argument])
            return (*args[:argument], x, *args[argument + 1 :])

        return before

    try:
        for module in unwrap(model).modules():
            for parameter, record in _records(module).items():
                if record.bits <= 8:
                    argument = _ARGUMENTS.get(parameter, 0)
                    handles.append(module.register_forward_pre_hook(hook(record, argument)))
        yield
    finally:
        for handle in handles:
            handle.remove()
