"""The integer grid: ``q = clamp(round(x / s) + z)`` stands for ``s * (q - z)``.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(arXiv 1712.05877). Zero is always on the grid, so a weight that was pruned stays exactly zero. A symmetric
grid of b bits is ``-(2**(b-1) - 1) .. 2**(b-1) - 1`` with z = 0 (the most negative code is not used, as the
int8 kernels want it); an asymmetric one is ``0 .. 2**b - 1``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pared._errors import check_flag, is_integer

__all__ = ["Grid", "GridRounding", "QuantizedWeight", "check_bits", "check_tensor", "fit", "steps"]

METHODS = ("minmax", "mse")


def check_bits(bits: object, argument: str = "bits") -> int:
    """2 to 16."""
    if not is_integer(bits):
        raise TypeError(f"{argument}: expected a number of bits, 2 to 16, got {type(bits).__name__}")
    if not 2 <= bits <= 16:
        raise ValueError(f"{argument}: expected 2 to 16 bits, got {bits!s:.20}")
    return int(bits)


def check_tensor(argument: str, got: object) -> None:
    """Raise ``TypeError`` unless `got` is a tensor of a floating-point dtype."""
    if not isinstance(got, torch.Tensor) or not got.is_floating_point():
        what = got.dtype if isinstance(got, torch.Tensor) else type(got).__name__
        raise TypeError(f"{argument}: expected a floating-point tensor, got {what}")


def steps(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code."""
    return (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


@dataclass(frozen=True)
class Grid:
    """Scales and zero points: ``x ~ scale * (q - zero)``.

    Attributes
    ----------
    scale, zero : float tensors that broadcast against the values.
    bits, symmetric : which codes there are.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_tensor("scale", self.scale)
        check_tensor("zero", self.zero)
        check_bits(self.bits)
        check_flag("symmetric", self.symmetric)

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Integer codes of `x`, as floating point."""
        check_tensor("x", x)
        low, high = steps(self.bits, self.symmetric)
        return (torch.round(x / self.scale) + self.zero).clamp(low, high)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest values on the grid."""
        return (self.codes(x) - self.zero) * self.scale


def _from_range(low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool) -> Grid:
    first, last = steps(bits, symmetric)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)  # zero is on the grid
    reach = torch.maximum(-low, high) if symmetric else high - low
    scale = reach / last
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.zeros_like(scale) if symmetric else torch.round(-low / scale).clamp(first, last)
    return Grid(scale, zero, bits, symmetric)


def fit(x: torch.Tensor, bits: int, *, symmetric: bool = True, method: str = "minmax") -> Grid:
    """The grid of each row of `x` [rows, n]: of its range, or of the part of it with the least squared
    error.
    """
    if not x.shape[1]:
        one = x.new_ones(x.shape[0], 1)
        return Grid(one, torch.zeros_like(one), bits, symmetric)
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    best = _from_range(low, high, bits, symmetric)
    if method == "minmax":
        return best
    scale, zero = best.scale.clone(), best.zero.clone()
    error = (best.round(x) - x).square().sum(1, keepdim=True)
    for share in torch.linspace(0.98, 0.3, 35, device="cpu").tolist():
        grid = _from_range(low * share, high * share, bits, symmetric)
        other = (grid.round(x) - x).square().sum(1, keepdim=True)
        better = other < error
        error = torch.where(better, other, error)
        scale, zero = torch.where(better, grid.scale, scale), torch.where(better, grid.zero, zero)
    return Grid(scale, zero, bits, symmetric)


class GridRounding:
    """Grids for `pared.pruning.obs.sweep`: one a row, or one a row and group of consecutive columns.

    A group's grid is of its columns as they are when the sweep reaches it: errors made so far are in them.
    """

    def __init__(self, bits: int, *, symmetric: bool, group: int | None, method: str) -> None:
        self.bits, self.symmetric, self.group, self.method = bits, symmetric, group, method
        self.grids: list[Grid] = []

    def enter(self, index: int, rest: torch.Tensor) -> None:
        if index % (self.group or rest.shape[1] + index) == 0:
            own = rest if self.group is None else rest[:, : self.group]
            self.grids.append(fit(own, self.bits, symmetric=self.symmetric, method=self.method))

    def column(self, index: int, w: torch.Tensor) -> torch.Tensor:
        return self.grids[-1].round(w.unsqueeze(1)).squeeze(1)


@dataclass(frozen=True)
class QuantizedWeight:
    """How a layer's weight lies on its grid; left on the module as ``_pared_quantized`` by `pared.quantize`.

    Attributes
    ----------
    bits, symmetric : of the weight. `group` : columns that share a scale, None for a whole row.
    scale, zero : [outputs, groups], float32; columns in the order of `pared.pruning.obs.Matrices`
        (convolutions: tap, then input channel).
    activation_scale, activation_zero, activation_dtype : static grid of the layer's input, as
        `pared.ops.Int8.from_quantized` takes it: None, 0, "int8" where inputs are quantised by token.
    """

    bits: int
    symmetric: bool
    group: int | None
    scale: torch.Tensor
    zero: torch.Tensor
    activation_scale: float | None = None
    activation_zero: int = 0
    activation_dtype: str = "int8"

    def codes(self, matrix: torch.Tensor) -> torch.Tensor:
        """Integer codes of the weight as a matrix [outputs, columns]; int8 up to 8 bits, else int32."""
        check_tensor("matrix", matrix)
        if matrix.ndim != 2 or len(matrix) != len(self.scale):
            raise ValueError(f"matrix: expected shape [{len(self.scale)}, columns], got {list(matrix.shape)}")
        group = self.group or max(1, matrix.shape[1])
        scale = self.scale.repeat_interleave(group, 1)[:, : matrix.shape[1]]
        zero = self.zero.repeat_interleave(group, 1)[:, : matrix.shape[1]]
        low, high = steps(self.bits, self.symmetric)
        codes = (torch.round(matrix.float() / scale) + zero).clamp(low, high)
        return codes.to(torch.int8 if self.bits <= 8 and self.symmetric else torch.int32)
