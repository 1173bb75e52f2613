"""CSR weights: unstructured sparsity."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from pared import _core
from pared.ops._arrays import check_scipy_dtype
from pared.ops._device import DeviceWeight, device_of
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
        if not hasattr(matrix, "tocsr") or len(matrix.shape) != 2:
            raise TypeError(f"matrix: expected a two-dimensional scipy matrix, got {type(matrix).__name__}")
        check_scipy_dtype(matrix)
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

    def to(self, device: Any, dtype: Any = None) -> DeviceWeight:
        """A copy in the memory of a CUDA device, for products with any number of tokens.

        Parameters
        ----------
        dtype : of the values and of the activations, ``torch.float32``, ``torch.float16`` or
            ``torch.bfloat16``; None for the weight's own. Values that it rounds to zero are not stored.

        Raises
        ------
        ValueError : a convolution's weight, another dtype, or a value beyond its range.
        """
        import torch

        from pared._cuda_sparse import DeviceCSR

        given = getattr(torch, self.dtype) if dtype is None else dtype
        known = isinstance(given, torch.dtype) and given in (torch.float32, torch.float16, torch.bfloat16)
        if len(self.shape) != 2 or not known:
            got = f"shape {list(self.shape)}" if len(self.shape) != 2 else given
            raise ValueError(
                f"dtype: expected a linear weight in float32, float16 or bfloat16 for CUDA, got {got}"
            )
        device = device_of(device)
        starts, columns, numbers = self.to_csr_arrays()
        rows = torch.from_numpy(np.repeat(np.arange(self.shape[0]), np.diff(starts))).to(device)
        values = torch.from_numpy(numbers).to(device).to(given)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"dtype: expected one that holds all values, got {given}")
        kept = values != 0
        cols = torch.from_numpy(columns).to(device)
        shape = (self.shape[0], self.shape[1])
        return DeviceCSR.from_entries(rows[kept], cols[kept], values[kept], shape)


class TwoFour(CSR):
    """A `CSR` linear weight with at most two non-zeros in every four inputs, which a CUDA device multiplies
    on its sparse tensor cores, through torch's cuSPARSELt.

    The same bytes as `CSR`; they differ in what `to` makes of them. On a CPU it is a `CSR`.
    """

    __slots__ = ()

    def to(self, device: Any, dtype: Any = None) -> DeviceWeight:
        """A copy in the memory of a CUDA device, in ``torch.float16`` or ``torch.bfloat16``.

        Raises
        ------
        ValueError : why it cannot: the dtype, sizes that are no multiples of 16, more than two non-zeros in
            four, a device or a torch without cuSPARSELt.
        """
        import torch

        from pared._cuda_two_four import DeviceTwoFour

        given, device = self._device_dtype(dtype), device_of(device)
        return DeviceTwoFour.from_dense(torch.as_tensor(self.to_dense(), dtype=given, device=device))
