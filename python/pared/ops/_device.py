"""Weights in the memory of a device other than the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class DeviceWeight:
    """A packed weight in a device's memory, as `PackedWeight.to` gives it; `pared.ops.linear` takes it.

    Attributes
    ----------
    shape : (out, in).
    nbytes : bytes of device memory.
    """

    @property
    def device(self) -> torch.device:
        """Where it is."""
        raise NotImplementedError

    def linear(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
    ) -> torch.Tensor:
        """See `pared.ops.linear`; `x` and `bias` are on the weight's device."""
        raise NotImplementedError
