"""int8 weights with zeros in blocks along the reduction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pared import _core
from pared._types import Array
from pared.ops._arrays import integer, is_torch, require_array, word
from pared.ops._device import DeviceWeight, device_of
from pared.ops.bsr import check_block
from pared.ops.int8 import (
    Activations,
    QuantizedWeight,
    check_activations,
    check_quantized,
    output_scales,
)

if TYPE_CHECKING:
    from typing_extensions import Self

# Rows that the quad kernel takes together (kQuadRows in csrc/formats/panel.h).
_QUAD = 4


class BSRInt8(QuantizedWeight):
    """An int8 weight with zeros in blocks of R outputs by four consecutive inputs: 1x4, 4x4, 16x4.

    A class of its own, beside `BSR`, because it is another weight: rounded to ``scale * q`` with one scale an
    output, which `to_dense` gives back, while `BSR` keeps every value. 1.5 bytes a weight in 1x4 blocks, 1.1
    in 4x4. For a convolution a block is four consecutive input channels at one tap.

    The operations quantise activations as they come, a scale a token, or an image of a convolution:
    ``q = round(x * 127 / max|x|)``, or with a given scale and zero point; sum in int32 without rounding, and
    return ``activation(float(sum) * (weight scale * activation scale) + bias)``, the same bits on every
    instruction set. A token or image that holds an infinity or a NaN gives NaN outputs; one whose magnitudes
    are all below 2^-100 counts as zero.

    Build it with `from_dense`, or from a weight that was quantised elsewhere with `from_quantized`.
    """

    __slots__ = ()
    kind: ClassVar[str] = "bsr8"
    _masked: ClassVar[bool] = False

    @classmethod
    def from_dense(
        cls,
        weight: Array,
        *,
        block: tuple[int, int] | None = None,
        groups: int = 1,
        activation_scale: float | None = None,
        activation_zero: int = 0,
        activation_dtype: str = "int8",
    ) -> Self:
        """Quantise and pack a dense weight of float32, bfloat16 or float16.

        ``scale = max|w| / 127`` of an output, ``q = w / scale`` rounded to the nearest even integer.

        Parameters
        ----------
        weight : [out, in] or [out, in/groups, kh, kw], at most 65793 elements an output.
        block : (R, C), positive, the pattern that the weight was pruned with: with R a multiple of 4 four
            rows are multiplied together. None: whichever is faster for the zeros that are there. Blocks are
            found, not imposed: every weight packs.
        groups : of a convolution.
        activation_scale, activation_zero, activation_dtype : None for activations that are quantised by
            token or image; else ``x`` is about ``activation_scale * (q - activation_zero)`` with q of
            ``"int8"`` or ``"uint8"``.

        Raises
        ------
        ValueError : a block that is not two positive integers; NaN or infinity in the weight; a row that is
            too long.
        """
        require_array(weight, "weight")
        dense = weight.detach() if is_torch(weight) else weight
        activations = check_activations(activation_scale, activation_zero, activation_dtype)
        return cls(
            _core.bsr8_pack(
                dense, None, integer(groups, "groups"), _entry_rows(block), activations=activations
            )
        )

    @classmethod
    def from_quantized(
        cls,
        q: Array,
        scales: Any,
        *,
        block: tuple[int, int] | None = None,
        groups: int = 1,
        dtype: str = "float32",
        activation_scale: float | None = None,
        activation_zero: int = 0,
        activation_dtype: str = "int8",
    ) -> Self:
        """Pack int8 `q`, shaped as for `from_dense`, with `scales`, [out] or a number, without rounding.

        `dtype` is the float dtype that `to_dense` gives a tensor; the others are as for `from_dense`. Raises
        ``ValueError`` or ``TypeError`` for other dtypes and shapes, and for scales that are negative or not
        finite.
        """
        check_quantized(q)
        activations = check_activations(activation_scale, activation_zero, activation_dtype)
        rows = output_scales(scales, q.shape[0])
        return cls(
            _core.bsr8_pack(
                q, rows, integer(groups, "groups"), _entry_rows(block), word(dtype, "dtype"), activations
            )
        )

    @classmethod
    def from_parts(
        cls, q: Array, scales: Array, dtype: str, activations: Activations | None, groups: int = 1
    ) -> Self:
        return cls(_core.bsr8_pack(q, scales, groups, 0, dtype, activations))

    def to_quantized(self) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        values, scales = _core.bsr8_unpack(self.packed)
        return values.reshape(self.shape), scales

    def to(self, device: Any, dtype: Any = None) -> DeviceWeight:
        import torch

        from pared._cuda_block_sparse import DeviceBlocks

        if len(self.shape) != 2 or self.activations is not None:
            what = "static activations" if len(self.shape) == 2 else f"shape {list(self.shape)}"
            raise ValueError(
                f"device: expected a linear weight that quantizes its input by token for {device}, got {what}"
            )
        device = device_of(device)
        q, scales = (torch.from_numpy(a).to(device) for a in self.to_quantized())
        return DeviceBlocks.found_in(q, scales)

    @property
    def block_rows(self) -> int:
        """Outputs that are multiplied together: 1 or 4."""
        return self._info["entry_rows"]


def _entry_rows(block: Any) -> int:
    if block is None:
        return 0
    check_block(block)
    return _QUAD if block[0] % _QUAD == 0 else 1
