"""``save_pretrained`` of transformers on models with accelerated layers: refused.

It would write the packed weights under names that ``from_pretrained`` does not know, which then fills the
layers with random numbers.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from pared.nn._base import PackedModule

__all__ = ["permit_pretrained", "refuse_pretrained"]

_METHOD = "save_pretrained"


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "save_pretrained: expected a model of plain layers, got one with accelerated ones, which "
        "from_pretrained cannot read; pared.save(model, path) stores it as it is, "
        "pared.restore(model).save_pretrained(...) the plain model, with its zeros"
    )


def refuse_pretrained(model: nn.Module) -> None:
    """Have every module around accelerated layers refuse ``save_pretrained``, where it has that."""
    for module in model.modules():
        if hasattr(module, _METHOD) and any(isinstance(m, PackedModule) for m in module.modules()):
            setattr(module, _METHOD, _refuse)


def permit_pretrained(model: nn.Module) -> None:
    """Take `refuse_pretrained` back."""
    for module in model.modules():
        vars(module).pop(_METHOD, None)
