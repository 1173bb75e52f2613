"""pared: makes pruned and quantized PyTorch models really faster, on CPU and GPU.

Importing this package does not import torch: `pared.ops` works on numpy arrays alone, and what needs torch
loads it on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pared import callbacks, nn, ops, pruning, quant, schedules, training
    from pared._accelerate import accelerate
    from pared._compress import compress
    from pared._evaluate import evaluate
    from pared._format import FormatError
    from pared._info import isa, kernels
    from pared._io import load, save
    from pared._levels import Levels, levels
    from pared._report import Report, report
    from pared._search import search_budget
    from pared._surgery import restore
    from pared.pruning import Pruner, prune, prune_channels, prune_layers
    from pared.quant import quantize

__version__ = "0.1.0"

# Public name -> module that defines it. Resolved on first access, so that `import pared` stays cheap.
# The modules behind functions have private names: importing a submodule sets its name on the package, so a
# module `pared.report` would hide the function.
_LAZY: dict[str, str] = {
    "FormatError": "pared._format",
    "Levels": "pared._levels",
    "Pruner": "pared.pruning",
    "Report": "pared._report",
    "accelerate": "pared._accelerate",
    "compress": "pared._compress",
    "evaluate": "pared._evaluate",
    "isa": "pared._info",
    "kernels": "pared._info",
    "levels": "pared._levels",
    "load": "pared._io",
    "prune": "pared.pruning",
    "prune_channels": "pared.pruning",
    "prune_layers": "pared.pruning",
    "quantize": "pared.quant",
    "report": "pared._report",
    "restore": "pared._surgery",
    "save": "pared._io",
    "search_budget": "pared._search",
}
_SUBMODULES = ("callbacks", "nn", "ops", "pruning", "quant", "schedules", "training")

__all__ = [
    "FormatError",
    "Levels",
    "Pruner",
    "Report",
    "accelerate",
    "callbacks",
    "compress",
    "evaluate",
    "isa",
    "kernels",
    "levels",
    "load",
    "nn",
    "ops",
    "prune",
    "prune_channels",
    "prune_layers",
    "pruning",
    "quant",
    "quantize",
    "report",
    "restore",
    "save",
    "schedules",
    "search_budget",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"pared.{name}")
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pared' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_SUBMODULES})
