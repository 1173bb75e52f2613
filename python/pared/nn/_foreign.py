"""Layers that torch.ao or torchao quantised: what they stand for, and whether our kernels can take them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pared.nn._base import PackedModule
from pared.nn.conv import Conv1d, Conv2d
from pared.nn.linear import Linear

__all__ = ["Foreign", "foreign", "foreign_bytes", "hides_weights"]

_OURS: dict[str, type[PackedModule]] = {
    "Linear": Linear,
    "LinearReLU": Linear,
    "Conv1d": Conv1d,
    "Conv2d": Conv2d,
    "ConvReLU1d": Conv1d,
    "ConvReLU2d": Conv2d,
}


@dataclass(frozen=True)
class Foreign:
    """A Linear layer or a convolution that another tool quantised.

    Attributes
    ----------
    tool : ``"torch.ao"`` or ``"torchao"``.
    shape : of its weight.
    plain : the float layer that its integers and scales stand for; None where no kernel of ours takes them.
    activation : what the layer computes behind it.
    refused : why no kernel of ours takes it.
    """

    tool: str
    shape: tuple[int, ...]
    plain: nn.Module | None = None
    activation: str | None = None
    refused: str | None = None


def _tool(module: nn.Module) -> str | None:
    cls = type(module)
    if cls.__name__ in _OURS and cls.__module__.startswith("torch.ao.nn.") and ".quantized" in cls.__module__:
        return "torch.ao"
    if cls not in (nn.Linear, nn.Conv1d, nn.Conv2d) or "weight" not in module._parameters:
        return None  # the older torch.nn.utils.weight_norm computes the weight
    if type(module._parameters["weight"]).__module__.startswith("torchao"):
        return "torchao"
    return None


def _weight(module: nn.Module) -> Tensor:
    w = module.weight
    return w if isinstance(w, Tensor) else w()


def foreign(module: nn.Module) -> Foreign | None:
    """What a layer that torch.ao or torchao quantised is; None for any other module."""
    tool = _tool(module)
    if tool is None:
        return None
    shape = tuple(_weight(module).shape)
    try:
        ours = _OURS[type(module).__name__].from_quantized(module)
    except (TypeError, ValueError) as e:
        return Foreign(tool, shape, refused=f"quantised by {tool} in a way that no int8 kernel takes: {e}")
    return Foreign(tool, shape, ours.to_module(), ours.activation)


def hides_weights(module: nn.Module) -> bool:
    """Whether a module of torch.ao holds its weights where neither parameters nor buffers show them."""
    cls = type(module)
    ours = cls.__module__.startswith("torch.ao.nn.") and ".quantized" in cls.__module__
    return ours and cls._save_to_state_dict is not nn.Module._save_to_state_dict


def foreign_bytes(module: nn.Module) -> int:
    """Bytes of the integers that a layer of torch.ao holds, which are neither parameters nor buffers."""
    return _weight(module).numel() if _tool(module) == "torch.ao" else 0
