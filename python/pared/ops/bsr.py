"""Weights whose rows come in blocks, and dense ones: four rows share each loaded vector of activations."""

from __future__ import annotations

from typing import Any, ClassVar

from pared._types import Array
from pared.ops._arrays import check_scipy_dtype
from pared.ops._device import DeviceWeight, device_of
from pared.ops._panel import PanelWeight

# Rows that the quad kernel takes together (kQuadRows in csrc/formats/csr.h).
_QUAD = 4


def check_block(block: Any) -> None:
    """Raise ``ValueError`` unless `block` is two positive integers."""
    ok = isinstance(block, tuple) and len(block) == 2 and all(type(b) is int and 0 < b < 2**31 for b in block)
    if not ok:
        raise ValueError(f"block: expected two positive integers (rows, columns), got {block!r}")


class BSR(PanelWeight):
    """A block-sparse weight: zeros in blocks of R consecutive outputs by C consecutive inputs.

    With R a multiple of 4 an entry is four rows of one input, 4.5 bytes a non-zero; other blocks are stored
    and multiplied row by row, as CSR. Blocks are found, not imposed: a block that is only partly zero keeps
    its zeros, and every weight packs without loss.
    """

    __slots__ = ()
    kind: ClassVar[str] = "bsr"
    _entry_rows: ClassVar[int] = _QUAD

    @classmethod
    def from_dense(cls, weight: Array, *, block: tuple[int, int] = (4, 1), groups: int = 1) -> BSR:
        """Pack a dense weight of float32, bfloat16 or float16.

        Parameters
        ----------
        weight : [out, in] or [out, in/groups, kh, kw]. Sizes that the block does not divide end in a smaller
            block.
        block : (R, C), positive: the pattern that the weight was pruned with.

        Raises
        ------
        ValueError : a block that is not two positive integers; NaN or infinity in the weight.
        """
        check_block(block)
        return cls._pack_dense(weight, groups, _QUAD if block[0] % _QUAD == 0 else 1)

    @classmethod
    def from_torch(cls, tensor: Any) -> BSR:
        """Pack a two-dimensional ``torch.sparse_bsr`` tensor."""
        import torch

        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.sparse_bsr or tensor.ndim != 2:
            got = getattr(tensor, "layout", type(tensor).__name__)
            raise TypeError(f"tensor: expected a two-dimensional torch.sparse_bsr tensor, got {got}")
        rows, columns = tensor.values().shape[-2:]
        return cls.from_dense(tensor.detach().to_dense(), block=(int(rows), int(columns)))

    @classmethod
    def from_scipy(cls, matrix: Any) -> BSR:
        """Pack a scipy ``bsr_array`` or ``bsr_matrix``, with its block size."""
        if getattr(matrix, "format", None) != "bsr":
            raise TypeError(f"matrix: expected a scipy BSR matrix, got {type(matrix).__name__}")
        check_scipy_dtype(matrix)
        rows, columns = matrix.blocksize
        return cls.from_dense(matrix.toarray(), block=(int(rows), int(columns)))

    def to_scipy(self, block: tuple[int, int] | None = None) -> Any:
        """A ``scipy.sparse.bsr_array`` of the matrix with blocks of this size, or a ``csr_array`` for None.

        Raises ``ValueError`` for a block that does not divide the matrix.
        """
        matrix = super().to_scipy()
        return matrix if block is None else matrix.tobsr(self._dividing(block))

    def to_torch(self, block: tuple[int, int]) -> Any:
        """A ``torch.sparse_bsr`` tensor of the matrix, float32, with blocks of this size.

        Raises ``ValueError`` for a block that does not divide the matrix.
        """
        import torch

        m = self.to_scipy(self._dividing(block))
        starts, columns, values = (torch.from_numpy(a.copy()) for a in (m.indptr, m.indices, m.data))
        return torch.sparse_bsr_tensor(starts, columns, values, m.shape, check_invariants=True)

    def to(self, device: Any, dtype: Any = None, block: tuple[int, int] | None = None) -> DeviceWeight:
        """A copy in the memory of a CUDA device, as blocks for its tensor cores; see `PackedWeight.to`.

        Parameters
        ----------
        dtype : of the activations, ``torch.float16`` or ``torch.bfloat16``; None for the weight's own.
        block : (16, 32, 64 or 128, a multiple of 8); None for the largest square one that stores at most
            5 % more than blocks of 16 x 16 do.
        """
        import torch

        from pared._cuda_block_sparse import DeviceBlocks

        given, device = self._device_dtype(dtype), device_of(device)
        dense = torch.as_tensor(self.to_dense(), dtype=given, device=device)
        return DeviceBlocks.from_dense(dense, block) if block else DeviceBlocks.found_in(dense)

    def _dividing(self, block: tuple[int, int]) -> tuple[int, int]:
        check_block(block)
        rows, cols = self._info["rows"], self._info["cols"]
        if rows % block[0] or cols % block[1]:
            raise ValueError(f"block: expected sizes that divide [{rows}, {cols}], got {block}")
        return block


class Dense(PanelWeight):
    """A weight without a pattern of zeros, packed once: 4.5 bytes an element.

    Worth having because torch's dense product packs the weight on every call.
    """

    __slots__ = ()
    kind: ClassVar[str] = "dense"
    _entry_rows: ClassVar[int] = _QUAD
