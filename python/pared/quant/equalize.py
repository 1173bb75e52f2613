"""Scales moved from one layer to the next, where the function stays the same and the grids get finer.

`equalize`
    cross-layer equalisation: ranges of a layer's outputs and of the next layer's inputs are made alike
    through a ReLU. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
    (arXiv 1906.04721).
`smooth`
    SmoothQuant: outliers of activations behind a LayerNorm move into the weights that read them. Xiao et al.
    (arXiv 2211.10438).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pared._errors import check_count, check_number
from pared._inputs import compare
from pared._interrupt import uninterrupted
from pared.pruning import calibration
from pared.pruning.calibration import _CONVOLUTIONS, LossFn, batches, check_loss_fn, forward, frozen
from pared.pruning.masks import check_finite
from pared.pruning.reconstruct import check_repeatable
from pared.pruning.targets import collect, unwrap

__all__ = ["equalize", "smooth"]

_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.modules.dropout._DropoutNd)
_TRANSPARENT = (nn.Flatten, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def _pairs(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Module]]:
    """Layers that follow each other inside an nn.Sequential, with nothing between that scaling would not
    pass.
    """
    found: list[tuple[str, nn.Module, str, nn.Module]] = []
    for prefix, container in model.named_modules():
        if not isinstance(container, nn.Sequential):
            continue
        open_: tuple[str, nn.Module] | None = None
        for name, module in container.named_children():
            full = f"{prefix}.{name}" if prefix else name
            if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
                if open_ is not None and getattr(module, "groups", 1) == 1:
                    found.append((*open_, full, module))
                open_ = full, module
            elif not isinstance(module, (*_HOMOGENEOUS, *_TRANSPARENT)):
                open_ = None
    return found


def equalize(model: nn.Module, *, iterations: int = 10) -> list[tuple[str, str]]:
    """Make the ranges of consecutive layers alike, in place; the model computes the same function.

    With ``r1`` the largest magnitudes of a layer's output channels and ``r2`` those of the next layer's input
    channels, channel i is divided by ``s_i = sqrt(r1_i / r2_i)`` in the first and multiplied by it in the
    second: both ranges become ``sqrt(r1_i r2_i)``. Pairs are taken from nn.Sequential containers, through
    ReLU, LeakyReLU, pooling and flattening; batch normalisation has to be folded into its layer first.

    Parameters
    ----------
    model : with finite weights.
    iterations : passes over all pairs; a layer between two others needs some to come to rest.

    Returns
    -------
    Names of the pairs.

    Raises
    ------
    TypeError, ValueError : naming the argument; there is no such pair. Nothing has changed then.
    """
    module = unwrap(model)
    iterations = check_count("iterations", iterations, "iterations", 0)
    pairs = _pairs(module)
    if not pairs:
        raise ValueError(
            "model: expected layers that follow each other in an nn.Sequential with ReLU or nothing "
            "between, got "
            "none (batch normalisation between them has to be folded first)"
        )
    layers = {id(m): m for _, first, _, second in pairs for m in (first, second)}
    for target in collect(module, list(layers.values()), None, 0, 0)[0]:
        check_finite(target, target.weight)
    with torch.no_grad():
        for _ in range(iterations):
            for _, first, _, second in pairs:
                _balance(first, second)
    return [(a, b) for a, _, b, _ in pairs]


def _balance(first: nn.Module, second: nn.Module) -> None:
    w1, w2 = first.weight, second.weight
    assert isinstance(w1, torch.Tensor)
    assert isinstance(w2, torch.Tensor)
    out = w1.shape[0]
    reach1 = w1.flatten(1).abs().amax(1)
    by_unit = w2.reshape(w2.shape[0], out, -1) if w2.shape[1] % out == 0 else None
    if by_unit is None:
        return
    reach2 = by_unit.abs().amax((0, 2))
    usable = (reach1 > 0) & (reach2 > 0)
    s = torch.where(usable, (reach1 / reach2.clamp(min=1e-30)).sqrt(), torch.ones_like(reach1))
    with uninterrupted():
        w1.div_(s.reshape(-1, *[1] * (w1.ndim - 1)))
        if isinstance(first.bias, torch.Tensor):
            first.bias.div_(s)
        w2.copy_((by_unit * s.reshape(1, -1, 1)).reshape(w2.shape))


def smooth(
    model: nn.Module,
    data: Iterable[Any],
    groups: Mapping[str, Sequence[str]] | None = None,
    *,
    alpha: float = 0.5,
    loss_fn: LossFn | None = None,
) -> list[str]:
    """Divide the outputs of LayerNorms by ``s_j = max|x_j|**alpha / max|W_j|**(1 - alpha)``, multiply weights
    by it.

    Parameters
    ----------
    model, data, loss_fn : as in `pared.prune`.
    groups : name of a norm -> names of all Linear layers that read it. None: found by running the model; a
        norm whose output something else reads too (a residual) would change the function, is seen by the
        outputs that move, and is left as it was.
    alpha : how much of the difficulty moves to the weights, 0 to 1.

    Returns
    -------
    Names of the norms that were smoothed.

    Raises
    ------
    TypeError, ValueError : naming the argument; no LayerNorm that Linear layers alone read, data without a
        batch or with values that are not finite. Nothing has changed then.
    """
    module = unwrap(model)
    if check_number("alpha", alpha) > 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha!r}")
    check_loss_fn(loss_fn)
    check_repeatable(data, "'smooth'")
    names = dict(module.named_modules())
    first = next(iter(batches(data, "'smooth'")))
    found = _readers(module, first, loss_fn) if groups is None else _named(names, groups)
    if not found:
        raise ValueError("model: expected LayerNorms that Linear layers read, got none")
    peaks: dict[str, torch.Tensor] = {}
    handles = []

    def watch(name: str) -> Any:
        def after(m: nn.Module, args: Any, y: torch.Tensor) -> None:
            peak = y.detach().abs().flatten(0, -2).amax(0)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

        return after

    try:
        handles = [names[n].register_forward_hook(watch(n)) for n in found]
        with frozen(module), torch.no_grad():
            for batch in batches(data, "'smooth'"):
                forward(module, batch, loss_fn)
    finally:
        for handle in handles:
            handle.remove()
    for name, peak in peaks.items():
        if not bool(peak.isfinite().all()):
            raise ValueError(f"data: expected finite activations, got NaN or infinity behind {name!r}")
    done = []
    with frozen(module), torch.no_grad():
        reference = forward(module, first, loss_fn)
        for name, readers in found.items():
            norm, linears = names[name], [names[r] for r in readers]
            old = [p.detach().clone() for m in (norm, *linears) for p in m.parameters(recurse=False)]
            _smooth_one(norm, linears, peaks[name], float(alpha))
            moved = compare(reference, forward(module, first, loss_fn))
            if moved.relative <= 1e-3:
                done.append(name)
            else:
                restored = [p for m in (norm, *linears) for p in m.parameters(recurse=False)]
                for p, value in zip(restored, old, strict=True):
                    p.copy_(value)
    return done


def _named(names: Mapping[str, nn.Module], groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    if not isinstance(groups, Mapping) or any(
        isinstance(r, str) or not isinstance(r, Sequence) for r in groups.values()
    ):
        raise TypeError(f"groups: expected the name of a norm -> names of its readers, got {groups!r:.200}")
    for norm, readers in groups.items():
        for name in (norm, *readers):
            if name not in names:
                raise ValueError(f"groups: expected names of modules, got {name!r}, which the model lacks")
        if not isinstance(names[norm], nn.LayerNorm):
            raise ValueError(f"groups: expected a LayerNorm, got {type(names[norm]).__name__} {norm!r}")
    return {norm: list(readers) for norm, readers in groups.items()}


def _readers(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> dict[str, list[str]]:
    """Linear layers whose input is the very tensor that a LayerNorm returned."""
    made: dict[int, tuple[torch.Tensor, str]] = {}
    found: dict[str, list[str]] = {}
    handles = []

    def keep(name: str) -> Any:
        return lambda m, args, y: made.__setitem__(id(y), (y, name))

    def look(name: str) -> Any:
        def before(m: nn.Module, args: Any) -> None:
            if args and id(args[0]) in made and made[id(args[0])][0] is args[0]:
                found.setdefault(made[id(args[0])][1], []).append(name)

        return before

    try:
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm) and module.weight is not None:
                handles.append(module.register_forward_hook(keep(name)))
            elif isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(look(name)))
        with calibration.frozen(model), torch.no_grad():
            forward(model, batch, loss_fn)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _smooth_one(norm: nn.Module, linears: Sequence[nn.Module], peak: torch.Tensor, alpha: float) -> None:
    weights = [m.weight for m in linears]
    reach = torch.stack([w.detach().abs().amax(0) for w in weights if isinstance(w, torch.Tensor)]).amax(0)
    usable = (peak > 0) & (reach > 0)
    s = peak.clamp(min=1e-5) ** alpha / reach.clamp(min=1e-5) ** (1 - alpha)
    s = torch.where(usable, s, torch.ones_like(s)).to(reach.dtype)
    with uninterrupted():
        for p in norm.parameters(recurse=False):
            p.div_(s)
        for w in weights:
            assert isinstance(w, torch.Tensor)
            w.mul_(s)
