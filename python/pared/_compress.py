"""`pared.compress`: from a trained model to a fast one in one call, within a bound on the metric."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pared._accelerate import accelerate
from pared._report import Report, report
from pared.pruning.calibration import LossFn, batches
from pared.pruning.importance import Importance
from pared.pruning.oneshot import check_sparsity, prune
from pared.pruning.patterns import parse_pattern
from pared.pruning.pruner import Pruner
from pared.pruning.reconstruct import check_repeatable
from pared.pruning.targets import Filters, unwrap
from pared.schedules import OneShot

__all__ = ["Compressed", "Step", "compress"]

_LADDER = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class Step:
    """One sparsity that was tried; `accepted` where the metric kept its bound."""

    sparsity: float
    metric: float
    accepted: bool


@dataclass(frozen=True)
class Compressed:
    """The result of `pared.compress`. ``print(result)`` shows the steps and the accelerated layers.

    Attributes
    ----------
    model : the accelerated model; `pared.save` takes it. `pruned` : the same as plain torch modules.
    baseline, bound : metric before, and what it must not fall below.
    metric : of `model`. `sparsity` : of its pruned weights.
    steps : what was tried, in order.
    report : `pared.report` of the model.
    """

    model: nn.Module
    pruned: nn.Module
    baseline: float
    bound: float
    metric: float
    sparsity: float
    steps: tuple[Step, ...]
    report: Report

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; without the models."""
        return {
            "baseline": self.baseline,
            "bound": self.bound,
            "metric": self.metric,
            "sparsity": self.sparsity,
            "steps": [asdict(step) for step in self.steps],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The result as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def __rich__(self) -> Table:
        table = Table(title=f"metric {self.baseline:.4g} -> {self.metric:.4g} at {self.sparsity:.0%} zeros")
        for heading in ("zeros", "metric", f"at least {self.bound:.4g}"):
            table.add_column(heading, justify="right")
        for step in self.steps:
            table.add_row(f"{step.sparsity:.0%}", f"{step.metric:.4g}", "yes" if step.accepted else "no")
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110, color_system=None).print(self)
        return f"{out.getvalue().rstrip()}\n{self.report}"


def compress(
    model: nn.Module,
    data: Iterable[Any],
    evaluate: Callable[[nn.Module], float],
    *,
    max_drop: float = 0.01,
    fine_tune: Callable[[nn.Module, Pruner], object] | None = None,
    sparsities: Sequence[float] = _LADDER,
    pattern: str = "unstructured",
    importance: Importance | None = None,
    loss_fn: LossFn | None = None,
    example_inputs: Any = None,
    precision: str = "float32",
    include: Filters = None,
    exclude: Filters = None,
    **options: Any,
) -> Compressed:
    """Find the sparsest model that keeps the metric, and make it fast. `model` itself is not changed.

    Parameters
    ----------
    data : batches that can be gone through several times, as in `pared.prune`.
    evaluate : ``model -> float``, higher is better; also of the accelerated model.
    max_drop : how far the metric may fall, absolute.
    fine_tune : ``(model, pruner)``; trains after each pruning, and calls ``pruner.step()`` after each step of
        the optimiser so that zeros stay. None: nothing is trained.
    sparsities : to choose from, ascending; found by bisection, each from the weights of the model as it is.
        N:M has only its own.
    importance : as in `pared.prune`; None: "sparsegpt", or "magnitude" with `fine_tune`.
    example_inputs : as in `pared.accelerate`; None: the inputs of the first batch.
    precision, options : of `pared.accelerate`.
    pattern, loss_fn, include, exclude : as in `pared.prune`.

    Returns
    -------
    Compressed : the fast model, the plain pruned one, and what was tried. Where no sparsity keeps the bound,
        the model as it is, accelerated.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came.
    """
    module = unwrap(model)
    check_repeatable(data, "'compress'")
    first = next(iter(batches(data, "'compress'")))
    if isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or not max_drop >= 0:
        raise ValueError(f"max_drop: expected a number >= 0, got {max_drop!r}")
    parsed = parse_pattern(pattern)
    ladder = (
        [parsed.rule_sparsity] if parsed.kind == "nm" else [check_sparsity(s, parsed) for s in sparsities]
    )
    if not ladder or any(a >= b for a, b in itertools.pairwise(ladder)):
        raise ValueError(f"sparsities: expected ascending numbers in [0, 1), got {sparsities!r}")
    criterion = importance if importance is not None else ("magnitude" if fine_tune else "sparsegpt")
    inputs = _inputs(module, first) if example_inputs is None else example_inputs
    baseline = _metric(evaluate, module)
    bound = baseline - max_drop
    steps: list[Step] = []
    kept: dict[float, nn.Module] = {}

    def holds(sparsity: float) -> bool:
        candidate = copy.deepcopy(module)
        prune(
            candidate,
            sparsity,
            pattern=pattern,
            importance=criterion,
            data=data,
            loss_fn=loss_fn,
            include=include,
            exclude=exclude,
        )
        if fine_tune is not None:
            # The masks are the zeros that are there: a pruner of a pruned model holds them.
            pruner = Pruner(candidate, OneShot(0.0), include=include, exclude=exclude)
            fine_tune(candidate, pruner)
            pruner.finalize()
        metric = _metric(evaluate, candidate)
        steps.append(Step(sparsity, metric, metric >= bound))
        if steps[-1].accepted:
            kept[sparsity] = candidate
        return steps[-1].accepted

    low, high = -1, len(ladder)  # ladder[low] holds, ladder[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        if holds(ladder[middle]):
            low = middle
        else:
            high = middle
    # The accelerated model computes the same but for rounding; where that breaks the bound, the next one is
    # taken.
    for sparsity in (*sorted(kept, reverse=True), 0.0):
        pruned = kept.get(sparsity, module)
        fast = accelerate(pruned, inputs, precision=precision, **options)
        metric = _metric(evaluate, fast)
        if metric >= bound or sparsity == 0.0:
            break
    if pruned is module:
        pruned = copy.deepcopy(module)
    return Compressed(fast, pruned, baseline, bound, metric, sparsity, tuple(steps), report(fast))


def _metric(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    value = float(evaluate(model))
    if value != value:
        raise ValueError("evaluate: expected a number, higher is better, got NaN")
    return value


def _inputs(model: nn.Module, batch: Any) -> Any:
    """The model's arguments in a batch, as `pared.accelerate` takes them."""
    if isinstance(batch, torch.Tensor):
        return batch
    signature = inspect.signature(model.forward)
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k in signature.parameters}
    if isinstance(batch, tuple | list) and batch:
        try:
            signature.bind(*batch)
        except TypeError:
            return batch[0]
        return tuple(batch)
    raise TypeError(f"data: expected batches of tensors, tuples or dicts, got {type(batch).__name__}")
