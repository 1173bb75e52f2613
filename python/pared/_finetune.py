"""Fine-tuning in steps that are kept on disk: the training loop that `pared.compress` can take up again."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pared._checkpoint import Checkpoint, Item
from pared._errors import check_callable, check_count, check_positive, check_text
from pared.pruning.calibration import batches, check_batches, check_loss_fn, checked_loss
from pared.pruning.pruner import Pruner
from pared.pruning.targets import unwrap

__all__ = ["FineTune", "seeded"]

_SCHEDULER = ("step", "state_dict", "load_state_dict")


@contextmanager
def seeded(name: str) -> Iterator[None]:
    """torch's random numbers from a seed that belongs to the name; the caller's go on as before afterwards.

    What a part of a run draws then does not depend on which parts ran before it in the same process.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        yield


@dataclass(frozen=True)
class FineTune:
    """How to train a pruned model on: one step, repeated, as the ``fine_tune`` of `pared.compress`.

    A run that is killed in the middle goes on from its last kept step and ends with the same bits: weights,
    optimiser, scheduler, random numbers and the place in the data are kept.

    Parameters
    ----------
    loss : ``(model, batch) -> scalar``.
    optimizer : makes an optimiser for a list of parameters, for example
        ``lambda p: torch.optim.AdamW(p, lr=1e-4)``.
    steps : of the optimiser, in all.
    data : batches; they are gone through as often as `steps` asks for. None: those of `pared.compress`.
    scheduler : makes a learning rate scheduler for the optimiser; stepped after each step.
    clip : largest norm of the gradients; None does not clip.
    every : steps between two states that are kept.

    Notes
    -----
    Random numbers are torch's, from seeds that pared sets: a DataLoader that shuffles does so the same way in
    each run. Those of ``random`` and numpy, and of workers, are the caller's.
    """

    loss: Callable[[nn.Module, Any], torch.Tensor]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    steps: int
    data: Iterable[Any] | None = None
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    clip: float | None = None
    every: int = 100

    def __post_init__(self) -> None:
        if self.loss is None:
            raise TypeError("loss: expected a callable (model, batch) -> scalar, got None")
        check_loss_fn(self.loss, "loss")
        check_callable("optimizer", self.optimizer, "(parameters) -> optimizer")
        for name in ("steps", "every"):
            check_count(name, getattr(self, name), "steps")
        if self.data is not None:
            check_batches(self.data)
        if self.scheduler is not None:
            check_callable("scheduler", self.scheduler, "(optimizer) -> scheduler, or None")
        if self.clip is not None:
            check_positive("clip", self.clip)

    def run(self, model: nn.Module, pruner: Pruner, data: Iterable[Any], done: Checkpoint, name: str) -> None:
        """Train `model`, whose zeros `pruner` holds; what `done` has under `name` is not done again.

        Raises
        ------
        TypeError, ValueError : naming the argument; a `loss` that returns no finite scalar with a gradient.
        """
        for argument, got, kind in (("pruner", pruner, Pruner), ("done", done, Checkpoint)):
            if not isinstance(got, kind):
                raise TypeError(f"{argument}: expected a {kind.__name__}, got {type(got).__name__}")
        check_text("name", name)
        check_batches(data)
        model = unwrap(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("model: expected parameters that ask for gradients, got none")
        optimizer = self.optimizer(trained)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: expected a callable that makes an optimiser, got one that makes "
                f"{type(optimizer).__name__}"
            )
        scheduler = None if self.scheduler is None else self.scheduler(optimizer)
        if self.scheduler is not None and (
            isinstance(scheduler, type) or not all(hasattr(scheduler, m) for m in _SCHEDULER)
        ):
            raise TypeError(
                f"scheduler: expected a callable that makes an object with {', '.join(_SCHEDULER)}, got one "
                f"that makes {type(scheduler).__name__}"
            )
        modes = [(m, m.training) for m in model.modules()]
        model.train()
        step, epoch, place = 0, 0, 0
        item = done.get(name)
        if item is not None:
            step, epoch, place = (int(item.values[k]) for k in ("step", "epoch", "place"))
            _restore(item, model, optimizer, scheduler)
        try:
            with torch.enable_grad():
                while step < self.steps:
                    with seeded(f"{name} {epoch}"):
                        fresh = iter(batches(self.data if self.data is not None else data, "'fine_tune'"))
                        if place:
                            for _ in itertools.islice(fresh, place):
                                pass
                            assert item is not None
                            torch.set_rng_state(item.tensors["random"])
                        for batch in fresh:
                            optimizer.zero_grad()
                            loss = checked_loss(
                                self.loss(model, batch), place, differentiable=True, argument="loss"
                            )
                            loss.backward()  # type: ignore[no-untyped-call]
                            if self.clip is not None:
                                nn.utils.clip_grad_norm_(trained, self.clip)
                            optimizer.step()
                            pruner.step()
                            if scheduler is not None:
                                scheduler.step()
                            step, place = step + 1, place + 1
                            if step % self.every == 0 or step == self.steps:
                                values = {"step": step, "epoch": epoch, "place": place}
                                _keep(done, name, values, model, optimizer, scheduler)
                            if step == self.steps:
                                break
                    epoch, place = epoch + 1, 0
        finally:
            for module, mode in modes:
                module.training = mode
        optimizer.zero_grad()


def _keep(
    done: Checkpoint,
    name: str,
    values: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> None:
    tensors = {f"model/{k}": t for k, t in model.state_dict().items()}
    tensors["random"] = torch.get_rng_state()
    numbers: dict[str, dict[str, Any]] = {}
    state = optimizer.state_dict()
    for index, own in state["state"].items():
        for key, value in own.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                numbers.setdefault(str(index), {})[key] = value
    groups = [{k: _number(v) for k, v in g.items()} for g in state["param_groups"]]
    plan = None if scheduler is None else {k: v for k, v in scheduler.state_dict().items() if _is_plain(v)}
    done.put(name, {**values, "groups": groups, "numbers": numbers, "scheduler": plan}, tensors)


def _restore(item: Item, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    prefix = "model/"
    model.load_state_dict(
        {k.removeprefix(prefix): t for k, t in item.tensors.items() if k.startswith(prefix)}
    )
    state: dict[int, dict[str, Any]] = {int(i): dict(own) for i, own in item.values["numbers"].items()}
    for key, tensor in item.tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/", 2)
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": item.values["groups"]})
    if scheduler is not None:
        scheduler.load_state_dict(item.values["scheduler"])


def _number(value: Any) -> Any:
    """As JSON takes it; a learning rate may be a tensor."""
    return value.item() if isinstance(value, torch.Tensor) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
