"""The criteria that look at data, at gradients, or at the layers around: one class each, with its formula.

They stream: a pass over the data leaves sums behind (at most a few numbers a weight), never activations.
Those that rank whole units (outputs of a layer: neurons, filters) give every weight of a unit the unit's
score; they are meant for whole rows, blocks as wide as the layer, and channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pared._errors import check_callable, check_choice, check_count, check_flag
from pared._inputs import leaves
from pared.pruning import distributed, masks
from pared.pruning.calibration import (
    _CONVOLUTIONS,
    INPUT,
    OUTPUT,
    SAMPLE_GRADIENT,
    InputNorms,
    LossFn,
    MeanGradient,
    Observer,
    accumulator,
    batch_size,
    batches,
    check_samples,
    checked_loss,
    forward,
    frozen,
)
from pared.pruning.distributed import Processes
from pared.pruning.importance import BuiltIn, Statistics, check_norm, spread_units
from pared.pruning.patterns import Pattern
from pared.pruning.targets import Target

__all__ = [
    "Activation",
    "BNScale",
    "ChangeRate",
    "Entropy",
    "Fisher",
    "GeometricMedian",
    "Gradient",
    "MutualInformation",
    "OutputWeight",
    "Propagation",
    "Taylor",
    "Wanda",
]

# Of a histogram of each unit.
_MOST_BINS = 2**16


# ---------------------------------------------------------------- gradients


class Gradient(BuiltIn):
    """``|g|``, the gradient of the mean loss over `data`.

    It vanishes where training has converged, whatever the weight is worth: a baseline, not a recommendation.
    """

    name = "gradient"
    needs_data = True
    needs_gradients = True
    scope = "global"
    key = "abs"

    def observe(self, target: Target, pattern: Pattern) -> Observer:
        return MeanGradient(target, pattern)

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        gradient: torch.Tensor = statistics.observed
        return gradient


class Taylor(BuiltIn):
    """``|sum over the unit of g * w|``: first-order estimate of how much the loss moves without the unit.

    The sum over a block (a channel) is inside the absolute value: contributions of opposite sign cancel, as
    they do in the loss. Molchanov et al., "Importance Estimation for Neural Network Pruning" (arXiv
    1906.10771); at initialisation it is SNIP (arXiv 1810.02340).
    """

    name = "taylor"
    needs_data = True
    needs_gradients = True
    scope = "global"
    key = "abs_sum"

    def observe(self, target: Target, pattern: Pattern) -> Observer:
        return MeanGradient(target, pattern)

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        gradient: torch.Tensor = statistics.observed
        return gradient * statistics.weight


class _SampleGradients(Observer):
    """``sum over samples of g**2``, or of ``(sum over the block of g * w)**2`` in the block's first
    element.
    """

    events = frozenset({SAMPLE_GRADIENT})

    def __init__(self, target: Target, pattern: Pattern) -> None:
        weight = target.weight
        self.weight = weight
        self.blocks = masks.Blocks(weight.shape, target, pattern) if pattern.kind == "block" else None
        self.sum = torch.zeros(weight.shape, dtype=accumulator(weight), device=weight.device)

    def gradient(self, g: torch.Tensor, samples: int) -> None:
        if self.blocks is None:
            self.sum.addcmul_(g.to(self.sum.dtype), g.to(self.sum.dtype))
        else:
            product = g.to(self.sum.dtype) * self.weight
            parts = [p.sum((2, 4)).square() for p in self.blocks.split(product, fill=0.0)]
            self.sum.add_(self.blocks.corners(parts))

    def tensors(self) -> Sequence[torch.Tensor]:
        return (self.sum,)

    def reduce(self, processes: Processes) -> None:
        processes.add_(self.sum)

    def result(self) -> torch.Tensor:
        return self.sum / max(self.samples, 1)


class Fisher(BuiltIn):
    """``w**2 * E[g**2] / 2``: the loss added by removing a weight, with the diagonal empirical Fisher matrix.

    Expectations are over samples: each sample has a backward pass of its own, because the square of a batch's
    mean gradient is not the mean of the samples' squares. Over a block or a channel the gradient of the
    unit's own factor is squared, ``E[(sum over the unit of g * w)**2] / 2``. Theis et al., "Faster gaze
    prediction with dense networks and Fisher pruning" (arXiv 1801.05787); groups: Liu et al., "Group Fisher
    Pruning" (arXiv 2108.00708).
    """

    joint = True  # scores of blocks are put together before the selection
    name = "fisher"
    needs_data = True
    needs_gradients = True
    scope = "global"
    key = "identity"

    def observe(self, target: Target, pattern: Pattern) -> Observer:
        return _SampleGradients(target, pattern)

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        observed: torch.Tensor = statistics.observed
        if statistics.blocks:
            return observed / 2
        return statistics.weight.to(observed.dtype).square() * observed / 2


# ---------------------------------------------------------------- inputs


class Wanda(BuiltIn):
    """``|w| * norm of its input``, compared within an output's row.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695). Block
    scores are sums over the block.
    """

    name = "wanda"
    needs_data = True
    needs_gradients = False
    scope = "row"
    key = "abs"

    def observe(self, target: Target, pattern: Pattern) -> Observer:
        return InputNorms(target, pattern)

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        norms: torch.Tensor = statistics.observed
        return statistics.weight.to(norms.dtype) * norms


# ---------------------------------------------------------------- activations


class _Moments(Observer):
    """Count, mean, squared deviations, minimum, maximum and zeros of every unit."""

    events = frozenset({OUTPUT})

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.m2 = self.low = self.high = self.dead = torch.empty(0, device="cpu")

    def output(self, y: torch.Tensor) -> None:
        y = y.reshape(-1, y.shape[-1]).to(torch.float64)
        n = y.shape[0]
        if not n:
            return
        mean = y.mean(0)
        self._merge(n, mean, (y - mean).square().sum(0), y.amin(0), y.amax(0), (y <= 0).sum(0))

    def _merge(
        self,
        n: int,
        mean: torch.Tensor,
        m2: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        dead: torch.Tensor,
    ) -> None:
        if not self.count:
            self.count, self.mean, self.m2 = n, mean, m2
            self.low, self.high, self.dead = low, high, dead
            return
        # Chan, Golub and LeVeque's update: no cancellation of large sums.
        delta, total = mean - self.mean, self.count + n
        self.mean = self.mean + delta * (n / total)
        self.m2 = self.m2 + m2 + delta.square() * (self.count * n / total)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.dead, self.count = self.dead + dead, total

    def tensors(self) -> Sequence[torch.Tensor]:
        return (self.mean,)

    def reduce(self, processes: Processes) -> None:
        own = self.mean.device
        seen = processes.gather(
            (self.count, *(t.cpu() for t in (self.mean, self.m2, self.low, self.high, self.dead)))
        )
        self.count = 0
        for n, *parts in seen:
            if n:
                self._merge(n, *(t.to(own) for t in parts))

    def result(self) -> _Moments:
        return self


class Activation(BuiltIn):
    """A statistic of each unit's activations over `data`; units with small values go first.

    "mean", "max", "min" and "variance" are of the activations, after the BatchNorm and activation modules
    that follow the layer (a functional activation is not seen). "apoz" scores
    ``1 - share of activations <= 0``, so that units that are mostly off go first: Hu et al., "Network
    Trimming" (arXiv 1607.03250).
    """

    units = True  # scores belong to outputs
    needs_data = True
    needs_gradients = False
    scope = "layer"
    key = "identity"

    def __init__(self, statistic: str = "mean") -> None:
        check_choice("statistic", statistic, ("mean", "max", "min", "variance", "apoz"))
        self.statistic = statistic
        self.name = "activation" if statistic == "mean" else f"activation ({statistic})"

    def observe(self, target: Target, pattern: Pattern) -> Observer:
        return _Moments()

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        seen: _Moments = statistics.observed
        _check_seen(seen.count, statistics)
        unit = {
            "mean": seen.mean,
            "max": seen.high,
            "min": seen.low,
            "variance": seen.m2 / max(seen.count, 1),
            "apoz": 1.0 - seen.dead / max(seen.count, 1),
        }[self.statistic]
        return spread_units(unit, statistics)


def _check_seen(count: int, statistics: Statistics) -> None:
    if not count:
        raise ValueError(f"data: expected batches that reach layer {statistics.layer!r}, got none that do")


class Histogram:
    """Counts of many series over bins that they share, of a range that grows: ``[-limit, limit)`` in `bins`.

    The limit is a power of two; when a value exceeds it, neighbouring bins are joined and it doubles, which
    is exact. So the counts depend on the values alone, not on the order or the batches in which they came.
    """

    def __init__(self, bins: int, classes: int = 1) -> None:
        self.bins, self.classes = bins, classes
        self.limit = 0.0
        self.counts = torch.empty(0, device="cpu")

    def add(self, x: torch.Tensor, label: torch.Tensor | None = None) -> None:
        """`x` [n, series], floating point; `label` [n], 0 to classes - 1."""
        n, series = x.shape
        if not self.counts.numel():
            self.counts = torch.zeros(series, self.bins, self.classes, dtype=torch.int64, device=x.device)
        if not n:
            return
        self._grow(float(x.abs().max()))
        width = 2.0 * self.limit / self.bins
        index = ((x + self.limit) / width).floor_().clamp_(0, self.bins - 1).to(torch.int64)
        index += torch.arange(series, device=x.device) * self.bins
        if self.classes > 1:
            assert label is not None
            index = index * self.classes + label.unsqueeze(1)
        self.counts += torch.bincount(index.reshape(-1), minlength=self.counts.numel()).reshape(
            self.counts.shape
        )

    def reduce(self, processes: Processes) -> None:
        """Counts of all processes, over the widest of their ranges."""
        self._widen(max(processes.gather(self.limit)))
        counts = processes.add([self.counts] if self.counts.numel() else [])
        if counts:
            self.counts = counts[0]

    def _grow(self, peak: float) -> None:
        if not math.isfinite(peak):
            raise ValueError("data: expected finite activations, got NaN or infinity")
        self._widen(2.0 ** max(math.floor(math.log2(peak)) + 1, -126) if peak > 0 else 2.0**-126)

    def _widen(self, limit: float) -> None:
        if self.limit == 0.0:
            self.limit = limit
        while self.limit < limit:
            if not bool(self.counts.any()):
                self.limit = limit
                return
            quarter, s = self.bins // 4, self.counts.shape[0]
            joined = self.counts.reshape(s, self.bins // 2, 2, self.classes).sum(2)
            self.counts.zero_()[:, quarter : quarter + self.bins // 2] = joined
            self.limit *= 2.0


class _Histograms(Observer):
    events = frozenset({OUTPUT})

    def __init__(self, bins: int) -> None:
        self.histogram = Histogram(bins)

    def output(self, y: torch.Tensor) -> None:
        self.histogram.add(y.reshape(-1, y.shape[-1]).to(torch.float64))

    def reduce(self, processes: Processes) -> None:
        self.histogram.reduce(processes)

    def result(self) -> torch.Tensor:
        return self.histogram.counts.sum(2)


def entropy(counts: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Entropy in nats of the distributions that `counts` has along `dim`."""
    p = counts.to(torch.float64)
    p = p / p.sum(dim, keepdim=True).clamp(min=1.0)
    return -torch.xlogy(p, p).sum(dim)


def _check_bins(bins: object) -> int:
    number = check_count("bins", bins, "bins")
    if number % 4 or number > _MOST_BINS:
        raise ValueError(f"bins: expected a positive multiple of 4, at most {_MOST_BINS}, got {number!s:.20}")
    return number


class Entropy(BuiltIn):
    """Entropy, in nats, of each unit's binned activations; all units of a layer share the bins.

    A unit whose output hardly varies tells the next layer little. Luo and Wu, "An Entropy-based Pruning
    Method for CNN Compression" (arXiv 1706.05791). Weights are fixed numbers and have no entropy.
    """

    name = "entropy"
    units = True  # scores belong to outputs
    needs_data = True
    needs_gradients = False
    scope = "layer"
    key = "identity"

    def __init__(self, bins: int = 64) -> None:
        self.bins = _check_bins(bins)

    def observe(self, target: Target, pattern: Pattern) -> Observer:
        return _Histograms(self.bins)

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        counts: torch.Tensor = statistics.observed
        _check_seen(int(counts.sum()), statistics)
        return spread_units(entropy(counts), statistics)


def mutual_information(counts: torch.Tensor) -> torch.Tensor:
    """``I(bin; label)`` in nats from counts [..., bins, classes], with Miller and Madow's bias correction.

    The plug-in estimate is too large by about ``(cells - rows - columns + 1) / (2 n)``, counted over those
    that are not empty: without the correction more bins look like more information.
    """
    n = counts.sum((-2, -1)).to(torch.float64).clamp(min=1.0)
    rows, cols = counts.sum(-1), counts.sum(-2)
    plain = entropy(rows) + entropy(cols) - entropy(counts.flatten(-2))
    filled = [(c > 0).sum(-1) for c in (rows, cols, counts.flatten(-2))]
    return plain + (filled[0] + filled[1] - filled[2] - 1) / (2.0 * n)


def labels_of(batch: Any) -> Any:
    """The batch's labels: under a key with such a name, or the last of a tuple."""
    if isinstance(batch, Mapping):
        for key in ("labels", "label", "targets", "target", "y"):
            if key in batch:
                return batch[key]
        raise ValueError(
            "data: expected batches with a key 'labels' or 'label', which mutual information needs, got "
            + ", ".join(map(repr, batch))
        )
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return batch[-1]
    raise ValueError(
        f"data: expected batches (inputs, labels), which mutual information needs, got {type(batch).__name__}"
    )


class _LabelledHistograms(Observer):
    """Joint counts of (bin, label): of each unit's activation, or of each weight's contribution ``w * x``."""

    def __init__(
        self, target: Target, bins: int, classes: int, labels: Callable[[Any], Any], single: bool
    ) -> None:
        self.histogram = Histogram(bins, classes)
        self.classes, self.labels, self.single = classes, labels, single
        self.target = target
        self.events = frozenset({INPUT if single else OUTPUT})
        if single:
            _check_single(target, bins, classes)

    def begin(self, batch: Any, samples: int) -> None:
        super().begin(batch, samples)
        given = self.labels(batch)
        try:
            label = given if isinstance(given, torch.Tensor) else torch.as_tensor(given, device="cpu")
        except (TypeError, ValueError, RuntimeError) as e:
            raise ValueError(f"data: expected integer labels >= 0, got {given!r:.60}") from e
        label = label.reshape(-1)
        if label.is_floating_point() or not label.numel() or int(label.min()) < 0:
            raise ValueError(f"data: expected integer labels >= 0, got {label.dtype}")
        if int(label.max()) >= self.classes:
            raise ValueError(
                f"classes: expected more than the largest label {int(label.max())}, got {self.classes}"
            )
        if label.numel() != samples:
            raise ValueError(f"data: expected one label a sample, got {label.numel()} for {samples}")
        self.label = label.to(torch.int64)

    def input(self, x: torch.Tensor) -> None:
        if x.shape[0] != self.label.numel():
            raise ValueError(
                "data: expected one input vector a sample at layer "
                f"{self.target.layer!r}, got {x.shape[0]} for {self.label.numel()}"
            )
        weight = self.target.weight.to(torch.float64)
        if self.target.transposed:
            weight = weight.t()
        for start in range(0, x.shape[0], 64):  # [64, weights] at a time
            row, label = x[start : start + 64].to(torch.float64), self.label[start : start + 64]
            self.histogram.add((row.unsqueeze(1) * weight).flatten(1), label)

    def output(self, y: torch.Tensor) -> None:
        self.histogram.add(
            y.to(torch.float64).mean(1), self.label
        )  # one label a sample: positions are pooled

    def reduce(self, processes: Processes) -> None:
        self.histogram.reduce(processes)

    def result(self) -> torch.Tensor:
        return mutual_information(self.histogram.counts)


def _check_single(target: Target, bins: int, classes: int) -> None:
    if not (isinstance(target.module, nn.Linear) or target.transposed):
        raise ValueError(
            f"importance: expected Linear layers for the mutual information of single weights, got "
            f"{target.type} "
            f"{target.layer!r}"
        )
    cells = target.tensor.numel() * bins * classes
    if cells > 2**28:
        raise ValueError(
            f"importance: expected at most 2**28 counters a layer, got {cells} (weights x bins x classes) "
            f"for "
            f"{target.layer!r}; use MutualInformation(single=False), which ranks units"
        )


class MutualInformation(BuiltIn):
    """``I(binned activation; label)``, plug-in estimate with Miller and Madow's bias correction, in nats.

    For units, of the activation (the mean over positions). With ``single=True`` for each weight of a Linear
    layer, of its contribution ``w * x``. Labels, of `classes` classes from 0 on, are a batch's last item or
    its key "labels"; `labels` is a callable that takes them from a batch otherwise. All units of a layer
    share the bins.
    """

    name = "mutual_information"
    units = True  # scores belong to outputs
    needs_data = True
    needs_gradients = False
    scope = "layer"
    key = "identity"

    def __init__(
        self,
        bins: int = 16,
        *,
        classes: int = 16,
        labels: Callable[[Any], Any] = labels_of,
        single: bool = False,
    ) -> None:
        check_callable("labels", labels, "(batch) -> labels")
        check_flag("single", single)
        self.bins, self.classes = _check_bins(bins), check_count("classes", classes, "classes")
        self.labels, self.single = labels, single
        self.units = not single

    def observe(self, target: Target, pattern: Pattern) -> Observer:
        return _LabelledHistograms(target, self.bins, self.classes, self.labels, self.single)

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        information: torch.Tensor = statistics.observed
        if not self.single:
            return spread_units(information, statistics)
        shape = statistics.weight.shape
        return (
            information.reshape(shape[1], shape[0]).t()
            if statistics.transposed
            else information.reshape(shape)
        )


# ---------------------------------------------------------------- the layers around


def outputs_of(target: Target) -> int:
    """Number of the layer's units."""
    return int(target.tensor.shape[1] if target.transposed else target.tensor.shape[0])


def _as_matrix(target: Target) -> torch.Tensor:
    """[outputs, inputs of one group, taps]"""
    weight = target.weight.to(accumulator(target.weight))
    matrix = weight.t() if target.transposed else weight
    return matrix.reshape(matrix.shape[0], matrix.shape[1], -1)


def _sequence(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Leaf modules in registration order, containers and repeats left out."""
    seen: set[int] = set()
    found = []
    for name, module in model.named_modules():
        if id(module) not in seen and not any(True for _ in module.children()):
            seen.add(id(module))
            found.append((name, module))
    return found


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    )


def following(model: nn.Module, target: Target) -> tuple[str, nn.Module] | None:
    """The layer registered next, which reads `target`'s units; None for the last one.

    Raises
    ------
    ValueError : the next layer's inputs do not fit the units: the model is no plain chain there.
    """
    order = _sequence(model)
    index = next(i for i, (_, m) in enumerate(order) if m is target.module)
    units = outputs_of(target)
    for name, module in order[index + 1 :]:
        if not _is_layer(module):
            continue
        place = Target(module, name, "weight")
        inputs = _as_matrix(place).shape[1] * place.groups
        if inputs % units:
            raise ValueError(
                f"importance: expected a chain of layers, got {units} units of {target.layer!r} before "
                f"{name!r} "
                f"with {inputs} inputs; leave it out with exclude, or use prune_channels, which knows the "
                f"graph"
            )
        return name, module
    return None


def _outgoing(consumer: nn.Module, units: int) -> torch.Tensor:
    """Weights of `consumer` as [its outputs, units, the rest]: what each unit is multiplied by."""
    place = Target(consumer, "", "weight")
    matrix = _as_matrix(place)
    if place.groups > 1:  # block diagonal: outputs of a group read the group's inputs
        groups, out, per = place.groups, matrix.shape[0], matrix.shape[1]
        full = matrix.new_zeros(out, groups * per, matrix.shape[2])
        for g in range(groups):
            rows = slice(g * out // groups, (g + 1) * out // groups)
            full[rows, g * per : (g + 1) * per] = matrix[rows]
        matrix = full
    return matrix.reshape(matrix.shape[0], units, -1)


class OutputWeight(BuiltIn):
    """Norm of the weights that leave a unit, L1 or L2; 1 for the last layer, whose units are the output.

    The model has to be a chain of layers in registration order (`pared.prune_channels` knows any graph).
    """

    name = "output_weight"
    units = True  # scores belong to outputs
    needs_data = False
    needs_gradients = False
    scope = "layer"
    key = "identity"

    def __init__(self, p: int = 1) -> None:
        self.p = check_norm(p)

    def measure(
        self, model: nn.Module, targets: Sequence[Target], data: object, loss_fn: LossFn | None
    ) -> dict[str, torch.Tensor]:
        found = {}
        for target in targets:
            units, after = outputs_of(target), following(model, target)
            if after is None:
                found[target.name] = torch.ones(units, device=target.tensor.device)
            else:
                outgoing = _outgoing(after[1], units).transpose(0, 1).flatten(1)
                found[target.name] = torch.linalg.vector_norm(outgoing, self.p, dim=1)
        return found

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        return spread_units(statistics.observed, statistics)


class Propagation(BuiltIn):
    """Importance of the outputs carried back through the layers: ``s_k = |W_(k+1)|^T s_(k+1)``, 1 at the end.

    Yu et al., "NISP: Pruning Networks using Neuron Importance Score Propagation" (arXiv 1711.05908). The
    model has to be a chain of layers in registration order.
    """

    name = "propagation"
    units = True  # scores belong to outputs
    needs_data = False
    needs_gradients = False
    scope = "layer"
    key = "identity"

    def measure(
        self, model: nn.Module, targets: Sequence[Target], data: object, loss_fn: LossFn | None
    ) -> dict[str, torch.Tensor]:
        known: dict[int, torch.Tensor] = {}

        def importance(module: nn.Module) -> torch.Tensor:
            if id(module) not in known:
                place = Target(module, "", "weight")
                units, after = outputs_of(place), following(model, place)
                if after is None:
                    known[id(module)] = torch.ones(units, device=place.tensor.device)
                else:
                    later = importance(after[1])
                    outgoing = _outgoing(after[1], units).abs().sum(2)
                    known[id(module)] = outgoing.t() @ later.to(outgoing.dtype)
            return known[id(module)]

        return {t.name: importance(t.module) for t in targets}

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        return spread_units(statistics.observed, statistics)


class BNScale(BuiltIn):
    """``|gamma|`` of the BatchNorm that follows the layer.

    It means something after training with an L1 penalty on the scales (`pared.training.SlimmingPenalty`). Liu
    et al., "Learning Efficient Convolutional Networks through Network Slimming" (arXiv 1708.06519).
    """

    name = "bn_scale"
    units = True  # scores belong to outputs
    needs_data = False
    needs_gradients = False
    scope = "global"
    key = "abs"

    def measure(
        self, model: nn.Module, targets: Sequence[Target], data: object, loss_fn: LossFn | None
    ) -> dict[str, torch.Tensor]:
        order = _sequence(model)
        found = {}
        for target in targets:
            index = next(i for i, (_, m) in enumerate(order) if m is target.module)
            after = next((m for _, m in order[index + 1 : index + 2]), None)
            scale = after.weight if isinstance(after, nn.modules.batchnorm._BatchNorm) else None
            if not isinstance(scale, torch.Tensor) or scale.shape[0] != outputs_of(target):
                raise ValueError(
                    f"importance: expected a BatchNorm with scales right after each layer for 'bn_scale', "
                    f"got none "
                    f"after {target.layer!r}; leave it out with exclude"
                )
            found[target.name] = scale.detach()
        return found

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        return spread_units(statistics.observed, statistics)


class LAMP(BuiltIn):
    """``w^2 / sum of v^2 over the weights v of its layer that are at least as large``: between 0 and 1.

    The largest weight of every layer scores 1, so that a threshold over all layers empties none, whatever
    their scales: magnitude within a layer, and a share for each layer without a parameter. Lee et al.,
    "Layer-adaptive Sparsity for the Magnitude-based Pruning" (arXiv 2010.07611). Takes a sort of each layer.
    """

    name = "lamp"
    needs_data = False
    needs_gradients = False
    scope = "global"
    key = "identity"

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        flat = statistics.weight.reshape(-1)
        # Of equal weights the first counts as the largest: it is the one that a selection keeps.
        order = flat.abs().argsort(descending=True, stable=True)
        energy = flat[order].double().square()  # a sum of millions of terms
        ranked = energy / energy.cumsum(0).clamp(min=torch.finfo(energy.dtype).tiny)
        scores = torch.empty_like(flat, dtype=torch.float32)
        scores[order] = ranked.float()
        return scores.reshape(statistics.weight.shape)


class GeometricMedian(BuiltIn):
    """Sum of a filter's distances to the other filters of its layer: what lies near their median goes first.

    Those filters are the ones that the others can replace. He et al., "Filter Pruning via Geometric Median"
    (arXiv 1811.00250).
    """

    name = "geometric_median"
    units = True  # scores belong to outputs
    needs_data = False
    needs_gradients = False
    scope = "layer"
    key = "identity"

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        weight = statistics.weight.to(accumulator(statistics.weight))
        rows = (weight.t() if statistics.transposed else weight).flatten(1)
        # The exact form: the expanded one loses small distances to cancellation.
        distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        return spread_units(distances.sum(1), statistics)


class ChangeRate(BuiltIn):
    """How much the loss (with `loss_fn`), or the output, moves when the unit's output is set to zero.

    The oracle that other criteria estimate: one forward pass for every unit and batch. Loss: ``|mean loss
    without - mean loss with|``; output: the relative Euclidean change.
    """

    name = "change_rate"
    units = True  # scores belong to outputs
    needs_data = True
    needs_gradients = False
    scope = "layer"
    key = "identity"

    def measure(
        self, model: nn.Module, targets: Sequence[Target], data: object, loss_fn: LossFn | None
    ) -> dict[str, torch.Tensor]:
        for target in targets:
            if not _is_layer(target.module):
                raise ValueError(
                    f"importance: expected layers with units for {self.name!r}, got {target.type} "
                    f"{target.layer!r}; leave it out with exclude"
                )
        moved = {t.name: torch.zeros(outputs_of(t), dtype=torch.float64, device="cpu") for t in targets}
        total, processes = 0, distributed.current()
        with distributed.together(processes), frozen(model), torch.no_grad():
            for index, batch in enumerate(batches(data, f"{self.name!r}")):
                n = batch_size(batch)
                total += n
                base = _flat(forward(model, batch, loss_fn), loss_fn, index)
                for target in targets:
                    for unit in range(outputs_of(target)):
                        with _without(target.module, unit):
                            other = _flat(forward(model, batch, loss_fn), loss_fn, index)
                        change = other - base
                        if loss_fn is not None:
                            moved[target.name][unit] += n * float(change)
                        else:
                            norm = float(torch.linalg.vector_norm(base)) or 1.0
                            moved[target.name][unit] += n * float(torch.linalg.vector_norm(change)) / norm
        if processes is not None:
            (total,) = processes.total(total)
            moved = {name: processes.add_(x) for name, x in moved.items()}
        check_samples(total)
        return {name: (x / total).abs() for name, x in moved.items()}

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        return spread_units(statistics.observed, statistics)


def _flat(out: Any, loss_fn: LossFn | None, index: int) -> torch.Tensor:
    if loss_fn is not None:
        return checked_loss(out, index, differentiable=False).to(torch.float64)
    parts = [
        x.detach().to(torch.float64).reshape(-1)
        for _, x in leaves(out)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]
    if not parts:
        raise ValueError(f"model: expected an output with floating-point tensors, got none in batch {index}")
    flat = torch.cat(parts)
    if not bool(torch.isfinite(flat).all()):
        raise ValueError(f"data: expected finite outputs, got NaN or infinity in batch {index}")
    return flat


class _without:
    """The module with one unit's output at zero."""

    def __init__(self, module: nn.Module, unit: int) -> None:
        self.module, self.unit = module, unit

    def __enter__(self) -> None:
        dim = -len(self.module.kernel_size) - 1 if isinstance(self.module, _CONVOLUTIONS) else -1

        def cut(module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
            return y.index_fill(dim, torch.tensor([self.unit], device=y.device), 0.0)

        self.handle = self.module.register_forward_hook(cut)

    def __exit__(self, *error: object) -> None:
        self.handle.remove()
