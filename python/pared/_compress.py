"""`pared.compress`: from a trained model to a fast one in one call, within a bound on the metric."""

from __future__ import annotations

import copy
import inspect
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from pared._accelerate import accelerate
from pared._accelerate.model import BUDGET
from pared._checkpoint import Checkpoint, Item, fingerprint
from pared._errors import (
    check_ascending,
    check_callable,
    check_choice,
    check_indent,
    check_metric,
    check_number,
    check_path,
    choice_error,
)
from pared._finetune import FineTune, seeded
from pared._io import load, save
from pared._report import Report, report
from pared._search import COSTS, BudgetPlan, Options, measure_options
from pared.pruning.calibration import LossFn, arguments, batches, check_loss_fn
from pared.pruning.importance import Importance, resolve
from pared.pruning.oneshot import check_sparsity, prune
from pared.pruning.patterns import Pattern, parse_pattern
from pared.pruning.pruner import Pruner
from pared.pruning.reconstruct import OBC, SparseGPT, check_repeatable
from pared.pruning.targets import Filters, collect, unwrap
from pared.quant.report import QuantReport
from pared.quant.weights import put_records, simulate, take_records
from pared.quant.weights import quantize as quantize_model
from pared.schedules import OneShot

__all__ = ["Compressed", "Step", "compress"]

_LADDER = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class Step:
    """One thing that was tried; `accepted` where the metric kept its bound, rolled back where it did not.

    Attributes
    ----------
    what : "prune" (with fine-tuning), "quantize" or "accelerate".
    sparsity : of the rung of the ladder. `metric` : what came out.
    """

    what: str
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
    metric : of `model`. `sparsity` : the rung of the ladder that it is from.
    steps : what was tried, in order.
    report : `pared.report` of the model.
    plan : with `search`, what each layer was pruned to. `quantized` : with `quantize`, what came of it; None
        where it was rolled back.
    """

    model: nn.Module
    pruned: nn.Module
    baseline: float
    bound: float
    metric: float
    sparsity: float
    steps: tuple[Step, ...]
    report: Report
    plan: BudgetPlan | None = None
    quantized: QuantReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; without the models."""
        return {
            "baseline": self.baseline,
            "bound": self.bound,
            "metric": self.metric,
            "sparsity": self.sparsity,
            "steps": [asdict(step) for step in self.steps],
            "plan": None if self.plan is None else json.loads(self.plan.to_json()),
            "quantized": None if self.quantized is None else self.quantized.to_dict(),
            "report": json.loads(self.report.to_json()),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The result as JSON text."""
        return json.dumps(self.to_dict(), indent=check_indent(indent))

    def __rich__(self) -> Table:
        table = Table(title=f"metric {self.baseline:.4g} -> {self.metric:.4g} at {self.sparsity:.0%} zeros")
        table.add_column("step")
        for heading in ("zeros", "metric", f"at least {self.bound:.4g}"):
            table.add_column(heading, justify="right")
        for step in self.steps:
            accepted = "yes" if step.accepted else "no"
            table.add_row(step.what, f"{step.sparsity:.0%}", f"{step.metric:.4g}", accepted)
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110, color_system=None).print(self)
        parts = [out.getvalue().rstrip(), self.plan, self.quantized, self.report]
        return "\n".join(str(part) for part in parts if part is not None)


def compress(
    model: nn.Module,
    data: Iterable[Any],
    evaluate: Callable[[nn.Module], float],
    *,
    max_drop: float = 0.01,
    search: str | None = None,
    sparsities: Sequence[float] = _LADDER,
    fine_tune: Callable[[nn.Module, Pruner], object] | FineTune | None = None,
    quantize: bool | Mapping[str, Any] = False,
    pattern: str = "unstructured",
    importance: Importance | None = None,
    loss_fn: LossFn | None = None,
    example_inputs: Any = None,
    precision: str = "float32",
    include: Filters = None,
    exclude: Filters = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Compressed:
    """Find the sparsest model that keeps the metric, and make it fast. `model` itself is not changed.

    Search, prune, fine-tune, quantise, accelerate: what breaks the bound on the metric is rolled back.

    Parameters
    ----------
    data : batches that can be gone through several times, as in `pared.prune`.
    evaluate : ``model -> float``, higher is better; also of the accelerated model.
    max_drop : how far the metric may fall, absolute.
    search : None: what competes is the criterion's own scope. "parameters", "macs" or "time": a sparsity for
        each layer by `pared.search_budget`, measured once (for criteria that rewrite weights with Wanda's
        masks); `sparsities` are then the shares of that to save.
    sparsities : to choose from, ascending; found by bisection, each from the weights of the model as it is.
        N:M has only its own.
    fine_tune : trains after each pruning. A `pared.training.FineTune`, or a callable ``(model, pruner)`` that
        calls ``pruner.step()`` after each step of the optimiser so that zeros stay. None: nothing is trained.
    quantize : True, or options of `pared.quantize`: the pruned model is quantised (``bits="auto"``) and
        accelerated with 8 bits, where the metric allows it.
    importance : as in `pared.prune`; None: "sparsegpt", or "magnitude" with `fine_tune`.
    example_inputs : as in `pared.accelerate`; None: the inputs of the first batch.
    precision, options : of `pared.accelerate`; "float32" becomes "int8" for a model that was quantised.
    pattern, loss_fn, include, exclude : as in `pared.prune`.
    checkpoint : a folder that keeps everything that is done. A call with the same arguments that finds it
        goes on where it was killed, at whatever point, and ends with what it would have ended with; once all
        is done, it returns the result at once. The folder stays: it is the caller's to remove.

    Returns
    -------
    Compressed : the fast model, the plain pruned one, and what was tried. Where no sparsity keeps the bound,
        the model as it is, accelerated.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came.

    Notes
    -----
    Each step draws torch's random numbers from a seed of its own, so that the result does not depend on where
    a run was interrupted. Functions and data cannot be compared: that those are the same is up to the caller.
    """
    module = unwrap(model)
    check_repeatable(data, "'compress'")
    first = next(iter(batches(data, "'compress'")))
    check_callable("evaluate", evaluate, "(model) -> number")
    check_loss_fn(loss_fn)
    check_number("max_drop", max_drop)
    if search is not None:
        check_choice("search", search, COSTS, "None")
    check_choice("precision", precision, ("float32", *BUDGET))
    if checkpoint is not None:
        check_path("checkpoint", checkpoint, "or None")
    unknown = set(quantize) - set(_QUANTIZE) if isinstance(quantize, Mapping) else ()
    if unknown:
        raise choice_error("quantize", min(map(str, unknown)), _QUANTIZE)
    if not isinstance(quantize, bool | Mapping):
        raise TypeError(f"quantize: expected True, False or options, got {type(quantize).__name__}")
    if fine_tune is not None and not callable(fine_tune) and not isinstance(fine_tune, FineTune):
        raise TypeError(f"fine_tune: expected a FineTune or a callable, got {type(fine_tune).__name__}")
    if callable(fine_tune):
        check_callable("fine_tune", fine_tune, "(model, pruner), a FineTune or None")
    parsed = parse_pattern(pattern)
    ladder = _ladder(sparsities, parsed, search)
    criterion = importance if importance is not None else ("magnitude" if fine_tune else "sparsegpt")
    collect(module, include, exclude, 0, 0)  # errors before any work
    work = _Run(
        module,
        data,
        evaluate,
        max_drop=float(max_drop),
        search=search,
        fine_tune=fine_tune,
        quantize=None if quantize is False else {} if quantize is True else dict(quantize),
        pattern=pattern,
        importance=criterion,
        loss_fn=loss_fn,
        inputs=_inputs(module, first) if example_inputs is None else example_inputs,
        precision=precision,
        include=include,
        exclude=exclude,
        options=options,
        done=Checkpoint(
            checkpoint,
            {
                "model": fingerprint(module),
                "max_drop": float(max_drop),
                "search": search,
                "sparsities": ladder,
                "fine_tune": _described(fine_tune),
                "quantize": _described(quantize),
                "pattern": pattern,
                "importance": resolve(criterion).name,
                "precision": precision,
                "filters": _described([include, exclude]),
                "options": _described(options),
            },
            "checkpoint",
        ),
    )
    return work.run(ladder)


def _ladder(sparsities: Sequence[float], pattern: Pattern, search: str | None) -> list[float]:
    if pattern.kind == "nm" and search is None:
        return [pattern.rule_sparsity]
    plain = parse_pattern("unstructured")  # shares of a budget are not bound to the rule's sparsity
    kind = plain if search else pattern
    return [*check_ascending("sparsities", sparsities, lambda s: check_sparsity(s, kind, "sparsities"))]


# What is for the whole run, or is done by it.
_QUANTIZE = [
    name
    for name in inspect.signature(quantize_model).parameters
    if name not in ("model", "data", "include", "exclude", "resume")
]


def _described(value: Any) -> Any:
    """What of an argument can be compared between two processes, as JSON takes it."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(k): _described(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_described(v) for v in value]
    if isinstance(value, FineTune):
        return {k: _described(v) for k, v in vars(value).items() if k != "data"}
    if isinstance(value, re.Pattern):
        return value.pattern
    return getattr(value, "__qualname__", type(value).__qualname__)


class _Run:
    """One run of `compress`: every step looks first for what an earlier run has kept of it."""

    def __init__(
        self, model: nn.Module, data: Iterable[Any], evaluate: Callable[[nn.Module], float], **how: Any
    ) -> None:
        self.model, self.data, self.evaluate = model, data, evaluate
        self.max_drop: float = how["max_drop"]
        self.search: str | None = how["search"]
        self.fine_tune: Callable[[nn.Module, Pruner], object] | FineTune | None = how["fine_tune"]
        self.quantize: dict[str, Any] | None = how["quantize"]
        self.loss_fn: LossFn | None = how["loss_fn"]
        self.importance: Importance = how["importance"]
        self.pattern: str = how["pattern"]
        self.inputs: Any = how["inputs"]
        self.precision: str = how["precision"]
        self.filters: dict[str, Any] = {"include": how["include"], "exclude": how["exclude"]}
        self.options: dict[str, Any] = how["options"]
        self.done: Checkpoint = how["done"]
        self.steps: list[Step] = []
        self.kept: dict[float, nn.Module] = {0.0: model}
        self.measured: Options | None = None

    def run(self, ladder: Sequence[float]) -> Compressed:
        self.baseline = self.number("baseline", lambda: self.metric(self.model, "baseline"))
        self.bound = self.baseline - self.max_drop
        if self.search is not None:
            self.measured = self.measure(self.search)
            ladder = [s for s in ladder if 1.0 - s >= self.measured.least]
        low, high = -1, len(ladder)  # ladder[low] holds, ladder[high] does not
        while high - low > 1:
            middle = (low + high) // 2
            if self.holds(ladder[middle]):
                low = middle
            else:
                high = middle
        # The accelerated model computes the same but for rounding, which with 8 bits is more: where that
        # breaks the bound, the same without 8 bits is next, and then the next sparsity.
        for sparsity in sorted(self.kept, reverse=True):
            for quantized in (True, False) if self.quantize is not None else (False,):
                found = self.finish(sparsity, quantized)
                if found is not None:
                    return found
        raise AssertionError("the model as it is comes last, and is never refused")

    # What is kept

    def number(self, name: str, compute: Callable[[], float]) -> float:
        item = self.done.get(name)
        if item is None:
            value = compute()
            self.done.put(name, {"value": value})
            return value
        return float(item.values["value"])

    def measure(self, unit: str) -> Options:
        item = self.done.get("search")
        if item is not None:
            return Options.from_dict(item.values)
        # Masks alone: rewriting every layer at every level would cost ten times the pruning itself.
        settles = hasattr(resolve(self.importance), "reconstruct")
        with seeded("search"):
            found = measure_options(
                self.model,
                cost=unit,
                data=self.data,
                example_inputs=self.inputs,
                pattern=self.pattern,
                importance="wanda" if settles else self.importance,
                scope="layer" if settles else None,
                loss_fn=self.loss_fn,
                precision="int8" if self.quantize is not None else self.precision,
                **self.filters,
            )
        self.done.put("search", found.to_dict())
        return found

    # Steps

    def metric(self, model: nn.Module, name: str) -> float:
        with seeded(name):
            return check_metric(self.evaluate(model))

    def holds(self, sparsity: float) -> bool:
        """Prune (and fine-tune) a copy, and measure it."""
        name = f"candidate {sparsity:g}"
        item = self.done.get(name)
        if item is None:
            candidate = self.candidate(sparsity)
            metric = self.metric(candidate, name)
            self.done.put(name, {"metric": metric}, candidate.state_dict() if metric >= self.bound else None)
        else:
            metric, candidate = float(item.values["metric"]), copy.deepcopy(self.model)
            if metric >= self.bound:
                candidate.load_state_dict(item.tensors)
        self.steps.append(Step("prune", sparsity, metric, metric >= self.bound))
        if self.steps[-1].accepted:
            self.kept[sparsity] = candidate
        return self.steps[-1].accepted

    def candidate(self, sparsity: float) -> nn.Module:
        candidate = copy.deepcopy(self.model)
        name = f"prune {sparsity:g}"
        item = self.done.get(name)
        if item is not None:
            candidate.load_state_dict(item.tensors)
        else:
            shares = sparsity if self.measured is None else self.measured.plan(1.0 - sparsity).sparsities
            with seeded(name):
                prune(
                    candidate,
                    shares,
                    pattern=self.pattern,
                    importance=self.resumable(name),
                    data=self.data,
                    loss_fn=self.loss_fn,
                    **self.filters,
                )
            if self.fine_tune is not None:
                self.done.put(name, None, candidate.state_dict())
        if self.fine_tune is None:
            return candidate
        # The masks are the zeros that are there: a pruner of a pruned model holds them.
        pruner = Pruner(candidate, OneShot(0.0), **self.filters)
        name = f"fine-tune {sparsity:g}"
        if isinstance(self.fine_tune, FineTune):
            self.fine_tune.run(candidate, pruner, self.data, self.done, name)
        else:
            with seeded(name):
                self.fine_tune(candidate, pruner)
        pruner.finalize()
        return candidate

    def resumable(self, name: str) -> Importance:
        """Criteria that settle layer by layer keep what is done inside this run's folder."""
        folder = self.done.part(name)
        if folder is not None and self.importance in ("sparsegpt", "obc"):
            return (SparseGPT if self.importance == "sparsegpt" else OBC)(resume=folder)
        return self.importance

    def finish(self, sparsity: float, quantized: bool) -> Compressed | None:
        """Quantise and accelerate; None where that breaks the bound."""
        name = f"{sparsity:g}{' quantized' if quantized else ''}"
        pruned, found = self.kept[sparsity], None
        if quantized:
            pruned = copy.deepcopy(pruned)
            found = self.quantized(pruned, sparsity)
            if found is None:
                return None
        fast, metric = self.accelerated(pruned, name, quantized)
        accepted = metric >= self.bound
        self.steps.append(Step("accelerate", sparsity, metric, accepted))
        if not accepted and (sparsity > 0 or quantized):
            return None
        return Compressed(
            fast,
            copy.deepcopy(pruned) if pruned is self.model else pruned,
            self.baseline,
            self.bound,
            metric,
            sparsity,
            tuple(self.steps),
            report(fast),
            None if self.measured is None or not sparsity else self.measured.plan(1.0 - sparsity),
            found,
        )

    def quantized(self, model: nn.Module, sparsity: float) -> QuantReport | None:
        """Quantise `model` in place; None where the metric breaks the bound."""
        assert self.quantize is not None
        name = f"quantize {sparsity:g}"
        item = self.done.get(name)
        if item is None:
            how = {"example_inputs": self.inputs, "loss_fn": self.loss_fn, **self.quantize}
            with seeded(name):
                found = quantize_model(model, self.data, resume=self.done.part(name), **self.filters, **how)
            with simulate(model):
                metric = self.metric(model, name)
            state = take_records(model)
            values = {"metric": metric, "report": found.to_dict(), "records": state.values}
            tensors = {f"model/{k}": t for k, t in model.state_dict().items()}
            tensors.update({f"record/{k}": t for k, t in state.tensors.items()})
            self.done.put(name, values, tensors if metric >= self.bound else None)
        else:
            metric, found = float(item.values["metric"]), QuantReport.from_dict(item.values["report"])
            if metric >= self.bound:
                parts = {
                    prefix: {
                        k.removeprefix(prefix): t for k, t in item.tensors.items() if k.startswith(prefix)
                    }
                    for prefix in ("model/", "record/")
                }
                model.load_state_dict(parts["model/"])
                put_records(model, Item(item.values["records"], parts["record/"]))
        self.steps.append(Step("quantize", sparsity, metric, metric >= self.bound))
        return found if metric >= self.bound else None

    def accelerated(self, pruned: nn.Module, name: str, quantized: bool) -> tuple[nn.Module, float]:
        """The fast model and its metric; from the file where there is one."""
        name = f"accelerate {name}"
        path = None if self.done.folder is None else self.done.folder / f"{name}.pared"
        item = self.done.get(name)
        if item is not None and path is not None:
            return load(path, self.model), float(item.values["metric"])
        precision = "int8" if quantized and self.precision == "float32" else self.precision
        fast = accelerate(pruned, self.inputs, precision=precision, **self.options)
        metric = self.metric(fast, name)
        if path is not None:
            save(fast, path)
            self.done.put(name, {"metric": metric})
        return fast, metric


def _inputs(model: nn.Module, batch: Any) -> Any:
    """The model's arguments in a batch, as `pared.accelerate` takes them."""
    args, kwargs = arguments(model, batch)
    return kwargs or args
