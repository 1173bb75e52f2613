"""`pared.search_budget`: how sparse each layer should be, under a budget of parameters, products or time.

For each layer and each of a few sparsities there is an error and a cost. One option a layer, the smallest sum
of errors whose costs stay within the budget: a knapsack, solved exactly. Yang et al., "NetAdapt"
(arXiv 1804.03230) measures the time of each option where it will run; Frantar and Alistarh, "SPDY"
(arXiv 2201.13096) solves the choice by dynamic programming.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn

from pared._accelerate import layer_seconds
from pared._cost import model_seconds, weight_uses
from pared._errors import (
    check_ascending,
    check_budget,
    check_callable,
    check_choice,
    check_indent,
    check_metric,
)
from pared._inputs import examples, first_run
from pared._report import _seconds
from pared._surgery import copy_model
from pared.pruning import calibration, obs
from pared.pruning.calibration import LossFn, Observer
from pared.pruning.importance import Importance, selection_key
from pared.pruning.masks import check_finite, choose, score
from pared.pruning.oneshot import Plan, bake_targets, check_sparsity, make_plan, observe, prune
from pared.pruning.reconstruct import check_repeatable
from pared.pruning.targets import Filters, Target, unwrap

__all__ = ["BudgetPlan", "LayerPlan", "Options", "knapsack", "measure_options", "search_budget"]

COSTS = ("parameters", "macs", "time")
LEVELS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
# Points of (cost, error) that the search keeps; beyond it, the best of each interval of costs.
_FRONT = 20_000
# Hessians that are held at once, bytes.
_MEMORY = 2**31

Floats = NDArray[np.float64]


# ---------------------------------------------------------------- the knapsack


def knapsack(tables: Sequence[tuple[Floats, Floats]], budget: float, *, limit: int = _FRONT) -> list[int]:
    """One option of each table, so that the costs sum to at most `budget` and the errors to the least.

    The set of all (cost, error) that no other one beats in both is merged with one table after the other.
    While it has at most `limit` points, the answer is exact; a larger one is thinned to the best point of
    each of `limit` intervals of cost. Costs stay what they are, so the budget holds either way.

    Parameters
    ----------
    tables : for each item its options' costs and errors, finite, the costs >= 0.
    budget : in the unit of the costs.

    Returns
    -------
    The chosen option of each table; with equal errors the cheaper sum.

    Raises
    ------
    ValueError : no choice is within the budget.
    """
    # What the rest costs at least: a point that leaves less can go at once.
    rest = [0.0, *itertools.accumulate(float(costs.min()) for costs, _ in reversed(tables))][::-1]
    if rest[0] > budget:
        raise ValueError(
            f"budget: expected at least {rest[0]:.6g}, what the cheapest options cost, got {budget:.6g}"
        )
    cost, error = np.zeros(1), np.zeros(1)
    steps: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for (costs, errors), least in zip(tables, rest[1:], strict=True):
        sums = (cost[:, None] + costs).ravel()
        losses = (error[:, None] + errors).ravel()
        order = np.lexsort((losses, sums))
        # Rounding must not take the last way out: the cheapest point always stays.
        order = order[(sums[order] + least <= budget) | (np.arange(order.size) == 0)]
        kept = losses[order]
        best = np.minimum.accumulate(kept)
        front = order[np.concatenate([[True], kept[1:] < best[:-1]])]
        if front.size > limit:
            bins = (sums[front] - sums[front[0]]) * (limit / (sums[front[-1]] - sums[front[0]]))
            last = np.concatenate([np.diff(bins.astype(np.int64)) > 0, [True]])  # errors fall along the front
            last[0] = True
            front = front[last]
        cost, error = sums[front], losses[front]
        steps.append((front // costs.size, front % costs.size))
    at = int(np.flatnonzero(cost <= budget)[-1]) if bool((cost <= budget).any()) else 0
    chosen = []
    for before, option in reversed(steps):
        chosen.append(int(option[at]))
        at = int(before[at])
    return chosen[::-1]


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a plan.

    Attributes
    ----------
    name, type, shape : of the tensor and its module.
    sparsity : share of its weights to remove. `error` : what that costs in accuracy, by the search's measure.
    before, cost : what the layer costs now and with that, in the unit of the plan.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    sparsity: float
    error: float
    before: float
    cost: float


@dataclass(frozen=True)
class BudgetPlan:
    """The result of `pared.search_budget`: a sparsity for each layer.

    ``pared.prune(model, plan.sparsities, ...)`` applies it.

    Attributes
    ----------
    unit : "parameters" (non-zero), "macs" or "time" (seconds).
    budget : that the whole model may cost. `before` : that it costs now. `cost` : that it costs by the plan,
        all that no plan changes included; never above `budget`.
    error : sum of the layers' errors. `measure` : what they are.
    uniform : sparsity, cost and error of the best plan within the budget with the same sparsity in all
        layers; None where there is none.
    layers : one `LayerPlan` a tensor, in registration order.
    pattern, importance : that the search pruned with.
    """

    unit: str
    budget: float
    before: float
    cost: float
    error: float
    measure: str
    uniform: tuple[float, float, float] | None
    layers: tuple[LayerPlan, ...]
    pattern: str
    importance: str

    @property
    def sparsities(self) -> dict[str, float]:
        """Sparsity by tensor name, as `pared.prune` takes it; 0 for layers that stay as they are."""
        return {layer.name: layer.sparsity for layer in self.layers}

    @property
    def sparsity(self) -> float:
        """Of all the plan's layers together."""
        sizes = [math.prod(layer.shape) for layer in self.layers]
        removed = sum(n * layer.sparsity for n, layer in zip(sizes, self.layers, strict=True))
        return removed / max(1, sum(sizes))

    def to_json(self, indent: int | None = 2) -> str:
        """The plan as JSON text."""
        return json.dumps({**asdict(self), "sparsity": self.sparsity}, indent=check_indent(indent))

    def __rich__(self) -> Table:
        table = Table(
            title=f"{_amount(self.before, self.unit)} -> {_amount(self.cost, self.unit)} of at most "
            f"{_amount(self.budget, self.unit)} {self.unit}",
            caption=self._caption(),
            caption_justify="left",
        )
        table.add_column("layer", overflow="fold")
        for heading in ("shape", "zeros", "before", "after", "error"):
            table.add_column(heading, justify="right", no_wrap=True)
        for x in self.layers:
            table.add_row(
                x.name,
                "x".join(map(str, x.shape)),
                f"{x.sparsity:.0%}",
                _amount(x.before, self.unit),
                _amount(x.cost, self.unit),
                f"{x.error:.2e}",
            )
        return table

    def _caption(self) -> str:
        text = f"sum of errors ({self.measure}): {self.error:.3g}"
        if self.uniform is None:
            return text + "; no single sparsity for all layers is within the budget"
        return text + f"; with {self.uniform[0]:.0%} in every layer {self.uniform[2]:.3g}"

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110, color_system=None).print(self)
        return out.getvalue().rstrip()


def _amount(value: float, unit: str) -> str:
    if unit == "time":
        return _seconds(value)
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.0f}"


@dataclass(frozen=True)
class LayerOptions:
    """What a layer may be: for each sparsity its cost and its error."""

    name: str
    type: str
    shape: tuple[int, ...]
    before: float
    sparsities: tuple[float, ...]
    costs: tuple[float, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Options:
    """Everything that has been measured: a plan for any budget needs nothing else.

    Attributes
    ----------
    unit, measure, pattern, importance : as in `BudgetPlan`.
    rest : what the model costs besides the layers.
    layers : of the options.
    """

    unit: str
    measure: str
    pattern: str
    importance: str
    rest: float
    layers: tuple[LayerOptions, ...]

    @property
    def before(self) -> float:
        """What the whole model costs as it is."""
        return self.rest + sum(layer.before for layer in self.layers)

    @property
    def least(self) -> float:
        """The smallest share of `before` that the options reach."""
        return (self.rest + sum(min(layer.costs) for layer in self.layers)) / self.before

    def plan(self, budget: float) -> BudgetPlan:
        """The best plan that costs at most the share `budget` of what the model costs now."""
        budget = check_budget(budget)
        if not self.before:
            raise ValueError(f"cost: expected a model that costs some {self.unit}, got one that costs none")
        if self.least > budget:
            raise ValueError(
                f"budget: expected at least {math.ceil(self.least * 1e4) / 1e4:g} of the model's "
                f"{self.unit}, which the largest sparsities leave, got {budget:g}"
            )
        room = budget * self.before - self.rest
        tables = [(np.array(x.costs), np.array(x.errors)) for x in self.layers]
        chosen = knapsack(tables, room)
        if (
            self.rest + sum(x.costs[i] for x, i in zip(self.layers, chosen, strict=True))
            > budget * self.before
        ):
            # By a rounding of the sum: seconds are no integers.
            chosen = knapsack(tables, room - 1e-12 * self.before)
        uniform = self._uniform(room)
        if uniform is not None and uniform[2] < sum(
            x.errors[i] for x, i in zip(self.layers, chosen, strict=True)
        ):
            # Only where the search was thinned.
            chosen = [self.layers[0].sparsities.index(uniform[0])] * len(self.layers)
        layers = tuple(
            LayerPlan(x.name, x.type, x.shape, x.sparsities[i], x.errors[i], x.before, x.costs[i])
            for x, i in zip(self.layers, chosen, strict=True)
        )
        return BudgetPlan(
            self.unit,
            budget * self.before,
            self.before,
            self.rest + sum(x.cost for x in layers),
            sum(x.error for x in layers),
            self.measure,
            uniform,
            layers,
            self.pattern,
            self.importance,
        )

    def _uniform(self, room: float) -> tuple[float, float, float] | None:
        fits = []
        for i, sparsity in enumerate(self.layers[0].sparsities):
            cost = sum(x.costs[i] for x in self.layers)
            if cost <= room:
                fits.append((sum(x.errors[i] for x in self.layers), sparsity, self.rest + cost))
        if not fits:
            return None
        error, sparsity, cost = min(fits)
        return sparsity, cost, error

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Options:
        """What `to_dict` gave."""
        fields: list[dict[str, Any]] = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in layer.items()} for layer in data["layers"]
        ]
        return cls(**{**data, "layers": tuple(LayerOptions(**layer) for layer in fields)})


# ---------------------------------------------------------------- the search


def search_budget(
    model: nn.Module,
    budget: float,
    *,
    cost: str = "parameters",
    levels: Sequence[float] = LEVELS,
    data: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    example_inputs: Any = None,
    pattern: str = "unstructured",
    importance: Importance = "magnitude",
    loss_fn: LossFn | None = None,
    precision: str = "float32",
    include: Filters = None,
    exclude: Filters = None,
    keep_first: int = 0,
    keep_last: int = 0,
) -> BudgetPlan:
    """The sparsity of each layer that keeps the sum of errors smallest within a budget. Nothing is changed.

    Parameters
    ----------
    model : as in `pared.prune`.
    budget : share of what the model costs now that it may cost afterwards, in (0, 1]: 0.5 is half.
    cost : "parameters", the non-zero ones; "macs", products with weights that are not zero, for one pass over
        the example inputs; "time", seconds of that pass on this machine: each layer is packed at each level,
        timed against the dense one as `pared.accelerate` does, and costs what the faster of the two takes.
    levels : sparsities that a layer may have; 0 keeps it as it is. N:M has only 0 and its own.
    data : batches. A layer's error is then ``|y - y'|^2 / |y|^2`` of its outputs, from the second moments of
        its inputs, in one pass; without data ``|w - w'|^2 / |w|^2`` of its weight.
    evaluate : ``model -> float``, higher is better: a layer's error is then how far it falls when that layer
        alone is pruned. One call a layer and level.
    example_inputs : as in `pared.accelerate`, for "macs" and "time".
    pattern, importance, loss_fn, include, exclude, keep_first, keep_last : as in `pared.prune`; each layer is
        pruned for itself.
    precision : of the kernels that "time" is measured with, as in `pared.accelerate`.

    Returns
    -------
    BudgetPlan : ``pared.prune(model, plan.sparsities, ...)`` applies it.

    Raises
    ------
    TypeError, ValueError : naming the argument; a budget below what the largest levels leave names the least.

    Notes
    -----
    Errors of single layers are taken to add up. The plan never costs more than the budget, by the table that
    was measured, and its error is never above that of one sparsity for all layers within the same budget.
    Yang et al., "NetAdapt" (arXiv 1804.03230); Frantar and Alistarh, "SPDY" (arXiv 2201.13096).
    """
    check_budget(budget)
    return measure_options(
        model,
        cost=cost,
        levels=levels,
        data=data,
        evaluate=evaluate,
        example_inputs=example_inputs,
        pattern=pattern,
        importance=importance,
        loss_fn=loss_fn,
        precision=precision,
        include=include,
        exclude=exclude,
        keep_first=keep_first,
        keep_last=keep_last,
    ).plan(budget)


def measure_options(
    model: nn.Module,
    *,
    cost: str = "parameters",
    levels: Sequence[float] = LEVELS,
    data: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    example_inputs: Any = None,
    pattern: str = "unstructured",
    importance: Importance = "magnitude",
    scope: str | None = None,
    loss_fn: LossFn | None = None,
    precision: str = "float32",
    include: Filters = None,
    exclude: Filters = None,
    keep_first: int = 0,
    keep_last: int = 0,
) -> Options:
    """The costs and errors of every layer at every level, as `search_budget` describes them.

    `scope` : "layer" or "row", in which weights compete; None: as `pared.prune` has it for the criterion.
    """
    check_choice("cost", cost, COSTS)
    if cost != "parameters" and example_inputs is None:
        raise ValueError(f"example_inputs: expected inputs of the model, which cost={cost!r} needs, got None")
    plan = make_plan(
        copy_model(unwrap(model)),
        pattern,
        importance,
        scope,
        data,
        loss_fn,
        include,
        exclude,
        keep_first,
        keep_last,
    )
    if plan.scope == "global":
        plan = dataclasses.replace(plan, scope="layer")
    chosen = _check_levels(levels, plan)
    inputs = [] if cost == "parameters" else examples(example_inputs)
    with calibration.frozen(plan.model):
        for example in inputs:
            first_run(plan.model, example)
    check_repeatable(data, "'search_budget'")
    for target in plan.targets:
        check_finite(target, target.weight)
    if evaluate is not None:
        check_callable("evaluate", evaluate, "(model) -> number")
    if hasattr(plan.criterion, "reconstruct") and not hasattr(plan.criterion, "settle"):
        raise ValueError(
            "importance: expected a criterion that scores or settles single layers, got "
            f"{plan.criterion.name!r}"
        )
    bake_targets(plan.targets)
    dense = [int(torch.count_nonzero(t.weight)) for t in plan.targets]
    pruned = _Pruned(plan, chosen, data, loss_fn)
    if evaluate is not None:
        errors, counts = _drops(plan, pruned, evaluate)
        measure = "fall of the metric"
    else:
        errors, counts = pruned.errors()
        measure = "relative squared output error" if data is not None else "relative squared weight error"
    if cost == "time":
        before, costs, rest = _times(plan, pruned, example_inputs, precision)
    else:
        uses = dict.fromkeys((t.name for t in plan.targets), 1.0)
        rest = 0.0
        if cost == "macs":
            every = weight_uses(plan.model, inputs)
            uses = {t.name: every.pop(t.name, (0.0, 0))[0] for t in plan.targets}
            rest = sum(n * nonzero for n, nonzero in every.values())
        else:
            own = {id(t.tensor) for t in plan.targets}
            rest = float(
                sum(int(torch.count_nonzero(p)) for p in plan.model.parameters() if id(p) not in own)
            )
        before = [uses[t.name] * n for t, n in zip(plan.targets, dense, strict=True)]
        costs = [[uses[t.name] * n for n in row] for t, row in zip(plan.targets, counts, strict=True)]
    return Options(
        cost,
        measure,
        str(plan.pattern),
        plan.criterion.name,
        rest,
        tuple(
            LayerOptions(t.name, t.type, tuple(t.tensor.shape), b, chosen, tuple(c), tuple(e))
            for t, b, c, e in zip(plan.targets, before, costs, errors, strict=True)
        ),
    )


def _check_levels(levels: object, plan: Plan) -> tuple[float, ...]:
    if plan.pattern.kind == "nm":
        return (0.0, plan.pattern.rule_sparsity)
    return check_ascending("levels", levels, lambda s: check_sparsity(s, plan.pattern, "levels"))


class _Pruned:
    """The weights of the targets at every level, one target at a time: nothing but the model is held."""

    def __init__(self, plan: Plan, levels: Sequence[float], data: object, loss_fn: LossFn | None) -> None:
        self.plan, self.levels, self.data, self.loss_fn = plan, levels, data, loss_fn
        self.settles = hasattr(plan.criterion, "reconstruct")
        self.observed = {} if self.settles else observe(plan, data, loss_fn)

    def weights(
        self, target: Target, hessians: Sequence[torch.Tensor] | None = None
    ) -> Iterator[torch.Tensor]:
        """The weight at each level."""
        plan, w = self.plan, target.weight
        if self.settles:
            criterion: Any = plan.criterion
            matrices = obs.Matrices(target)
            assert hessians is not None
            for level in self.levels:
                parts = [
                    criterion.settle(part.to(h.dtype), h, matrices, level, plan.pattern) if level else part
                    for part, h in zip(matrices.split(w), hessians, strict=True)
                ]
                yield matrices.join(parts).to(w.dtype)
            return
        key = selection_key(plan.criterion)
        scored = score(plan.criterion, target, plan.pattern, observed=self.observed.get(target.name))
        for level in self.levels:
            mask = choose([scored], key, level, plan.pattern, plan.scope)[0] if level else None
            yield w if mask is None else w * mask

    def each(self) -> Iterator[tuple[Target, list[torch.Tensor] | None]]:
        """The targets, with what the data says of their inputs: as many at a time as memory allows."""
        if self.data is None:
            yield from ((t, None) for t in self.plan.targets)
            return
        chunk: list[Target] = []
        for target in [*self.plan.targets, None]:
            used = sum(obs.Hessian.nbytes(t) for t in chunk)
            if chunk and (target is None or used + obs.Hessian.nbytes(target) > _MEMORY):
                observers: dict[str, Observer] = {t.name: obs.Hessian(t) for t in chunk}
                calibration.collect(
                    self.plan.model, chunk, observers, self.data, self.loss_fn, "'search_budget'"
                )
                for t in chunk:
                    yield t, observers.pop(t.name).result()
                chunk = []
            if target is not None:
                chunk.append(target)

    def errors(self) -> tuple[list[list[float]], list[list[int]]]:
        """Relative squared errors, and non-zeros, of each target at each level."""
        errors, counts = [], []
        for target, hessians in self.each():
            matrices = obs.Matrices(target)
            before = matrices.split(target.weight.double())
            if hessians is None:
                hessians = [torch.eye(1, dtype=torch.float64, device="cpu")] * len(before)
                whole = sum(float(w.square().sum()) for w in before)
            else:
                whole = sum(
                    obs.output_error(w, torch.zeros_like(w), h) for w, h in zip(before, hessians, strict=True)
                )
            row, nonzeros = [], []
            for new in self.weights(target, hessians):
                parts = zip(matrices.split(new.double()), before, hessians, strict=True)
                if self.data is None:
                    lost = sum(float((a - b).square().sum()) for a, b, _ in parts)
                else:
                    lost = sum(obs.output_error(a, b, h) for a, b, h in parts)
                row.append(max(lost, 0.0) / whole if whole > 0 else 0.0)
                nonzeros.append(int(torch.count_nonzero(new)))
            errors.append(row)
            counts.append(nonzeros)
        return errors, counts


def _drops(
    plan: Plan, pruned: _Pruned, evaluate: Callable[[nn.Module], float]
) -> tuple[list[list[float]], list[list[int]]]:
    """How far the metric falls with one target pruned alone, and non-zeros, at each level."""

    def metric() -> float:
        return check_metric(evaluate(plan.model))

    baseline = metric()
    errors, counts = [], []
    for target, hessians in pruned.each() if pruned.settles else ((t, None) for t in plan.targets):
        row, nonzeros = [], []
        before = target.tensor.detach().clone()
        for level, new in zip(
            pruned.levels, [w.clone() for w in pruned.weights(target, hessians)], strict=True
        ):
            with torch.no_grad():
                target.tensor.copy_(new)
            row.append(max(0.0, baseline - metric()) if level else 0.0)
            nonzeros.append(int(torch.count_nonzero(new)))
        with torch.no_grad():
            target.tensor.copy_(before)
        errors.append(row)
        counts.append(nonzeros)
    return errors, counts


def _times(
    plan: Plan, pruned: _Pruned, example_inputs: Any, precision: str
) -> tuple[list[float], list[list[float]], float]:
    """Seconds of each target's layer dense, and at each level; and of the rest of the model.

    The time depends on how many zeros there are and hardly on which, so the masks are magnitude's.
    """
    inputs = examples(example_inputs)
    seconds: list[dict[str, tuple[float, float]]] = []
    for level in pruned.levels:
        candidate = copy_model(plan.model)
        if level:
            shares = dict.fromkeys((t.name for t in plan.targets), level)
            prune(candidate, shares, pattern=str(plan.pattern), include=[*shares])
        seconds.append(layer_seconds(candidate, example_inputs, precision))
    before, costs = [], []
    for target in plan.targets:
        own = [s[target.layer] for s in seconds if target.layer in s]
        if len(own) < len(seconds):  # no kernel takes it: the time is part of the rest, whatever is removed
            before.append(0.0)
            costs.append([0.0] * len(seconds))
            continue
        dense = float(np.median([d for d, _ in own]))
        before.append(dense)
        costs.append([dense / max(1.0, speedup) for _, speedup in own])
    return before, costs, max(0.0, model_seconds(plan.model, inputs) - sum(before))
