"""What modules around accelerated layers do in another way, as attributes of the instances.

``save_pretrained`` of transformers is refused: it would write the packed weights under names that
``from_pretrained`` does not know, which then fills the layers with random numbers. ``to``, ``cuda``, ``half``
and the like, all of which call ``_apply``, convert everything or, where a layer refuses, nothing. Layers that
go in one call do so in calls of the module around them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, nn

from pared.nn._base import PackedModule
from pared.nn._chains import bind_chains, unbind_chains

__all__ = ["guard", "unguard"]

_SAVE = "save_pretrained"
_APPLY = "_apply"


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "save_pretrained: expected a model of plain layers, got one with accelerated ones, which "
        "from_pretrained cannot read; pared.save(model, path) stores it as it is, "
        "pared.restore(model).save_pretrained(...) the plain model, with its zeros"
    )


class _ApplyWhole:
    """``model._apply`` that asks every accelerated layer before the first tensor of the model changes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # which holds this: no cycle, so that memory is freed at once

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        model = self._model()
        if model is None:
            raise RuntimeError(
                "model: expected an accelerated model or a deep copy, got a shallow copy of one that is gone"
            )
        layers = [m for m in model.modules() if isinstance(m, PackedModule)]
        try:
            for layer in layers:
                layer._prepare(fn)
            return type(model)._apply(model, fn, recurse)  # type: ignore[no-untyped-call,no-any-return]
        finally:
            for layer in layers:
                layer._prepared = None

    def __reduce__(self) -> tuple[Any, ...]:  # of deep copies as well: the copy's is of the copy
        return type(self), (self._model(),)


def guard(model: nn.Module) -> None:
    """Have every module around accelerated layers refuse ``save_pretrained``, where it has that, convert all
    of itself or nothing, and tell layers that go in one call when they may."""
    for module in model.modules():
        if isinstance(module, PackedModule) or not any(isinstance(m, PackedModule) for m in module.modules()):
            continue
        if hasattr(module, _SAVE):
            setattr(module, _SAVE, _refuse)
        setattr(module, _APPLY, _ApplyWhole(module))
    bind_chains(model)


def unguard(model: nn.Module) -> None:
    """Take `guard` back."""
    unbind_chains(model)
    for module in model.modules():
        vars(module).pop(_SAVE, None)
        vars(module).pop(_APPLY, None)
