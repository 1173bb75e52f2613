"""What quantisation did: a table for people, JSON for programs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pared._errors import check_indent

__all__ = ["QuantLayer", "QuantReport"]


@dataclass(frozen=True)
class QuantLayer:
    """One quantised tensor.

    Attributes
    ----------
    name, type, shape : of the tensor and its module.
    bits : of the weight. `sparsity` : share of zeros afterwards, 0 to 1.
    error : relative output error on the calibration inputs, ``|y - y_q| / |y|`` (Euclidean).
    activation : static grid of the input, ``(scale, zero, dtype)``; None where it is quantised by token.
    distribution : of the input: which fits best ("gaussian", "laplace", "poisson", "constant").
    tried : ``(bits, error, seconds)`` of each width that was looked at; None for what was not measured.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bits: int
    sparsity: float
    error: float
    activation: tuple[float, int, str] | None = None
    distribution: str = ""
    tried: tuple[tuple[int, float | None, float | None], ...] = ()


@dataclass(frozen=True)
class QuantReport:
    """The result of `pared.quantize`. ``print(report)`` shows the table.

    Attributes
    ----------
    method : "gptq" or "rtn". `observer` : how static ranges were chosen, None without.
    layers : one `QuantLayer` a tensor. `kept` : ``(name, reason)`` of tensors that were left as they are.
    """

    method: str
    observer: str | None
    layers: tuple[QuantLayer, ...]
    kept: tuple[tuple[str, str], ...] = ()

    @property
    def bytes(self) -> float:
        """Size of the quantised weights: codes alone."""
        sizes = 0.0
        for layer in self.layers:
            n = 1
            for size in layer.shape:
                n *= size
            sizes += n * layer.bits / 8
        return sizes

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            "method": self.method,
            "observer": self.observer,
            "layers": [asdict(layer) for layer in self.layers],
            "bytes": self.bytes,
            "kept": [{"name": name, "reason": reason} for name, reason in self.kept],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantReport:
        """What `to_dict` gave."""
        if not isinstance(data, Mapping):
            raise TypeError(f"data: expected what to_dict gave, got {type(data).__name__}")
        if missing := {"method", "observer", "layers", "kept"} - data.keys():
            raise ValueError(f"data: expected what to_dict gave, got a mapping without {min(missing)!r}")
        try:
            layers = []
            for own in data["layers"]:
                grid = own["activation"]
                fields: dict[str, Any] = {
                    **own,
                    "shape": tuple(own["shape"]),
                    "activation": None if grid is None else tuple(grid),
                    "tried": tuple(tuple(t) for t in own["tried"]),
                }
                layers.append(QuantLayer(**fields))
            kept = tuple((k["name"], k["reason"]) for k in data["kept"])
        except (TypeError, KeyError) as e:
            raise ValueError(f"data: expected what to_dict gave, got something else ({e})") from e
        return cls(data["method"], data["observer"], tuple(layers), kept)

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=check_indent(indent))

    def __rich__(self) -> Table:
        table = Table(title=f"quantised ({self.method})", caption_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("type")
        for heading in ("shape", "bits", "zeros", "error", "input"):
            table.add_column(heading, justify="right", no_wrap=True)
        for x in self.layers:
            shape = "x".join(map(str, x.shape))
            grid = "by token" if x.activation is None else f"{x.activation[2]} {x.activation[0]:.3g}"
            table.add_row(x.name, x.type, shape, str(x.bits), f"{x.sparsity:.1%}", f"{x.error:.2%}", grid)
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=110, color_system=None).print(self)
        return out.getvalue().rstrip()
