"""`pared.Pruner`: masks that grow on a schedule and hold while any optimiser trains the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from pared._errors import check_count, check_flag, check_number, is_real
from pared.pruning.importance import Importance
from pared.pruning.masks import check_finite, zero
from pared.pruning.oneshot import (
    bake_targets,
    check_sparsity,
    choose_masks,
    make_plan,
    make_report,
    observe,
)
from pared.pruning.report import PruneReport
from pared.pruning.targets import Filters, Target
from pared.schedules import Schedule, check_schedule

__all__ = ["Pruner"]

_VERSION = 1


def check_optimizers(optimizer: object) -> list[torch.optim.Optimizer]:
    """One optimiser or several as a list, None as none. Raises ``TypeError``."""
    given = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    optimizers: list[torch.optim.Optimizer] = []
    for one in given if optimizer is not None else []:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer or a list of them, got {type(one).__name__}"
            )
        optimizers.append(one)
    return optimizers


class Pruner:
    """Prune while training: call `step` after each ``optimizer.step()``, `finalize` at the end.

    ::

        schedule = pared.schedules.Polynomial(0.5, 0.9, begin=100, end=1000)
        pruner = pared.Pruner(model, schedule, optimizer=optimizer)
        for batch in loader:
            loss_fn(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
        report = pruner.finalize()

    Parameters
    ----------
    model, pattern, importance, scope, data, loss_fn, include, exclude, keep_first, keep_last : as in
        `pared.prune`. A criterion that needs `data` goes through it at every choice of masks (see
        `update_every`): batches in a list, or a loader, not an iterator.
    schedule : callable ``step -> sparsity`` in [0, 1); see `pared.schedules`. After n calls of `step` the
        masks are those of ``schedule(n)``. With N:M the number kept of each M falls from M to N as the
        sparsity rises to ``1 - N/M``, which it may not exceed.
    optimizer : one optimiser or a list. Its state for pruned weights (momentum, second moments: every state
        tensor of the weight's shape) is zeroed too, so that it does not push them away from zero again.
    update_every : steps between two choices of masks, at least. The masks hold in between; `finalize` catches
        up with the schedule.
    allow_regrowth : see Notes.

    Attributes
    ----------
    step_count : calls of `step` so far.
    sparsity : share of the selected weights that the masks hold at zero, 0 to 1.
    masks : tensor name -> boolean mask, True where a weight is kept; of layers that have one.

    Raises
    ------
    TypeError, ValueError : as `pared.prune`; `step` also when the schedule leaves [0, 1) or a weight is not
        finite. `step` changes nothing then.

    Notes
    -----
    Without regrowth (the default) a weight that was pruned stays exactly zero, whatever the optimiser does:
    masks only grow, and a schedule that falls leaves them as they are. Weights that are zero when the
    pruner is made are held too: masks of torch.nn.utils.prune and torch.ao.pruning (which become
    permanent), and plain zeros of a pruned checkpoint; a tensor that is zero altogether is taken for an
    initialisation and is free.

    With ``allow_regrowth=True`` masks are applied when they are chosen and not held in between (soft
    pruning, arXiv 1808.06866): pruned weights train on from zero, and at the next choice, every
    `update_every` steps, those that have grown compete again. Masks of other tools are made permanent but
    not held. `finalize` applies the masks of the last choice for good.

    In a data-parallel job every process has a pruner. Masks that are chosen from the weights alone are the
    same everywhere; statistics of `data` are reduced over the processes. Steps that a ``GradScaler`` skips
    still count as steps. Parameters stay the same objects and are written in place,
    between the backward passes, so autograd, compiled models and mixed precision go on as before.
    FullyShardedDataParallel has whole weights in its ``summon_full_params(model)`` only, where the pruner is
    made, stepped and finalized; `optimizer` is left out then. ``fully_shard`` has none to write to.

    Averages of the weights (``torch.optim.swa_utils.AveragedModel``) over steps between which masks changed
    are not zero where the weights are: ``average.module.get_parameter(name).data.mul_(mask)`` for `masks`,
    before `finalize`.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        pattern: str = "unstructured",
        importance: Importance = "magnitude",
        scope: str | None = None,
        data: Iterable[Any] | None = None,
        loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
        include: Filters = None,
        exclude: Filters = None,
        keep_first: int = 0,
        keep_last: int = 0,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        update_every: int = 1,
        allow_regrowth: bool = False,
    ) -> None:
        check_schedule(schedule)
        check_count("update_every", update_every, "steps")
        check_flag("allow_regrowth", allow_regrowth)
        self._plan = make_plan(
            model, pattern, importance, scope, data, loss_fn, include, exclude, keep_first, keep_last
        )
        if self._plan.criterion.needs_data and data is not None and iter(data) is data:
            raise TypeError(
                "data: expected batches that can be gone through at every choice of masks, such as a list "
                "or a "
                f"DataLoader, got an iterator ({type(data).__name__})"
            )
        self._data, self._loss_fn = data, loss_fn
        final = getattr(schedule, "final", getattr(schedule, "sparsity", None))
        if self._plan.pattern.kind == "nm" and isinstance(final, float):
            check_sparsity(final, self._plan.pattern)
        self._optimizers = self._checked_optimizers(optimizer)
        weights = [target.weight for target in self._plan.targets]
        self._shapes = [w.shape for w in weights]
        self._before = [int(torch.count_nonzero(w)) for w in weights]
        self._schedule = schedule
        self._update_every = update_every
        self._allow_regrowth = allow_regrowth
        self.step_count = 0
        self._updated_at: int | None = None
        self._chosen_for = 0.0
        self._finalized = False
        # True where a weight is pruned; None where nothing is. A pruned model comes with its masks.
        self._dropped: list[torch.Tensor | None] = [
            w == 0 if not self._allow_regrowth and 0 < n < w.numel() else None
            for w, n in zip(weights, self._before, strict=True)
        ]
        bake_targets(self._plan.targets)

    def _checked_optimizers(self, optimizer: object) -> list[torch.optim.Optimizer]:
        optimizers = check_optimizers(optimizer)
        trained = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
        if optimizers and not any(id(t.tensor) in trained for t in self._plan.targets):
            raise ValueError(
                "optimizer: expected one that trains the pruned weights, got none of "
                + ", ".join(t.name for t in self._plan.targets[:3])
            )
        return optimizers

    # What is held

    @property
    def sparsity(self) -> float:
        total = sum(t.tensor.numel() for t in self._plan.targets)
        return sum(int(d.sum()) for d in self._dropped if d is not None) / total if total else 0.0

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        return {
            t.name: dropped.logical_not()
            for t, dropped in zip(self._plan.targets, self._dropped, strict=True)
            if dropped is not None
        }

    # Training

    def step(self) -> None:
        """After ``optimizer.step()``: count, choose new masks when they are due, zero what is pruned."""
        if self._finalized:
            raise RuntimeError(
                "step: expected a pruner that is not finalized; make a new one to prune further"
            )
        self._check_whole()
        step = self.step_count + 1
        wanted = self._scheduled(step)
        due = self._updated_at is None or step - self._updated_at >= self._update_every
        chooses = due and (wanted > self._chosen_for or (self._allow_regrowth and wanted > 0))
        if chooses:
            self._dropped = self._choose(wanted)
            self._updated_at, self._chosen_for = step, wanted
        self.step_count = step
        if chooses or not self._allow_regrowth:
            self._apply()

    def _check_whole(self) -> None:
        for target, shape in zip(self._plan.targets, self._shapes, strict=True):
            tensor = target.tensor
            if tensor.shape != shape or type(tensor.detach()) is not torch.Tensor:
                raise ValueError(
                    f"model: expected {target.name!r} with shape {list(shape)}, as when the pruner was made, "
                    f"got a {type(tensor).__name__} of shape {list(tensor.shape)}; weights that "
                    "FullyShardedDataParallel shards are whole in its summon_full_params(model)"
                )

    def _scheduled(self, step: int) -> float:
        value = self._schedule(step)
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
            value = value.item()
        if not is_real(value):
            raise TypeError(
                f"schedule: expected a sparsity in [0, 1) at step {step}, got {type(value).__name__}"
            )
        pattern = self._plan.pattern
        if not 0 <= value < 1:
            raise ValueError(f"schedule: expected a sparsity in [0, 1) at step {step}, got {value!r}")
        if pattern.kind == "nm" and value > pattern.rule_sparsity + 1e-9:
            limit = f"{pattern.rule_sparsity:g}, which pattern {str(pattern)!r} gives,"
            raise ValueError(f"schedule: expected at most {limit} at step {step}, got {value!r}")
        return float(value)

    def _choose(self, sparsity: float) -> list[torch.Tensor | None]:
        plan, held = self._plan, not self._allow_regrowth
        if held:
            for target in plan.targets:
                check_finite(target, target.weight)
            self._apply()  # what the optimiser has moved since competes as the zero that it is
        observed = observe(plan, self._data, self._loss_fn)
        masks = choose_masks(plan, observed, sparsity, zeros_last=held)
        dropped: list[torch.Tensor | None] = []
        for mask, old in zip(masks, self._dropped, strict=True):
            new = mask.logical_not_()
            if held and old is not None:
                new |= old.to(new.device)  # a weight that trained to exactly zero ties with the pruned ones
            dropped.append(new)
        return dropped

    def _apply(self) -> None:
        for i, target in enumerate(self._plan.targets):
            dropped = self._dropped[i]
            if dropped is None:
                continue
            tensor = target.tensor
            if dropped.device != tensor.device:
                dropped = self._dropped[i] = dropped.to(tensor.device)
            zero(tensor, dropped)
            for optimizer in self._optimizers:
                _zero_state(optimizer, tensor, dropped)

    def finalize(self) -> PruneReport:
        """Apply the masks for good, let go of them, and report. `step` is an error from here on.

        Where `update_every` has held the last choice back, it is made now: the model ends at the sparsity
        that the schedule asks for at the last step.
        """
        if not self._finalized:
            self._check_whole()
            wanted = self._scheduled(self.step_count) if self.step_count else 0.0
            if wanted > self._chosen_for:
                self._dropped = self._choose(wanted)
                self._updated_at, self._chosen_for = self.step_count, wanted
            self._apply()
            self._finalized = True
            self._report = make_report(self._plan, self._chosen_for, self._before)
            self._dropped = [None] * len(self._plan.targets)
        return self._report

    def __enter__(self) -> Pruner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finalize()

    def __repr__(self) -> str:
        return (
            f"Pruner(schedule={self._schedule!r}, pattern={str(self._plan.pattern)!r}, "
            f"importance={self._plan.criterion.name!r}, scope={self._plan.scope!r}, "
            f"step_count={self.step_count}, sparsity={self.sparsity:.4f})"
        )

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The step counter and the masks, eight to a byte: tensors and plain values, for ``torch.save``.

        With the states of model and optimiser, training goes on exactly as if it had not stopped.
        """
        masks = {}
        for target, dropped in zip(self._plan.targets, self._dropped, strict=True):
            if dropped is not None:
                packed = np.packbits(dropped.contiguous().cpu().numpy().reshape(-1))
                masks[target.name] = {"shape": list(dropped.shape), "dropped": torch.from_numpy(packed)}
        return {
            "version": _VERSION,
            "pattern": str(self._plan.pattern),
            "step_count": self.step_count,
            "updated_at": self._updated_at,
            "chosen_for": self._chosen_for,
            "finalized": self._finalized,
            "before": dict(zip((t.name for t in self._plan.targets), self._before, strict=True)),
            "masks": masks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that `state_dict` gave, from a pruner of the same model and pattern.

        The masks are applied to the weights as they are now; load the model's state before or after.

        Raises
        ------
        TypeError, ValueError : a state of another version, pattern or model; nothing is changed then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected what state_dict() returned, got {type(state).__name__}")
        own = self.state_dict()
        if missing := sorted(own.keys() - state.keys()):
            raise ValueError(
                f"state: expected what state_dict() returned, got one without {', '.join(missing)}"
            )
        for key in ("version", "pattern"):
            if state[key] != own[key]:
                raise ValueError(f"state: expected {key} {own[key]!r}, got {state[key]!r:.60}")
        for key in ("before", "masks"):
            if not isinstance(state[key], Mapping):
                raise TypeError(
                    f"state[{key!r}]: expected entries by tensor name, got {type(state[key]).__name__}"
                )
        if (
            state["before"].keys() != own["before"].keys()
            or not state["masks"].keys() <= own["before"].keys()
        ):
            other = (state["before"].keys() ^ own["before"].keys()) | (
                state["masks"].keys() - own["before"].keys()
            )
            raise ValueError(
                "state: expected masks for the layers that this pruner selects, got other ones: "
                f"{sorted(map(str, other))[:4]}"
            )
        for n in state["before"].values():
            check_count("state['before']", n, "non-zeros", 0)
        check_count("state['step_count']", state["step_count"], "steps", 0)
        if state["updated_at"] is not None:
            check_count("state['updated_at']", state["updated_at"], "steps", 0)
        if check_number("state['chosen_for']", state["chosen_for"]) >= 1:
            raise ValueError(
                f"state['chosen_for']: expected a sparsity in [0, 1), got {state['chosen_for']!r}"
            )
        check_flag("state['finalized']", state["finalized"])
        dropped: list[torch.Tensor | None] = []
        for target in self._plan.targets:
            masked, tensor = target.name in state["masks"], target.tensor
            dropped.append(_unpack(target, state["masks"][target.name], tensor) if masked else None)
        self.step_count = int(state["step_count"])
        self._updated_at = state["updated_at"]
        self._chosen_for = float(state["chosen_for"])
        self._before = [state["before"][t.name] for t in self._plan.targets]
        self._dropped = dropped
        self._finalized = False
        if not self._allow_regrowth:
            self._apply()
        if state["finalized"]:
            self.finalize()


def _unpack(target: Target, entry: object, tensor: torch.Tensor) -> torch.Tensor:
    packed = entry.get("dropped") if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping) or not isinstance(packed, torch.Tensor) or packed.is_meta:
        raise TypeError(
            f"state: expected a mask for {target.name!r}, eight bits to a byte, got {entry!r:.60}"
        )
    shape = entry.get("shape")
    if shape != list(tensor.shape):
        raise ValueError(
            f"state: expected a mask of shape {list(tensor.shape)} for {target.name!r}, got {shape!r:.60}"
        )
    size = math.ceil(tensor.numel() / 8)
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        raise ValueError(
            f"state: expected {size} bytes (uint8) as the mask of {target.name!r}, got {packed.dtype} "
            f"{list(packed.shape)}"
        )
    bits = np.unpackbits(packed.cpu().numpy(), count=tensor.numel()).astype(bool)
    return torch.from_numpy(bits).reshape(tensor.shape).to(tensor.device)


def _zero_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, dropped: torch.Tensor) -> None:
    """Zero what the optimiser remembers of pruned weights: every state tensor of the weight's shape."""
    for value in optimizer.state.get(tensor, {}).values():
        if isinstance(value, torch.Tensor) and value.shape == tensor.shape:
            zero(value, dropped)
