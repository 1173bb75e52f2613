"""Bitmap weights: unstructured sparsity for few tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from pared import _core
from pared._types import Array
from pared.ops._arrays import integer, is_torch, require_array
from pared.ops._device import DeviceWeight, device_of
from pared.ops._estimate import Facts, Work
from pared.ops.packed import PackedWeight


class Bitmap(PackedWeight):
    """An unstructured sparse weight for few tokens: one bit an element, and 4 bytes a non-zero, 2 where the
    dense weight is bfloat16.

    With one token, or up to about 16, reading the weight is the cost of a linear layer. This format is the
    smallest, and it is read once, in order. More tokens go in batches of 16; `CSR` takes over between 4 and
    64 tokens, the later the denser and the larger the weight is.
    Unlike `CSR`, absent weights are multiplied: an infinity in an input reaches every output of its token as
    NaN, as it does in a dense product.
    """

    __slots__ = ()
    kind: ClassVar[str] = "bitmap"

    @classmethod
    def from_dense(cls, weight: Array, *, groups: int = 1) -> Bitmap:
        """Pack a dense linear weight.

        Parameters
        ----------
        weight : [out, in], float32, bfloat16 or float16, of any strides. Zeros and denormals are not stored.
        groups : 1: there is no kernel for convolutions.

        Raises
        ------
        TypeError, ValueError : another shape or dtype; NaN or infinity in the weight.
        """
        require_array(weight, "weight")
        if integer(groups, "groups") != 1:
            raise ValueError(f"groups: expected 1 for a linear weight, got {groups}")
        return cls(_core.bitmap_pack_dense(weight.detach() if is_torch(weight) else weight))

    @staticmethod
    def from_device(weight: Any, mask: Any = None) -> DeviceWeight:
        """Pack a dense weight that is in a CUDA device's memory, where it is: what `to` gives, without the
        way through the CPU. It waits once, to learn the size.

        Parameters
        ----------
        weight : [out, in], float16 or bfloat16. Zeros are not stored; NaN and infinity are.
        mask : bool [out, in] on the same device, for example from `pared.ops.topk_mask`: what is kept of it;
            None: all.

        Raises
        ------
        TypeError, ValueError : naming the argument, what was expected and what came.
        """
        from pared._cuda import is_device_tensor  # which needs this package
        from pared._cuda_decode import DecodeWeight

        if not is_device_tensor(weight):
            got = weight.device if is_torch(weight) else type(weight).__name__
            raise ValueError(f"weight: expected a tensor on a CUDA device, got {got}; use from_dense")
        return DecodeWeight.from_dense(weight, mask)

    def to(self, device: Any, dtype: Any = None) -> DeviceWeight:
        import torch

        from pared._cuda_decode import DecodeWeight

        given, device = self._device_dtype(dtype), device_of(device)
        return DecodeWeight.from_dense(torch.as_tensor(self.to_dense(), dtype=given, device=device))


class BitmapCSR(PackedWeight):
    """One unstructured weight packed twice: `Bitmap` for few tokens, `CSR` for many.

    For layers that are called with both, as a language model's are: prompts, then single tokens. Memory is
    the sum of the two, about ``10.2 * density + 0.13`` bytes an element (``8.2 * density`` where the dense
    weight is bfloat16). Up to `few_tokens` tokens a call reads the bitmap, where an absent weight
    counts as a zero: see `Bitmap`.
    """

    __slots__ = ()
    kind: ClassVar[str] = "bitmap+csr"

    @classmethod
    def from_dense(cls, weight: Array, *, groups: int = 1) -> BitmapCSR:
        """Pack a dense linear weight; as `Bitmap.from_dense`."""
        require_array(weight, "weight")
        if integer(groups, "groups") != 1:
            raise ValueError(f"groups: expected 1 for a linear weight, got {groups}")
        return cls(_core.pair_pack_dense(weight.detach() if is_torch(weight) else weight))

    @property
    def few_tokens(self) -> int:
        """Tokens up to which a call takes the bitmap: where the two were measured to be equally fast."""
        return _core.pair_few_tokens(self.packed)

    def _work(self, tokens: int) -> tuple[str, Work]:
        rows, cols = self.shape
        # The blocks of the zeros are not in the header: as if there were none.
        element = 2 if self.dtype == "bfloat16" else 4
        facts = Facts(rows, cols, rows * cols, self.nnz, self.nnz, self.nnz, self.nnz, element=element)
        kind = "bitmap" if tokens <= self.few_tokens else "csr"
        return kind, facts.work(kind)
