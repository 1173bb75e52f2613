"""CSR weights: unstructured sparsity."""

from __future__ import annotations

from typing import Any, ClassVar

from pared import _core
from pared._types import Array
from pared.ops.packed import PackedWeight


class CSR(PackedWeight):
    """An unstructured sparse weight, about 6.2 bytes a non-zero.

    Build it with `from_dense`, `from_scipy` or `from_torch`.
    """

    __slots__ = ()
    kind: ClassVar[str] = "csr"

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
        return cls._pack_dense(weight, groups, 1)

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
