"""4-bit weights for few tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pared import _core
from pared._types import Array
from pared.ops._arrays import integer, is_torch, require_array, word
from pared.ops.int8 import Activations, IntegerWeight

# Numbers of inputs that may share a scale (csrc/formats/int4.h), and where none is given.
GROUPS = (32, 64, 128)
GROUP = 64


def int4_group(bits: int, symmetric: bool, group: int | None, activation_scale: float | None) -> int | None:
    """The group of the `Int4` weight that holds a grid of `pared.quantize` as it is; None where none does."""
    if bits > 4 or not symmetric or activation_scale is not None:
        return None
    group = GROUPS[-1] if group is None else group
    return group if group in GROUPS else None


def _group(group: Any) -> int:
    return integer(group, "group", 0, 2**31 - 1)


class Int4(IntegerWeight):
    """4-bit integers, a scale a group of inputs: ``w[n, k]`` is about ``scales[n, k // group] * q[n, k]``.

    4.25 to 5 bits an element: at its best with few tokens, where reading the weight is the cost.
    `pared.ops.linear` quantizes its input by token to 8 bits. A group's sum is exact in int32, groups add up
    in float32 in their order: the same bits on every instruction set and for any number of tokens. A token
    that holds NaN or infinity gives NaN.

    `pared.accelerate` takes over what ``pared.quantize(model, data, bits=4, group=...)`` has put on such a
    grid. Asked for by name (``formats=["int4", ...]``) it rounds other layers as `from_dense` does, which
    costs more accuracy than quantizing with data.
    """

    __slots__ = ()
    kind: ClassVar[str] = "int4"

    @classmethod
    def from_dense(cls, weight: Array, *, groups: int = 1, group: int = GROUP) -> Int4:
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
        if integer(groups, "groups") != 1:
            raise ValueError(f"groups: expected 1 for an int4 weight, got {groups!r}")
        dense = weight.detach() if is_torch(weight) else weight
        return cls(_core.int4_pack_dense(dense, _group(group)))

    @classmethod
    def from_quantized(cls, q: Array, scales: Array, *, group: int, dtype: str = "float32") -> Int4:
        """Take over a weight that is quantized already; nothing is rounded a second time.

        Parameters
        ----------
        q : [out, in], int8 from -8 to 7.
        scales : [out, ceil(in / group)], float32, finite and at least 0.
        group : inputs that share a scale: 32, 64 or 128.
        dtype : float dtype that `to_dense` gives a tensor.

        Raises
        ------
        TypeError, ValueError : naming the argument, what was expected and what came.
        """
        require_array(q, "q")
        require_array(scales, "scales")
        return cls(_core.int4_pack_quantized(q, scales, _group(group), word(dtype, "dtype")))

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return _core.int4_group(self.packed)

    def to_quantized(self) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """``(q [out, in], scales [out, ceil(in / group)])``."""
        return _core.int4_unpack(self.packed)

    def stored(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """[ceil(out / 2), in], two outputs a byte (two's complement, the first in the low four bits), so that
        the shapes tell one weight from another; and the scales.
        """
        q, scales = self.to_quantized()
        nibbles = np.pad(q, ((0, q.shape[0] % 2), (0, 0))).view(np.uint8) & 15
        return nibbles[0::2] | nibbles[1::2] << 4, scales

    @classmethod
    def stored_like(
        cls, shape: tuple[int, ...], scales: tuple[int, ...]
    ) -> tuple[tuple[str, tuple[int, ...]], tuple[int, ...]]:
        known = [(shape[0], -(-shape[1] // group)) for group in GROUPS]
        return ("uint8", (-(-shape[0] // 2), shape[1])), scales if scales in known else known[0]

    @classmethod
    def from_stored(
        cls,
        shape: tuple[int, ...],
        integers: Array,
        scales: Array,
        dtype: str,
        activations: Activations | None,
        groups: int = 1,
    ) -> Int4:
        """Weights of one group, of at most 128 inputs, are put into the smallest that holds them."""
        if activations is not None:
            raise ValueError("input: expected none for an int4 weight, which quantizes its input by token")
        b = np.asarray(integers).view(np.int8)
        q = np.empty((2 * b.shape[0], shape[1]), np.int8)
        q[0::2], q[1::2] = b << 4 >> 4, b >> 4
        group = next(g for g in GROUPS if -(-shape[1] // g) == scales.shape[1])
        return cls.from_quantized(q[: shape[0]], np.ascontiguousarray(scales), group=group, dtype=dtype)
