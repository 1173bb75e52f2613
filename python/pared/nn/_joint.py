"""Linear layers of one input on a CUDA device: their weights as one, so that one product computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pared.ops._device import DeviceWeight

if TYPE_CHECKING:
    from pared.nn.linear import Linear


# Together. Formats count units of 12 bytes and more in 32 bits.
_MOST_BYTES = 1 << 35


@dataclass
class Joint:
    """The weights of layers on a device, joined.

    Attributes
    ----------
    weight : the outputs of all, one behind the other.
    parts : the layers' own weights, in the memory of `weight`.
    """

    weight: DeviceWeight
    parts: tuple[DeviceWeight, ...]
    _bias: Tensor | None = None
    _biases: tuple[tuple[Tensor | None, int], ...] = ()  # of which it was made, each with its version then

    @classmethod
    def of(cls, layers: Sequence[Linear]) -> Joint | None:
        """Joins weights on a device; None where one is not there, or they do not go together."""
        weights = [m._on_device for m in layers]
        there = [w for w in weights if w is not None]
        if len(there) < len(layers) or not all(a.joins(b) for a, b in pairwise(there)):
            return None
        if len({m.activation for m in layers}) > 1 or sum(w.nbytes for w in there) > _MOST_BYTES:
            return None
        whole, parts = there[0].join(*there[1:])
        return cls(whole, tuple(parts))

    def holds(self, layers: Sequence[Linear]) -> bool:
        """Whether these are still the layers' weights."""
        return all(m._on_device is part for m, part in zip(layers, self.parts, strict=True))

    def linear(self, x: Tensor, layers: Sequence[Linear], activation: str | None) -> tuple[Tensor, ...]:
        """The outputs of all layers for `x`."""
        biases = tuple((b, _version(b)) for b in (m._buffers["bias"] for m in layers))
        if [(id(b), v) for b, v in biases] != [(id(b), v) for b, v in self._biases]:
            self._bias, self._biases = _joined(layers), biases
        y = self.weight.linear(x, self._bias, activation)
        return torch.split(y, [m.out_features for m in layers], -1)


def _version(t: Tensor | None) -> int:
    return 0 if t is None or t.is_inference() else t._version


def _joined(layers: Sequence[Linear]) -> Tensor | None:
    """Their biases, one behind the other."""
    there = [m.bias for m in layers if m.bias is not None]
    if not there:
        return None
    return torch.cat([there[0].new_zeros(m.out_features) if m.bias is None else m.bias for m in layers])
