"""Pruning while training: loops, penalties and losses around `pared.Pruner`. Plain functions and objects.

`prune_until`
    prune, retrain, measure, and roll back the round that broke the metric; with rewinding of the survivors.
`RigL`, `Movement`
    masks that move during training; scores that follow the training.
`Proximal`, `SlimmingPenalty`
    penalties that make exact zeros, and BatchNorm scales that mean something.
`FineTune`
    a training step for `pared.compress`, which goes on from the last one that was kept when it is killed.
`distillation_loss`, `feature_loss`
    a teacher's soft targets, and its activations.
`sensitivity`, `allocate`
    what each layer bears, and ratios for a common target from it.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from pared import ops
from pared._errors import (
    check_ascending,
    check_callable,
    check_choice,
    check_count,
    check_indent,
    check_known,
    check_metric,
    check_number,
    check_path,
    check_positive,
)
from pared._files import replacing
from pared._finetune import FineTune
from pared.pruning.importance import Importance, Statistics
from pared.pruning.masks import keep_count, zero
from pared.pruning.oneshot import check_sparsity, prune
from pared.pruning.patterns import parse_pattern
from pared.pruning.pruner import Pruner, _zero_state, check_optimizers
from pared.pruning.targets import Filters, collect, unwrap
from pared.quant.grid import check_tensor
from pared.schedules import OneShot

__all__ = [
    "FineTune",
    "Movement",
    "Proximal",
    "RigL",
    "Round",
    "Sensitivity",
    "SlimmingPenalty",
    "UntilReport",
    "allocate",
    "distillation_loss",
    "feature_loss",
    "prune_until",
    "sensitivity",
]


# ---------------------------------------------------------------- losses and penalties


def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.9,
) -> torch.Tensor:
    """``alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) CE(student, labels)``.

    T squared keeps the gradients' size whatever the temperature. Hinton, Vinyals and Dean, "Distilling the
    Knowledge in a Neural Network" (arXiv 1503.02531).

    Parameters
    ----------
    student, teacher : logits [n, classes]; no gradient reaches the teacher.
    labels : [n], int64; None leaves the second term out (and alpha at 1).
    temperature : T, above 0.
    alpha : share of the first term, 0 to 1.

    Returns
    -------
    A scalar, of the student's dtype.

    Raises
    ------
    TypeError, ValueError : naming the argument: other shapes, labels that are no classes, numbers out of
        range.
    """
    t = check_positive("temperature", temperature)
    if check_number("alpha", alpha) > 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha!r}")
    check_tensor("student", student)
    check_tensor("teacher", teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher: expected logits of shape {list(student.shape)}, got {list(teacher.shape)}"
        )
    soft = (
        t
        * t
        * functional.kl_div(
            (student / t).log_softmax(-1),
            (teacher.detach() / t).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
    )
    if labels is None:
        return soft
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        got = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected an int64 tensor or None, got {got}")
    if labels.shape != student.shape[:1]:
        raise ValueError(f"labels: expected shape {list(student.shape[:1])}, got {list(labels.shape)}")
    try:
        hard = functional.cross_entropy(student, labels)
    except IndexError:
        low, high = (int(v) for v in torch.aminmax(labels))
        raise ValueError(
            f"labels: expected classes from 0 to {student.shape[1] - 1}, got numbers from {low} to {high}"
        ) from None
    return alpha * soft + (1 - alpha) * hard


def feature_loss(
    student: torch.Tensor | Sequence[torch.Tensor], teacher: torch.Tensor | Sequence[torch.Tensor]
) -> torch.Tensor:
    """``mean over layers of |student - teacher|^2 / |teacher|^2``: activations follow the teacher's.

    Each layer counts alike, whatever the size of its values (one of zeros absolutely). Romero et al.,
    "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550).

    Parameters
    ----------
    student, teacher : outputs of the same layers of both models, of equal shapes: a tensor, or one a layer
        (hidden states, or what forward hooks kept); no gradient reaches the teacher.

    Returns
    -------
    A scalar, of the student's dtype.

    Raises
    ------
    TypeError, ValueError : naming the argument and the layer: no tensor, another number of layers or shape.
    """
    students, teachers = _layers("student", student), _layers("teacher", teacher)
    if len(students) != len(teachers):
        raise ValueError(f"teacher: expected {len(students)} layers, got {len(teachers)}")
    terms = []
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        if s.shape != t.shape:
            raise ValueError(f"teacher[{i}]: expected shape {list(s.shape)}, got {list(t.shape)}")
        t = t.detach()
        size = t.square().sum()
        terms.append((s - t).square().sum() / torch.where(size > 0, size, 1.0))
    return torch.stack(terms).mean()


def _layers(name: str, given: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if not isinstance(given, torch.Tensor | Sequence):
        raise TypeError(f"{name}: expected a tensor or one a layer, got {type(given).__name__}")
    found = [given] if isinstance(given, torch.Tensor) else list(given)
    if not found:
        raise ValueError(f"{name}: expected one or more layers, got none")
    for i, one in enumerate(found):
        check_tensor(f"{name}[{i}]", one)
    return found


class SlimmingPenalty:
    """``strength * sum |gamma|`` over the BatchNorm layers: add it to the loss, then prune by "bn_scale".

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming" (arXiv 1708.06519).

    Parameters
    ----------
    model : with BatchNorm layers that have scales; ``ValueError`` where there are none.
    strength : above 0.
    """

    def __init__(self, model: nn.Module, strength: float = 1e-4) -> None:
        self.strength = check_positive("strength", strength)
        norms = nn.modules.batchnorm._BatchNorm
        self.scales = [m.weight for m in unwrap(model).modules() if isinstance(m, norms) and m.affine]
        if not self.scales:
            raise ValueError("model: expected BatchNorm layers with scales, got none")

    def __call__(self) -> torch.Tensor:
        return self.strength * torch.stack([s.abs().sum() for s in self.scales]).sum()


class Proximal:
    """An L1 or group-lasso penalty by its proximal step: call `step` after ``optimizer.step()``.

    L1 is the soft threshold ``sign(w) max(|w| - t, 0)``, ``t = lr * strength``: it makes exact zeros, which
    subtracting ``t * sign(w)`` does not (that overshoots and swings around zero). The group form scales the
    weights of an output, or of an input, by ``max(1 - t sqrt(n) / ||w||, 0)``: Yuan and Lin, "Model selection
    and estimation in regression with grouped variables" (2006).

    Parameters
    ----------
    model, include, exclude : which weights, as in `pared.prune`.
    optimizer : its learning rates are read at each step.
    penalty : "l1", "outputs" or "inputs".
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        strength: float,
        *,
        penalty: str = "l1",
        include: Filters = None,
        exclude: Filters = None,
    ) -> None:
        check_choice("penalty", penalty, ("l1", "outputs", "inputs"))
        (self.optimizer,) = check_optimizers([optimizer])
        self.strength, self.penalty = check_positive("strength", strength), penalty
        self.targets, _ = collect(unwrap(model), include, exclude, 0, 0)

    def step(self) -> None:
        """Shrink the weights by what the optimizer's learning rates are now."""
        rates = {id(p): float(g["lr"]) for g in self.optimizer.param_groups for p in g["params"]}
        with torch.no_grad():
            for target in self.targets:
                w = target.tensor
                threshold = rates.get(id(w), 0.0) * self.strength
                if self.penalty == "l1":
                    w.copy_(functional.softshrink(w, threshold))
                    continue
                own = 0 if (self.penalty == "outputs") != target.transposed else 1
                over = [d for d in range(w.ndim) if d != own]
                n = w.numel() // max(1, w.shape[own])
                norm = torch.linalg.vector_norm(w, dim=over, keepdim=True)
                w.mul_((1 - threshold * math.sqrt(n) / norm.clamp(min=1e-30)).clamp(min=0.0))


# ---------------------------------------------------------------- masks that move


class Movement:
    """``-sum over steps of g * w``: weights that training moves away from zero are important.

    A criterion for `pared.Pruner` in fine-tuning, of the weights that `include` and `exclude` select as in
    `pared.prune`: call `update` after each backward pass. Sanh, Wolf and
    Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (arXiv 2005.07683).

    ::

        movement = pared.training.Movement(model)
        pruner = pared.Pruner(model, schedule, importance=movement, optimizer=optimizer)
        loss.backward(); movement.update(); optimizer.step(); pruner.step()
    """

    name = "movement"
    needs_data = False
    needs_gradients = False
    scope = "layer"
    key = "identity"

    def __init__(self, model: nn.Module, *, include: Filters = None, exclude: Filters = None) -> None:
        self.targets, _ = collect(unwrap(model), include, exclude, 0, 0)
        self.sums: dict[str, torch.Tensor] = {}

    def update(self) -> None:
        """Take in the gradients that are there now."""
        for target in self.targets:
            w = target.tensor
            if w.grad is not None:
                moved = w.detach() * w.grad.detach()
                if target.name in self.sums:
                    self.sums[target.name].sub_(moved)
                else:
                    self.sums[target.name] = moved.neg_()

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        """The sums of the tensor that `statistics` names, of its shape.

        Raises
        ------
        TypeError : `statistics` is not a `pared.pruning.Statistics`.
        ValueError : no gradient of that tensor was seen.
        """
        if not isinstance(statistics, Statistics):
            raise TypeError(f"statistics: expected pared.pruning.Statistics, got {type(statistics).__name__}")
        name = f"{statistics.layer}.{statistics.parameter}" if statistics.layer else statistics.parameter
        if name not in self.sums:
            raise ValueError(
                f"importance: expected update() after a backward pass that reaches {name!r} before masks are "
                "chosen, got no gradient of it"
            )
        return self.sums[name].to(statistics.weight.device)


class RigL:
    """Sparse from the start: now and then the smallest weights are dropped and those with the largest
    gradients grow.

    Call `step` after ``optimizer.step()`` and before ``zero_grad``: the gradients of the weights that are
    zero decide what grows. Grown weights start at zero. The share that moves falls as a cosine to nothing at
    `end`. Evci et al., "Rigging the Lottery: Making All Tickets Winners" (arXiv 1911.11134).

    Parameters
    ----------
    model, include, exclude : which weights, as in `pared.prune`; each layer has the same sparsity, always
        exactly.
    optimizer : its state for dropped and grown weights is zeroed.
    share : of a layer's remaining weights that move at first.
    update_every, end : steps.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        share: float = 0.3,
        update_every: int = 100,
        end: int = 10_000,
        include: Filters = None,
        exclude: Filters = None,
    ) -> None:
        self.sparsity = check_sparsity(sparsity, parse_pattern("unstructured"))
        if check_number("share", share) >= 1:
            raise ValueError(f"share: expected a number in [0, 1), got {share!r}")
        check_count("update_every", update_every, "steps")
        check_count("end", end, "steps")
        check_optimizers([] if optimizer is None else [optimizer])
        module = unwrap(model)
        self.targets, _ = collect(module, include, exclude, 0, 0)
        self.optimizer, self.share, self.update_every, self.end = optimizer, share, update_every, end
        self.step_count = 0
        self.keep = [keep_count(t.tensor.numel(), self.sparsity) for t in self.targets]
        self.masks = [_top(t.tensor.detach().abs(), k) for t, k in zip(self.targets, self.keep, strict=True)]
        self._apply(self.masks)

    def step(self) -> None:
        """Count a step of training; move weights where it is due, and hold the zeros of all others."""
        self.step_count += 1
        changed = self.masks
        if self.step_count % self.update_every == 0 and self.step_count < self.end:
            changed = self._move(self.share / 2 * (1 + math.cos(math.pi * self.step_count / self.end)))
        # What is dropped and what grows starts from nothing: zero outside of what was and is there.
        self._apply([new & old for new, old in zip(changed, self.masks, strict=True)])
        self.masks = changed

    def _move(self, share: float) -> list[torch.Tensor]:
        found = []
        for target, mask, keep in zip(self.targets, self.masks, self.keep, strict=True):
            w = target.tensor
            if w.grad is None:
                raise ValueError(
                    f"step: expected gradients of {target.name!r}, got none; call it before "
                    f"optimizer.zero_grad()"
                )
            n = min(round(share * keep), w.numel() - keep)
            survivors = _top(w.detach().abs().masked_fill(~mask, -1.0), keep - n)
            grown = _top(w.grad.detach().abs().masked_fill(mask, -1.0), n)
            found.append(survivors | grown)
        return found

    def _apply(self, masks: Sequence[torch.Tensor]) -> None:
        for target, mask in zip(self.targets, masks, strict=True):
            dropped = ~mask
            zero(target.tensor, dropped)
            if self.optimizer is not None:
                _zero_state(self.optimizer, target.tensor, dropped)


def _top(scores: torch.Tensor, k: int) -> torch.Tensor:
    flat = scores.float().contiguous()
    return cast(torch.Tensor, ops.topk_mask(flat, k, key="identity"))


# ---------------------------------------------------------------- until the metric breaks


@dataclass(frozen=True)
class Round:
    """One round of `prune_until`: its sparsity and the metric then; `accepted` False was rolled back."""

    sparsity: float
    metric: float
    accepted: bool


@dataclass(frozen=True)
class UntilReport:
    """The result of `prune_until`.

    Attributes
    ----------
    baseline : metric before. `bound` : what it must not fall below.
    sparsity, metric : of the model as it is left.
    rounds : every round, in order.
    """

    baseline: float
    bound: float
    sparsity: float
    metric: float
    rounds: tuple[Round, ...]

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=check_indent(indent))


def prune_until(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    max_drop: float = 0.01,
    retrain: Callable[[nn.Module, Pruner], object] | None = None,
    start: float = 0.5,
    rate: float = 0.3,
    rounds: int = 10,
    rewind: Mapping[str, torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    **options: Any,
) -> UntilReport:
    """Prune, retrain and measure, in rounds, until the metric has dropped by more than `max_drop`.

    A round that breaks the bound is undone, and the next one takes a step of half the size. The model is left
    at the sparsest state that keeps the bound.

    Parameters
    ----------
    evaluate : ``model -> float``, higher is better.
    max_drop : absolute.
    retrain : ``(model, pruner)``; trains, and calls ``pruner.step()`` after each step so that zeros stay.
        None: nothing is trained.
    start : sparsity of the first round. `rate` : share of the remaining weights that each later one removes.
    rounds : at most so many.
    optimizer : as in `pared.Pruner`: its state for pruned weights is zeroed.
    rewind : a state_dict of an early checkpoint: after each pruning the survivors go back to it. Frankle and
        Carbin, "The Lottery Ticket Hypothesis" (arXiv 1803.03635).
    options : pattern, importance, scope, data, loss_fn, include, exclude, ... of `pared.Pruner`.

    Returns
    -------
    UntilReport

    Raises
    ------
    TypeError, ValueError : naming the argument; a metric that is no finite number. The model is then at the
        last state that kept the bound.
    """
    module = unwrap(model)
    drop, rate = check_number("max_drop", max_drop), check_positive("rate", rate)
    check_callable("evaluate", evaluate, "(model) -> number")
    if retrain is not None:
        check_callable("retrain", retrain, "(model, pruner), or None")
    check_count("rounds", rounds, "rounds")
    check_known(options, Pruner, ("model", "schedule", "optimizer"))
    check_optimizers(optimizer)
    pattern = parse_pattern(options.get("pattern", "unstructured"))
    if pattern.kind == "nm":
        raise ValueError(
            f"pattern: expected one whose sparsity can grow, got {str(pattern)!r}; use pared.prune"
        )
    sparsity = check_sparsity(start, pattern, "start")
    if not rate < 1:
        raise ValueError(f"rate: expected a number in (0, 1), got {rate!r}")
    if rewind is not None:
        _check_rewind(module, rewind)
    collect(module, options.get("include"), options.get("exclude"), 0, 0)  # errors before any work
    baseline = check_metric(evaluate(module))
    done: list[Round] = []
    best, reached, metric = _snapshot(module), 0.0, baseline
    for _ in range(rounds):
        try:
            pruner = Pruner(module, OneShot(sparsity), optimizer=optimizer, **options)
            pruner.step()
            if rewind is not None:
                _rewind(module, rewind)
                pruner.step()
            if retrain is not None:
                retrain(module, pruner)
            pruner.finalize()
            value = check_metric(evaluate(module))
        except BaseException:
            module.load_state_dict(best)
            raise
        accepted = value >= baseline - drop
        done.append(Round(sparsity, value, accepted))
        if accepted:
            best, reached, metric = _snapshot(module), sparsity, value
        else:
            module.load_state_dict(best)
            rate /= 2
            if rate < 0.01 or (not reached and sparsity < 0.01):
                break
        # From what holds: a first round that was too much is followed by one of half its size.
        sparsity = 1 - (1 - reached) * (1 - rate) if reached else (sparsity / 2 if not accepted else sparsity)
    return UntilReport(baseline, baseline - drop, reached, metric, tuple(done))


def _snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def _check_rewind(model: nn.Module, state: object) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"rewind: expected a state_dict of the model, got {type(state).__name__}")
    for name, p in model.named_parameters():
        if name not in state:
            raise ValueError(f"rewind: expected a state_dict of the model, got one without {name}")
        own = state[name]
        if not isinstance(own, torch.Tensor) or own.shape != p.shape:
            got = list(own.shape) if isinstance(own, torch.Tensor) else type(own).__name__
            raise ValueError(f"rewind: expected {name!r} of shape {list(p.shape)}, got {got}")


def _rewind(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state[name])


# ---------------------------------------------------------------- sensitivity


@dataclass(frozen=True)
class Sensitivity:
    """The result of `sensitivity`: the metric of the model with one layer pruned, for each layer and ratio.

    Attributes
    ----------
    baseline : the metric of the model as it is.
    ratios : that were tried.
    metrics : by tensor name, one number a ratio. `weights` : the tensor's elements.
    """

    baseline: float
    ratios: tuple[float, ...]
    metrics: dict[str, tuple[float, ...]]
    weights: dict[str, int]

    def to_json(self, indent: int | None = 2) -> str:
        """The result as JSON text."""
        return json.dumps(asdict(self), indent=check_indent(indent))

    def __rich__(self) -> Table:
        table = Table(title=f"metric with one layer pruned (as it is: {self.baseline:.4g})")
        table.add_column("layer", overflow="fold")
        for ratio in self.ratios:
            table.add_column(f"{ratio:.0%}", justify="right")
        for name, values in self.metrics.items():
            table.add_row(name, *(f"{v:.4g}" for v in values))
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110, color_system=None).print(self)
        return out.getvalue().rstrip()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """One line a layer, metric against ratio, as an image; needs matplotlib (``pip install
        'pared[report]'``), and raises ``ImportError`` where it is not installed.
        """
        check_path("path", path)
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as e:
            raise ImportError("plot needs matplotlib: pip install 'pared[report]'") from e

        figure = Figure(figsize=(8, 5), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        kind = os.path.splitext(path)[1][1:].lower() or "png"
        check_choice("path", kind, canvas.get_supported_filetypes(), "no suffix, which is 'png'")
        axes = figure.add_subplot()
        for name, values in self.metrics.items():
            axes.plot([0.0, *self.ratios], [self.baseline, *values], marker="o", label=name)
        axes.set_xlabel("share of the layer's weights removed")
        axes.set_ylabel("metric")
        axes.legend(fontsize="small")
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=120, format=kind)


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    ratios: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95),
    importance: Importance = "magnitude",
    include: Filters = None,
    exclude: Filters = None,
    **options: Any,
) -> Sensitivity:
    """Prune one layer at a time to each ratio, measure, and put it back.

    Parameters
    ----------
    model : not changed when it is over, whether it ends well or not.
    evaluate : ``model -> float``, higher is better.
    ratios : ascending, each in [0, 1).
    importance, include, exclude, options : as in `pared.prune`.

    Returns
    -------
    Sensitivity : the metric for each layer and ratio; ``print`` it, ``plot`` it, or give it to `allocate`.

    Raises
    ------
    TypeError, ValueError : naming the argument; a metric that is no finite number.
    """
    module = unwrap(model)
    check_callable("evaluate", evaluate, "(model) -> number")
    pattern = parse_pattern(options.get("pattern", "unstructured"))
    ratios = check_ascending("ratios", ratios, lambda r: check_sparsity(r, pattern, "ratios"))
    check_known(options, prune, ("model", "sparsity", "scope", "importance", "include", "exclude"))
    targets, _ = collect(module, include, exclude, 0, 0)
    baseline = check_metric(evaluate(module))
    metrics: dict[str, tuple[float, ...]] = {}
    for target in targets:
        values = []
        for ratio in ratios:
            before = target.tensor.detach().clone()
            try:
                prune(module, ratio, importance=importance, scope="layer", include=target.name, **options)
                values.append(check_metric(evaluate(module)))
            finally:
                with torch.no_grad():
                    target.tensor.copy_(before)
        metrics[target.name] = tuple(values)
    return Sensitivity(baseline, tuple(ratios), metrics, {t.name: t.tensor.numel() for t in targets})


def allocate(scan: Sensitivity, sparsity: float) -> dict[str, float]:
    """A ratio for each layer so that together they reach `sparsity`, at the least loss that the scan
    predicts.

    Greedy: again and again the step to a layer's next ratio that costs least metric per removed weight.
    Losses of single layers are taken to add up.

    Parameters
    ----------
    scan : what `sensitivity` gave.
    sparsity : share of the weights of all scanned layers, in [0, 1).

    Returns
    -------
    Ratios by tensor name, 0 for layers that stay: a mapping that `pared.prune` takes.

    Raises
    ------
    TypeError, ValueError : naming the argument; more than the largest ratio of the scan gives.
    """
    if not isinstance(scan, Sensitivity):
        raise TypeError(f"scan: expected what sensitivity gives, got {type(scan).__name__}")
    target = check_sparsity(sparsity, parse_pattern("unstructured"))
    total = sum(scan.weights.values())
    chosen = dict.fromkeys(scan.metrics, -1)
    removed = 0.0
    while removed < target * total:
        best: tuple[float, str] | None = None
        for name, at in chosen.items():
            if at + 1 < len(scan.ratios):
                here = scan.metrics[name][at] if at >= 0 else scan.baseline
                share = scan.ratios[at + 1] - (scan.ratios[at] if at >= 0 else 0.0)
                price = (here - scan.metrics[name][at + 1]) / (share * scan.weights[name])
                if best is None or price < best[0]:
                    best = price, name
        if best is None:
            raise ValueError(
                f"sparsity: expected at most {removed / total:.4g}, which the largest ratio of the scan "
                f"gives, got "
                f"{sparsity!r}"
            )
        name = best[1]
        at = chosen[name]
        removed += (scan.ratios[at + 1] - (scan.ratios[at] if at >= 0 else 0.0)) * scan.weights[name]
        chosen[name] = at + 1
    return {name: scan.ratios[at] if at >= 0 else 0.0 for name, at in chosen.items()}
