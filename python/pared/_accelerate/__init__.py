"""`pared.accelerate`: measure, convert what gains, check, report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from pared._accelerate import timing
from pared._accelerate.attention import attend_all
from pared._accelerate.bounds import four_of, may_round
from pared._accelerate.choose import decide, hopeless
from pared._accelerate.encoder import encode_all
from pared._accelerate.layers import find_candidates, record_calls, without_kernel
from pared._accelerate.model import BUDGET, as_linears, note_times, open_model, race, runs_kernels, settle
from pared._accelerate.pools import pool_all
from pared._accelerate.residuals import add_residuals
from pared._accelerate.together import hand_over, share
from pared._choices import Choices
from pared._errors import check_choice, check_flag, check_number, check_path
from pared._inputs import examples, first_run, forked_random
from pared._report import _ATTRIBUTE, Report
from pared._size import disk_bytes, memory_bytes
from pared._sparsity import bake, bake_constants
from pared._surgery import copy_model, tied_parameters
from pared._target import Target, target_of
from pared._timing import watched
from pared.nn import PackedModule
from pared.nn._around import guard
from pared.ops._formats import FORMATS
from pared.ops.int4 import GROUP
from pared.ops.packed import PackedWeight

__all__ = ["accelerate"]

# A model that is this much slower than the dense one is not returned: below it, 1.0 cannot be told from
# noise.
_NEVER_SLOWER = 0.98

AUTOCAST = (
    "torch.autocast was on and is left out: times and errors are those without it, and accelerated layers "
    "compute in the dtype of their input; for 16 bits, accelerate model.to(torch.bfloat16)"
)


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

    Runs the example inputs, and times each ``nn.Linear``, ``nn.Conv1d`` and ``nn.Conv2d`` (dense, and the two
    or three packed formats that are estimated to be the fastest) on the shapes that it really gets, in
    interleaved rounds. What is faster by `min_speedup` is kept; a following activation is fused where the
    model allows it. Then the whole model is compared with the original, outputs and time: where the outputs
    differ by more than allowed, or the model is not faster, layers go back to dense. nn.MultiheadAttention
    and transformers' Conv1D are tried as the Linear layers that they are made of; weights that torch's
    weight_norm, spectral_norm or orthogonal compute are constants. ``print(pared.report(fast))`` says what
    was done and why, ``rich.print(pared.report(fast).candidates())`` what it was chosen from.

    Parameters
    ----------
    model : on the CPU or on one CUDA device (whose kernels take Linear layers, most of them 16-bit ones;
        times are then of CUDA graphs); pruned by any tool (true zeros, masks of ``torch.nn.utils.prune``,
        ``FakeSparsity``), or quantised by one: layers of ``torch.ao.nn.quantized.dynamic``, and Linear layers
        with torchao's int8 weights, are taken over in 8 bits, integers and scales as they are, where that is
        faster. Layers between which torch passes quantised tensors (its static quantisation) stay. It is not
        changed. ``torch.autocast`` is left out.
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
        4x4) and ``"int4"``, for layers that `pared.quantize` has put on a grid of 4 bits; None: all that
        suit a layer's zeros and calls. With ``"int4"`` in the list, layers that were not quantized are
        rounded to 4 bits too (to nearest, a scale for 64 inputs); where `max_error` does not allow that, they
        go to the 8-bit formats of the list, then to its exact ones.
    fuse : fuse activations, fold batch normalisation into convolutions, let linear layers that follow
        each other keep the kernels' own layout between them, let convolutions add the residual behind them,
        and compute attention modules of transformers (``attn_implementation="sdpa"``) with
        `pared.ops.attention` and ``nn.MaxPool2d`` with `pared.ops.max_pool2d`.
    progress : show a progress bar; None: when the work takes more than two seconds and stderr is a terminal.

    Returns
    -------
    A new model in eval mode, for inference: its parameters ask for no gradients. Threads may share it.

    Raises
    ------
    TypeError, ValueError : naming the argument; also for example inputs that the model does not run with (the
        model's own error is chained) and for weights that are not finite. Nothing has changed then.
    """
    target = _check_arguments(model, precision, max_error, min_speedup, fuse, progress, cache)
    max_error, min_speedup = None if max_error is None else float(max_error), float(min_speedup)
    known = _check_formats(formats, precision, target.kind)
    rounds = formats is not None and "int4" in formats
    inputs = examples(example_inputs, target.device)
    with (
        _progress(progress) as advance,
        watched() as watch,
        torch.inference_mode(False),  # or nothing could be loaded into the model later
        torch.no_grad(),
        forked_random(target.device),
        _exact(target) as notes,
    ):
        dense = copy_model(model).eval()
        advance("running the example inputs", 0.0)
        reference = [first_run(dense, e) for e in inputs]
        bake(dense)
        bake_constants(dense)
        opened = open_model(dense, inputs, reference)
        candidates = find_candidates(opened.model, precision)
        record_calls(opened.model, inputs, candidates, fuse)
        report = Report(
            precision=precision,
            ties=tied_parameters(dense),
            trainable=[n for n, p in dense.named_parameters(remove_duplicate=False) if p.requires_grad],
            memory_before=memory_bytes(dense),
            disk_before=disk_bytes(dense),
            machine=target.machine(),
        )
        packed: dict[Any, PackedWeight] = {}
        timed = Choices(cache, target.machine(), watch)
        for i, c in enumerate(candidates):
            advance(f"timing {c.name or type(c.module).__name__}", 0.05 + 0.75 * i / len(candidates))
            c.four, c.target = four_of(c), target
            if rounds and may_round(c):
                c.four, c.rounds = GROUP, True
            decide(c, packed, timed, known, min_speedup)
        advance("checking the outputs", 0.8)
        fast = settle(opened, inputs, reference, candidates, report, max_error)
        advance("timing the model", 0.9)
        fast = race(
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
            hand_over(fast, inputs, reference, candidates, report, timed)
            share(fast, inputs, reference, candidates, report, timed, target)
            attends = attend_all(fast, inputs, reference, candidates, report, min_speedup, timed)
            encodes = encode_all(fast, inputs, reference, candidates, report, timed)
            fast, pools = pool_all(fast, inputs, report, min_speedup, timed)
            fast, adds = add_residuals(fast, inputs, reference, candidates, report, timed)
            if attends or encodes or pools or adds:
                note_times(timing.time_models(dense, fast, inputs, report, target), report)
        elif fuse:
            share(fast, inputs, reference, candidates, report, timed, target)
        timed.save()
        report.layers = [c.row for c in candidates]
        report.notes += [*notes, *opened.notes, *without_kernel(opened.model)]
        report.opened = {n: t for n, t in opened.types.items() if runs_kernels(fast.get_submodule(n))}
        report.notes += as_linears(report.opened)
        if watch.disturbed:
            report.notes.append(str(watch))
        report.memory_after, report.disk_after = memory_bytes(fast), disk_bytes(fast)
        advance("done", 1.0)
    fast.eval().requires_grad_(False)
    setattr(fast, _ATTRIBUTE, report)
    guard(fast)
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
    target = _check_arguments(model, precision, None, 1.0, True, None, None)
    inputs = examples(example_inputs, target.device)
    with watched() as watch, torch.no_grad(), forked_random(target.device), _exact(target):
        dense = copy_model(model).eval()
        reference = [first_run(dense, e) for e in inputs]
        bake(dense)
        bake_constants(dense)
        opened = open_model(dense, inputs, reference)
        candidates = find_candidates(opened.model, precision)
        record_calls(opened.model, inputs, candidates, fuse=True)
        known = _check_formats(formats, precision, target.kind)
        packed: dict[Any, PackedWeight] = {}
        timed = Choices(None, target.machine(), watch)
        found: dict[str, tuple[float, float]] = {}
        for c in candidates:
            if c.refused or hopeless(c):
                continue
            c.four, c.rounds, c.target = four, True, target
            decide(c, packed, timed, known, 1.0)
            before = timing.time_layer(c, {}) if c.row.before is None else c.row.before
            found[c.name] = (before, c.row.speedup or 1.0)
        timed.save()
        for name, kind in opened.types.items():
            parts = [f"{name}.{part}" if name else part for part in ("q_proj", "k_proj", "v_proj")]
            if kind == "MultiheadAttention" and all(part in found for part in parts):
                times = [found.pop(part) for part in parts]
                before = sum(t for t, _ in times)
                found[name] = (before, before / sum(t / speedup for t, speedup in times))
    return found


def _check_arguments(
    model: Any, precision: Any, max_error: Any, min_speedup: Any, fuse: Any, progress: Any, cache: Any
) -> Target:
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
    check_choice("precision", precision, ("float32", *BUDGET))
    if max_error is not None:
        check_number("max_error", max_error, also="None")
    check_number("min_speedup", min_speedup)
    check_flag("fuse", fuse)
    if progress is not None:
        check_flag("progress", progress)
    if cache is not None and not isinstance(cache, bool):
        check_path("cache", cache, "a bool or None")
    return target_of(model)


def _check_formats(formats: Any, precision: str, device: str) -> Sequence[str]:
    here = [f for f in FORMATS.values() if device in f.devices]
    known = tuple(f.name for f in here if precision != "float32" or f.precision == "float32")
    if formats is None:
        return known
    if isinstance(formats, str) or not isinstance(formats, Sequence) or not formats:
        raise TypeError(f"formats: expected a list of names or None, got {formats!r}")
    for name in formats:
        if name not in known:
            raise ValueError(
                f"formats: expected names among {', '.join(known)} with precision={precision!r}, got {name!r}"
            )
    return formats


@contextmanager
def _exact(target: Target) -> Iterator[list[str]]:
    """The model's own dtypes; gives what the report has to say about that."""
    notes = [AUTOCAST] if torch.is_autocast_enabled(target.kind) else []
    with torch.autocast(target.kind, enabled=False):
        yield notes


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
