"""What stands where a module was whose work the layer before it does now; and what modules that take another
one's place share."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

Path = tuple[str, ...]


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


def at(module: nn.Module, path: Path) -> nn.Module:
    """The submodule at a path. Raises ``KeyError`` or ``AttributeError`` where there is none."""
    found: Any = module
    for name in path:
        found = found._modules[name]
    return found  # type: ignore[no-any-return]


_subclasses: dict[tuple[type, type[nn.Module]], Any] = {}


def subclass(first: type, plain: type[nn.Module]) -> Any:
    """The class (`first`, `plain`), under the name of `plain`: one for each pair."""
    if (first, plain) in _subclasses:
        return _subclasses[first, plain]
    members = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    return _subclasses.setdefault((first, plain), type(plain.__name__, (first, plain), members))


def class_below(first: type, kind: type[Any]) -> type[Any]:
    """The class that `subclass` was given beside `first`."""
    return kind.__mro__[kind.__mro__.index(first) + 1]
