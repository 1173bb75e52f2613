"""CSR weights: unstructured sparsity."""

from __future__ import annotations

from typing import Any, ClassVar

from pared import _core
from pared.ops._panel import PanelWeight


class CSR(PanelWeight):
    """An unstructured sparse weight, about 6.2 bytes a non-zero.

    Build it with `from_dense`, `from_scipy` or `from_torch`.
    """

    __slots__ = ()
    kind: ClassVar[str] = "csr"
    _entry_rows: ClassVar[int] = 1

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
