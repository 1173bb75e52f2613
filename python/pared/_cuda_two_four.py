"""2:4 weights on CUDA devices: the sparse tensor cores, through torch's cuSPARSELt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pared._cuda_decode import _activate
from pared._cuda_weight import KernelWeight, Place

if TYPE_CHECKING:
    import torch

ALIGN = 16  # both sizes of a weight are multiples of this
TOKENS = 8  # and the tokens of this; they are padded


def follows_two_four(weight: torch.Tensor) -> bool:
    """Whether of every four consecutive inputs of an output at most two are not zero; -0.0 is a zero."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    kept = (weight.detach() != 0).reshape(weight.shape[0], -1, 4).sum(-1)
    return bool((kept <= 2).all())


def unavailable(weight: torch.Tensor) -> str | None:
    """Why torch's cuSPARSELt cannot multiply with this weight, or None."""
    import torch

    if weight.ndim != 2:
        return f"expected a linear weight [out, in], got shape {list(weight.shape)}"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"expected dtype float16 or bfloat16, got {weight.dtype}"
    if any(n == 0 or n % ALIGN for n in weight.shape):
        return f"expected sizes that are multiples of {ALIGN}, got {list(weight.shape)}"
    if not follows_two_four(weight):
        return "expected at most two non-zeros in every four inputs, got more"
    if weight.device.type != "cuda":
        return f"expected a weight on a CUDA device, got one on {weight.device}"
    if torch.version.hip is not None or not torch.backends.cusparselt.is_available():
        return "this torch comes without cuSPARSELt"
    major, minor = torch.cuda.get_device_capability(weight.device)
    if major < 8:
        return f"expected compute capability 8.0 or newer, got {major}.{minor}"
    return None


@dataclass(frozen=True)
class DeviceTwoFour(KernelWeight):
    """A 2:4 weight in a device's memory, as cuSPARSELt compressed it.

    Attributes
    ----------
    compressed : opaque, of `dtype`: the values, then where they are.
    dtype : float16 or bfloat16, of the weight and of the activations.
    shape : (out, in).
    algorithm : cuSPARSELt's number for the tile that it found fastest, 0 for its default.
    """

    compressed: torch.Tensor
    dtype: torch.dtype
    shape: tuple[int, int]
    algorithm: int = 0

    @classmethod
    def from_dense(cls, weight: torch.Tensor) -> DeviceTwoFour:
        """Compress a float16 or bfloat16 weight [out, in] that follows 2:4 along its inputs.

        Raises
        ------
        ValueError : why it cannot: the dtype, the sizes, the zeros, the device, or a torch without
            cuSPARSELt.
        """
        import torch

        reason = unavailable(weight)
        if reason is not None:
            raise ValueError(f"weight: {reason}")
        # A compressor that looks at bits takes -0.0 for a value, and drops a real one where there are two.
        dense = (weight.detach() + 0.0).contiguous()
        return cls(torch._cslt_compress(dense), weight.dtype, (weight.shape[0], weight.shape[1]))

    def tuned(self, tokens: int) -> DeviceTwoFour:
        """With the algorithm that cuSPARSELt finds fastest for so many tokens: it times all of them."""
        import torch

        x = torch.randn(-(-max(1, tokens) // TOKENS) * TOKENS, self.shape[1], device=self.device).to(
            self.dtype
        )
        found = torch._cslt_sparse_mm_search(self.compressed, x.t(), transpose_result=True)
        return DeviceTwoFour(self.compressed, self.dtype, self.shape, int(found))

    def _like(self) -> torch.Tensor:
        return self.compressed

    def _multiply(
        self, place: Place | None, rows: torch.Tensor, bias: torch.Tensor | None, activation: str | None
    ) -> torch.Tensor:
        """Tokens are padded to 8; the bias is rounded to the weight's dtype."""
        import torch

        tokens, cols = rows.shape
        if tokens % TOKENS or rows.stride(0) != cols:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, -tokens % TOKENS)).contiguous()
        y = torch._cslt_sparse_mm(
            self.compressed,
            rows.t(),
            None if bias is None else bias.to(self.dtype),
            transpose_result=True,
            alg_id=self.algorithm,
        )
        return _activate(y[:tokens], activation).contiguous()
