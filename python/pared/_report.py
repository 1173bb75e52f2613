"""What `pared.accelerate` did, layer by layer, as a table and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pared._errors import check_indent

__all__ = ["LayerReport", "Report", "report"]

_ATTRIBUTE = "_pared_report"
# LayerReport.kernel of a layer that was not converted.
KEPT = "torch"


@dataclass
class CandidateTime:
    """One way to run a layer that was considered.

    Attributes
    ----------
    kernel : packed format and what is fused behind it, or ``"torch"``.
    estimated : seconds of all calls by the model of times (``weight.estimate``), without what is fused; None
        where there is no estimate.
    measured : seconds of all calls as timed, what follows the layer included; None where it was not timed.
    note : why it was not timed.
    """

    kernel: str
    estimated: float | None = None
    measured: float | None = None
    note: str = ""


@dataclass
class LayerReport:
    """One layer.

    Attributes
    ----------
    name : qualified name; `aliases` are further names of the same module.
    type : class of the plain module, for example ``"Linear"``.
    shape : of the weight.
    sparsity : share of zeros in the weight, 0 to 1.
    kernel : packed format that runs, or ``"torch"`` where the plain layer was kept.
    activation : activation fused into the layer, or None.
    norm : whether the batch normalisation behind it is folded into the layer.
    calls : calls in one pass over all example inputs.
    inputs : input shapes seen.
    before, after : seconds that all those calls take, dense (with the activation that is fused) and as kept;
        None where nothing was timed.
    speedup : median over interleaved rounds of before / after, also where the layer was kept dense: what was
        tried.
    error : max |new - dense| over the layer's output on the example inputs, and `bound`, its largest allowed
        value.
    reason : why this kernel.
    candidates : what it was chosen from, with estimated and measured times.
    """

    name: str
    type: str
    shape: list[int]
    sparsity: float
    kernel: str = KEPT
    activation: str | None = None
    norm: bool = False
    aliases: list[str] = field(default_factory=list)
    calls: int = 0
    inputs: list[list[int]] = field(default_factory=list)
    before: float | None = None
    after: float | None = None
    speedup: float | None = None
    error: float | None = None
    bound: float | None = None
    reason: str = ""
    candidates: list[CandidateTime] = field(default_factory=list)


@dataclass
class ModelTime:
    """Seconds for one pass over all example inputs: median and 95th percentile."""

    p50: float
    p95: float


@dataclass
class Report:
    """What was converted, what was kept and why, what it gained and what it cost in accuracy.

    ``print(report)`` shows a table, in which layers of repeated blocks with the same kernel and times share a
    row (with their largest error, and the reason of the first); ``report.to_json()`` gives everything,
    `Report.from_json` reads it back.

    Attributes
    ----------
    layers : one entry a layer.
    dense, fast : time of the whole model before and after; None where nothing was converted.
    speedup : median over interleaved rounds of dense / fast time; 1 where nothing was converted.
    error, relative_error : max |new - reference| over the outputs, and relative to max |reference|.
    tolerance : what `relative_error` was allowed to be.
    memory_before, memory_after, disk_before, disk_after : bytes of parameters and buffers in memory, and of
        the saved state dict.
    machine : processor, instruction set and threads that the times are of.
    precision : as given to accelerate.
    ties : groups of parameter names that are one tensor in the plain model.
    trainable : names of the parameters that asked for gradients in the plain model.
    notes : decisions about the model as a whole.
    opened : by name, the type of each module in whose place Linear layers compute; `pared.restore` puts it
        back.
    """

    layers: list[LayerReport] = field(default_factory=list)
    dense: ModelTime | None = None
    fast: ModelTime | None = None
    speedup: float = 1.0
    error: float = 0.0
    relative_error: float = 0.0
    tolerance: float = 0.0
    memory_before: int = 0
    memory_after: int = 0
    disk_before: int = 0
    disk_after: int = 0
    machine: dict[str, Any] = field(default_factory=dict)
    precision: str = "float32"
    ties: list[list[str]] = field(default_factory=list)
    trainable: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    opened: dict[str, str] = field(default_factory=dict)

    @property
    def converted(self) -> list[LayerReport]:
        """The layers that run a packed kernel."""
        return [layer for layer in self.layers if layer.kernel != KEPT]

    def candidates(self, layer: str | None = None) -> Table:
        """A table of what the kernels were chosen from: estimated and measured times, and why the others were
        not timed. ``rich.print`` shows it.

        Parameters
        ----------
        layer : name of the only layer to show; None: all.

        Raises
        ------
        ValueError : no layer of that name.
        """
        names = [row.name for row in self.layers]
        if layer is not None and layer not in names:
            raise ValueError(f"layer: expected the name of a layer ({', '.join(names)}), got {layer!r}")
        table = Table(title="candidates", title_justify="left")
        for title in ("layer", "kernel", "estimated", "measured", "why"):
            justify: Any = "right" if title in ("estimated", "measured") else "left"
            table.add_column(title, justify=justify, overflow="fold")
        for row in self.layers:
            if layer is not None and row.name != layer:
                continue
            for i, c in enumerate(row.candidates):
                name = (row.name or "(model)") if i == 0 else ""
                note = c.note or ("chosen" if c.kernel == _kernel(row) else "")
                cells = (name, c.kernel, _seconds(c.estimated), _seconds(c.measured), note)
                table.add_row(*map(Text, cells), style="dim" if c.measured is None else None)
        return table

    def to_json(self, indent: int | None = 2) -> str:
        """Everything as JSON; times in seconds, sizes in bytes."""
        return json.dumps(asdict(self), indent=check_indent(indent), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote. Raises ``ValueError`` for anything else."""
        try:
            data = json.loads(text)
            layers = [_layer(layer) for layer in data.pop("layers")]
            dense, fast = (time and ModelTime(**time) for time in (data.pop("dense"), data.pop("fast")))
            return cls(layers=layers, dense=dense, fast=fast, **data)
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise ValueError(f"text: expected the JSON of a report, got something else ({e})") from e

    def __rich__(self) -> Table:
        converted = len(self.converted)
        table = Table(
            title=f"pared: {converted} of {len(self.layers)} layers accelerated",
            caption=Text("\n".join(self._summary())),
            caption_justify="left",
            title_justify="left",
        )
        table.add_column("layer", overflow="fold")
        table.add_column("shape", no_wrap=True)
        table.add_column("zeros", justify="right")
        table.add_column("kernel")
        for title in ("before", "after", "speed-up", "error"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("why", overflow="fold")
        for group in _alike(self.layers):
            layer = group[0]
            errors = [row.error for row in group if row.error is not None]
            # As Text: names are not rich's markup.
            cells = (
                _names(group),
                "x".join(map(str, layer.shape)),
                _share(group),
                _kernel(layer),
                _seconds(layer.before),
                _seconds(layer.after),
                "" if layer.speedup is None else f"{layer.speedup:.2f}x",
                f"{max(errors):.1e}" if errors else "",
                layer.reason,
            )
            table.add_row(*map(Text, cells), style="dim" if layer.kernel == KEPT else None)
        return table

    def _summary(self) -> list[str]:
        lines = []
        if self.dense and self.fast:
            lines.append(
                f"model: {_seconds(self.dense.p50)} -> {_seconds(self.fast.p50)} (p50), "
                f"{_seconds(self.dense.p95)} -> {_seconds(self.fast.p95)} (p95): {self.speedup:.2f}x"
            )
            of_medians = self.dense.p50 / self.fast.p50 if self.fast.p50 else self.speedup
            if not 0.8 < of_medians / (self.speedup or 1.0) < 1.25:
                lines[-1] += f", the median of the rounds; of p50 {of_medians:.2f}x, for rounds differ"
        lines.append(
            f"output error: {self.error:.1e} absolute, {self.relative_error:.1e} of the largest output "
            f"(allowed {self.tolerance:.1e})"
        )
        lines.append(
            f"memory: {_bytes(self.memory_before)} -> {_bytes(self.memory_after)}, "
            f"on disk: {_bytes(self.disk_before)} -> {_bytes(self.disk_after)}"
        )
        if self.machine:
            where = f"{self.machine['device']}, " if "device" in self.machine else ""
            lines.append(
                f"{where}{self.machine.get('cpu')}, {self.machine.get('isa')}, "
                f"{self.machine.get('threads')} thread(s)"
            )
        return lines + self.notes

    def __str__(self) -> str:
        console = Console(width=140, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


# The first number in a name is that of a block; rows are merged from so many on.
_INDEX = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
_MERGED = 3


def _alike(layers: Sequence[LayerReport]) -> list[list[LayerReport]]:
    """The rows of the table, in the model's order: layers of repeated blocks that differ in the block's
    number, in their zeros and in their errors alone go together.
    """
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(layers):
        found = _INDEX.search(row.name)
        key: Any = i
        if found and not row.aliases:
            # Reasons name the layers that a time is of, and say by how much 8 bits change an output.
            why = re.sub(r", as timed for [^;]*", "", row.reason)
            why = re.sub(r"\d+", "#", why)
            around = (row.name[: found.start()], row.name[found.end() :])
            times = (row.before, row.after, row.speedup, row.calls)
            key = (around, row.type, tuple(row.shape), _kernel(row), times, why)
        groups.setdefault(key, []).append(i)
    merged = [part for g in groups.values() for part in ([g] if len(g) >= _MERGED else ([i] for i in g))]
    return [[layers[i] for i in group] for group in sorted(merged)]


def _names(group: Sequence[LayerReport]) -> str:
    """One name with the numbers of its blocks as ranges, or a layer's name and aliases."""
    first = group[0]
    if len(group) == 1:
        return "\n".join([first.name or "(model)", *(f"= {a}" for a in first.aliases)])
    found = [m for row in group if (m := _INDEX.search(row.name))]
    runs: list[list[int]] = []
    for n in sorted(int(m.group()) for m in found):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    numbers = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    start, end = found[0].span()
    return f"{first.name[:start]}{{{numbers}}}{first.name[end:]}\n{len(group)} layers"


def _share(group: Sequence[LayerReport]) -> str:
    """The zeros, or the least and the most."""
    shares = [f"{100 * row.sparsity:.1f}" for row in group]
    least, most = min(shares, key=float), max(shares, key=float)
    return f"{least}%" if least == most else f"{least}-{most}%"


def _kernel(layer: LayerReport) -> str:
    """The kernel and what is fused behind it."""
    return " + ".join(
        [layer.kernel, *(["batchnorm"] if layer.norm else []), *filter(None, [layer.activation])]
    )


def _layer(data: dict[str, Any]) -> LayerReport:
    """What `dataclasses.asdict` made of a layer's report."""
    candidates = [CandidateTime(**c) for c in data.pop("candidates", [])]
    return LayerReport(**data, candidates=candidates)


def _seconds(t: float | None) -> str:
    if t is None:
        return ""
    return f"{t * 1e6:.1f} us" if t < 1e-3 else f"{t * 1e3:.2f} ms" if t < 1 else f"{t:.2f} s"


def _bytes(n: int) -> str:
    return f"{n / 1e6:.2f} MB" if n >= 1e5 else f"{n / 1e3:.2f} kB"


def report(model: Any) -> Report:
    """What `pared.accelerate` did to `model`.

    Parameters
    ----------
    model : a module that accelerate returned (or a copy of one).

    Raises
    ------
    TypeError : not a module.
    ValueError : a module that accelerate did not return.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    found = vars(model).get(_ATTRIBUTE)
    if not isinstance(found, Report):
        raise ValueError(
            f"model: expected what pared.accelerate returned, got a {type(model).__name__} without a report"
        )
    return found
