"""Data-driven pruning with reconstruction: SparseGPT and OBC as criteria, and the walk through a model.

The walk settles a model from its inputs to its outputs, a stage at a time (a block of a transformer, a stage
of a residual network, a layer of a chain): one pass over the data collects the stage's Hessians, on
activations that the stages before have already changed; then its layers are rewritten. Memory: one stage's
Hessians, one batch, and the old weights, which come back if anything fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from pared._checkpoint import Checkpoint, Item, digest
from pared._errors import check_flag, check_number, check_path
from pared.pruning import distributed, obs
from pared.pruning.calibration import LossFn, Observer, batches, collect, forward, frozen
from pared.pruning.distributed import Processes
from pared.pruning.importance import BuiltIn, Statistics
from pared.pruning.masks import keep_count
from pared.pruning.patterns import Pattern
from pared.pruning.targets import Target

__all__ = ["OBC", "SparseGPT", "walk"]

Settle = Callable[[Target, list[torch.Tensor]], torch.Tensor]
# Between a tensor's name and the name of what is kept beside it.
_EXTRA = "//"


@dataclass(frozen=True)
class Extra:
    """What a resumed walk needs of a settled target besides its weight."""

    save: Callable[[Target], Item]
    load: Callable[[Target, Item], None]


def check_repeatable(data: object, why: str) -> None:
    """Several passes are made: an iterator would be empty at the second."""
    if data is not None and not isinstance(data, torch.Tensor) and hasattr(data, "__next__"):
        raise TypeError(
            f"data: expected batches that can be gone through several times, which {why} needs, such as a "
            f"list "
            f"or a DataLoader, got an iterator ({type(data).__name__})"
        )


class _Reconstruction(BuiltIn):
    """What SparseGPT and OBC share."""

    needs_data = True
    needs_gradients = False
    scope = "layer"
    key = "identity"
    name = ""

    def __init__(
        self, *, damping: float = 0.01, resume: str | os.PathLike[str] | None = None, progress: bool = False
    ) -> None:
        if resume is not None:
            check_path("resume", resume, "or None")
        check_flag("progress", progress)
        self.damping, self.progress = check_number("damping", damping), progress
        self.resume = None if resume is None else Path(resume)

    def observe(self, target: Target, pattern: Pattern) -> Observer:
        return obs.Hessian(target, pattern)

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        """``w**2 / (2 [H^-1]_pp)``: without an update, as `pared.Pruner` uses it while the rest is
        trained.
        """
        target = Target(module, statistics.layer, statistics.parameter)
        matrices = obs.Matrices(target)
        scores = [
            w.to(h.dtype).square() / (2 * obs.invert(h, self.damping).diagonal)
            for w, h in zip(matrices.split(statistics.weight), statistics.observed, strict=True)
        ]
        return matrices.join(scores)

    def settle(
        self, w: torch.Tensor, h: torch.Tensor, matrices: obs.Matrices, sparsity: float, pattern: Pattern
    ) -> torch.Tensor:
        raise NotImplementedError

    def reconstruct(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        sparsity: float | Mapping[str, float],
        pattern: Pattern,
        data: object,
        loss_fn: LossFn | None,
    ) -> None:
        """Prune and rewrite the targets, in place; undone when anything fails.

        `sparsity` : of all of them, or by name.
        """

        def settle(target: Target, hessians: list[torch.Tensor]) -> torch.Tensor:
            matrices = obs.Matrices(target)
            share = sparsity[target.name] if isinstance(sparsity, Mapping) else sparsity
            return matrices.join(
                [
                    self.settle(w.to(h.dtype), h, matrices, share, pattern)
                    for w, h in zip(matrices.split(target.weight), hessians, strict=True)
                ]
            )

        settings = {
            "method": self.name,
            "damping": self.damping,
            "sparsity": sparsity,
            "pattern": str(pattern),
        }
        walk(
            model,
            targets,
            settle,
            data,
            loss_fn,
            why=repr(self.name),
            settings=settings,
            resume=self.resume,
            progress=self.progress,
        )


class SparseGPT(_Reconstruction):
    """Prune each layer so that its outputs stay: columns from left to right, errors made up by those to the
    right.

    The weights with the smallest ``w**2 / [H^-1]_pp`` of each 128 columns go (blocks: the exact loss of the
    block), ``H = 2/n X^T X`` of the layer's inputs; the remaining weights are changed. Frantar and Alistarh,
    "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot" (arXiv 2301.00774).

    Parameters
    ----------
    damping : added to H's diagonal, as a share of its mean.
    resume : a folder that keeps the layers that are done. A call that finds it goes on from there; it is
        removed at the end.
    progress : whether a progress bar is shown.
    """

    name = "sparsegpt"

    def settle(
        self, w: torch.Tensor, h: torch.Tensor, matrices: obs.Matrices, sparsity: float, pattern: Pattern
    ) -> torch.Tensor:
        width = 1 if pattern.kind == "unstructured" else pattern.cols
        new, _ = obs.sweep(
            w,
            obs.invert(h, self.damping, f" at layer {matrices.target.layer!r}"),
            units=matrices.units(width),
            sparsity=sparsity,
            pattern=pattern,
            alive=w != 0,
        )
        return new


class OBC(_Reconstruction):
    """Exact greedy Optimal Brain Surgeon, weight by weight, for small layers: unstructured and N:M.

    About ``outputs * inputs**3`` operations a layer. Frantar, Singh and Alistarh, "Optimal Brain Compression"
    (arXiv 2208.11580). Parameters as `SparseGPT`.
    """

    name = "obc"

    def settle(
        self, w: torch.Tensor, h: torch.Tensor, matrices: obs.Matrices, sparsity: float, pattern: Pattern
    ) -> torch.Tensor:
        if pattern.kind == "block":
            raise ValueError(f"pattern: expected 'unstructured' or N:M for 'obc', got {str(pattern)!r}")
        keep = keep_count(w.numel(), sparsity)
        drop = w.numel() - keep
        units = matrices.units(pattern.cols) if pattern.kind == "nm" else None
        new, _ = obs.greedy(w, h, drop, alive=w != 0, damping=self.damping, pattern=pattern, units=units)
        return new


# ---------------------------------------------------------------- the walk


def _stage(model: nn.Module, layer: str) -> str:
    """Name of the repeated part that the layer lies in: the child of the outermost list of modules.

    The model itself, where it is a list, counts when there is none inside: its first member may be all of a
    network but the head.
    """
    parts = layer.split(".")
    for i in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList | nn.Sequential):
            return ".".join(parts[: i + 1])
    return parts[0] if isinstance(model, nn.ModuleList | nn.Sequential) else layer


class _Order:
    """In which order a batch reaches the targets, and how often."""

    def __init__(
        self, model: nn.Module, targets: Sequence[Target], batch: Any, loss_fn: LossFn | None
    ) -> None:
        self.calls: dict[int, int] = {}
        with ExitStack() as stack:
            stack.enter_context(frozen(model))
            for target in targets:
                if id(target.module) not in self.calls:
                    self.calls[id(target.module)] = 0
                    stack.callback(target.module.register_forward_pre_hook(self._count).remove)
            self.first: list[int] = []
            with torch.no_grad():
                forward(model, batch, loss_fn)

    def _count(self, module: nn.Module, args: Any) -> None:
        if not self.calls[id(module)]:
            self.first.append(id(module))
        self.calls[id(module)] += 1

    def position(self, target: Target, default: int) -> int:
        return self.first.index(id(target.module)) if self.calls[id(target.module)] else default


def stages(model: nn.Module, targets: Sequence[Target], order: _Order, memory: int) -> Iterator[list[Target]]:
    """The targets in the order of execution, those of one stage together as far as `memory` bytes allow."""
    # Inside an attention the output projection is not called as a module: it stays behind its neighbours.
    positions: list[int] = []
    for target in targets:
        positions.append(order.position(target, positions[-1] if positions else 0))
    ranked = [t for _, t in sorted(zip(positions, targets, strict=True), key=lambda pair: pair[0])]
    stage: list[Target] = []
    for target in ranked:
        used = sum(obs.Hessian.nbytes(t) for t in [*stage, target])
        if stage and (used > memory or _stage(model, stage[0].layer) != _stage(model, target.layer)):
            yield stage
            stage = []
        stage.append(target)
    if stage:
        yield stage


def walk(
    model: nn.Module,
    targets: Sequence[Target],
    settle: Settle,
    data: object,
    loss_fn: LossFn | None,
    *,
    why: str,
    settings: Mapping[str, Any],
    resume: str | os.PathLike[str] | None = None,
    extra: Extra | None = None,
    progress: bool = False,
    memory: int = 2**31,
) -> None:
    """Rewrite the targets one stage after the other, each on what the rewritten ones before give it.

    Parameters
    ----------
    settle : ``(target, Hessians) -> new weight``.
    settings : what `resume` has to agree on, JSON-able.
    memory : bytes for the Hessians of layers that are collected in the same pass.
    """
    check_repeatable(data, why)
    processes = distributed.current()
    with distributed.together(processes):
        with torch.no_grad():
            order = _Order(model, targets, next(iter(batches(data, why))), loss_fn)
        before = {t.name: digest(t.tensor) for t in targets}
        # Of several processes the first one reads and writes.
        first = processes is None or processes.rank == 0
        done = Checkpoint(resume if first else None, {**settings, "before": before})
    plan = list(stages(model, targets, order, memory))
    backup: dict[str, torch.Tensor] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        disable=not progress,
    )
    try:
        with bar:
            task = bar.add_task(settings["method"], total=len(targets))
            for stage in plan:
                if not _take(done, stage, backup, extra, processes):
                    bar.update(task, description=f"{settings['method']}: {stage[0].layer}")
                    observers: dict[str, Observer] = {t.name: obs.Hessian(t) for t in stage}
                    last = None
                    if all(order.calls[id(t.module)] and len(t.places) == 1 for t in stage):
                        last = sum(order.calls[i] for i in {id(t.module) for t in stage})
                    collect(model, stage, observers, data, loss_fn, why, stop_after=last)
                    for target in stage:
                        new = settle(target, observers.pop(target.name).result())
                        if processes is not None:
                            new = processes.first_(new.contiguous())
                        backup[target.name] = target.tensor.detach().clone()
                        _write(target, new)
                    _put(done, stage, extra)
                bar.advance(task, len(stage))
    except BaseException:
        for target in targets:
            if target.name in backup:
                _write(target, backup[target.name])
        raise
    done.finish()


def _take(
    done: Checkpoint,
    stage: Sequence[Target],
    backup: dict[str, torch.Tensor],
    extra: Extra | None,
    processes: Processes | None,
) -> bool:
    """Whether the stage is done; its weights are then those that were kept."""
    with distributed.together(processes):
        item = done.get(stage[0].name)
    if processes is not None:
        item = processes.gather(item)[0]
    if item is None or not all(t.name in item.tensors for t in stage):
        return False
    for target in stage:
        backup[target.name] = target.tensor.detach().clone()
        _write(target, item.tensors[target.name].to(target.tensor.device))
        if extra is not None:
            mark = target.name + _EXTRA
            own = {k.removeprefix(mark): t for k, t in item.tensors.items() if k.startswith(mark)}
            extra.load(target, Item(item.values[target.name], own))
    return True


def _put(done: Checkpoint, stage: Sequence[Target], extra: Extra | None) -> None:
    values: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for target in stage:
        tensors[target.name] = target.tensor
        if extra is not None:
            item = extra.save(target)
            values[target.name] = item.values
            tensors.update({target.name + _EXTRA + k: t for k, t in item.tensors.items()})
    done.put(stage[0].name, values, tensors)


def _write(target: Target, new: torch.Tensor) -> None:
    tensor = target.tensor
    if not bool(torch.isfinite(new).all()):
        raise ValueError(
            f"data: expected inputs from which layer {target.layer!r} can be rebuilt, got weights that are "
            f"not "
            "finite; give more samples or a larger damping"
        )
    with torch.no_grad():
        tensor.copy_(new.to(tensor.dtype))
