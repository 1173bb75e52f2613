"""What the callbacks share: a pruner that is made when training begins, and its state before that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pared._errors import check_known
from pared.pruning.pruner import Pruner
from pared.pruning.report import PruneReport
from pared.schedules import Schedule, check_schedule
from pared.training import Movement

__all__ = ["Held"]


class Held:
    """The pruner of one training, made late.

    Attributes
    ----------
    pruner : None before training begins.
    report : None before training has ended.
    """

    def __init__(self, schedule: Schedule, options: dict[str, Any]) -> None:
        check_schedule(schedule)
        for name in ("model", "optimizer"):
            if name in options:
                raise TypeError(
                    f"{name}: expected none, the trainer has it, got {type(options[name]).__name__}"
                )
        check_known(options, Pruner, ("model", "schedule", "optimizer"))
        self.schedule, self.options = schedule, options
        self.pruner: Pruner | None = None
        self.report: PruneReport | None = None
        self.state: Mapping[str, Any] | None = None

    def begin(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Pruner:
        self.report = None
        self.pruner = Pruner(model, self.schedule, optimizer=optimizers, **self.options)
        if self.state is not None:
            self.pruner.load_state_dict(self.state)
            self.state = None
        return self.pruner

    def gradients(self) -> None:
        """Gradients are there, the weights have not moved yet."""
        importance = self.options.get("importance")
        if isinstance(importance, Movement):
            importance.update()

    def step(self) -> None:
        if self.pruner is not None:
            self.pruner.step()

    def end(self) -> None:
        if self.pruner is not None:
            self.report = self.pruner.finalize()

    def saved(self) -> dict[str, Any]:
        """For a checkpoint; empty before training begins."""
        return {} if self.pruner is None else self.pruner.state_dict()
