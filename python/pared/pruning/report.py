"""What pruning did: a table for people, JSON for programs."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from pared._errors import check_indent
from pared.pruning.auto import PatternChoice

__all__ = ["LayerReport", "PruneReport"]


@dataclass(frozen=True)
class LayerReport:
    """One pruned tensor.

    Attributes
    ----------
    name : qualified name of the tensor; `tied` are the other places that share it.
    type : the module's class. `shape` : the tensor's.
    before, kept : non-zeros before and after.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    before: int
    kept: int
    tied: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of elements."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def sparsity_before(self) -> float:
        """Share of zeros before, 0 to 1."""
        return _sparsity(self.before, self.weights)

    @property
    def sparsity(self) -> float:
        """Share of zeros after, 0 to 1."""
        return _sparsity(self.kept, self.weights)

    @property
    def changed(self) -> bool:
        """Whether any weight became zero."""
        return self.kept != self.before


# Of the average share of weights that is kept: less of a layer, and the report says so.
_FAINT = 0.1


def _sparsity(nonzeros: int, total: int) -> float:
    return 1.0 - nonzeros / total if total else 0.0


@dataclass(frozen=True)
class PruneReport:
    """The result of `pared.prune` and of `Pruner.finalize`. ``print(report)`` shows the table.

    Attributes
    ----------
    pattern, importance, scope : what was asked for, names resolved.
    target : the sparsity that was asked for, 0 to 1.
    layers : one `LayerReport` a pruned tensor, in registration order.
    dense : ``(name, reason)`` of prunable tensors that were left as they are.
    parameters : number of parameters of the whole model, each counted once.
    notes : what was unusual, a line each.
    choices : of pattern "auto": what each layer got, and why.
    """

    pattern: str
    importance: str
    scope: str
    target: float
    layers: tuple[LayerReport, ...]
    dense: tuple[tuple[str, str], ...] = ()
    parameters: int = 0
    notes: tuple[str, ...] = field(default=())
    choices: tuple[PatternChoice, ...] = ()

    @property
    def weights(self) -> int:
        """Elements of the pruned tensors."""
        return sum(layer.weights for layer in self.layers)

    @property
    def before(self) -> int:
        """Non-zeros of the pruned tensors, before."""
        return sum(layer.before for layer in self.layers)

    @property
    def kept(self) -> int:
        """Non-zeros of the pruned tensors, after."""
        return sum(layer.kept for layer in self.layers)

    @property
    def sparsity_before(self) -> float:
        """Share of zeros in the pruned tensors before, 0 to 1."""
        return _sparsity(self.before, self.weights)

    @property
    def sparsity(self) -> float:
        """Share of zeros in the pruned tensors after, 0 to 1."""
        return _sparsity(self.kept, self.weights)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        layers = [
            {
                **asdict(layer),
                "weights": layer.weights,
                "sparsity_before": layer.sparsity_before,
                "sparsity": layer.sparsity,
            }
            for layer in self.layers
        ]
        return {
            "pattern": self.pattern,
            "importance": self.importance,
            "scope": self.scope,
            "target": self.target,
            "layers": layers,
            "total": {
                "weights": self.weights,
                "before": self.before,
                "kept": self.kept,
                "sparsity_before": self.sparsity_before,
                "sparsity": self.sparsity,
                "parameters": self.parameters,
            },
            "dense": [{"name": name, "reason": reason} for name, reason in self.dense],
            "notes": list(self.notes),
            "choices": [asdict(c) for c in self.choices],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=check_indent(indent))

    def __rich__(self) -> Table:
        table = Table(
            title=f"pruned to {self.sparsity:.2%} ({self.pattern}, {self.importance}, {self.scope})",
            caption="\n".join(self._footnotes()) or None,
            caption_justify="left",
        )
        table.add_column("layer", overflow="fold")
        table.add_column("type")
        for heading in ("shape", "before", "after", "kept"):
            table.add_column(heading, justify="right", no_wrap=True)
        for layer in self.layers:
            tied = f" (tied: {', '.join(layer.tied)})" if layer.tied else ""
            shape = "x".join(map(str, layer.shape))
            sparsities = (f"{layer.sparsity_before:.2%}", f"{layer.sparsity:.2%}")
            table.add_row(layer.name + tied, layer.type, shape, *sparsities, f"{layer.kept:,}")
        table.add_section()
        total = f"{self.weights:,}"
        table.add_row(
            "total", "", total, f"{self.sparsity_before:.2%}", f"{self.sparsity:.2%}", f"{self.kept:,}"
        )
        return table

    def _footnotes(self) -> list[str]:
        lines = list(self.notes)
        if self.scope == "global":
            least = _FAINT * (1.0 - self.sparsity)
            faint = [x.name for x in self.layers if x.kept < least * x.weights and x.before >= x.weights / 2]
            if faint:
                more = f" and {len(faint) - 3} more" if len(faint) > 3 else ""
                lines.append(
                    f"less than a tenth of the average share was kept of {', '.join(faint[:3])}{more}: one "
                    'threshold for all takes most where weights are small; scope="layer" or '
                    'importance="lamp" treat layers alike'
                )
        for why in dict.fromkeys((c.pattern, c.reason) for c in self.choices):
            names = [c.name for c in self.choices if (c.pattern, c.reason) == why]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"{why[0]} for {', '.join(names[:3])}{more}: {why[1]}")
        for reason in dict.fromkeys(reason for _, reason in self.dense):
            names = [name for name, why in self.dense if why == reason]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"left dense ({reason}): {', '.join(names[:3])}{more}")
        return lines

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110, color_system=None).print(self)
        return out.getvalue().rstrip()
