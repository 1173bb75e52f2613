"""`TrainerPruner`, for ``transformers.Trainer``."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pared._errors import check_path
from pared.callbacks._held import Held
from pared.pruning.pruner import Pruner
from pared.pruning.report import PruneReport
from pared.schedules import Schedule

__all__ = ["TrainerPruner"]

FILE = "pared_pruner.pt"


def _check(name: str, got: object, kind: type) -> None:
    if not isinstance(got, kind):
        raise TypeError(f"{name}: expected transformers' {kind.__name__}, got {type(got).__name__}")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint of this step."""
    _check("args", args, TrainingArguments)
    _check("state", state, TrainerState)
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _load(file: Path) -> Any:
    """What `TrainerPruner.on_save` wrote. Raises ``ValueError`` for a damaged file."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(
            f"resume: expected the file of an earlier training, got a damaged one: {file} "
            f"({str(e).partition(chr(10))[0]:.100})"
        ) from e


class TrainerPruner(TrainerCallback):  # type: ignore[misc, unused-ignore]  # a class without types
    """A `pared.Pruner` for transformers' Trainer: masks grow with the optimiser's steps and hold.

    ::

        schedule = pared.schedules.Polynomial(0.0, 0.8, begin=100, end=1000)
        pruner = pared.callbacks.TrainerPruner(schedule, pattern="unstructured", include="*.layer.*")
        trainer = Trainer(model, arguments, train_dataset=..., callbacks=[pruner])
        trainer.train()
        print(pruner.report)

    Parameters
    ----------
    schedule : as for `pared.Pruner`, over the optimiser's steps (not the batches that are accumulated).
    resume : a folder that holds the pruner's state of an earlier training, a Trainer checkpoint. None: a
        training that is resumed looks for it in ``output_dir/checkpoint-STEP``.
    options : what else `pared.Pruner` takes. A `pared.training.Movement` given as importance is fed with the
        gradients.

    Attributes
    ----------
    pruner : the `pared.Pruner`, from the beginning of the training on.
    report : the `PruneReport`, from its end on.

    Notes
    -----
    Each checkpoint gets a file of masks (``pared_pruner.pt``, tensors and plain values), so that a resumed
    training goes on as if it had not stopped. With ``load_best_model_at_end`` the last masks are applied to
    the best model's weights: choose that model among checkpoints behind the schedule's end.
    """

    def __init__(
        self, schedule: Schedule, *, resume: str | os.PathLike[str] | None = None, **options: Any
    ) -> None:
        self._held = Held(schedule, options)
        if resume is not None:
            check_path("resume", resume, "or None")
        self._resume = None if resume is None else Path(resume)

    @property
    def pruner(self) -> Pruner | None:
        return self._held.pruner

    @property
    def report(self) -> PruneReport | None:
        return self._held.report

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check("state", state, TrainerState)
        for name in ("model", "optimizer"):
            if kwargs.get(name) is None:
                raise TypeError(f"{name}: expected the trainer's, got none")
        folder = self._resume
        if folder is None and state.global_step:
            folder = _checkpoint(args, state)
        if folder is not None:
            file = folder / FILE
            if not file.is_file():
                raise ValueError(
                    f"resume: expected the folder of a checkpoint that a TrainerPruner took part in, got "
                    f"{folder}, which has no {FILE}"
                )
            self._held.state = _load(file)
        self._held.begin(kwargs["model"], [kwargs["optimizer"]])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._held.gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._held.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self._held.saved(), folder / FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._held.end()
