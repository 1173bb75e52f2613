"""Which activations can be computed by the layer before them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pared._surgery import module_names

__all__ = ["Fusion", "activation_of", "find_fusions"]


def activation_of(module: nn.Module) -> str | None:
    """The kernel's name of an activation module, or None."""
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.SiLU:
        return "silu"
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return None


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
}


@dataclass
class Fusion:
    """A layer and the activation module that takes its output.

    The structure of the model proposes it; `watch` then sees whether the calls really go that way: each
    output of the layer into the activation, once, and nothing else into the activation.
    """

    layer: nn.Module
    name: str
    module: nn.Module
    activation: str
    _pending: Tensor | None = None
    _passed: int = 0
    _broken: bool = False
    _handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def apply(self) -> Callable[[Tensor], Tensor]:
        """The activation as a function."""
        return _FUNCTIONS[self.activation]

    def watch(self) -> list[RemovableHandle]:
        """Hooks that note how the two are called."""

        def after_layer(module: nn.Module, args: Any, output: Any) -> None:
            self._broken |= self._pending is not None
            self._pending = output

        def before_activation(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._broken |= not args or args[0] is not self._pending or self._pending is None
            self._pending = None
            self._passed += 1

        return [
            self.layer.register_forward_hook(after_layer),
            self.module.register_forward_pre_hook(before_activation),
        ]

    def confirmed(self) -> bool:
        """Whether every call went from the layer into the activation."""
        pending, self._pending = self._pending, None
        return self._passed > 0 and not self._broken and pending is None


def find_fusions(model: nn.Module, layers: set[int]) -> dict[int, Fusion]:
    """id of a layer (one of `layers`) -> the activation that can be fused into it.

    Neighbours in an ``nn.Sequential``; both occur once in the model and carry no hooks, which would see other
    values.
    """
    names = module_names(model)
    found: dict[int, Fusion] = {}
    for prefix, parent in model.named_modules():
        if type(parent).forward is not nn.Sequential.forward:
            continue
        children = list(parent.named_children())
        for (_, layer), (child, follower) in itertools.pairwise(children):
            activation = activation_of(follower)
            if id(layer) not in layers or activation is None:
                continue
            if any(len(names[id(m)]) > 1 or _has_hooks(m) for m in (layer, follower)):
                continue
            name = f"{prefix}.{child}" if prefix else child
            found[id(layer)] = Fusion(layer, name, follower, activation)
    return found


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
