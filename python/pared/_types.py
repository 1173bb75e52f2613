"""Type aliases that several modules share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    Array: TypeAlias = NDArray[Any] | torch.Tensor
else:
    Array: TypeAlias = "np.ndarray | torch.Tensor"

__all__ = ["Array"]
