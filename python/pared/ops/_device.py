"""Weights in the memory of a device other than the CPU."""

from __future__ import annotations

import dataclasses
import importlib
import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Where the classes are; what a layout names beyond this is refused.
_MODULE = "pared._cuda_"


def device_of(device: Any) -> torch.device:
    """`device` as torch has it. Raises ``TypeError`` or ``ValueError`` for what is none or cannot be used."""
    import torch

    if not isinstance(device, str | torch.device):
        raise TypeError(f"device: expected a string or a torch.device, got {type(device).__name__}")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected a device such as 'cuda' or 'cuda:1', got {device!r}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that torch can use, got {found}, and it has no CUDA device")
    return found


class DeviceWeight:
    """A packed weight in a device's memory, as `PackedWeight.to` gives it; `pared.ops.linear` takes it.

    A format is a frozen dataclass in a module ``pared._cuda_*``: tensors, and values that JSON holds (and
    dtypes), so that `parts` and `from_parts` carry every format through an operator.

    Attributes
    ----------
    shape : (out, in).
    """

    def linear(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
    ) -> torch.Tensor:
        """See `pared.ops.linear`; `x` and `bias` are on the weight's device."""
        raise NotImplementedError

    def joins(self, other: DeviceWeight) -> bool:
        """Whether both have the same inputs and are of one kind, so that `join` takes them together."""
        return False

    def join(self, *others: DeviceWeight) -> tuple[DeviceWeight, list[DeviceWeight]]:
        """Weights of which each `joins` the next as one, their outputs one behind the other; and each of them
        as a part of its memory."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.parts()[1][0].device

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(t.numel() * t.element_size() for t in self.parts()[1])

    def parts(self) -> tuple[str, list[torch.Tensor]]:
        """A description of the format, and its tensors."""
        import torch

        values: dict[str, Any] = {}
        tensors: list[torch.Tensor] = []
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor):
                values[f.name] = {"tensor": len(tensors)}
                tensors.append(value)
            elif isinstance(value, torch.dtype):
                values[f.name] = {"dtype": str(value).removeprefix("torch.")}
            else:
                values[f.name] = value
        cls = type(self)
        return json.dumps([cls.__module__.removeprefix(_MODULE), cls.__qualname__, values]), tensors

    @staticmethod
    def from_parts(layout: str, tensors: list[torch.Tensor]) -> DeviceWeight:
        """The weight that `parts` described. Raises ``ValueError`` for another description."""
        cls, values, places = _parsed(layout)
        if len(tensors) != len(places):
            raise ValueError(f"weight: expected {len(places)} tensors, got {len(tensors)}")
        made: DeviceWeight = cls(**values, **{name: tensors[at] for name, at in places.items()})
        return made


@lru_cache(maxsize=4096)
def _parsed(layout: str) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """The class, its plain values, and which tensor each other field is."""
    import torch

    try:
        module, name, given = json.loads(layout)
        if not (module.isidentifier() and name.isidentifier()):
            raise ValueError(layout)
        cls = getattr(importlib.import_module(_MODULE + module), name)
        known = {f.name for f in dataclasses.fields(cls)}
        if not issubclass(cls, DeviceWeight) or given.keys() != known:
            raise ValueError(layout)
    except (ValueError, TypeError, AttributeError, ImportError) as e:
        raise ValueError(
            f"layout: expected the description of a weight on a device, got {layout!r:.80}"
        ) from e
    values: dict[str, Any] = {}
    places: dict[str, int] = {}
    for key, value in given.items():
        if isinstance(value, dict) and "tensor" in value:
            places[key] = value["tensor"]
        elif isinstance(value, dict):
            values[key] = getattr(torch, value["dtype"])
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    return cls, values, places
