"""WoodFisher: second order with the blocks of the empirical Fisher matrix, not with its diagonal alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pared._errors import check_count, check_flag, check_positive
from pared.pruning.calibration import SAMPLE_GRADIENT, Observer, accumulator
from pared.pruning.distributed import Processes
from pared.pruning.importance import BuiltIn, Statistics
from pared.pruning.masks import Blocks
from pared.pruning.obs import solve
from pared.pruning.patterns import Pattern
from pared.pruning.targets import Target

__all__ = ["FisherBlocks", "WoodFisher"]

# Gradients that are gathered before they reach the matrices: one product instead of many rank-one updates.
GATHER = 16


class _Order:
    """A weight as rows of `size` elements, one a block of the matrix; units of the pattern stay together.

    The last row is filled up with zeros. Units are in the order of the kernels: by tap, output, input.
    """

    def __init__(self, target: Target, pattern: Pattern, size: int) -> None:
        self.blocks = Blocks(target.tensor.shape, target, pattern)
        self.unit = pattern.rows * pattern.cols
        self.size = self.unit * max(1, size // self.unit)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.blocks.split(x, fill=0.0)
        self.shapes = [part.shape for part in parts]
        flat = torch.cat([part.permute(0, 1, 3, 2, 4).reshape(-1) for part in parts])
        return nn.functional.pad(flat, (0, -flat.numel() % self.size)).reshape(-1, self.size)

    def units(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """From [rows, units of a row] to one number a unit of the weight: [taps, block rows, block
        columns] for each part, as `Blocks.corners` takes them."""
        counts = [shape[0] * shape[1] * shape[3] for shape in self.shapes]
        parts = torch.split(rows.reshape(-1)[: sum(counts)], counts)
        return [p.reshape(s[0], s[1], s[3]) for p, s in zip(parts, self.shapes, strict=True)]

    def weight(self, rows: torch.Tensor) -> torch.Tensor:
        """Back from rows to the weight's shape."""
        counts = [math.prod(shape) for shape in self.shapes]
        grown = []
        for part, (taps, high, r, wide, c) in zip(
            torch.split(rows.reshape(-1)[: sum(counts)], counts), self.shapes, strict=True
        ):
            ordered = part.reshape(taps, high, wide, r, c).permute(0, 1, 3, 2, 4)
            grown.append(ordered.reshape(taps, high * r, wide * c))
        return self.blocks.join(grown)


class FisherBlocks(Observer):
    """Sums of ``g g^T`` over samples, [rows, size, size]; `result` inverts what they are a mean of."""

    events = frozenset({SAMPLE_GRADIENT})

    def __init__(self, target: Target, pattern: Pattern, size: int, damping: float) -> None:
        self.order, self.damping = _Order(target, pattern, size), damping
        weight = target.weight.to(accumulator(target.weight))
        self.weight = self.order.rows(weight)
        size = self.order.size
        self.sum = self.weight.new_zeros(self.weight.shape[0], size, size)
        self.waiting: list[torch.Tensor] = []

    def gradient(self, g: torch.Tensor, samples: int) -> None:
        self.waiting.append(self.order.rows(g.to(self.sum.dtype)))
        if len(self.waiting) == GATHER:
            self._take_in()

    def _take_in(self) -> None:
        if self.waiting:
            g = torch.stack(self.waiting, 1)
            self.sum.baddbmm_(g.transpose(1, 2), g)
            self.waiting.clear()

    def tensors(self) -> Sequence[torch.Tensor]:
        return (*self.waiting[-1:], self.sum.diagonal(dim1=1, dim2=2))

    def reduce(self, processes: Processes) -> None:
        self._take_in()
        processes.add_(self.sum)

    def result(self) -> InverseFisher:
        """The inverse of ``damping I + 1/n sum g g^T``. Overwrites the sums: one copy of them exists."""
        self._take_in()
        eye = torch.eye(self.order.size, dtype=torch.float64, device=self.sum.device)
        step = max(1, 2**22 // max(1, eye.numel()))
        for some in torch.split(self.sum, step):
            fisher = some.to(torch.float64).div_(max(self.samples, 1)).add_(eye, alpha=self.damping)
            some.copy_(torch.cholesky_inverse(torch.linalg.cholesky(fisher)))
        return InverseFisher(self.order, self.weight, self.sum)


@dataclass(frozen=True)
class InverseFisher:
    """What `WoodFisher` reads: `inverse` [rows, size, size] of the weights `weight` [rows, size]."""

    order: _Order
    weight: torch.Tensor
    inverse: torch.Tensor

    def element_losses(self) -> torch.Tensor:
        """``w_p**2 / (2 [F^-1]_pp)``, [rows, size]."""
        return self.weight.square() / (2 * self.inverse.diagonal(dim1=1, dim2=2))

    def unit_losses(self) -> torch.Tensor:
        """``w_Q^T ([F^-1]_QQ)^-1 w_Q / 2`` of the pattern's units Q, [rows, units of a row]."""
        n, unit = self.weight.shape[0], self.order.unit
        own = self.inverse.reshape(n, -1, unit, self.order.size // unit, unit)
        own = own.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [rows, units, unit, unit]
        w = self.weight.reshape(n, -1, unit, 1)
        losses: torch.Tensor = (w * torch.linalg.solve(own, w)).sum((2, 3)) / 2
        return losses

    def without(self, dropped: torch.Tensor) -> torch.Tensor:
        """The weights, those of `dropped` [rows, size] at zero and the others where the quadratic is least.

        ``w - F^-1[:, P] (F^-1[P, P])^-1 w_P``.
        """
        new = []
        step = max(1, 2**22 // max(1, self.order.size**2))
        for w, inverse, p in zip(
            torch.split(self.weight, step),
            torch.split(self.inverse, step),
            torch.split(dropped, step),
            strict=True,
        ):
            gone = p.to(torch.float64)
            wide = inverse.to(torch.float64)
            system = wide * gone.unsqueeze(1) * gone.unsqueeze(2) + torch.diag_embed(1.0 - gone)
            price = solve(system, (w.to(torch.float64) * gone).unsqueeze(2)) * gone.unsqueeze(2)
            moved = w - (wide @ price).squeeze(2)
            new.append(torch.where(p, 0.0, moved).to(w.dtype))
        return torch.cat(new) if new else self.weight.clone()


class WoodFisher(BuiltIn):
    """``w_p**2 / (2 [F^-1]_pp)``: the loss added by removing a weight when the others make up for it.

    F is the empirical Fisher matrix ``damping I + 1/n sum g g^T`` of the samples' gradients, in blocks of
    consecutive weights. For RxC patterns a block's joint loss ``w_Q^T ([F^-1]_QQ)^-1 w_Q / 2`` is compared.
    With `update` the weights that stay then change by ``-F^-1[:, P] ([F^-1]_PP)^-1 w_P``, P all that went, as
    `pared.prune` does it; a `pared.Pruner` takes the scores alone, since training follows. Singh and
    Alistarh, "WoodFisher: Efficient Second-Order Approximation for Neural Network Compression" (arXiv
    2004.14340); joint removal: Kurtic et al., "The Optimal BERT Surgeon" (arXiv 2203.07259).

    The papers build the inverse up by the Sherman-Morrison formula, a sample at a time. Here the sums of
    ``g g^T`` are inverted once at the end: the same matrix, from sums that do not ask for n in advance, take
    many samples in one product and can be added up over processes.

    Parameters
    ----------
    block : weights of one block of the matrix; it takes ``block`` numbers a weight.
    damping : as in the formula.
    update : whether the weights that stay are changed.
    """

    joint = True  # scores of blocks are put together before the selection
    name = "woodfisher"
    needs_data = True
    needs_gradients = True
    scope = "global"
    key = "identity"

    def __init__(self, block: int = 64, *, damping: float = 1e-5, update: bool = True) -> None:
        check_flag("update", update)
        self.block, self.update = check_count("block", block, "weights"), update
        self.damping = check_positive("damping", damping)

    def observe(self, target: Target, pattern: Pattern) -> Observer:
        return FisherBlocks(target, pattern, self.block, self.damping)

    def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
        seen: InverseFisher = statistics.observed
        if statistics.blocks:
            return seen.order.blocks.corners(seen.order.units(seen.unit_losses()))
        return seen.order.weight(seen.element_losses())

    def compensate(self, observed: InverseFisher, dropped: torch.Tensor) -> torch.Tensor | None:
        """The weight after `dropped` (bool, of its shape) is gone; None: the others stay as they are."""
        if not self.update:
            return None
        return observed.order.weight(observed.without(observed.order.rows(dropped.float()) > 0))
