"""What the demonstration measures, and how it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class Variant:
    """One version of a model: dense, or pruned and run by pared.

    Attributes
    ----------
    name : what was done to the model.
    metrics : the model's quality, by name; every metric is a share of one.
    parameters, nonzero : counts of weights.
    file_bytes : size of the model on disk.
    p50_s, p95_s : seconds for one call; measured in turns with the other variants of the same model.
    speedup : the fastest dense variant's time over this one's, the median over rounds; 1 for that variant.
    """

    name: str
    metrics: dict[str, float]
    parameters: int
    nonzero: int
    file_bytes: int
    p50_s: float
    p95_s: float
    speedup: float


@dataclass(frozen=True)
class Result:
    """One model of the demonstration: as it was, in each memory layout, and then what pared made of it."""

    model: str
    workload: str
    variants: tuple[Variant, ...]
    note: str = ""


def _bytes(n: int) -> str:
    return f"{n / 1e6:.2f} MB" if n < 10e6 else f"{n / 1e6:.1f} MB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _metrics(v: Variant) -> str:
    return "\n".join(f"{name} {100 * value:.1f} %" for name, value in v.metrics.items())


def table(results: list[Result], baseline: str) -> Table:
    """The table of all results; `baseline` says what the dense models ran on."""
    t = Table(title="Dense and pared, measured here in turns", box=box.SIMPLE_HEAVY, caption_justify="left")
    t.add_column("model", no_wrap=True)
    t.add_column("variant", no_wrap=True)
    t.add_column("quality", justify="right", no_wrap=True)
    t.add_column("weights\nnon-zero", justify="right")
    t.add_column("file", justify="right")
    t.add_column("p50\nms", justify="right")
    t.add_column("p95\nms", justify="right")
    t.add_column("speed-up", justify="right")
    for r in results:
        for i, v in enumerate(r.variants):
            color = "green" if v.speedup > 1 else "red" if v.speedup < 1 else "default"
            t.add_row(
                f"[bold]{r.model}[/]\n{r.workload}" if i == 0 else "",
                v.name,
                _metrics(v),
                f"{v.nonzero / 1e6:.3f} M",
                _bytes(v.file_bytes),
                _ms(v.p50_s),
                _ms(v.p95_s),
                f"[bold {color}]{v.speedup:.2f}x[/]",
                end_section=i == len(r.variants) - 1,
            )
    t.caption = "\n".join([baseline, *(f"{r.model}: {r.note}" for r in results if r.note)])
    return t


def to_json(results: list[Result], machine: dict[str, Any]) -> dict[str, Any]:
    """The same numbers, and more digits, for programs. Times are in seconds."""
    return {"machine": machine, "results": [asdict(r) for r in results]}
