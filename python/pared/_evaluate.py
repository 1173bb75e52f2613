"""`pared.evaluate`: size, speed, accuracy and robustness of models, as table, JSON and page."""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pared import _core
from pared._cost import weight_uses
from pared._errors import check_callable, check_indent, check_number, check_path, check_text
from pared._files import replacing
from pared._finetune import seeded
from pared._inputs import Example, examples, first_run, one_pass
from pared._io import save
from pared._report import _bytes, _seconds
from pared._size import Counter, memory_bytes
from pared._sparsity import base_type
from pared._timing import interleave
from pared.nn import PackedModule
from pared.ops._arrays import number
from pared.pruning.calibration import _plain, batches, check_samples, forward
from pared.pruning.reconstruct import check_repeatable
from pared.pruning.targets import _find

__all__ = ["Evaluation", "Histogram", "Interval", "LayerFigures", "ModelFigures", "evaluate"]

Score: TypeAlias = "Callable[[nn.Module, Any], Tensor]"
Distortion: TypeAlias = "Callable[[Tensor], Tensor]"

_BINS = 48
_SECONDS = 2.0


# ---------------------------------------------------------------- figures


@dataclass(frozen=True)
class Interval:
    """A mean over samples and its 95 % confidence interval: Wilson's for shares, else the normal one."""

    value: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        """`values` : one a sample."""
        x = values.detach().double().reshape(-1).cpu()
        n, z = x.numel(), 1.959964
        mean = float(x.mean())
        if bool(((x == 0) | (x == 1)).all()):
            centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
            reach = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
            return cls(mean, max(0.0, min(mean, centre - reach)), min(1.0, max(mean, centre + reach)), n)
        reach = z * float(x.std()) / math.sqrt(n) if n > 1 else math.inf
        return cls(mean, mean - reach, mean + reach, n)


@dataclass(frozen=True)
class Histogram:
    """`counts` of equal bins from `low` to `high`; values that are exactly zero are counted apart."""

    low: float
    high: float
    counts: tuple[int, ...]
    zeros: int

    @classmethod
    def of(cls, values: Tensor) -> Histogram:
        x = values.detach().float().reshape(-1)
        kept = x[(x != 0) & x.isfinite()]
        zeros = int((x == 0).sum())
        if not kept.numel():
            return cls(0.0, 0.0, (0,) * _BINS, zeros)
        low, high = float(kept.min()), float(kept.max())
        if low == high:
            low, high = low - 0.5, high + 0.5
        return cls(low, high, tuple(int(c) for c in torch.histc(kept, _BINS, low, high)), zeros)


@dataclass(frozen=True)
class LayerFigures:
    """One layer with weights.

    Attributes
    ----------
    name, type, shape : of the layer and its weight. `kernel` : packed format, or "torch".
    sparsity : share of zeros in the weight. `macs` : multiply-adds without those with zeros, in a pass.
    seconds : median in a pass, with what was fused into the layer; None where it is not called.
    weights, inputs : their values. `inputs` is None where the layer is not called with a tensor.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    kernel: str
    sparsity: float
    macs: float
    seconds: float | None
    weights: Histogram
    inputs: Histogram | None


@dataclass(frozen=True)
class ModelFigures:
    """One model.

    Attributes
    ----------
    parameters, nonzeros : of the weights that the model stands for, packed or not; tied ones once.
    file_bytes : of what `pared.save` writes; None where it cannot.
    memory_bytes : of parameters and buffers.
    macs : multiply-adds with weights that are not zero, in one pass over the example inputs.
    p50, p95 : seconds of such a pass. `throughput` : samples a second, at p50.
    speedup : over the first model, median over interleaved rounds, and its 95 % interval.
    metrics : "top-1" and "top-5", or the user's. `difference` : of the first metric to the first model's,
        sample by sample, so that its interval is that of the difference.
    robustness : the first metric on distorted inputs, by distortion.
    layers : in the order of the model.
    """

    name: str
    parameters: int
    nonzeros: int
    file_bytes: int | None
    memory_bytes: int
    macs: float
    p50: float
    p95: float
    throughput: float
    speedup: tuple[float, float, float]
    metrics: dict[str, Interval]
    difference: Interval
    robustness: dict[str, Interval]
    layers: tuple[LayerFigures, ...]

    @property
    def sparsity(self) -> float:
        """Share of zeros in all parameters."""
        return 1.0 - self.nonzeros / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Evaluation:
    """The result of `pared.evaluate`: ``print(result)``, `to_json`, `to_html`.

    Attributes
    ----------
    models : in the order given; the first is what the others are compared with.
    percent : whether the metrics are shares of right answers.
    samples : evaluated. `batch` : samples in a timed pass. `machine` : that the times are of.
    """

    models: tuple[ModelFigures, ...]
    percent: bool
    samples: int
    batch: int
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; seconds and bytes."""
        return asdict(self)

    def to_json(self, indent: int | None = 2) -> str:
        """Everything as JSON text."""
        return json.dumps(self.to_dict(), indent=check_indent(indent), allow_nan=False)

    def to_html(self, path: str | os.PathLike[str], title: str = "pared: evaluation") -> None:
        """Write one page with the tables and plots; it needs no other file and no network."""
        from pared._page import page

        check_path("path", path)
        check_text("title", title)
        with replacing(path) as temporary:
            Path(temporary).write_text(page(self, title), encoding="utf-8")

    def metric(self, value: float) -> str:
        """A metric as text."""
        value = number(value, "value")
        return f"{100 * value:.1f} %" if self.percent else f"{value:.4g}"

    def change(self, value: float) -> str:
        """A difference of two metrics as text: points, where they are shares."""
        value = number(value, "value")
        return f"{100 * value:+.1f}" if self.percent else f"{value:+.4g}"

    def __rich__(self) -> Table:
        names = list(self.models[0].metrics)
        table = Table(title=f"{self.samples} samples, {self.batch} a pass", title_justify="left")
        table.add_column("")
        for m in self.models:
            table.add_column(m.name, justify="right")
        rows: list[tuple[str, Callable[[ModelFigures], str]]] = [
            ("parameters", lambda m: f"{m.parameters:,}"),
            ("non-zero", lambda m: f"{m.nonzeros:,} ({1 - m.sparsity:.1%})"),
            ("file", lambda m: "-" if m.file_bytes is None else _bytes(m.file_bytes)),
            ("memory", lambda m: _bytes(m.memory_bytes)),
            ("multiply-adds", lambda m: count(m.macs)),
            ("p50", lambda m: _seconds(m.p50)),
            ("p95", lambda m: _seconds(m.p95)),
            ("samples a second", lambda m: count(m.throughput)),
            ("speed-up", lambda m: "{:.2f}x [{:.2f}, {:.2f}]".format(*m.speedup)),
        ]
        for label, show in rows:
            table.add_row(label, *map(show, self.models))
        table.add_section()
        for name in names:
            table.add_row(name, *(self._interval(m.metrics[name]) for m in self.models))
        title = "difference (points)" if self.percent else "difference"
        table.add_row(title, *("" if m is self.models[0] else self._change(m) for m in self.models))
        if self.models[0].robustness:
            table.add_section()
        for name in self.models[0].robustness:
            table.add_row(f"{names[0]}, {name}", *(self._interval(m.robustness[name]) for m in self.models))
        return table

    def _interval(self, x: Interval) -> str:
        return f"{self.metric(x.value)} [{self.metric(x.low)}, {self.metric(x.high)}]"

    def _change(self, m: ModelFigures) -> str:
        x = m.difference
        return f"{self.change(x.value)} [{self.change(x.low)}, {self.change(x.high)}]"

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=max(100, 30 + 32 * len(self.models)), color_system=None).print(self)
        return out.getvalue().rstrip()


def count(n: float) -> str:
    """A number as people read it: 12.3 M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {letter}"
    return f"{n:.3g}"


# ---------------------------------------------------------------- distortions


def _noise(x: Tensor) -> Tensor:
    return x + 0.3 * x.std() * torch.randn_like(x)


def _contrast(x: Tensor) -> Tensor:
    middle = x.mean(tuple(range(1, x.ndim)), keepdim=True)
    return middle + 0.5 * (x - middle)


def _missing(x: Tensor) -> Tensor:
    return x * (torch.rand_like(x) >= 0.1)


def _blur(x: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if x.ndim == 4 else x


DISTORTIONS: dict[str, Distortion] = {
    "noise of 0.3 sigma": _noise,
    "half the contrast": _contrast,
    "10 % missing": _missing,
    "3x3 blur": _blur,
}


def _distorted(batch: Any, change: Distortion, name: str) -> Any:
    """The batch with its floating-point inputs changed; the last of several tensors is the label."""

    def own(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        new = change(x)
        if not isinstance(new, Tensor):
            raise TypeError(
                f"distortions[{name!r}]: expected a callable (tensor) -> tensor, got one that returns "
                f"{type(new).__name__}"
            )
        return new

    if isinstance(batch, Tensor):
        return own(batch)
    if isinstance(batch, Mapping):
        return {k: x if k == "labels" else own(x) for k, x in _plain(batch).items()}
    return (*(own(x) for x in batch[:-1]), batch[-1])


# ---------------------------------------------------------------- evaluation


def evaluate(
    models: nn.Module | Mapping[str, nn.Module],
    data: Iterable[Any],
    *,
    score: Score | None = None,
    example_inputs: Any = None,
    distortions: Mapping[str, Distortion] | None = None,
    seconds: float = _SECONDS,
) -> Evaluation:
    """Measure models side by side: what they take, how fast they are, how right, and how right on bad inputs.

    Parameters
    ----------
    models : name -> model, plain or accelerated; the others are compared with the first. None is changed.
    data : batches that can be gone through several times: ``(inputs, ..., labels)``, or dicts with "labels".
    score : ``(model, batch) -> tensor [samples]``, higher is better; its ``__name__`` names the metric. None:
        top-1 and (from six classes on) top-5 of the model's logits.
    example_inputs : timed, as in `pared.accelerate`; None: the inputs of the first batch.
    distortions : name -> function of an input tensor. None: noise, less contrast, missing values and (images)
        blur, for inputs that are floating point; {}: none. Each model sees the same ones.
    seconds : that the timing of all models may take; half as many more go into that of the layers.

    Returns
    -------
    Evaluation : prints as a table; ``to_json()``; ``to_html(path)`` writes one page with plots.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came.
    """
    if isinstance(models, nn.Module):
        models = {"model": models}
    if not isinstance(models, Mapping) or not all(
        isinstance(name, str) and isinstance(m, nn.Module) for name, m in models.items()
    ):
        raise TypeError(f"models: expected a module, or names and modules, got {models!r:.200}")
    if not models:
        raise ValueError("models: expected at least one, got an empty mapping")
    check_repeatable(data, "'evaluate'")
    first = next(iter(batches(data, "'evaluate'")))
    if score is not None:
        check_callable("score", score, "(model, batch) -> tensor")
    check_number("seconds", seconds)
    if distortions is not None:
        if not isinstance(distortions, Mapping) or not all(isinstance(name, str) for name in distortions):
            raise TypeError(f"distortions: expected names and functions, got {distortions!r:.200}")
        for name, function in distortions.items():
            check_callable(f"distortions[{name!r}]", function, "(tensor) -> tensor")
    inputs = examples(_inputs_of(first) if example_inputs is None else example_inputs)
    chosen = _applicable(first) if distortions is None else dict(distortions)
    with _evaluating(models.values()):
        for model in models.values():
            for example in inputs:
                first_run(model, example)
        per_sample = {n: _scores(m, data, score) for n, m in models.items()}
        robust = {
            n: {d: _scores(m, data, score, (d, f)) for d, f in chosen.items()} for n, m in models.items()
        }
        times = interleave(
            {n: one_pass(m, inputs) for n, m in models.items()},
            budget=seconds,
            min_rounds=7,
            precision=0.01,
            warmup=2,
        )
        batch = _samples_of(inputs)
        figures = []
        reference = next(iter(models))
        leading = next(iter(per_sample[reference]))
        for name in models:
            sizes = [len(per_sample[n][leading]) for n in (reference, name)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"score: expected one number a sample for each model, got {sizes[0]} in all for "
                    f"{reference!r} and {sizes[1]} for {name!r}"
                )
        for name, model in models.items():
            layers = _layers(model, inputs, seconds / 2 / len(models))
            ratio = times.speedup(name, reference)
            parameters, nonzeros = _count(model)
            difference = per_sample[name][leading].double() - per_sample[reference][leading].double()
            figures.append(
                ModelFigures(
                    name,
                    parameters,
                    nonzeros,
                    _file_bytes(model),
                    memory_bytes(model),
                    sum(layer.macs for layer in layers),
                    times.median(name),
                    times.p95(name),
                    batch / times.median(name),
                    (ratio.value, ratio.low, ratio.high) if name != reference else (1.0, 1.0, 1.0),
                    {k: Interval.of(v) for k, v in per_sample[name].items()},
                    _paired(difference),
                    {d: Interval.of(v[leading]) for d, v in robust[name].items()},
                    layers,
                )
            )
    machine = {
        "cpu": _core.cpu_brand(),
        "isa": _core.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    samples = per_sample[reference][leading].numel()
    return Evaluation(tuple(figures), score is None, samples, batch, machine)


def _paired(x: Tensor) -> Interval:
    """Mean of differences with its normal interval; differences of 0 and 1 are no shares."""
    n, mean = x.numel(), float(x.mean())
    reach = 1.959964 * float(x.std()) / math.sqrt(n) if n > 1 else 0.0
    return Interval(mean, mean - reach, mean + reach, n)


@contextmanager
def _evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    modes = [(m, m.training) for model in models for m in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _inputs_of(batch: Any) -> Any:
    """A batch without its labels, as `accelerate` takes inputs."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return {k: v for k, v in _plain(batch).items() if k != "labels"}
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return tuple(batch[:-1])
    raise TypeError(f"data: expected batches (inputs, labels) or dicts, got {type(batch).__name__}")


def _samples_of(inputs: Sequence[Example]) -> int:
    total = 0
    for e in inputs:
        tensors = [x for x in (*e.args, *e.kwargs.values()) if isinstance(x, Tensor) and x.ndim]
        total += tensors[0].shape[0] if tensors else 1
    return total


def _applicable(batch: Any) -> dict[str, Distortion]:
    """The usual distortions that change anything in this batch."""
    inputs = _inputs_of(batch)
    tensors = (
        [inputs]
        if isinstance(inputs, Tensor)
        else list(inputs.values() if isinstance(inputs, dict) else inputs)
    )
    floating = [x for x in tensors if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1]
    if not floating:
        return {}
    images = any(x.ndim == 4 for x in floating)
    return {name: f for name, f in DISTORTIONS.items() if images or f is not _blur}


def _scores(
    model: nn.Module,
    data: Iterable[Any],
    score: Score | None,
    distortion: tuple[str, Distortion] | None = None,
) -> dict[str, Tensor]:
    """Per sample, by metric."""
    found: dict[str, list[Tensor]] = {}
    for i, batch in enumerate(batches(data, "'evaluate'")):
        if distortion is not None:
            name, change = distortion
            with seeded(f"{name} {i}"):  # the same for every model
                batch = _distorted(batch, change, name)
        if score is None:
            own = _right(model, batch)
        else:
            value = score(model, batch)
            if not isinstance(value, Tensor) or value.ndim != 1 or value.is_complex() or value.is_meta:
                got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"score: expected a tensor [samples], got {got}")
            own = {getattr(score, "__name__", "score"): value}
        for key, value in own.items():
            if not bool(value.double().isfinite().all()):
                raise ValueError(f"score: expected finite numbers, got others in batch {i}")
            found.setdefault(key, []).append(value)
    scores = {key: torch.cat(values) for key, values in found.items()}
    check_samples(min(map(len, scores.values())))
    return scores


def _labels(batch: Any) -> Tensor:
    """The labels of a batch. Raises ``TypeError`` or ``ValueError``."""
    if isinstance(batch, Tensor):
        raise TypeError("data: expected batches (inputs, labels) or dicts, or a score, got a tensor")
    if isinstance(batch, Mapping) and "labels" not in batch:
        raise ValueError(f"data: expected batches with a key 'labels', got {sorted(map(str, batch))!r:.60}")
    labels = batch["labels"] if isinstance(batch, Mapping) else batch[-1]
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"data: expected a tensor of integer labels, got {got}")
    return labels


def _right(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Whether the label is the first, or among the first five, of the logits."""
    inputs, labels = _inputs_of(batch), _labels(batch)
    output = forward(model, inputs, None)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "score: expected a function for models that return no logits [samples, classes], got None and "
            f"{type(logits).__name__}"
        )
    valid = ~logits.isnan().any(1)  # argmax takes NaN for the largest
    own = {"top-1": (logits.argmax(1) == labels) & valid}
    if logits.shape[1] > 5:
        own["top-5"] = (logits.topk(5, 1).indices == labels[:, None]).any(1) & valid
    return {key: value.float() for key, value in own.items()}


def _count(model: nn.Module) -> tuple[int, int]:
    """Parameters that the model stands for, and how many are not zero; tied ones once."""
    total = nonzero = 0
    seen: set[int] = set()

    def add(t: Tensor | None) -> None:
        nonlocal total, nonzero
        if t is not None and t.data_ptr() not in seen:
            seen.add(t.data_ptr())
            total, nonzero = total + t.numel(), nonzero + int(torch.count_nonzero(t))

    for p in model.parameters():
        add(p)
    for module in model.modules():
        if isinstance(module, PackedModule) and module.packed.data_ptr() not in seen:
            seen.add(module.packed.data_ptr())
            total, nonzero = total + math.prod(module.weight_shape), nonzero + module.packed_weight().nnz
            add(module.bias)
    return total, nonzero


def _file_bytes(model: nn.Module) -> int | None:
    counter = Counter()
    try:
        save(model, counter)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return counter.size


def _layers(model: nn.Module, inputs: Sequence[Example], budget: float) -> tuple[LayerFigures, ...]:
    """Every layer with weights: what it is, what it is given, and how long it takes."""
    uses = weight_uses(model, inputs)
    rows: dict[str, tuple[nn.Module, str, Tensor, str]] = {}
    for target in _find(dict(model.named_modules(remove_duplicate=False))):
        rows[target.name] = (target.module, target.layer, target.weight, "torch")
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            dense = torch.as_tensor(module.packed_weight().to_dense(), device="cpu")
            rows[f"{name}.weight" if name else "weight"] = (module, name, dense, module.format)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    given: dict[int, Histogram] = {}
    spent: dict[int, float] = {}
    took: dict[int, list[float]] = {}
    began: dict[int, float] = {}

    def look(m: nn.Module, args: Any) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_floating_point() and id(m) not in given:
            given[id(m)] = Histogram.of(x.to_dense())

    def start(m: nn.Module, args: Any) -> None:
        began[id(m)] = time.perf_counter()

    def stop(m: nn.Module, args: Any, output: Any) -> None:
        spent[id(m)] = spent.get(id(m), 0.0) + time.perf_counter() - began[id(m)]

    owners = {id(m): m for m, *_ in rows.values()}
    run = one_pass(model, list(inputs))
    handles = [m.register_forward_pre_hook(look) for m in owners.values()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    handles = [m.register_forward_pre_hook(start) for m in owners.values()]
    handles += [m.register_forward_hook(stop) for m in owners.values()]
    try:
        end = time.perf_counter() + budget
        for i in range(200):
            spent.clear()
            run()
            for key, t in spent.items():
                took.setdefault(key, []).append(t)
            if i >= 4 and time.perf_counter() > end:
                break
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, (module, layer, weight, kernel) in sorted(rows.items(), key=lambda r: order.get(r[1][1], 0)):
        n, nonzero = uses.get(name, (0.0, 0))
        times = took.get(id(module))
        found.append(
            LayerFigures(
                layer or name,
                type(module).__name__ if kernel != "torch" else base_type(module).__name__,
                tuple(weight.shape),
                kernel,
                1.0 - int(torch.count_nonzero(weight)) / max(1, weight.numel()),
                n * nonzero,
                float(np.median(times[1:] or times)) if times else None,
                Histogram.of(weight),
                given.get(id(module)),
            )
        )
    return tuple(found)
