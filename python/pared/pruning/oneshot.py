"""`pared.prune`: zeros into a model, in one call."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pared._errors import check_choice, is_real
from pared._interrupt import uninterrupted
from pared._sparsity import bake, base_type, masked_names, weight_format
from pared.nn import RULES
from pared.pruning import auto, calibration, distributed
from pared.pruning.calibration import (
    InputNorms,
    LossFn,
    MeanGradient,
    check_batches,
    check_loss_fn,
    check_observer,
)
from pared.pruning.importance import SCOPES, Criterion, Importance, resolve, selection_key
from pared.pruning.linears import plain_kind
from pared.pruning.masks import Scored, check_finite, check_writable, choose, nonzeros, score, zero
from pared.pruning.patterns import Pattern, parse_pattern
from pared.pruning.report import LayerReport, PruneReport
from pared.pruning.targets import Filters, Target, _matchers, collect, unwrap

__all__ = ["prune"]


@dataclass(frozen=True)
class Plan:
    """Checked arguments that `prune` and `Pruner` share."""

    model: nn.Module
    pattern: Pattern
    criterion: Criterion
    scope: str
    targets: list[Target]
    dense: list[tuple[str, str]]
    # Of targets with a pattern of their own, by name.
    patterns: Mapping[str, Pattern] = dataclasses.field(default_factory=dict)

    def pattern_of(self, target: Target) -> Pattern:
        return self.patterns.get(target.name, self.pattern)


def make_plan(
    model: object,
    pattern: object,
    importance: object,
    scope: object,
    data: object,
    loss_fn: object,
    include: object,
    exclude: object,
    keep_first: object,
    keep_last: object,
) -> Plan:
    """Check every argument and find the targets; nothing is changed."""
    module = unwrap(model)
    parsed = parse_pattern(pattern)
    criterion = resolve(importance)
    if scope is not None:
        check_choice("scope", scope, SCOPES, "None, the criterion's own")
    check_loss_fn(loss_fn)
    if data is not None:
        check_batches(data)
    if data is None and (criterion.needs_data or criterion.needs_gradients):
        raise ValueError(f"data: expected batches, which {criterion.name!r} needs, got None")
    if loss_fn is None and criterion.needs_gradients:
        raise ValueError(
            f"loss_fn: expected a callable (model, batch) -> scalar, which {criterion.name!r} needs, got None"
        )
    targets, dense = collect(module, include, exclude, keep_first, keep_last)
    for target in targets:
        check_writable(target)
        _check_ties(target)
        for name in masked_names(target.module):
            weight_format(target.module, name)  # what cannot be baked is refused before anything is
    return Plan(
        module, parsed, criterion, scope if isinstance(scope, str) else criterion.scope, targets, dense
    )


def observe(plan: Plan, data: object, loss_fn: LossFn | None) -> Mapping[str, Any]:
    """What the criterion wants to know of each target: one pass over `data`, or the criterion's own measure.

    By the target's name. Criteria that say only that they need gradients or data get the gradient of the mean
    loss, or the norms of the inputs' columns.
    """
    criterion: Any = plan.criterion
    if hasattr(criterion, "measure"):
        found: Mapping[str, Any] = criterion.measure(plan.model, plan.targets, data, loss_fn)
        if not isinstance(found, Mapping):
            raise TypeError(
                f"importance: expected measure() of {criterion.name!r} to return a dict by tensor name, got "
                f"{type(found).__name__}"
            )
        if missing := [t.name for t in plan.targets if t.name not in found]:
            raise ValueError(
                f"importance: expected measure() of {criterion.name!r} to return an entry for each tensor, "
                f"got none for {missing[0]!r}"
            )
        return found
    make = getattr(criterion, "observe", None)
    if make is None:
        if not (criterion.needs_data or criterion.needs_gradients):
            return {}
        make = MeanGradient if criterion.needs_gradients else InputNorms
    observers = {target.name: make(target, plan.pattern_of(target)) for target in plan.targets}
    for observer in observers.values():
        check_observer(observer, criterion.name)
    calibration.collect(plan.model, plan.targets, observers, data, loss_fn, repr(criterion.name))
    return {name: observer.result() for name, observer in observers.items()}


def score_all(plan: Plan, observed: Mapping[str, Any], *, zeros_last: bool = True) -> Iterator[Scored]:
    """The targets with their scores, one after the other."""
    for target in plan.targets:
        seen = observed.get(target.name)
        yield score(plan.criterion, target, plan.pattern_of(target), observed=seen, zeros_last=zeros_last)


def choose_masks(
    plan: Plan, observed: Mapping[str, Any], sparsity: float | Mapping[str, float], *, zeros_last: bool = True
) -> list[torch.Tensor]:
    """Masks of all targets; only a global selection holds more than one layer's scores at a time."""
    scored, key = score_all(plan, observed, zeros_last=zeros_last), selection_key(plan.criterion)
    rule = plan.pattern.kind == "nm" and not plan.patterns
    if isinstance(sparsity, Mapping) or plan.scope != "global" or rule:
        shares = (
            sparsity
            if isinstance(sparsity, Mapping)
            else dict.fromkeys((t.name for t in plan.targets), sparsity)
        )
        masks = [
            choose([s], key, shares[s.target.name], plan.pattern_of(s.target), plan.scope)[0] for s in scored
        ]
    elif plan.patterns:
        masks = _choose_by_pattern(plan, list(scored), key, sparsity)
    else:
        masks = choose(list(scored), key, sparsity, plan.pattern, plan.scope)
    shared = plan.criterion.needs_data or plan.criterion.needs_gradients
    if shared and (processes := distributed.current()) is not None:
        masks = [processes.first_(mask) for mask in masks]  # replicas stay replicas, whatever rounds where
    return masks


def _choose_by_pattern(plan: Plan, scored: list[Scored], key: str, sparsity: float) -> list[torch.Tensor]:
    """A selection for each pattern among the layers that have it: a block and a weight do not compare."""
    masks: dict[str, torch.Tensor] = {}
    for pattern in dict.fromkeys(plan.pattern_of(s.target) for s in scored):
        mine = [s for s in scored if plan.pattern_of(s.target) == pattern]
        rule = pattern.kind == "nm"
        parts = [[s] for s in mine] if rule else [mine]
        for part in parts:
            found = choose(part, key, sparsity, pattern, plan.scope)
            masks.update((s.target.name, m) for s, m in zip(part, found, strict=True))
    return [masks[s.target.name] for s in scored]


def with_auto_patterns(
    plan: Plan,
    sparsity: float | Mapping[str, float],
    example_inputs: object,
    tokens: int | None,
    device: object,
    precision: str,
) -> tuple[Plan, list[auto.PatternChoice]]:
    """The plan with a pattern for each target."""
    kind = auto.check_options(example_inputs, tokens, device, precision, plan.model)
    layers = auto.layers(plan.model, plan.targets, example_inputs, tokens)
    choices = []
    for target, layer in zip(plan.targets, layers, strict=True):
        share = sparsity if isinstance(sparsity, float) else sparsity[target.name]
        choices.append(auto.decide(target.name, layer, share, kind, precision))
    if hasattr(plan.criterion, "reconstruct"):
        choices = auto.agree(choices, f"for {plan.criterion.name} prunes all layers with one pattern")
    patterns = {c.name: parse_pattern(c.pattern) for c in choices}
    common = next(iter(patterns.values()), plan.pattern)
    return dataclasses.replace(plan, pattern=common, patterns=patterns), choices


def compensated(
    plan: Plan, observed: Mapping[str, Any], dropped: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The weights as the criterion changes them for what is dropped; empty where it does not."""
    compensate = getattr(plan.criterion, "compensate", None)
    if compensate is None:
        return []
    found = []
    for target, gone in zip(plan.targets, dropped, strict=True):
        # What is zero stays zero.
        new = compensate(observed.get(target.name), gone | (target.weight == 0))
        if new is None:
            return []
        if not isinstance(new, torch.Tensor) or not new.is_floating_point() or new.shape != gone.shape:
            got = f"{new.dtype} {list(new.shape)}" if isinstance(new, torch.Tensor) else type(new).__name__
            raise TypeError(
                f"importance: expected compensate() of {plan.criterion.name!r} to return None or a floating-"
                f"point tensor {list(gone.shape)} for {target.name!r}, got {got}"
            )
        if new.is_meta or not bool(torch.isfinite(new).all()):
            raise ValueError(
                f"importance: expected finite weights from {plan.criterion.name!r}, got others at "
                f"{target.name!r}; a larger damping may help"
            )
        found.append(new)
    if (processes := distributed.current()) is not None:
        found = [processes.first_(new.contiguous()) for new in found]
    return found


def _check_ties(target: Target) -> None:
    """Places that share a weight have to agree on its masks: one tensor cannot hold two."""
    if len(target.places) == 1:
        return
    formats = {weight_format(module, parameter) for module, parameter in target.places}
    if formats == {"plain"}:
        return
    first, *others = (Target(module, "", parameter).weight for module, parameter in target.places)
    if not all(torch.equal(first, other) for other in others):
        raise ValueError(
            f"model: expected tied weights with one mask, got different ones on {', '.join(target.names)}"
        )


def check_sparsity(sparsity: object, pattern: Pattern, name: str = "sparsity") -> float:
    """The argument `name` as a float in [0, 1); the rule's own when it is None and the pattern is N:M."""
    if sparsity is None and pattern.kind == "nm":
        return pattern.rule_sparsity
    if not is_real(sparsity):
        kind = type(sparsity).__name__
        raise TypeError(f"{name}: expected a number in [0, 1), the share of weights to remove, got {kind}")
    if not 0 <= sparsity < 1:
        hint = "; 90 % is 0.9" if 1 < sparsity <= 100 else ""
        raise ValueError(f"{name}: expected a number in [0, 1), got {sparsity!r}{hint}")
    if pattern.kind == "nm" and not math.isclose(sparsity, pattern.rule_sparsity, abs_tol=1e-9):
        want = f"{pattern.rule_sparsity:g} (or None)"
        raise ValueError(f"{name}: expected {want}, which pattern {str(pattern)!r} fixes, got {sparsity!r}")
    return float(sparsity)


def assign_sparsity(plan: Plan, sparsity: Mapping[Any, Any]) -> tuple[Plan, dict[str, float]]:
    """For each target the share that the first filter that matches it has; the others, and those with a share
    of 0, stay as they are.
    """
    if not sparsity:
        raise ValueError("sparsity: expected at least one filter, got an empty mapping")
    modules = dict(plan.model.named_modules(remove_duplicate=False))
    assigned: dict[str, float] = {}
    for given, share in sparsity.items():
        (matcher,) = _matchers("sparsity", given)
        value = 0.0 if share == 0 else check_sparsity(share, plan.pattern)
        found = [t for t in plan.targets if matcher.selects(t, modules)]
        if not found:
            names = ", ".join(t.name for t in plan.targets[:5])
            raise ValueError(
                f"sparsity: expected filters that match a selected weight, got {str(matcher)!r}; weights: "
                f"{names}"
            )
        for target in found:
            assigned.setdefault(target.name, value)
    own = plan.scope if plan.scope != "global" else "layer"
    why = {0.0: "its sparsity is 0", None: "no filter in sparsity matches"}
    targets = [t for t in plan.targets if assigned.get(t.name)]
    left = [(t.name, why[assigned.get(t.name)]) for t in plan.targets if t not in targets]
    return dataclasses.replace(plan, scope=own, targets=targets, dense=[*plan.dense, *left]), assigned


def reconstruct(
    plan: Plan, sparsity: float | Mapping[str, float], data: object, loss_fn: LossFn | None
) -> None:
    """Let the criterion prune and rewrite the weights itself."""
    if plan.scope != "layer":
        raise ValueError(
            f"scope: expected 'layer' or None with {plan.criterion.name!r}, which prunes each layer for "
            f"itself, "
            f"got {plan.scope!r}"
        )
    for target in plan.targets:
        if any(weight_format(module, parameter) != "plain" for module, parameter in target.places):
            raise ValueError(
                f"model: expected plain weights, which {plan.criterion.name!r} rewrites, got masks of "
                f"another "
                f"tool on {target.name!r}; make them permanent first, for example with pared.prune(model, "
                f"0.0)"
            )
    criterion: Any = plan.criterion
    criterion.reconstruct(plan.model, plan.targets, sparsity, plan.pattern, data, loss_fn)


def bake_targets(targets: Iterable[Target]) -> None:
    """Make the masks of other tools permanent on the targets' modules."""
    for target in targets:
        for module, _ in target.places:
            bake(module, recurse=False)


def layer_report(target: Target, before: int) -> LayerReport:
    tensor = target.tensor.detach()
    kept = nonzeros(tensor)
    return LayerReport(target.name, target.type, tuple(tensor.shape), before, kept, tuple(target.names[1:]))


def make_report(
    plan: Plan, sparsity: float, before: Sequence[int], choices: Sequence[auto.PatternChoice] = ()
) -> PruneReport:
    """Count what is there now against the non-zeros that were there before."""
    layers = tuple(layer_report(t, b) for t, b in zip(plan.targets, before, strict=True))
    notes = []
    if not any(layer.changed for layer in layers):
        total = sum(layer.weights for layer in layers)
        present = 1.0 - sum(before) / total if total else 0.0
        notes.append(
            f"nothing changed: {present:.2%} of these weights were zero, the target is {sparsity:.2%}"
        )
    last = [
        x.name
        for x, p in zip(layers, map(plan.pattern_of, plan.targets), strict=True)
        if x.changed and p.kind != "nm" and x.kept <= p.rows * p.cols < x.weights
    ]
    if last and plan.scope == "global":
        more = f" and {len(last) - 3} more" if len(last) > 3 else ""
        notes.append(f"one weight or block is left in {', '.join(last[:3])}{more}: try scope='layer'")
    without = [t for t in plan.targets if base_type(t.module) not in RULES and plain_kind(t.module) is None]
    for kind in dict.fromkeys(t.type for t in without):
        names = [t.name for t in without if t.type == kind]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        notes.append(f"no kernel accelerates {kind}: zeros in {', '.join(names[:3])}{more} save no time")
    return PruneReport(
        pattern="auto: " + ", ".join(dict.fromkeys(c.pattern for c in choices))
        if choices
        else str(plan.pattern),
        importance=plan.criterion.name,
        scope=plan.scope,
        target=sparsity,
        layers=layers,
        dense=tuple(plan.dense),
        parameters=sum(p.numel() for p in plan.model.parameters()),
        notes=tuple(notes),
        choices=tuple(choices),
    )


def prune(
    model: nn.Module,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    pattern: str = "unstructured",
    importance: Importance = "magnitude",
    scope: str | None = None,
    data: Iterable[Any] | None = None,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    include: Filters = None,
    exclude: Filters = None,
    keep_first: int = 0,
    keep_last: int = 0,
    example_inputs: Any = None,
    tokens: int | None = None,
    device: Any = None,
    precision: str = "float32",
) -> PruneReport:
    """Prune a model once, in place: the least important weights become true zeros.

    Parameters
    ----------
    model : any module; one wrapped by ``torch.compile`` or DistributedDataParallel is looked into. Masks that
        torch.nn.utils.prune or torch.ao.pruning left on the pruned layers are respected and made permanent.
    sparsity : share of the selected weights (blocks, for RxC) to remove, in [0, 1); weights that are zero
        already count. None only with N:M, which fixes it. Or a share for each layer: a mapping from filters
        (as for `include`) to numbers, such as the `sparsities` of `pared.search_budget`; the first filter
        that matches counts, and what none matches stays dense.
    pattern : "unstructured"; "RxC", blocks of R consecutive outputs by C consecutive inputs (of one tap, for
        convolutions), such as "1x4", "4x1", "16x1"; "N:M", the N best of every M inputs, such as "2:4".
        "auto": for each layer the one that the device rewards, with the finer ones preferred: a coarser one
        is taken where it is estimated to be at least 1.15 times as fast at this sparsity. It needs `tokens`
        or `example_inputs`; the report says why. Layers with the same pattern compete where `scope` is
        global.
    importance : a name: "magnitude" (``|w|``, the L1 norm of a block), "lamp", "random"; with `data` "wanda",
        "activation", "apoz", "entropy", "mutual_information", "change_rate",
        "sparsegpt" and "obc", which also rewrite the weights that stay; with `data` and `loss_fn`
        "taylor", "fisher", "gradient", and "woodfisher", which rewrites too; from the layers around
        "output_weight", "propagation", "bn_scale", "geometric_median". Or an
        object that follows `pared.pruning.Criterion`, or a callable ``module -> scores`` (of the weight's
        shape, larger is more important; a dict by tensor name for modules with several weights). The
        classes in `pared.pruning` say what each is, and take options.
    scope : where scores compete. "global": over all layers; "layer": each layer loses the same share;
        "row": each output (block row) does. None: the criterion's own: row for wanda, layer for those that
        rank units, global for the others. N:M is the same for each.
    data : batches, for criteria that need them; one pass. Tensors (the model's argument), tuples (its
        arguments, or ``(input, label)``) or dicts (its keyword arguments).
    loss_fn : ``loss_fn(model, batch) -> scalar``, the batch's mean loss, for criteria that need gradients;
        where given, it is also how other criteria run the model.
    include, exclude : filters: a glob over names ("encoder.*", "*.fc1"), a regular expression (compiled,
        or a string after "re:"), a module type, a module, a callable ``(layer name, module) -> bool``, or a
        list of those. What matches a container selects everything in it; exclude wins. Embeddings, and
        weights tied to one, are pruned only when an include filter selects nothing else.
    keep_first, keep_last : how many of the selected layers stay dense, in registration order.
    example_inputs, tokens : of pattern "auto": what the model will be called with, as for `pared.accelerate`
        (the model runs once), or how many tokens (output pixels) a call of each layer has.
    device, precision : of pattern "auto": where it will run, "cpu" or "cuda" (None: where it is now), and
        whether with "float32" kernels, which leave the weights as they are, or "int8".

    Returns
    -------
    PruneReport : per layer and in total, non-zeros and sparsity before and after; ``print`` it, or
        ``to_json()``.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came: among others non-finite
        weights, an unknown parametrisation, a filter that matches nothing; no data or no loss where the
        criterion needs it, a loss without a gradient, an exhausted loader, NaN in the data (which batch,
        which layer). The model is then untouched.

    Notes
    -----
    Of n units ``n - round(sparsity * n)`` are kept, exactly, ties going to the lowest index, and at least
    one in each layer (in each row, with ``scope="row"``), so that no layer is emptied. Tied weights are
    pruned once and stay tied. Parameters stay the same objects. float64 weights are ranked in float32.
    Statistics are streamed: sums stay, activations do not. The model runs in eval mode, and its mode, its
    ``.grad`` and its ``requires_grad`` flags are as before afterwards.

    Where torch.distributed is initialised, criteria that need data reduce their statistics over the
    processes: every process calls this with its own share of the data, and all get the same masks
    (`pared.pruning.process_group`).

    Zeros alone are not faster: `pared.accelerate` is the next step. To fine-tune a pruned model with its
    zeros held, use `pared.Pruner`.
    """
    automatic = isinstance(pattern, str) and pattern == "auto"
    if not automatic and (example_inputs is not None or tokens is not None or device is not None):
        raise ValueError(f"pattern: expected 'auto' with example_inputs, tokens or device, got {pattern!r}")
    if automatic:
        pattern = "unstructured"
    plan = make_plan(
        model, pattern, importance, scope, data, loss_fn, include, exclude, keep_first, keep_last
    )
    shares: float | Mapping[str, float]
    if isinstance(sparsity, Mapping):
        if scope == "global":
            raise ValueError(
                "scope: expected 'layer', 'row' or None with a sparsity for each layer, got 'global'"
            )
        plan, shares = assign_sparsity(plan, sparsity)
        total = sum(t.tensor.numel() for t in plan.targets)
        overall = sum(shares[t.name] * t.tensor.numel() for t in plan.targets) / max(1, total)
    else:
        shares = overall = check_sparsity(sparsity, plan.pattern)
    for target in plan.targets:
        check_finite(target, target.weight)  # before the data: a model that is broken says so at once
    choices: list[auto.PatternChoice] = []
    if automatic:
        plan, choices = with_auto_patterns(plan, shares, example_inputs, tokens, device, precision)
    before = [nonzeros(target.weight) for target in plan.targets]
    if plan.targets and hasattr(plan.criterion, "reconstruct"):
        reconstruct(plan, shares, data, loss_fn)
    elif plan.targets:
        observed = observe(plan, data, loss_fn)
        dropped = [mask.logical_not_() for mask in choose_masks(plan, observed, shares)]
        changed = compensated(plan, observed, dropped)
        with uninterrupted(), torch.no_grad():
            bake_targets(plan.targets)
            for i, target in enumerate(plan.targets):
                if changed:
                    target.tensor.copy_(changed[i])
                zero(target.tensor, dropped[i])
    return make_report(plan, overall, before, choices)
