"""`search_channels`: how many channels each group of layers keeps, under a budget.

A layer's cost is a table over what two groups keep: the channels that it reads and those that it writes. Yang
et al., "NetAdapt" (arXiv 1804.03230) measures such tables where the model will run; the choice is made by
dynamic programming over groups, as in "SPDY" (arXiv 2201.13096), with those states kept apart whose groups
still meet a layer to come.
"""

from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pared._errors import (
    check_ascending,
    check_budget,
    check_callable,
    check_choice,
    check_count,
    check_indent,
    check_metric,
)
from pared._inputs import Example, check_filled, examples, leaves, run
from pared._surgery import copy_model
from pared._timing import interleave
from pared.pruning.calibration import _CONVOLUTIONS, LossFn, batches, check_loss_fn, forward
from pared.pruning.importance import Importance
from pared.pruning.oneshot import check_sparsity
from pared.pruning.patterns import parse_pattern
from pared.pruning.reconstruct import check_repeatable
from pared.pruning.structured import (
    _LAYERS,
    _attempt,
    _channel_scores,
    _choose,
    _Group,
    _NotConstant,
    find_groups,
)
from pared.pruning.targets import Filters, check_values, unwrap

__all__ = ["ChannelPlan", "GroupPlan", "Tables", "search_channels", "solve"]

COSTS = ("parameters", "macs", "time")
LEVELS = (0.0, 0.25, 0.5, 0.75)
# Points of (cost, error) over all states; beyond it, the best of each interval of costs.
_FRONT = 20_000
_LAYER_SECONDS = 0.1


@dataclass(frozen=True)
class GroupPlan:
    """Layers that share their channels.

    Attributes
    ----------
    name : of the layer that stands for them. `layers` : those that write the channels.
    before, after : channels now, and by the plan. `ratio` : of `pared.prune_channels`.
    error : of the model's outputs with this group alone pruned, by the plan's measure.
    """

    name: str
    layers: tuple[str, ...]
    before: int
    after: int
    ratio: float
    error: float


@dataclass(frozen=True)
class ChannelPlan:
    """The result of `search_channels`. ``pared.prune_channels(model, inputs, plan.ratios, ...)`` applies it.

    Attributes
    ----------
    unit : "parameters", "macs" or "time" (seconds).
    budget, before, cost : of the whole model: what it may cost, costs now, and costs by the plan.
    error : sum of the groups' errors. `measure` : what they are.
    groups : one `GroupPlan` a group. `kept` : ``(layer, reason)`` of groups that no plan changes.
    """

    unit: str
    budget: float
    before: float
    cost: float
    error: float
    measure: str
    groups: tuple[GroupPlan, ...]
    kept: tuple[tuple[str, str], ...]

    @property
    def ratios(self) -> dict[str, float]:
        """Share of the channels to remove, by the layer that stands for a group."""
        return {g.name: g.ratio for g in self.groups}

    def to_json(self, indent: int | None = 2) -> str:
        """The plan as JSON text."""
        return json.dumps(asdict(self), indent=check_indent(indent))

    def __rich__(self) -> Table:
        from pared._search import _amount  # which imports this package

        before, cost, budget = (_amount(v, self.unit) for v in (self.before, self.cost, self.budget))
        table = Table(
            title=f"{before} -> {cost} of at most {budget} {self.unit}",
            caption=f"sum of errors ({self.measure}): {self.error:.3g}",
            caption_justify="left",
        )
        table.add_column("layers that share channels", overflow="fold")
        for heading in ("before", "after", "error"):
            table.add_column(heading, justify="right", no_wrap=True)
        for g in self.groups:
            table.add_row(", ".join(g.layers), str(g.before), str(g.after), f"{g.error:.2e}")
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110, color_system=None).print(self)
        return out.getvalue().rstrip()


@dataclass
class Tables:
    """Costs and errors of the options of some groups, numbered.

    Attributes
    ----------
    errors : by group, of each of its options.
    own : by group, the cost of each option by itself.
    pairs : ``(a, b)`` with a < b -> costs ``[option of a][option of b]`` of the layers between the two.
    rest : what costs the same whatever is chosen.
    """

    errors: list[list[float]]
    own: list[list[float]]
    pairs: dict[tuple[int, int], list[list[float]]]
    rest: float = 0.0

    def cost(self, chosen: Sequence[int]) -> float:
        """Of one option a group."""
        own = sum(row[i] for row, i in zip(self.own, chosen, strict=True))
        return self.rest + own + sum(t[chosen[a]][chosen[b]] for (a, b), t in self.pairs.items())


# A state: cost, error, and the options chosen so far, the last one first.
_Path = tuple[Any, int] | None
_Point = tuple[float, float, _Path]


def solve(tables: Tables, budget: float, *, limit: int = _FRONT) -> list[int] | None:
    """One option a group with the least sum of errors whose costs stay within `budget`; None where none does.

    Group after group, the (cost, error) that no other one beats in both are kept for each way to choose the
    groups that still meet a layer to come. Exact while there are at most `limit` of them.
    """
    n = len(tables.own)
    last = [max([i, *(b for a, b in tables.pairs if a == i)]) for i in range(n)]
    # What the groups from i on cost at least.
    least = [min(row) for row in tables.own]
    for (_, b), table in tables.pairs.items():
        least[b] += min(map(min, table))
    rest = [*itertools.accumulate(reversed(least), initial=0.0)][::-1]
    open_: list[int] = []
    states: dict[tuple[int, ...], list[_Point]] = {(): [(tables.rest, 0.0, None)]}
    for i in range(n):
        keep = [g for g in [*open_, i] if last[g] > i]
        at = [[*open_, i].index(g) for g in keep]
        merged: dict[tuple[int, ...], list[_Point]] = {}
        for key, points in states.items():
            for option, (cost, error) in enumerate(zip(tables.own[i], tables.errors[i], strict=True)):
                more = cost + sum(
                    tables.pairs[g, i][key[j]][option] for j, g in enumerate(open_) if (g, i) in tables.pairs
                )
                room = budget - more - rest[i + 1]
                full = (*key, option)
                own = merged.setdefault(tuple(full[j] for j in at), [])
                own += [(c + more, e + error, (path, option)) for c, e, path in points if c <= room]
        states = {key: _front(points, max(8, limit // len(merged))) for key, points in merged.items()}
        open_ = keep
    final = states.get((), [])
    if not final:
        return None
    path: _Path = min(final, key=lambda p: (p[1], p[0]))[2]
    chosen: list[int] = []
    while path is not None:
        path, option = path
        chosen.append(option)
    return chosen[::-1]


def _front(points: list[_Point], limit: int) -> list[_Point]:
    """The points that no other one beats in cost and error; thinned to the best of each interval of costs."""
    found: list[_Point] = []
    for point in sorted(points, key=lambda p: p[:2]):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    if len(found) > limit:
        span = (found[-1][0] - found[0][0]) / limit or 1.0
        # Errors fall along the front: the last of an interval is its best; the cheapest always stays.
        best = {int((p[0] - found[0][0]) / span): p for p in found[1:]}
        found = [found[0], *best.values()]
    return found


def search_channels(
    model: nn.Module,
    example_inputs: Any,
    budget: float,
    *,
    cost: str = "parameters",
    levels: Sequence[float] = LEVELS,
    importance: Importance = "magnitude",
    round_to: int = 4,
    data: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    include: Filters = None,
    exclude: Filters = None,
) -> ChannelPlan:
    """A share of the channels to remove for each group of layers that share them, under a budget.

    Parameters
    ----------
    model : as in `pared.prune_channels`; it is not changed.
    example_inputs : show the graph, and are what products and times are of.
    budget : share of what the model costs now, in (0, 1].
    cost : "parameters"; "macs", multiply-adds; "time", seconds of each layer, measured at each pair of widths
        that it may read and write. What is not a layer with weights counts and does not change.
    levels : shares to choose from, ascending, in [0, 1).
    importance, round_to, include, exclude : as in `pared.prune_channels`.
    data, loss_fn : for criteria that need them. With data a group's error is measured on it, otherwise on the
        example inputs.
    evaluate : ``model -> float``, higher is better: a group's error is then the fall of it.

    Returns
    -------
    ChannelPlan : its `ratios` go to ``pared.prune_channels`` with the same `importance`, `round_to` and
        filters. The error is ``|y - y'|^2 / |y|^2`` of the model's outputs with one group pruned alone;
        errors of groups are taken to add up.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came; a budget below what the
        highest level of every group leaves.
    """
    from pared._cost import weight_uses  # which imports this package

    check_choice("cost", cost, COSTS)
    budget = check_budget(budget)
    plain = parse_pattern("unstructured")
    given = check_ascending("levels", levels, lambda s: check_sparsity(s, plain, "levels"))
    shares = [0.0, *(s for s in given if s)]
    check_count("round_to", round_to, "channels")
    check_loss_fn(loss_fn)
    if evaluate is not None:
        check_callable("evaluate", evaluate, "(model) -> number")
    if data is not None:
        check_repeatable(data, "'search_channels'")
    module = unwrap(model)
    check_values(module)
    inputs = examples(example_inputs)
    check_filled(inputs)
    work = copy_model(module).eval()
    groups, kept = find_groups(work, inputs, include, exclude)
    scores, _ = _channel_scores(work, groups, importance, data, loss_fn)
    options = _options(groups, scores, shares, round_to)
    with torch.no_grad():
        error = _Error(work, inputs, data, evaluate)
        errors, sizes, usable = [], [], []
        for group, own in zip(groups, options, strict=True):
            measured = _alone(work, group, own, inputs, error)
            if measured is None:
                kept.append((group.root, "without its channels the others come out differently"))
                continue
            usable.append((group, own))
            errors.append([e for e, _ in measured])
            sizes.append([n for _, n in measured])
        uses = weight_uses(work, inputs) if cost == "macs" else {}
        tables = _tables(work, [g for g, _ in usable], [o for _, o in usable], cost, uses, inputs)
    tables.errors = errors
    if cost == "parameters":
        _add_what_goes_along(tables, sizes)
    before = tables.cost([0] * len(usable))
    limit = budget * before
    chosen = solve(tables, limit + 1e-9 * before)
    if chosen is None:
        cheapest = tables.cost([len(own) - 1 for _, own in usable]) / before
        raise ValueError(
            f"budget: expected at least {math.ceil(cheapest * 1e4) / 1e4:g} of the model's {cost}, which the "
            f"largest share of every group leaves, got {budget:g}"
        )
    plans = tuple(
        GroupPlan(
            g.root,
            tuple(g.producers),
            g.channels,
            g.channels - len(own[i][1]),
            own[i][0],
            row[i],
        )
        for (g, own), row, i in zip(usable, errors, chosen, strict=True)
    )
    return ChannelPlan(
        cost,
        limit,
        before,
        tables.cost(chosen),
        sum(p.error for p in plans),
        error.measure,
        plans,
        tuple(kept),
    )


# By group: (share, channels that go), narrower and narrower.
_Options = list[tuple[float, list[int]]]


def _options(
    groups: Sequence[_Group], scores: Sequence[torch.Tensor], shares: Sequence[float], round_to: int
) -> list[_Options]:
    found: list[_Options] = [[] for _ in groups]
    for share in shares:
        _choose(groups, scores, [share] * len(groups), round_to, "layer")
        for own, group in zip(found, groups, strict=True):
            if not own or len(group.removed) > len(own[-1][1]):  # rounding gives some shares one width
                own.append((share, list(group.removed)))
    return found


class _Error:
    """How far a pruned model is from the dense one."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Example],
        data: Iterable[Any] | None,
        evaluate: Callable[[nn.Module], float] | None,
    ) -> None:
        self.inputs, self.data, self.evaluate = inputs, data, evaluate
        self.measure = "relative squared output error" if evaluate is None else "fall of the metric"
        self.baseline = 0.0 if evaluate is None else self._metric(model)
        self.outputs = [] if evaluate is not None else [*self._run(model)]
        self.size = sum(float(t.double().square().sum()) for ys in self.outputs for t in ys)
        if not math.isfinite(self.size):
            name = "example_inputs" if data is None else "data"
            raise ValueError(f"{name}: expected inputs with finite outputs, got NaN or infinity")

    def _metric(self, model: nn.Module) -> float:
        assert self.evaluate is not None
        return check_metric(self.evaluate(model))

    def _run(self, model: nn.Module) -> Iterable[list[torch.Tensor]]:
        calls: Iterable[Any]
        if self.data is None:
            calls = (run(model, e) for e in self.inputs)
        else:
            calls = (forward(model, batch, None) for batch in batches(self.data, "'search_channels'"))
        for y in calls:
            yield [t for _, t in leaves(y) if isinstance(t, torch.Tensor) and t.is_floating_point()]

    def of(self, model: nn.Module) -> float:
        if self.evaluate is not None:
            return max(0.0, self.baseline - self._metric(model))
        lost = 0.0
        for old, new in zip(self.outputs, self._run(model), strict=True):
            lost += sum(float((a - b).double().square().sum()) for a, b in zip(old, new, strict=True))
        return lost / self.size if self.size else 0.0


def _alone(
    model: nn.Module, group: _Group, options: _Options, inputs: Sequence[Example], error: _Error
) -> list[tuple[float, int]] | None:
    """By option, error and parameters of the model with this group alone pruned; None where that fails."""
    found = [(0.0, sum(p.numel() for p in model.parameters()))]
    for _, removed in options[1:]:
        group.removed = removed
        try:
            pruned, _, _, exact = _attempt(model, [group], inputs)
        except _NotConstant:
            return None
        if not exact:
            return None
        found.append((error.of(pruned), sum(p.numel() for p in pruned.parameters())))
    return found


@dataclass(frozen=True)
class _Side:
    """The channels that a layer reads, or writes: those that stay, and by group what options keep."""

    fixed: int
    kept: dict[int, list[int]]


def _side(total: int, layer: str, groups: Sequence[_Group], options: Sequence[_Options], role: str) -> _Side:
    kept: dict[int, list[int]] = {}
    for i, (group, own) in enumerate(zip(groups, options, strict=True)):
        indices = cast("dict[str, dict[int, list[int]]]", getattr(group, role)).get(layer)
        if indices:
            size = sum(map(len, indices.values()))
            kept[i] = [size - sum(len(indices[c]) for c in removed) for _, removed in own]
    return _Side(total - sum(row[0] for row in kept.values()), kept)


def _tables(
    model: nn.Module,
    groups: Sequence[_Group],
    options: Sequence[_Options],
    cost: str,
    uses: Mapping[str, tuple[float, int]],
    inputs: Sequence[Example],
) -> Tables:
    """Costs of all layers, as sums over groups and pairs of groups."""
    tables = Tables([], [[0.0] * len(own) for own in options], {})
    seen = _Inputs(model, inputs) if cost == "time" else None
    total = 0.0
    for name, module in model.named_modules():
        if not isinstance(module, _LAYERS):
            continue
        weight = module.weight
        grouped = getattr(module, "groups", 1)
        depthwise = grouped > 1 and grouped == weight.shape[0]
        rows = _side(weight.shape[0], name, groups, options, "producers")
        reads = weight.shape[1] if depthwise else weight.shape[1] * grouped
        columns = _Side(reads, {}) if depthwise else _side(reads, name, groups, options, "consumers")
        each = weight.numel() / max(1, weight.shape[0] * reads)
        if cost == "macs":
            each *= uses.get(f"{name}.weight" if name else "weight", (0.0, 0))[0]
        times: Callable[[int, int], float] | None = None
        if seen is not None:
            times = seen.table(name, module, rows, columns)
            total += times(weight.shape[0], reads)
        _add_layer(tables, rows, columns, times or (lambda r, c, each=each: each * r * c))  # type: ignore[misc]
    if seen is not None:
        tables.rest += max(0.0, seen.whole - total)
    elif cost == "parameters":
        counted = sum(m.weight.numel() for m in model.modules() if isinstance(m, _LAYERS))
        tables.rest += sum(p.numel() for p in model.parameters()) - counted
    return tables


def _add_layer(tables: Tables, rows: _Side, columns: _Side, cost: Callable[[int, int], float]) -> None:
    """Add a layer of `cost` (rows, columns); where several groups share a side, as proportional to both."""
    writes = list(rows.kept.items())
    reads = list(columns.kept.items())
    if len(writes) <= 1 and len(reads) <= 1:
        (a, r), (b, c) = (side[0] if side else (None, [0]) for side in (writes, reads))
        if a is None or b is None or a == b:
            if a is None and b is None:
                tables.rest += cost(rows.fixed, columns.fixed)
                return
            for i in range(max(len(r), len(c))):
                n = cost(
                    rows.fixed + r[i if a is not None else 0], columns.fixed + c[i if b is not None else 0]
                )
                tables.own[cast(int, a if a is not None else b)][i] += n
            return
        both = [[cost(rows.fixed + x, columns.fixed + y) for y in c] for x in r]
        _add_pair(tables, a, b, both)
        return
    # Concatenated inputs: a sum over the parts.
    whole = cost(rows.fixed + sum(r[0] for _, r in writes), columns.fixed + sum(c[0] for _, c in reads))
    area = (rows.fixed + sum(r[0] for _, r in writes)) * (columns.fixed + sum(c[0] for _, c in reads))
    each = whole / area if area else 0.0
    tables.rest += each * rows.fixed * columns.fixed
    for a, r in writes:
        for i, x in enumerate(r):
            tables.own[a][i] += each * x * columns.fixed
    for b, c in reads:
        for i, y in enumerate(c):
            tables.own[b][i] += each * y * rows.fixed
    for (a, r), (b, c) in itertools.product(writes, reads):
        if a == b:
            for i, (x, y) in enumerate(zip(r, c, strict=True)):
                tables.own[a][i] += each * x * y
        else:
            _add_pair(tables, a, b, [[each * x * y for y in c] for x in r])


def _add_pair(tables: Tables, a: int, b: int, costs: list[list[float]]) -> None:
    if a > b:
        a, b, costs = b, a, [list(row) for row in zip(*costs, strict=True)]
    old = tables.pairs.get((a, b))
    if old is not None:
        costs = [[x + y for x, y in zip(p, q, strict=True)] for p, q in zip(old, costs, strict=True)]
    tables.pairs[a, b] = costs


def _add_what_goes_along(tables: Tables, sizes: Sequence[Sequence[int]]) -> None:
    """Biases, normalisation: what a group's own removal saves besides weights, as it was counted."""
    dense = [0] * len(sizes)
    for g, row in enumerate(sizes):
        for i, n in enumerate(row):
            alone = tables.cost([*dense[:g], i, *dense[g + 1 :]])
            tables.own[g][i] += n - alone


class _Inputs:
    """Shapes of what layers are called with, and seconds of layers of other widths on such inputs."""

    def __init__(self, model: nn.Module, inputs: Sequence[Example]) -> None:
        from pared._cost import model_seconds  # which imports this package

        self.shapes: dict[int, list[tuple[int, ...]]] = {}
        handles = [m.register_forward_pre_hook(self._see) for m in model.modules() if isinstance(m, _LAYERS)]
        for example in inputs:
            run(model, example)
        for handle in handles:
            handle.remove()
        self.whole = model_seconds(model, inputs)

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor):
            self.shapes.setdefault(id(module), []).append(tuple(args[0].shape))

    def table(self, name: str, module: nn.Module, rows: _Side, columns: _Side) -> Callable[[int, int], float]:
        """Seconds in a pass by (rows, columns), measured in interleaved rounds."""
        shapes = self.shapes.get(id(module), [])
        if not shapes:
            return lambda rows, columns: 0.0
        widths = []
        for side in (rows, columns):
            own = (
                next(iter(side.kept.values()))
                if len(side.kept) == 1
                else [sum(r[0] for r in side.kept.values())]
            )
            widths.append([side.fixed + n for n in own])
        pairs = [*itertools.product(*widths)]
        if len(rows.kept) == 1 and rows.kept.keys() == columns.kept.keys():
            pairs = [*zip(*widths, strict=True)]
        calls = {f"{r} {c}": _call(module, r, c, shapes) for r, c in pairs}
        t = interleave(calls, budget=_LAYER_SECONDS, min_rounds=5, max_rounds=100, warmup=1)
        known = {pair: t.median(f"{pair[0]} {pair[1]}") for pair in pairs}
        # A narrower layer is not slower: what looks so is noise.
        found = {p: min(s for q, s in known.items() if q[0] >= p[0] and q[1] >= p[1]) for p in pairs}
        return lambda rows, columns: found[rows, columns]


def _call(
    module: nn.Module, rows: int, columns: int, shapes: Sequence[tuple[int, ...]]
) -> Callable[[], None]:
    """A pass through a layer like this one with so many outputs and inputs."""
    bias, dtype = module.bias is not None, cast(torch.Tensor, module.weight).dtype
    if isinstance(module, _CONVOLUTIONS):
        groups = module.groups
        if groups > 1 and groups == module.weight.shape[0]:
            groups, columns = rows, rows
        options = (module.kernel_size, module.stride, module.padding, module.dilation, groups, bias)
        layer: nn.Module = type(module)(columns, rows, *options, module.padding_mode)  # type: ignore[arg-type]
        at = -len(module.kernel_size) - 1
    else:
        layer, at = nn.Linear(columns, rows, bias), -1
    layer = layer.eval().to(dtype)
    inputs = []
    for shape in shapes:
        own = list(shape)
        own[at] = columns
        inputs.append(torch.randn(own, device="cpu").to(dtype))

    def call() -> None:
        for x in inputs:
            layer(x)

    return call
