"""`pared.prune_channels` and `pared.prune_layers`: neurons, filters and whole blocks removed for real.

Channels. Which tensors shrink together (residual sums, concatenations, batch normalisation, flattening before
a Linear layer, grouped convolutions) comes from torch-pruning's dependency graph: Fang et al., "DepGraph:
Towards Any Structural Pruning" (arXiv 2301.12900). A channel whose weights are zero is not zero: its bias and
its BatchNorm shift make it a constant, which its readers multiply. That constant is measured and folded into
the readers' biases, so that the small model computes what the masked one does; this is checked before the
user's model is touched.
"""

from __future__ import annotations

import functools
import io
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from pared import ops
from pared._errors import (
    check_callable,
    check_choice,
    check_count,
    check_indent,
    check_metric,
    is_integer,
    is_real,
)
from pared._inputs import Example, check_filled, compare, examples, first_run, leaves, run, tolerance
from pared._interrupt import uninterrupted
from pared._sparsity import weight_format
from pared._surgery import copy_model
from pared.pruning import distributed, oneshot
from pared.pruning.calibration import (
    _CONVOLUTIONS,
    SAMPLE_GRADIENT,
    LossFn,
    Observer,
    batches,
    check_loss_fn,
    collect,
    forward,
    frozen,
)
from pared.pruning.criteria import Fisher, OutputWeight
from pared.pruning.distributed import Processes
from pared.pruning.importance import Importance, resolve
from pared.pruning.masks import check_finite, keep_count
from pared.pruning.patterns import parse_pattern
from pared.pruning.targets import Filters, Target, _matchers, check_values, unwrap

__all__ = ["ChannelReport", "LayerRemovalReport", "prune_channels", "prune_layers"]

# These mix all channels of a position: without some of them the others come out differently.
_MIXING = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
_LAYERS = (nn.Linear, *_CONVOLUTIONS)


@dataclass(frozen=True)
class ChannelReport:
    """The result of `pared.prune_channels`. ``print(report)`` shows the table.

    Attributes
    ----------
    importance, scope, target : what was asked for.
    groups : ``(layers, channels before, channels after)`` of each group of layers that share their channels.
    kept : ``(layer, reason)`` of groups that were left as they are.
    approximate : layers whose zero padding meets a removed constant: equal to the masked model inside, not at
        the borders.
    parameters_before, parameters : of the whole model.
    error : largest relative difference from the masked model's outputs on the example inputs.
    """

    importance: str
    scope: str
    target: float
    groups: tuple[tuple[tuple[str, ...], int, int], ...]
    kept: tuple[tuple[str, str], ...]
    approximate: tuple[str, ...]
    parameters_before: int
    parameters: int
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=check_indent(indent))

    def __rich__(self) -> Table:
        share = 1 - self.parameters / max(1, self.parameters_before)
        notes = [f"left as it is ({reason}): {layer}" for layer, reason in self.kept]
        if self.approximate:
            notes.append(f"exact but for the borders, where zeros are padded: {', '.join(self.approximate)}")
        table = Table(
            title=f"{share:.1%} fewer parameters ({self.importance}, {self.scope})",
            caption="\n".join(notes) or None,
            caption_justify="left",
        )
        table.add_column("layers that share channels", overflow="fold")
        for heading in ("before", "after"):
            table.add_column(heading, justify="right", no_wrap=True)
        for layers, before, after in self.groups:
            table.add_row(", ".join(layers), str(before), str(after))
        return table

    def __str__(self) -> str:
        return _text(self)


def _text(report: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=110, color_system=None).print(report)
    return out.getvalue().rstrip()


@dataclass
class _Group:
    """Layers whose channels go together, by name: with deep copies of the model names stay, objects do
    not.
    """

    root: str
    channels: int
    parts: int
    # Name of a layer -> for each root channel its indices there.
    producers: dict[str, dict[int, list[int]]]
    consumers: dict[str, dict[int, list[int]]]
    # Channels that go together: an attention head's. `heads`: the module that counts them, and how.
    unit: int = 1
    heads: tuple[str, str] | None = None
    removed: list[int] = field(default_factory=list)


# Nodes of the graph in which channels of queries meet those of keys: only whole heads can go.
_ATTENTION = ("Bmm", "Softmax", "ScaledDotProduct", "Attention", "Einsum")
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead")


def _head_count(modules: dict[str, nn.Module], layer: str) -> tuple[str, str] | None:
    """The nearest module around `layer` that has a number of heads, and the attribute's name."""
    name = layer
    while name:
        name = name.rpartition(".")[0]
        for attribute in _HEAD_COUNTS:
            if isinstance(vars(modules[name]).get(attribute), int):
                return name, attribute
    return None


def _graph(model: nn.Module, example: Example) -> Any:
    import torch_pruning

    def forward(model: nn.Module, inputs: Example) -> Any:
        return model(*inputs.args, **inputs.kwargs)

    try:
        with warnings.catch_warnings(), torch.enable_grad():  # the graph is autograd's
            warnings.simplefilter("ignore")  # about parameters that no module owns: handled below
            # Its own way to call a model takes Ctrl-C for a sign to call it otherwise.
            return torch_pruning.DependencyGraph().build_dependency(
                model, example_inputs=example, forward_fn=forward, verbose=False
            )
    except Exception as error:
        raise ValueError(
            f"model: expected one whose graph torch-pruning can trace with example_inputs, got "
            f"{type(error).__name__}"
            f": {error}"
        ) from error


def find_groups(
    model: nn.Module, inputs: Sequence[Example], include: Filters, exclude: Filters
) -> tuple[list[_Group], list[tuple[str, str]]]:
    """The groups that can be pruned, one at least, and why others cannot. Runs the model on each input."""
    for example in inputs:
        first_run(model, example)
    groups, kept = _groups(_graph(model, inputs[0]), model, include, exclude)
    if not groups:
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in kept[:5])
        raise ValueError(f"model: expected layers whose channels can be removed, got none ({reasons})")
    return groups, kept


def _groups(
    graph: Any, model: nn.Module, include: Filters, exclude: Filters
) -> tuple[list[_Group], list[tuple[str, str]]]:
    """The groups that can be pruned, and why the others cannot."""
    modules = dict(model.named_modules())
    names = {id(m): n for n, m in modules.items()}
    inside, outside = _matchers("include", include), _matchers("exclude", exclude)
    found: list[_Group] = []
    kept: list[tuple[str, str]] = []
    matched: set[int] = set()
    for raw in graph.get_all_groups(root_module_types=[*_LAYERS]):
        root = names[id(raw[0].dep.target.module)]
        producers: dict[str, dict[int, list[int]]] = {}
        consumers: dict[str, dict[int, list[int]]] = {}
        reason, parts, attention = "", 1, False
        for item in raw.items:
            node = item.dep.target
            module = node.module
            operation = id(module) not in names  # the graph wraps functions in modules of its own
            attention |= operation and any(a in node.name for a in _ATTENTION)
            if not node.outputs and operation:
                reason = reason or "its channels are the model's output"
            if operation:
                if isinstance(module, nn.Parameter):
                    reason = reason or "a parameter outside of known layers shares its channels"
                continue
            name, out = names[id(module)], graph.is_out_channel_pruning_fn(item.dep.handler)
            if isinstance(module, _MIXING):
                reason = reason or f"{type(module).__name__} {name!r} normalises over its channels"
            elif isinstance(module, _LAYERS):
                if out and not node.outputs:
                    reason = reason or "its channels are the model's output"
                where = producers if out else consumers
                indices = where.setdefault(name, {})
                for index, channel in zip(item.idxs, item.root_idxs or item.idxs, strict=True):
                    indices.setdefault(int(channel), []).append(int(index))
                groups = getattr(module, "groups", 1)
                depthwise = (
                    groups > 1
                    and groups == getattr(module, "out_channels", 0)
                    and (groups == getattr(module, "in_channels", 0))
                )
                if groups > 1 and not depthwise:
                    parts = math.lcm(parts, groups)
            elif not isinstance(module, nn.modules.batchnorm._BatchNorm | nn.PReLU) and list(
                module.parameters(recurse=False)
            ):
                reason = reason or f"{type(module).__name__} {name!r} shares its channels"
        layers = list(producers)
        for i, matcher in enumerate([*inside, *outside]):
            if any(matcher.matches(n, n, modules[n], modules) for n in layers):
                matched.add(i)
        if inside and not any(m.matches(n, n, modules[n], modules) for m in inside for n in layers):
            reason = "not included"
        elif any(m.matches(n, n, modules[n], modules) for m in outside for n in layers):
            reason = "excluded"
        elif not consumers and not reason:
            reason = "its channels are the model's output"
        n = len(producers[root])
        unit, heads = 1, None
        if attention and not reason:
            heads = _head_count(modules, root)
            count = vars(modules[heads[0]])[heads[1]] if heads else 0
            if not count or n % count or parts > 1 or any(len(own) != n for own in producers.values()):
                reason = "it belongs to an attention whose heads are not known"
            else:
                unit = n // count
        if n % parts:
            reason = reason or "its channels do not divide into the convolution's groups"
        if reason:
            kept.append((root, reason))
        else:
            found.append(_Group(root, n, parts, producers, consumers, unit, heads))
    position = {name: i for i, name in enumerate(modules)}
    for group in found:
        group.producers = dict(sorted(group.producers.items(), key=lambda pair: position[pair[0]]))
    found.sort(key=lambda group: position[next(iter(group.producers))])
    kept.sort(key=lambda pair: position[pair[0]])
    for i, matcher in enumerate([*inside, *outside]):
        if i not in matched:
            raise ValueError(
                f"{matcher.argument}: expected a filter that matches a layer with channels, got "
                f"{str(matcher)!r}, "
                f"which matches none; layers: {', '.join([g.root for g in found] + [k for k, _ in kept])}"
            )
    return found, kept


def _channel_scores(
    model: nn.Module,
    groups: Sequence[_Group],
    importance: Importance,
    data: object,
    loss_fn: LossFn | None,
) -> tuple[list[torch.Tensor], str]:
    """One score a root channel, float32, for each group; and the criterion's name."""
    criterion: Any = resolve(importance)
    if data is None and (criterion.needs_data or criterion.needs_gradients):
        raise ValueError(f"data: expected batches, which {criterion.name!r} needs, got None")
    if loss_fn is None and criterion.needs_gradients:
        raise ValueError(
            f"loss_fn: expected a callable (model, batch) -> scalar, which {criterion.name!r} needs, got None"
        )
    modules = dict(model.named_modules())
    if isinstance(criterion, OutputWeight):
        scores = []
        for group in groups:
            total = torch.zeros(group.channels, device="cpu")
            for name, indices in group.consumers.items():
                weight = _by_input(modules[name])
                for channel, own in indices.items():
                    total[channel] += torch.linalg.vector_norm(weight[own].flatten(), criterion.p)
            scores.append(total)
        return scores, str(criterion.name)
    names = list(dict.fromkeys(n for g in groups for n in g.producers))
    targets = [Target(modules[n], n, "weight", [f"{n}.weight"], [(modules[n], "weight")]) for n in names]
    for target in targets:
        check_finite(target, target.weight)
    if isinstance(criterion, Fisher):
        return _group_fisher(model, groups, targets, data, loss_fn), str(criterion.name)
    plan = oneshot.Plan(model, parse_pattern("unstructured"), criterion, "layer", targets, [])
    observed = oneshot.observe(plan, data, loss_fn)
    rows: dict[str, torch.Tensor] = {}
    unit = bool(getattr(criterion, "units", False))
    for scored in oneshot.score_all(plan, observed, zeros_last=False):
        x = scored.scores.flatten(1).float().cpu()
        if criterion.key == "abs":
            x = x.abs()
        elif criterion.key == "square":
            x = x.square()
        rows[scored.target.layer] = x.mean(1) if unit else x.sum(1)
    scores = []
    for group in groups:
        total = torch.zeros(group.channels, device="cpu")
        for name, indices in group.producers.items():
            for channel, own in indices.items():
                total[channel] += rows[name][own].sum()
        # First order: contributions of all the layers that share a channel cancel or add up like their sum.
        scores.append(total.abs() if criterion.key == "abs_sum" else total)
    return scores, str(criterion.name)


class _GroupFisher:
    """``sum over samples of (sum over a channel's weights of g * w)**2``, over all layers that share the
    channel: their contributions to one sample add up before they are squared.

    Liu et al., "Group Fisher Pruning for Practical Network Compression" (arXiv 2108.00708).
    """

    def __init__(self, group: _Group) -> None:
        self.sum = torch.zeros(group.channels, dtype=torch.float64, device="cpu")
        self.sample = torch.zeros(group.channels, dtype=torch.float64, device="cpu")
        self.seen: set[str] = set()

    def add(self, layer: str, channels: torch.Tensor, products: torch.Tensor) -> None:
        if layer in self.seen:
            self.flush()  # the next sample
        self.seen.add(layer)
        self.sample.index_add_(0, channels, products)

    def flush(self) -> None:
        self.sum += self.sample.square()
        self.sample.zero_()
        self.seen.clear()


class _ChannelProducts(Observer):
    """Feeds a layer's share of its group's `_GroupFisher`."""

    events = frozenset({SAMPLE_GRADIENT})

    def __init__(
        self, target: Target, group: _GroupFisher, indices: dict[int, list[int]], first: bool
    ) -> None:
        self.target, self.group, self.first = target, group, first
        self.weight = target.weight
        self.channels = torch.tensor([c for c, own in indices.items() for _ in own], device="cpu")
        self.own = torch.tensor([i for own in indices.values() for i in own], device=self.weight.device)

    def gradient(self, g: torch.Tensor, samples: int) -> None:
        products = rows_of(self.target, g.double() * self.weight.double()).sum(1)
        self.group.add(self.target.layer, self.channels, products[self.own].cpu())

    def tensors(self) -> Sequence[torch.Tensor]:
        return (self.group.sum, self.group.sample)

    def reduce(self, processes: Processes) -> None:
        self.group.flush()
        if self.first:  # the layers of a group share its sums
            processes.add_(self.group.sum)


def rows_of(target: Target, x: torch.Tensor) -> torch.Tensor:
    """[outputs, the rest] of what has the shape of the weight."""
    return (x.t() if target.transposed else x).flatten(1)


def _group_fisher(
    model: nn.Module,
    groups: Sequence[_Group],
    targets: Sequence[Target],
    data: object,
    loss_fn: LossFn | None,
) -> list[torch.Tensor]:
    by_name = {t.layer: t for t in targets}
    found = [_GroupFisher(group) for group in groups]
    observers: dict[str, Observer] = {}
    for group, sums in zip(groups, found, strict=True):
        for i, (layer, indices) in enumerate(group.producers.items()):
            observers[by_name[layer].name] = _ChannelProducts(by_name[layer], sums, indices, i == 0)
    collect(model, targets, observers, data, loss_fn, "'fisher'")
    samples = next(iter(observers.values())).samples
    for sums in found:
        sums.flush()
    return [(sums.sum / (2 * max(samples, 1))).float() for sums in found]


def _by_input(module: nn.Module) -> torch.Tensor:
    """[inputs, everything that an input is multiplied by]; a grouped convolution's inputs in order."""
    weight = cast(torch.Tensor, module.weight).detach()
    groups = cast(int, getattr(module, "groups", 1))
    per = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return per.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def _choose(
    groups: Sequence[_Group],
    scores: Sequence[torch.Tensor],
    ratios: Sequence[float],
    round_to: int,
    scope: str,
) -> None:
    """Fill in which channels of each group go; with scope "global" all ratios are the same."""
    local = []
    for group, score in zip(groups, scores, strict=True):
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"importance: expected finite scores of the channels of {group.root!r}, got NaN")
        # In a grouped convolution each group loses the same local channels.
        units = score.reshape(group.parts, -1).sum(0)
        local.append(units.reshape(-1, group.unit).sum(1).contiguous())
    if scope == "global":
        # Layers' scores differ in size: each is taken relative to its layer's mean.
        relative = [x / x.mean().abs().clamp(min=1e-30) for x in local]
        total = sum(x.numel() for x in relative)
        masks = cast(
            "list[torch.Tensor]", ops.topk_mask(relative, keep_count(total, ratios[0]), key="identity")
        )
        wanted = [max(1, int(m.sum())) for m in masks]
    else:
        wanted = [keep_count(x.numel(), ratio) for x, ratio in zip(local, ratios, strict=True)]
    for group, score, keep in zip(groups, local, wanted, strict=True):
        n = score.numel()
        rounded = round_to if group.unit == 1 else 1  # heads are as wide as they are
        keep = min(n, -(-keep // rounded) * rounded)
        mask = cast(torch.Tensor, ops.topk_mask(score, keep, key="identity"))
        gone = [i for i, kept in enumerate(mask.tolist()) if not kept]
        gone = [i * group.unit + j for i in gone for j in range(group.unit)]
        group.removed = [part * n + i for part in range(group.parts) for i in gone]


def _ratios(shares: Mapping[Any, float], groups: Sequence[_Group], model: nn.Module) -> list[float]:
    """By group, the share of the first filter that matches one of its layers; 0 where none does."""
    modules = dict(model.named_modules())
    found: list[float | None] = [None] * len(groups)
    for given, share in shares.items():
        (matcher,) = _matchers("ratio", given)
        hits = [
            i
            for i, group in enumerate(groups)
            if any(matcher.matches(n, n, modules[n], modules) for n in group.producers)
        ]
        if not hits:
            raise ValueError(
                f"ratio: expected filters that match a layer with channels, got {str(matcher)!r}, which "
                f"matches none; layers: {', '.join(g.root for g in groups)}"
            )
        for i in hits:
            found[i] = share if found[i] is None else found[i]
    return [share or 0.0 for share in found]


def _mask(model: nn.Module, groups: Sequence[_Group]) -> None:
    """Zero the weights of the removed channels; biases and BatchNorm stay."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for group in groups:
            for name, indices in group.producers.items():
                rows = [i for channel in group.removed for i in indices[channel]]
                cast(torch.Tensor, modules[name].weight)[rows] = 0


class _Constants:
    """What the masked model feeds its readers at the removed channels."""

    def __init__(self, model: nn.Module, groups: Sequence[_Group], inputs: Sequence[Example]) -> None:
        modules = dict(model.named_modules())
        self.indices: dict[str, list[int]] = {}
        for group in groups:
            for name, indices in group.consumers.items():
                own = self.indices.setdefault(name, [])
                own.extend(i for channel in group.removed for i in indices[channel])
        self.low: dict[str, torch.Tensor] = {}
        self.high: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            for name in self.indices:
                handle = modules[name].register_forward_pre_hook(self._watch(name))
                stack.callback(handle.remove)
            for example in inputs:
                run(model, example)

    def _watch(self, name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            if isinstance(module, _CONVOLUTIONS):
                x = x.unsqueeze(0) if x.ndim == len(module.kernel_size) + 1 else x
                x = x.transpose(0, 1).flatten(1)
            else:
                x = x.reshape(-1, x.shape[-1]).t()
            x = x[self.indices[name]]
            low, high = x.amin(1), x.amax(1)
            self.low[name] = torch.minimum(self.low.get(name, low), low)
            self.high[name] = torch.maximum(self.high.get(name, high), high)

        return before

    def fold(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Bias of each reader that takes over the removed channels, and the readers with borders.

        Raises
        ------
        _NotConstant : a removed channel still varies.
        """
        modules = dict(model.named_modules())
        shifts: dict[str, torch.Tensor] = {}
        approximate = []
        for name, indices in self.indices.items():
            if not indices or name not in self.low:
                continue
            low, high = self.low[name], self.high[name]
            scale = torch.maximum(low.abs(), high.abs())
            if bool((high - low > 1e-4 * scale + 1e-6).any()):
                raise _NotConstant(name)
            constant = (low + high) / 2
            module = modules[name]
            weight = cast(torch.Tensor, module.weight).detach()
            groups = cast(int, getattr(module, "groups", 1))
            per = weight.shape[0] // groups
            sums = weight.reshape(weight.shape[0], weight.shape[1], -1).double().sum(2)
            shift = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
            for i, value in zip(indices, constant.double(), strict=True):
                part, column = divmod(i, weight.shape[1])
                rows = slice(part * per, (part + 1) * per) if groups > 1 else slice(None)
                shift[rows] += sums[rows, column] * value
            shifts[name] = shift
            padded = isinstance(module, _CONVOLUTIONS) and any(module._reversed_padding_repeated_twice)
            if padded and module.padding_mode == "zeros" and bool((constant != 0).any()):
                approximate.append(name)
        return shifts, approximate


class _NotConstant(Exception):
    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.layer = layer


def _add_bias(module: nn.Module, shift: torch.Tensor) -> None:
    weight = cast(torch.Tensor, module.weight)
    shift = shift.to(weight.device, weight.dtype)
    with torch.no_grad():
        if isinstance(module.bias, torch.Tensor):
            module.bias.add_(shift)
        elif bool((shift != 0).any()):
            module.bias = nn.Parameter(shift)


def _cut_borders(
    model: nn.Module, constants: _Constants, names: Sequence[str], shifts: dict[str, torch.Tensor]
) -> list[Any]:
    """Hooks that make the masked model treat a constant at a padded reader as folded: for the check."""
    modules = dict(model.named_modules())
    handles = []
    for name in names:
        indices, shift = constants.indices[name], shifts[name]

        def before(m: nn.Module, args: tuple[Any, ...], own: list[int] = indices) -> tuple[Any, ...]:
            where = torch.tensor(own, device=args[0].device)
            return (args[0].index_fill(-len(m.kernel_size) - 1, where, 0.0), *args[1:])  # type: ignore[arg-type]

        def after(m: nn.Module, args: Any, y: torch.Tensor, s: torch.Tensor = shift) -> torch.Tensor:
            return y + s.to(y.dtype).reshape(-1, *[1] * len(m.kernel_size))  # type: ignore[arg-type]

        handles.append(modules[name].register_forward_pre_hook(before))
        handles.append(modules[name].register_forward_hook(after))
    return handles


def _attempt(
    model: nn.Module, groups: Sequence[_Group], inputs: Sequence[Example]
) -> tuple[nn.Module, list[str], float, bool]:
    """A pruned copy, the readers with borders, its relative error against the masked model, and whether that
    is rounding."""
    masked = copy_model(model).eval()
    _mask(masked, groups)
    constants = _Constants(masked, groups, inputs)
    shifts, approximate = constants.fold(masked)
    pruned = copy_model(model).eval()
    graph = _graph(pruned, inputs[0])
    modules = dict(pruned.named_modules())
    for name, shift in shifts.items():
        _add_bias(modules[name], shift)
    for group in groups:
        if group.removed:
            root = modules[group.root]
            pruner = graph.get_pruner_of_module(root)
            graph.get_pruning_group(root, pruner.prune_out_channels, group.removed).prune()
            if group.heads is not None:
                _fewer_heads(modules[group.heads[0]], group)
    for p in pruned.parameters():
        p.grad = None
    try:
        found = [run(pruned, e) for e in inputs]
    except RuntimeError as error:
        raise _NotConstant(str(error)) from error
    plain = max(compare(run(masked, e), y).relative for e, y in zip(inputs, found, strict=True))
    handles = _cut_borders(masked, constants, approximate, shifts)
    exact = max(compare(run(masked, e), y).relative for e, y in zip(inputs, found, strict=True))
    for handle in handles:
        handle.remove()
    depth = max((p[0].numel() for p in model.parameters() if p.ndim > 1 and p.numel()), default=1)
    layers = sum(isinstance(m, _LAYERS) for m in model.modules())
    eps = max(
        (
            torch.finfo(t.dtype).eps
            for _, t in leaves(found[0])
            if isinstance(t, torch.Tensor) and t.is_floating_point()
        ),
        default=torch.finfo(torch.float32).eps,
    )
    return pruned, approximate, plain, exact <= 8 * tolerance(layers, depth, eps)


def _fewer_heads(module: nn.Module, group: _Group) -> None:
    """The counts that an attention module keeps."""
    assert group.heads is not None
    attributes = vars(module)
    attributes[group.heads[1]] -= len(group.removed) // group.unit
    if attributes.get("all_head_size") == group.channels:
        attributes["all_head_size"] -= len(group.removed)


def prune_channels(
    model: nn.Module,
    example_inputs: Any,
    ratio: float | Mapping[Any, float],
    *,
    importance: Importance = "magnitude",
    scope: str = "layer",
    round_to: int = 4,
    data: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    include: Filters = None,
    exclude: Filters = None,
) -> ChannelReport:
    """Remove the least important neurons, filters and channels of a model, in place: its layers become
    smaller.

    Parameters
    ----------
    model : any module that torch-pruning can trace. Its parameters become new objects: make the optimiser
        after.
    example_inputs : as in `pared.accelerate`; they show the graph, and are what the result is checked on.
    ratio : share of the channels to remove, in [0, 1); or a mapping from filters over layers to shares (the
        ``ratios`` of `pared.pruning.search_channels`): a group takes that of the first filter that matches
        one of its layers, and stays as it is where none does.
    importance, data, loss_fn : as in `pared.prune`. A channel's score is that of its weights in all the
        layers that share it: summed ("taylor": inside the absolute value; "fisher": before a sample's
        square), or its own for criteria that rank units. "output_weight" reads the graph.
    scope : "layer": each loses the same share; "global": scores compete, each relative to its layer's mean.
    round_to : widths become multiples of this, upwards: what kernels work in.
    include, exclude : filters over layers, as in `pared.prune`; a group of layers that share channels is
        pruned when an include filter matches one of them, and not when an exclude filter does.

    Returns
    -------
    ChannelReport : widths before and after, what was left and why.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came; a graph that cannot be
        traced; no channels to remove. The model is then untouched.

    Notes
    -----
    Biases and BatchNorm shifts of removed channels are constants that their readers see; they are folded into
    the readers' biases, so that the result equals the model with those channels' weights at zero. Where a
    convolution pads with zeros that holds inside, not at the borders (`ChannelReport.approximate`). Groups
    for which it does not hold (attention, whose scale depends on the width) are left as they are. At least
    one channel stays.
    """
    module = unwrap(model)
    check_values(module)
    inputs = examples(example_inputs)
    check_filled(inputs)
    shares = dict(ratio) if isinstance(ratio, Mapping) else {None: ratio}
    for share in shares.values():
        if not is_real(share):
            raise TypeError(f"ratio: expected a number in [0, 1), got {type(share).__name__}")
        if not 0 <= share < 1:
            raise ValueError(f"ratio: expected a number in [0, 1), got {share!r}")
    if not shares:
        raise ValueError("ratio: expected at least one filter, got an empty mapping")
    round_to = check_count("round_to", round_to, "channels")
    check_choice("scope", scope, ("layer", "global"))
    check_loss_fn(loss_fn)
    if isinstance(ratio, Mapping) and scope != "layer":
        raise ValueError(f"scope: expected 'layer' with shares for single layers, got {scope!r}")
    for name, layer in module.named_modules():
        if isinstance(layer, _LAYERS) and weight_format(layer) != "plain":
            raise ValueError(
                f"model: expected plain weights, got masks of another tool on {name!r}; make them "
                f"permanent first"
            )
    work = copy_model(module).eval()
    groups, kept = find_groups(work, inputs, include, exclude)
    scores, criterion = _channel_scores(work, groups, importance, data, loss_fn)
    ratios = _ratios(shares, groups, work) if isinstance(ratio, Mapping) else [float(ratio)] * len(groups)
    _choose(groups, scores, ratios, round_to, scope)
    target = ratios[0]
    if isinstance(ratio, Mapping):
        wide = [g.channels for g in groups]
        target = sum(n * r for n, r in zip(wide, ratios, strict=True)) / sum(wide)

    def works(some: Sequence[_Group]) -> bool:
        try:
            return _attempt(module, some, inputs)[3]
        except _NotConstant:
            return False

    active = [g for g in groups if g.removed]
    if active and not works(active):
        bad = [g for g in active if not works([g])]
        kept += [(g.root, "without its channels the others come out differently") for g in bad]
        active = [g for g in active if g not in bad]
        groups = [g for g in groups if g not in bad]
        if not active or not works(active):
            raise ValueError(
                "model: expected one whose channels can be removed without changing the others, got "
                "outputs that "
                f"differ from the masked model's at {', '.join(g.root for g in bad or active)}"
            )
    before = sum(p.numel() for p in module.parameters())
    pruned, approximate, error, _ = _attempt(module, active, inputs)
    with uninterrupted():
        _transplant(module, pruned)
    table = tuple((tuple(g.producers), g.channels, g.channels - len(g.removed)) for g in groups)
    after = sum(p.numel() for p in module.parameters())
    return ChannelReport(
        criterion, scope, target, table, tuple(kept), tuple(approximate), before, after, error
    )


def _transplant(model: nn.Module, donor: nn.Module) -> None:
    """Give each module its twin's tensors and sizes; modes, hooks and flags stay."""
    twins = dict(donor.named_modules())
    for name, module in model.named_modules():
        twin = twins[name]
        old = dict(module._parameters)
        for key, value in vars(twin).items():
            if isinstance(value, int) and not isinstance(value, bool) and key in vars(module):
                vars(module)[key] = value  # in_features, out_channels, num_features, groups
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = twin.normalized_shape
        for key, parameter in twin._parameters.items():
            if parameter is not None and old.get(key) is not None:
                parameter.requires_grad_(cast(nn.Parameter, old[key]).requires_grad)
            if (
                parameter is None
                or old.get(key) is None
                or parameter.shape != cast(torch.Tensor, old[key]).shape
            ):
                module._parameters[key] = parameter
            else:
                with torch.no_grad():
                    cast(torch.Tensor, old[key]).copy_(parameter)
        for key, buffer in twin._buffers.items():
            module._buffers[key] = buffer


# ---------------------------------------------------------------- layers


@dataclass(frozen=True)
class LayerRemovalReport:
    """The result of `pared.prune_layers`. ``print(report)`` shows the table.

    Attributes
    ----------
    importance : what was asked for.
    scores : ``(block, score)`` of every candidate, in order; `removed` : names of those that are gone.
    parameters_before, parameters : of the whole model.
    """

    importance: str
    scores: tuple[tuple[str, float], ...]
    removed: tuple[str, ...]
    parameters_before: int
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=check_indent(indent))

    def __rich__(self) -> Table:
        table = Table(title=f"{len(self.removed)} of {len(self.scores)} blocks removed ({self.importance})")
        table.add_column("block")
        table.add_column("score", justify="right")
        table.add_column("")
        for name, score in self.scores:
            table.add_row(name, f"{score:.4g}", "removed" if name in self.removed else "")
        return table

    def __str__(self) -> str:
        return _text(self)


class Skip(nn.Module):
    """In place of a removed block: gives its first argument back, in the form of the block's output."""

    def __init__(self, wrap: str) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (x,) if self.wrap == "tuple" else x


def _candidates(model: nn.Module, include: Filters, exclude: Filters) -> dict[str, nn.Module]:
    """Children of lists of modules (blocks of a transformer, stages of a residual network)."""
    inside, outside = _matchers("include", include), _matchers("exclude", exclude)
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for prefix, container in modules.items():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            for name, child in container.named_children():
                full = f"{prefix}.{name}" if prefix else name
                nested = any(full.startswith(f"{other}.") for other in found)
                if list(child.parameters()) and not nested:
                    found[full] = child
    if inside:
        # What a filter matches itself, not everything inside of it.
        found = {
            n: m
            for n, m in modules.items()
            if n and any(f.matches(n, n, m, modules) for f in inside) and not _inside(n, inside, modules)
        }
        if not found:
            raise ValueError(
                f"include: expected a filter that matches a block, got {[str(f) for f in inside]}"
            )
    for f in outside:
        if not any(f.matches(n, n, m, modules) for n, m in modules.items() if n):
            raise ValueError(f"exclude: expected a filter that matches a module, got {str(f)!r}")
    return {n: m for n, m in found.items() if not any(f.matches(n, n, m, modules) for f in outside)}


def _inside(name: str, filters: Sequence[Any], modules: dict[str, nn.Module]) -> bool:
    parent = name.rpartition(".")[0]
    return bool(parent) and any(f.matches(parent, parent, modules[parent], modules) for f in filters)


class _Influence:
    """``1 - cos(input, output)`` of each block, over all positions; None where the shapes differ."""

    def __init__(self) -> None:
        self.sum: dict[str, float] = {}
        self.count: dict[str, int] = {}
        self.wrap: dict[str, str] = {}
        self.other: set[str] = set()

    def hook(self, name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            wrap = "tuple" if isinstance(y, tuple) else "tensor"
            out = y[0] if isinstance(y, tuple) and len(y) == 1 else y
            if not (
                isinstance(x, torch.Tensor)
                and isinstance(out, torch.Tensor)
                and x.shape == out.shape
                and args
            ):
                self.other.add(name)
                return
            self.wrap[name] = wrap
            dim = 1 if x.ndim == 4 else -1  # channels of an image, features of a token
            cosine = nn.functional.cosine_similarity(x.double(), out.double(), dim=dim)
            if not bool(torch.isfinite(cosine).all()):
                raise ValueError(f"data: expected finite activations, got NaN or infinity at block {name!r}")
            if not cosine.numel():
                return
            self.sum[name] = self.sum.get(name, 0.0) + float((1 - cosine).sum())
            self.count[name] = self.count.get(name, 0) + cosine.numel()

        return after

    def reduce(self, processes: Processes) -> None:
        """Take in what other processes have seen of their data."""
        seen = processes.gather((self.sum, self.count, self.wrap, self.other))
        self.sum, self.count = {}, {}
        for sums, counts, wrap, other in seen:
            for name, value in sums.items():
                self.sum[name] = self.sum.get(name, 0.0) + value
                self.count[name] = self.count.get(name, 0) + counts[name]
            self.wrap.update(wrap)
            self.other |= other


def prune_layers(
    model: nn.Module,
    example_inputs: Any,
    n: int,
    *,
    importance: str | Callable[[str, nn.Module], float] = "block_influence",
    data: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    include: Filters = None,
    exclude: Filters = None,
) -> LayerRemovalReport:
    """Remove the `n` least important blocks of a model, in place: each becomes the identity.

    Candidates are the members of ModuleLists and Sequentials whose input and output have the same shape.

    Parameters
    ----------
    example_inputs : as in `pared.accelerate`; the data that scores are taken on when `data` is None.
    importance : "block_influence": ``1 - cos(input, output)``, Men et al., "ShortGPT" (arXiv 2403.03853);
        "change_rate": how much the loss (`loss_fn`) or the output moves without the block; or a callable
        ``(name, module) -> score``.
    data, loss_fn, include, exclude : as in `pared.prune`.

    Returns
    -------
    LayerRemovalReport

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came. The model is then untouched.
    """
    module = unwrap(model)
    check_values(module)
    if not is_integer(n):
        raise TypeError(f"n: expected a number of blocks, got {type(n).__name__}")
    if callable(importance):
        check_callable("importance", importance, "(name, module) -> score")
    else:
        known = ("block_influence", "change_rate")
        check_choice("importance", importance, known, "a callable (name, module) -> score")
    check_loss_fn(loss_fn)
    inputs = examples(example_inputs)
    check_filled(inputs)
    candidates = _candidates(module, include, exclude)
    influence = _Influence()
    processes = None if data is None else distributed.current()
    with distributed.together(processes), ExitStack() as stack:
        stack.enter_context(frozen(module))
        for name, block in candidates.items():
            handle = block.register_forward_hook(influence.hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        with torch.no_grad():
            for run_one in _runs(module, inputs, data, loss_fn):
                run_one()
    if processes is not None:
        influence.reduce(processes)
    usable = [c for c in candidates if c in influence.count and c not in influence.other]
    if not 0 <= n < max(1, len(usable)):
        raise ValueError(
            f"n: expected 0 to {max(0, len(usable) - 1)}, fewer than the {len(usable)} blocks whose output "
            f"has the "
            f"shape of their input ({', '.join(usable[:6])}), got {n}"
        )
    if callable(importance):
        scores = {
            c: check_metric(importance(c, candidates[c]), f"importance: expected a number for block {c!r},")
            for c in usable
        }
    elif importance == "block_influence":
        scores = {c: influence.sum[c] / influence.count[c] for c in usable}
    else:
        scores = _block_changes(module, usable, influence, inputs, data, loss_fn)
    order = torch.tensor([-scores[c] for c in usable], dtype=torch.float32, device="cpu")
    gone = (
        cast("tuple[torch.Tensor, torch.Tensor]", ops.topk(order, n, key="identity"))[1].tolist() if n else []
    )
    before = sum(p.numel() for p in module.parameters())
    removed = [usable[i] for i in sorted(gone)]
    for name in removed:
        _replace(module, name, Skip(influence.wrap[name]))
    after = sum(p.numel() for p in module.parameters())
    label = importance if isinstance(importance, str) else getattr(importance, "__name__", "callable")
    return LayerRemovalReport(label, tuple(scores.items()), tuple(removed), before, after)


def _runs(
    model: nn.Module, inputs: Sequence[Example], data: Iterable[Any] | None, loss_fn: LossFn | None
) -> Iterator[Callable[[], Any]]:
    if data is None:
        for example in inputs:
            yield functools.partial(first_run, model, example)
    else:
        for batch in batches(data, "'prune_layers'"):
            yield functools.partial(forward, model, batch, loss_fn)


def _replace(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent) if parent else model
    old = owner._modules[last]
    owner._modules[last] = new
    assert old is not None
    return old


def _block_changes(
    model: nn.Module,
    names: Sequence[str],
    influence: _Influence,
    inputs: Sequence[Example],
    data: Iterable[Any] | None,
    loss_fn: LossFn | None,
) -> dict[str, float]:
    from pared.pruning.criteria import _flat

    moved = dict.fromkeys(names, 0.0)
    processes = None if data is None else distributed.current()
    with distributed.together(processes), frozen(model), torch.no_grad():
        for index, run_one in enumerate(_runs(model, inputs, data, loss_fn)):
            used = loss_fn if data is not None else None
            base = _flat(run_one(), used, index)
            for name in names:
                old = _replace(model, name, Skip(influence.wrap[name]))
                try:
                    change = _flat(run_one(), used, index) - base
                finally:
                    _replace(model, name, old)
                if used is not None:
                    moved[name] += float(change)
                else:
                    norm = float(torch.linalg.vector_norm(base)) or 1.0
                    moved[name] += float(torch.linalg.vector_norm(change)) / norm
    if processes is not None:
        sums = processes.add_(
            torch.tensor([moved[name] for name in names], dtype=torch.float64, device="cpu")
        )
        moved = dict(zip(names, sums.tolist(), strict=True))
    return {name: abs(x) for name, x in moved.items()}
