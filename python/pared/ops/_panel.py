"""What the formats of csrc/formats/csr.h share: sparse rows, or quads of rows, for the panel kernels."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from pared import _core
from pared._types import Array
from pared.ops._arrays import integer, is_torch, require_array
from pared.ops.packed import PackedWeight

P = TypeVar("P", bound="PanelWeight")


class PanelWeight(PackedWeight):
    """A float32 weight of sparse rows or quads of rows. Zeros and denormals are not stored."""

    __slots__ = ()
    _entry_rows: ClassVar[int]  # output rows that share an offset (csrc/formats/csr.h)

    @classmethod
    def from_dense(cls: type[P], weight: Array, *, groups: int = 1) -> P:
        """Pack a dense weight of float32, bfloat16 or float16. Raises ``ValueError`` on NaN or infinity."""
        return cls._pack_dense(weight, groups, cls._entry_rows)

    @classmethod
    def _pack_dense(cls: type[P], weight: Array, groups: int, entry_rows: int) -> P:
        require_array(weight, "weight")
        dense = weight.detach() if is_torch(weight) else weight
        return cls(_core.csr_pack_dense(dense, integer(groups, "groups"), cls.kind, entry_rows))

    def to_csr_arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """``(row pointers, columns, values)`` of the matrix ``[out, in]``; for a convolution
        ``[out, in * kh * kw]``, block-diagonal over groups."""
        return _core.csr_unpack(self.packed)

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.csr_array`` of the matrix."""
        import scipy.sparse

        p, c, v = self.to_csr_arrays()
        return scipy.sparse.csr_array((v, c, p), shape=(self._info["rows"], self._info["cols"]))
