"""CSR weights, packed for the panel kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pared import _core
from pared._types import Array
from pared.ops._arrays import is_torch, require_array


class CSR:
    """An unstructured sparse weight: ``[out, in]``, or a convolution's ``[out, in/groups, kh, kw]``.

    Holds one packed buffer (about 6.2 bytes a non-zero) and nothing else: the matrix is recovered from it.
    Zeros and denormals are not stored. Build it with `from_dense`, `from_scipy` or `from_torch`.

    Attributes
    ----------
    packed : uint8 array or tensor, 64-byte aligned, with a checked header.
    shape : the weight's shape.
    nnz : stored non-zeros.
    """

    __slots__ = ("_info", "packed")

    def __init__(self, packed: Array) -> None:
        self._info = _core.csr_info(packed)
        self.packed = packed

    @classmethod
    def _copied(cls, packed: Array) -> CSR:
        """From a copy of a packed buffer that need not be aligned; the copy is."""
        if is_torch(packed):
            return cls(packed.clone())
        room = np.empty(packed.nbytes + 63, np.uint8)
        start = -room.ctypes.data % 64
        room[start : start + packed.nbytes] = packed
        return cls(room[start : start + packed.nbytes])

    # numpy aligns neither a deep copy nor what it unpickles to 64 bytes.
    def __deepcopy__(self, memo: dict[int, Any]) -> CSR:
        return CSR._copied(self.packed)

    def __reduce__(self) -> tuple[Any, ...]:
        return CSR._copied, (self.packed,)

    @classmethod
    def from_dense(cls, weight: Array, *, groups: int = 1) -> CSR:
        """Pack a dense weight of float32, bfloat16 or float16. Raises ``ValueError`` on NaN or infinity."""
        require_array(weight, "weight")
        return cls(_core.csr_pack_dense(weight.detach() if is_torch(weight) else weight, groups))

    @classmethod
    def from_scipy(cls, matrix: Any) -> CSR:
        """Pack a two-dimensional scipy sparse matrix or array (any format; duplicates are summed)."""
        m = matrix.tocsr()
        if m is matrix and not m.has_canonical_format:
            m = m.copy()
        m.sum_duplicates()
        m.sort_indices()
        return cls(_core.csr_pack_csr(m.indptr, m.indices, m.data, m.shape[0], m.shape[1]))

    @classmethod
    def from_torch(cls, tensor: Any) -> CSR:
        """Pack a two-dimensional ``torch.sparse_csr`` tensor."""
        import torch

        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.sparse_csr or tensor.ndim != 2:
            got = getattr(tensor, "layout", type(tensor).__name__)
            raise TypeError(f"tensor: expected a two-dimensional torch.sparse_csr tensor, got {got}")
        t = tensor.detach()
        return cls(_core.csr_pack_csr(t.crow_indices(), t.col_indices(), t.values(), t.shape[0], t.shape[1]))

    @property
    def shape(self) -> tuple[int, ...]:
        i = self._info
        if i["kh"]:
            return (i["rows"], i["channels"], i["kh"], i["kw"])
        return (i["rows"], i["cols"])

    @property
    def groups(self) -> int:
        """Convolution groups; 1 for a linear weight."""
        return max(1, self._info["groups"])

    @property
    def nnz(self) -> int:
        return self._info["nnz"]

    @property
    def dtype(self) -> str:
        """The dtype that the weight had: ``"float32"``, ``"float16"`` or ``"bfloat16"``."""
        return self._info["dtype"]

    @property
    def nbytes(self) -> int:
        """Bytes that the packed weight takes."""
        return int(self.packed.nbytes)

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0 to 1."""
        total = math.prod(self.shape)
        return 1.0 - self.nnz / total if total else 0.0

    def to_dense(self) -> Array:
        """The dense weight: a float32 array, or a tensor of the original dtype when packed is one."""
        if is_torch(self.packed):
            import torch

            out: Array = torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        else:
            out = np.empty(self.shape, dtype=np.float16 if self.dtype == "float16" else np.float32)
        _core.csr_unpack_dense(self.packed, out)
        return out

    def to_csr_arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """``(row pointers, columns, values)`` of the matrix ``[out, in]``; for a convolution
        ``[out, in * kh * kw]``, block-diagonal over groups."""
        return _core.csr_unpack(self.packed)

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.csr_array`` of the matrix."""
        import scipy.sparse

        p, c, v = self.to_csr_arrays()
        return scipy.sparse.csr_array((v, c, p), shape=(self._info["rows"], self._info["cols"]))

    def validate(self) -> None:
        """Check every invariant and the checksum; raises ``ValueError``."""
        _core.csr_validate(self.packed)

    def __repr__(self) -> str:
        return (
            f"CSR(shape={self.shape}, sparsity={self.sparsity:.3f}, nnz={self.nnz}, "
            f"nbytes={self.nbytes}, dtype={self.dtype})"
        )
