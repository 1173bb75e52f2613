"""`LightningPruner`, for Lightning's Trainer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from pared.callbacks._held import Held
from pared.pruning.pruner import Pruner
from pared.pruning.report import PruneReport
from pared.schedules import Schedule

__all__ = ["LightningPruner"]


def _base() -> Any:
    """Lightning comes as two packages with classes of their own: the one that is in use, or there."""
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in sorted(names, key=lambda n: n not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ModuleNotFoundError("No module named 'lightning' or 'pytorch_lightning'")


class LightningPruner(_base()):  # type: ignore[misc]  # whichever of the two is installed
    """A `pared.Pruner` for Lightning's Trainer: masks grow with the optimiser's steps and hold.

    ::

        schedule = pared.schedules.Polynomial(0.0, 0.8, begin=100, end=1000)
        pruner = pared.callbacks.LightningPruner(schedule, include="model.*")
        trainer = lightning.Trainer(max_epochs=3, callbacks=[pruner])
        trainer.fit(module, loader)
        print(pruner.report)

    Parameters
    ----------
    schedule : as for `pared.Pruner`, over the optimiser's steps (not the batches that are accumulated).
    options : what else `pared.Pruner` takes. A `pared.training.Movement` given as importance is fed with the
        gradients.

    Attributes
    ----------
    pruner : the `pared.Pruner`, from the beginning of the training on.
    report : the `PruneReport`, from its end on.

    Notes
    -----
    The masks are part of Lightning's checkpoints; a resumed training goes on as if it had not stopped.
    """

    def __init__(self, schedule: Schedule, **options: Any) -> None:
        super().__init__()
        self._held = Held(schedule, options)
        self._steps = 0

    @property
    def pruner(self) -> Pruner | None:
        return self._held.pruner

    @property
    def report(self) -> PruneReport | None:
        return self._held.report

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if missing := [name for name in ("optimizers", "global_step") if not hasattr(trainer, name)]:
            raise TypeError(
                f"trainer: expected Lightning's Trainer, got {type(trainer).__name__} without "
                f"{' and '.join(missing)}"
            )
        self._held.begin(pl_module, trainer.optimizers)
        self._steps = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._held.gradients()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._steps:  # while batches are accumulated it stays
            self._steps = trainer.global_step
            self._held.step()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._held.end()

    def state_dict(self) -> dict[str, Any]:
        return self._held.saved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"state_dict: expected what state_dict() gave, a mapping, got {type(state_dict).__name__}"
            )
        self._held.state = state_dict or None
