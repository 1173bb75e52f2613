"""4-bit weights for few tokens."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pared import _core
from pared._types import Array
from pared.ops._arrays import is_torch, require_array
from pared.ops.packed import PackedWeight


class Int4(PackedWeight):
    """4-bit integers, a scale a group of inputs: ``w[n, k]`` is about ``scales[n, k // group] * q[n, k]``.

    For 1 to 16 tokens, where reading the weight is the cost: 4.25 to 5 bits an element. `pared.ops.linear`
    quantizes its input by token to 8 bits. A group's sum is exact in int32, groups add up in float32 in their
    order: the same bits on every instruction set. A token that holds NaN or infinity gives NaN.

    An operation of its own: `pared.accelerate` does not choose it, and `pared.save` does not store it.
    """

    __slots__ = ()
    kind: ClassVar[str] = "int4"

    @classmethod
    def from_dense(cls, weight: Array, *, groups: int = 1, group: int = 64) -> Int4:
        """Quantize a dense weight: ``scale = max|w| / 7`` of a group, ``q = round(w / scale)``.

        Parameters
        ----------
        weight : [out, in], float32, bfloat16 or float16, at most 2**20 inputs.
        groups : 1; of a convolution, which this is not for.
        group : inputs that share a scale: 32, 64 or 128.

        Raises
        ------
        TypeError, ValueError : naming the argument; NaN or infinity in the weight.
        """
        require_array(weight, "weight")
        if groups != 1:
            raise ValueError(f"groups: expected 1 for an int4 weight, got {groups!r}")
        dense = weight.detach() if is_torch(weight) else weight
        return cls(_core.int4_pack_dense(dense, group))

    @classmethod
    def from_quantized(cls, q: Array, scales: Array, *, group: int) -> Int4:
        """Take over `q` [out, in], int8 from -8 to 7, and `scales` [out, ceil(in / group)], float32."""
        require_array(q, "q")
        require_array(scales, "scales")
        return cls(_core.int4_pack_quantized(q, scales, group))

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return _core.int4_unpack(self.packed)[2]

    def to_quantized(self) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """``(q [out, in], scales [out, ceil(in / group)])``."""
        q, scales, _ = _core.int4_unpack(self.packed)
        return q, scales
