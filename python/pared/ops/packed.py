"""What every packed weight is: one buffer with a checked header, and the matrix that it holds."""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeVar

import numpy as np

from pared import _core
from pared._types import Array
from pared.ops._arrays import integer, is_torch
from pared.ops._device import DeviceWeight
from pared.ops._estimate import Work, estimate

W = TypeVar("W", bound="PackedWeight")


class PackedWeight:
    """A weight packed for the kernels: ``[out, in]``, or a convolution's ``[out, in/groups, kh, kw]``.

    Holds one buffer and nothing else: the matrix is recovered from it. A format is a subclass with a `kind`
    and a `from_dense`, a line in ``pared.ops._formats.FORMATS`` and one in csrc/formats/formats.cc, which
    knows what the buffer holds.

    A buffer is checked as a whole when the object is made, so that no kernel is led outside of it later: do
    not write to it.

    Attributes
    ----------
    packed : uint8 array or tensor, 64-byte aligned, with a checked header.
    shape : the weight's shape.
    nnz : stored non-zeros.
    """

    __slots__ = ("_info", "packed")
    kind: ClassVar[str]

    def __init__(self, packed: Array) -> None:
        info = _core.packed_info(packed)
        if info["kind"] != self.kind:
            raise ValueError(f"packed weight: expected a {self.kind} buffer, got a {info['kind']} one")
        _core.packed_validate(packed)
        self._info = info
        self.packed = packed

    @classmethod
    def from_dense(cls: type[W], weight: Array, *, groups: int = 1) -> W:
        """Pack a dense weight of float32, bfloat16 or float16. Raises ``ValueError`` on NaN or infinity."""
        raise NotImplementedError

    @classmethod
    def _copied(cls: type[W], packed: Array) -> W:
        """From a copy of a packed buffer that need not be aligned; the copy is."""
        copy = _core.packed_copy(packed)
        if not is_torch(packed):
            return cls(copy)
        import torch

        return cls(torch.from_numpy(copy))

    # numpy aligns neither a deep copy nor what it unpickles to 64 bytes.
    def __deepcopy__(self: W, memo: dict[int, Any]) -> W:
        return type(self)._copied(self.packed)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._copied, (self.packed,)

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

    def estimate(self, tokens: int, *, threads: int | None = None) -> float:
        """Seconds that a product with this weight takes, by a model over this machine's ceilings.

        The ceilings are measured on first use, in about half a second, and kept in the user's cache directory
        (``$XDG_CACHE_HOME/pared``). The model is good for choosing between formats: half of its errors are
        below a sixth, nine tenths below a half.

        Parameters
        ----------
        tokens : rows of the input; of a convolution, output pixels of all images.
        threads : None: as many as the operations use now.

        Raises
        ------
        TypeError, ValueError : not an integer; fewer than 0 tokens or 1 thread.
        """
        threads = _core.num_threads() if threads is None else threads
        tokens, threads = integer(tokens, "tokens", 0), integer(threads, "threads", 1)
        kind, work = self._work(tokens)
        return estimate(kind, work, tokens, threads)

    def _work(self, tokens: int) -> tuple[str, Work]:
        """The kind of packing that so many tokens meet, and what it makes a kernel do."""
        i = self._info
        return self.kind, Work(
            rows=i["rows"],
            cols=i["cols"],
            nnz=i["nnz"],
            nbytes=self.nbytes,
            entries=i["entries"],
            entry_rows=max(1, i["entry_rows"]),
            taps=i["kh"] * i["kw"],
            tile=i["tile"] or 128,
            block_k=i["block_k"] or 80,
        )

    def to_dense(self) -> Array:
        """The dense weight: a float32 array, or a tensor of the original dtype when packed is one."""
        if is_torch(self.packed):
            import torch

            out: Array = torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="cpu")
        else:
            out = np.empty(self.shape, dtype=np.float16 if self.dtype == "float16" else np.float32)
        _core.packed_unpack_dense(self.packed, out)
        return out

    def to(self, device: Any, dtype: Any = None) -> DeviceWeight:
        """A copy in the memory of a CUDA device, for `pared.ops.linear` with inputs there.

        `Int8` becomes an 8-bit weight for any number of tokens, `BSR` and `BSRInt8` ones of blocks for tensor
        cores, `TwoFour` one for sparse tensor cores, `Bitmap`, `Bitmap8` and `Int8WeightOnly` weights that
        few tokens read once, `CSR` one of unstructured zeros in any float dtype. Nothing is rounded again but
        a `Bitmap`, `BSR`, `TwoFour` or `CSR`, to `dtype`.

        Parameters
        ----------
        device : ``"cuda"``, ``"cuda:1"`` or a ``torch.device``.
        dtype : of the activations of `BSR`, `TwoFour`, `Bitmap`, `Bitmap8` and `Int8WeightOnly`,
            ``torch.float16`` or ``torch.bfloat16``; of `CSR`, these or ``torch.float32``; None for the
            weight's own. `Int8` and `BSRInt8` take all float dtypes.

        Raises
        ------
        ValueError : a format, or a dtype, without kernels for the device.
        """
        raise ValueError(
            f"device: expected cpu for {type(self).__name__} weights; Int8, Int8WeightOnly, Bitmap, Bitmap8, "
            f"BSR, BSRInt8, TwoFour and CSR have kernels for CUDA, got {device}"
        )

    def _device_dtype(self, dtype: Any) -> Any:
        """The 16-bit dtype of a weight for few tokens. Raises ``ValueError`` where there is none."""
        import torch

        given = getattr(torch, self.dtype) if dtype is None else dtype
        known = isinstance(given, torch.dtype) and given in (torch.float16, torch.bfloat16)
        if len(self.shape) != 2 or not known:
            got = f"shape {list(self.shape)}" if len(self.shape) != 2 else given
            raise ValueError(f"dtype: expected a linear weight in float16 or bfloat16 for CUDA, got {got}")
        return given

    def validate(self) -> None:
        """Check every invariant and the checksum; raises ``ValueError``."""
        _core.packed_validate(self.packed)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(shape={self.shape}, sparsity={self.sparsity:.3f}, nnz={self.nnz}, "
            f"nbytes={self.nbytes}, dtype={self.dtype})"
        )
