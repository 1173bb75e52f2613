"""Pruning inside other people's training loops: transformers' Trainer and Lightning.

`TrainerPruner` needs transformers, `LightningPruner` lightning or pytorch-lightning; neither is imported
before its name is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pared.callbacks._lightning import LightningPruner
    from pared.callbacks._transformers import TrainerPruner

__all__ = ["LightningPruner", "TrainerPruner"]

# Name -> module, and what has to be installed.
_LAZY = {
    "LightningPruner": ("pared.callbacks._lightning", "lightning or pytorch-lightning"),
    "TrainerPruner": ("pared.callbacks._transformers", "transformers and accelerate"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pared.callbacks' has no attribute {name!r}")
    module, packages = _LAZY[name]
    try:
        value = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(f"pared.callbacks.{name} needs {packages}: {error}") from error
    globals()[name] = value
    return value
