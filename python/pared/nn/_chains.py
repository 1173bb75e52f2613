"""Modules with layers that go in one call inside: they say when these may.

`Linear.hand_to` makes the first of them return what the last one gives. That is right in a call of the module
around them all, as long as they are where they were; called from elsewhere (``model[0](x)``, a slice of an
``nn.Sequential``), or with one of them replaced or wrapped, each computes for itself. The module around keeps
its class, as far as ``isinstance`` goes: it becomes a subclass.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from pared.nn._fused import Path, at, class_below, subclass
from pared.nn.linear import Linear, calls

__all__ = ["bind_chains", "unbind_chains"]

# Of each chain its first layer, and all its modules: children of the module by name, others by path.
_CHAINS = "_pared_chains"


class _Around:
    """What the class of a module around chains is given before itself."""

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        plain: Any = super()
        if is_compiling():  # layers compute for themselves there
            return plain._call_impl(*args, **kwargs)
        inside = self.__dict__
        outer = heads = calls.heads
        # With a forward of its own that somebody has set since, anything may happen between layers. A slice
        # of an nn.Sequential has its class and no chains.
        if "forward" not in inside and _CHAINS in inside:
            children = inside["_modules"]
            for head, near, far in inside[_CHAINS]:
                for name, module in near:
                    if children.get(name) is not module:
                        break
                else:
                    if not far or _in_place(self, far):
                        heads = (*heads, head)
        calls.heads = heads
        try:
            return plain._call_impl(*args, **kwargs)
        finally:
            calls.heads = outer

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made here, in whatever process unpickles.
        plain: Any = super()
        make, args, *state = plain.__reduce_ex__(protocol)
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            args = (class_below(_Around, args[0]), *args[1:])
        return _made, (make, args), *state


def _made(make: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    module = make(*args)
    object.__setattr__(module, "__class__", subclass(_Around, type(module)))
    return module


def _in_place(around: Any, places: Sequence[tuple[Path, nn.Module]]) -> bool:
    for path, module in places:
        found = around
        for name in path:
            found = found._modules.get(name)
        if found is not module:
            return False
    return True


def bind_chains(model: nn.Module) -> None:
    """Have layers that go in one call do so in calls of the innermost module around them only."""
    names = {m: n for n, m in model.named_modules()}
    for head in [m for m in names if isinstance(m, Linear) and m._handed]:
        paths = [names[m].split(".") for m in head._chained]
        depth = sum(1 for _ in takewhile(lambda parts: len({*parts}) == 1, zip(*paths, strict=False)))
        around = at(model, tuple(paths[0][:depth]))
        if not isinstance(around, _Around):
            object.__setattr__(around, "__class__", subclass(_Around, type(around)))
        places = [(path[depth:], m) for path, m in zip(paths, head._chained, strict=True)]
        near = [(path[0], m) for path, m in places if len(path) == 1]
        far = [(tuple(path), m) for path, m in places if len(path) > 1]
        vars(around).setdefault(_CHAINS, []).append((head, near, far))
        head._refer("_bound", True)


def unbind_chains(model: nn.Module) -> None:
    """Take `bind_chains` back."""
    for module in model.modules():
        if isinstance(module, _Around):
            for head, *_ in vars(module).pop(_CHAINS, ()):
                head._refer("_bound", False)
            object.__setattr__(module, "__class__", class_below(_Around, type(module)))
