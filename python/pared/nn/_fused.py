"""What stands where a module was whose work the layer before it does now."""

from __future__ import annotations

import copy

from torch import nn


class Fused(nn.Identity):
    """An identity in the place of an activation that the accelerated layer before it computes.

    Attributes
    ----------
    original : the module that was here; `pared.restore` puts it back.
    """

    original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        check_module(original, "original")
        super().__init__()
        # Past nn.Module's own registration: it is no part of the model (state dict, hooks, modules()) any
        # more.
        object.__setattr__(self, "original", original)
        self.training = False

    def extra_repr(self) -> str:
        return f"{type(self.original).__name__}, fused into the layer before"


def check_module(module: object, name: str = "module") -> None:
    """Raise ``TypeError`` for what is no module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(module).__name__}")


def adopt(new: nn.Module, old: nn.Module) -> None:
    """Give `new` all that `old` has: parameters, submodules, hooks, attributes."""
    vars(new).update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(old).items()})
