"""Blocks whose residual additions are part of a convolution's kernel."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from typing_extensions import Self

from pared.nn._base import ACTIVATIONS
from pared.nn._fused import Path, adopt, at, check_module
from pared.nn.conv import Conv2d

_mode_depth = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing


@dataclass(frozen=True)
class Call:
    """A step of a block: a submodule is called with an earlier value.

    Attributes
    ----------
    module : path to the submodule; None: nothing is called.
    value : number of the value that it takes; 0 is the block's input, n what step n - 1 gives.
    residual : number of the value that is added to what the submodule, then a `Conv2d`, gives; or None.
    activation : what follows, of a `Conv2d` or without a submodule; or None.
    """

    module: Path | None
    value: int
    residual: int | None = None
    activation: str | None = None


class ResidualBlock(nn.Module):
    """A block in whose convolutions a residual is added, and the activations behind them are computed.

    It has the submodules of the module that was there, under their names. Called in another way than with one
    tensor, in training, traced, or where a submodule has hooks or was replaced, it computes what that module
    does.

    Attributes
    ----------
    original : the class of the module that was there; `pared.restore` puts it back.
    steps : what is called instead of that class's ``forward``, in this order. The last one's value is the
        block's output.
    watched : paths to all submodules that those steps stand for.
    """

    original: type[nn.Module]
    steps: Sequence[Call]
    watched: Sequence[Path]
    # What is at these paths, and how many children it has.
    _inside: Sequence[tuple[nn.Module, int]]

    @classmethod
    def from_module(cls, module: nn.Module, steps: Sequence[Call], watched: Sequence[Path]) -> Self:
        """Of the same submodules as `module`.

        Raises
        ------
        TypeError : not a module; steps or paths of another type.
        ValueError : a path to nothing, a value that no earlier step gives, or what a step cannot do.
        """
        check_module(module)
        if not isinstance(steps, Sequence) or not all(isinstance(s, Call) for s in steps):
            raise TypeError(f"steps: expected a sequence of Call, got {type(steps).__name__}")
        if not steps:
            raise ValueError("steps: expected at least one, got none")
        for i, step in enumerate(steps):
            _check_step(f"steps[{i}]", step, i, module)
        if isinstance(watched, str) or not isinstance(watched, Sequence):
            raise TypeError(f"watched: expected a sequence of paths, got {type(watched).__name__}")
        for i, path in enumerate(watched):
            _check_path(f"watched[{i}]", path, module)
        new = cls.__new__(cls)
        adopt(new, module)
        new.original, new.steps, new.watched = type(module), tuple(steps), tuple(watched)
        new._inside = tuple((m, len(m._modules)) for m in (at(module, path) for path in watched))
        return new

    def to_module(self) -> nn.Module:
        """The module that was there, of the same submodules."""
        new = self.original.__new__(self.original)
        adopt(new, self)
        for name in ("original", "steps", "watched", "_inside"):
            vars(new).pop(name)
        return new

    def __getattr__(self, name: str) -> Any:
        # What the model's code may ask of the module that was there: its methods and properties.
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = vars(self).get("original")  # not there yet while it is unpickled
            found = inspect.getattr_static(original, name, None)
            if original is None or found is None:
                raise
            bind = getattr(type(found), "__get__", None)
            return bind(found, self, original) if bind else found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module that was there."""
        x = args[0] if len(args) == 1 and not kwargs else None
        if type(x) is not Tensor or self.training or is_compiling() or _mode_depth() or _tracing():
            return self.original.forward(self, *args, **kwargs)
        if not self._untouched():
            return self.original.forward(self, x)
        values = [x]
        for step in self.steps:
            y = values[step.value]
            residual = None if step.residual is None else values[step.residual]
            module: Any = None if step.module is None else at(self, step.module)
            if module is None:
                y = y if residual is None else y + residual
                y = ACTIVATIONS[step.activation](y) if step.activation else y
            elif residual is None and step.activation is None:
                y = module(y)
            else:
                y = module._compute(y, residual, step.activation or "")
            values.append(y)
        return values[-1]

    def _untouched(self) -> bool:
        """Whether all submodules are those that the steps stand for, and nothing listens to them."""
        try:
            for path, (module, children) in zip(self.watched, self._inside, strict=True):
                if at(self, path) is not module or len(module._modules) != children:
                    return False
                if module._forward_hooks or module._forward_pre_hooks:
                    return False
        except (AttributeError, KeyError):
            return False
        return True

    def extra_repr(self) -> str:
        count = sum(s.residual is not None for s in self.steps)
        return f"{self.original.__name__}, {count} addition(s) computed by convolutions"


def _check_path(name: str, path: Any, module: nn.Module) -> nn.Module:
    if not isinstance(path, tuple) or not all(isinstance(part, str) for part in path):
        raise TypeError(f"{name}: expected a tuple of names, got {path!r}")
    try:
        return at(module, path)
    except (KeyError, AttributeError):
        raise ValueError(f"{name}: expected a path to a submodule, got {path!r}") from None


def _check_step(name: str, step: Call, earlier: int, module: nn.Module) -> None:
    """`earlier`: the number of the last value that there is."""
    for what, value in (("value", step.value), ("residual", 0 if step.residual is None else step.residual)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= earlier:
            raise ValueError(f"{name}: expected as {what} an integer from 0 to {earlier}, got {value!r}")
    known = isinstance(step.activation, str) and step.activation in ACTIVATIONS
    if step.activation is not None and not known:
        raise ValueError(
            f"{name}: expected an activation of {', '.join(ACTIVATIONS)}, got {step.activation!r}"
        )
    if step.module is None:
        return
    called = _check_path(name, step.module, module)
    if (step.residual is not None or step.activation is not None) and not isinstance(called, Conv2d):
        raise TypeError(f"{name}: expected a Conv2d that adds or activates, got {type(called).__name__}")
