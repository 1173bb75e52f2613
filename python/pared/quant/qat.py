"""Quantisation-aware training: fake quantisation with a straight-through estimator."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from pared._sparsity import weight_format
from pared.pruning import obs
from pared.pruning.targets import Filters, Target, collect, unwrap
from pared.quant.grid import check_bits, fit

__all__ = ["FakeQuantize", "finish_qat", "prepare_qat"]


class _StraightThrough(torch.autograd.Function):
    """Rounded forwards; backwards as if it had not been, but nothing for values beyond the grid."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounded: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inside)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad[0] * inside, None, None


class FakeQuantize(nn.Module):
    """A parametrisation that rounds a weight to its grid at every forward pass; zeros stay zero."""

    def __init__(self, target: Target, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.matrices = obs.Matrices(target)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            parts = self.matrices.split(weight.detach())
            grids = [fit(p, self.bits) for p in parts]
            rounded = self.matrices.join([g.round(p) for g, p in zip(grids, parts, strict=True)])
            inside = torch.ones_like(weight)  # min-max scales leave nothing outside
        out: torch.Tensor = _StraightThrough.apply(weight, rounded, inside)  # type: ignore[no-untyped-call]
        return out


def prepare_qat(
    model: nn.Module, *, bits: int = 8, include: Filters = None, exclude: Filters = None
) -> list[str]:
    """Round the weights at every forward pass while training goes on; gradients reach the full-precision
    weights.

    Parameters
    ----------
    model, include, exclude : which weights, as in `pared.prune`.
    bits : of all of them, 2 to 16; symmetric, a scale a row.

    Returns
    -------
    Names of the tensors. `finish_qat` makes the rounded weights permanent.

    Raises
    ------
    TypeError, ValueError : naming the argument; for weights with masks of another tool. Nothing has changed.
    """
    width = check_bits(bits)
    targets, _ = collect(unwrap(model), include, exclude, 0, 0)
    for target in targets:
        if any(weight_format(module, parameter) != "plain" for module, parameter in target.places):
            raise ValueError(
                f"model: expected plain weights, got masks of another tool on {target.name!r}; make them "
                "permanent first, for example with pared.prune(model, 0.0)"
            )
    for target in targets:
        for module, parameter in target.places:
            parametrize.register_parametrization(module, parameter, FakeQuantize(target, width))
    return [t.name for t in targets]


def finish_qat(model: nn.Module) -> list[str]:
    """Replace the fake quantisation by the rounded weights.

    Parameters
    ----------
    model : that `prepare_qat` has prepared.

    Returns
    -------
    Names of the tensors.

    Raises
    ------
    ValueError : there is no fake quantisation in it.
    """
    done = []
    for name, module in unwrap(model).named_modules():
        if not parametrize.is_parametrized(module):
            continue
        parametrizations: Any = module.parametrizations
        for parameter in list(parametrizations):
            if any(isinstance(p, FakeQuantize) for p in parametrizations[parameter]):
                parametrize.remove_parametrizations(module, parameter, leave_parametrized=True)
                done.append(f"{name}.{parameter}" if name else parameter)
    if not done:
        raise ValueError("model: expected one that prepare_qat has prepared, got none")
    return done
