"""Accelerated modules for inference, and the registry that maps torch's modules to them.

Add a module type: write it on `PackedModule` and add its line to `RULES`. Add a format: its line in
``pared.ops._formats.FORMATS`` and its name in the lines of `RULES` that can use it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pared.nn._base import DenseWeightError, PackedModule
from pared.nn._fold import FoldedBatchNorm2d
from pared.nn._fused import Fused
from pared.nn.conv import Conv1d, Conv2d
from pared.nn.linear import Linear
from pared.nn.pool import MaxPool2d
from pared.nn.residual import ResidualBlock
from pared.ops._formats import FORMATS


@dataclass(frozen=True)
class Rule:
    """How a module type of torch is accelerated: by which module, in which formats (tried in this order)."""

    module: type[PackedModule]
    formats: tuple[str, ...]

    def __post_init__(self) -> None:
        if not (isinstance(self.module, type) and issubclass(self.module, PackedModule)):
            raise TypeError(f"module: expected a class of PackedModule, got {self.module!r}")
        known = isinstance(self.formats, tuple) and all(isinstance(f, str) for f in self.formats)
        if not known or not FORMATS.keys() >= {*self.formats}:
            raise ValueError(f"formats: expected a tuple of {', '.join(FORMATS)}, got {self.formats!r}")


_CONVOLUTION = ("csr", "bsr", "dense", "int8", "bsr8")

# By exact type: a subclass may compute something else (see `pared.pruning.linears.plain_kind`).
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: Rule(
        Linear,
        ("csr", "2:4", "bsr", "dense", "bitmap", "bitmap+csr", "int8", "int8wo", "bitmap8", "bsr8", "int4"),
    ),
    nn.Conv1d: Rule(Conv1d, _CONVOLUTION),
    nn.Conv2d: Rule(Conv2d, _CONVOLUTION),
}

__all__ = [
    "RULES",
    "Conv1d",
    "Conv2d",
    "DenseWeightError",
    "FoldedBatchNorm2d",
    "Fused",
    "Linear",
    "MaxPool2d",
    "PackedModule",
    "ResidualBlock",
    "Rule",
]
