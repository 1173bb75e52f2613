"""Sparsities from a threshold on the weights, where no share is given."""

from __future__ import annotations

import math

import torch
from torch import nn

from pared._errors import check_choice, check_positive
from pared.pruning.masks import check_finite
from pared.pruning.targets import Filters, collect, unwrap

__all__ = ["threshold"]

_RULES = ("absolute", "std", "norm")


def threshold(
    model: nn.Module,
    value: float,
    rule: str = "absolute",
    *,
    most: float = 0.99,
    include: Filters = None,
    exclude: Filters = None,
    keep_first: int = 0,
    keep_last: int = 0,
) -> dict[str, float]:
    """The share of each layer's weights whose magnitude is below a threshold, for `pared.prune`.

    ::

        pared.prune(model, pared.pruning.threshold(model, 0.5, "std"))

    Parameters
    ----------
    model, include, exclude, keep_first, keep_last : as in `pared.prune`.
    value : the threshold, > 0.
    rule : "absolute", the same number everywhere; "std", `value` times the standard deviation of the layer's
        weights, Han et al., "Learning both Weights and Connections" (arXiv 1506.02626); "norm", `value` times
        their root mean square, ``||w|| / sqrt(n)``. (A quantile is a sparsity: give that to `pared.prune`.)
    most : no layer loses a larger share, in (0, 1).

    Returns
    -------
    dict : tensor name -> sparsity, 0 to `most`; zeros that are there count. The model is not changed.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came; weights that are not finite.
    """
    check_positive("value", value)
    check_choice("rule", rule, _RULES)
    if check_positive("most", most) >= 1:
        raise ValueError(f"most: expected a number in (0, 1), got {most!r}")
    targets, _ = collect(unwrap(model), include, exclude, keep_first, keep_last)
    shares = {}
    for target in targets:
        weight = target.weight
        check_finite(target, weight)
        if not weight.numel():
            continue
        limit = float(value)
        if rule == "std":
            limit *= float(weight.double().std(correction=0))
        elif rule == "norm":
            limit *= float(torch.linalg.vector_norm(weight, dtype=torch.float64)) / math.sqrt(weight.numel())
        below = int(torch.count_nonzero(weight.abs() < limit))
        shares[target.name] = min(below / weight.numel(), float(most))
    return shares
