"""How far a layer may be from the dense one, by formula, and how far it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pared._accelerate.layers import Candidate
from pared._accelerate.timing import timing_input
from pared._surgery import copy_model, shared_copy
from pared.nn import PackedModule
from pared.nn._base import off_grid, on_grid
from pared.ops.int4 import int4_group
from pared.quant.weights import quantized as quantized_weight


@dataclass(frozen=True)
class Reference:
    """What a layer has to compute for one input, and how far from it a kernel may be."""

    x: Tensor
    output: Tensor
    bound: Tensor
    rounding: dict[str, Tensor]  # what rounding weights and inputs may add to the bound, by precision


def references_of(c: Candidate, fused: int, precisions: set[str]) -> list[Reference]:
    """For each recorded input, what the layer and the steps to be fused into it give, in float32.

    Two float32 sums of the same K products in different orders differ by at most ``K * eps * S`` with S the
    sum of the products' magnitudes; an activation's slope is at most 1.13, and its own evaluation and the
    output's rounding add a few ulps. With 8 bits every weight is off by up to s_w / 2 and every input by up
    to s_x / 2, where s is the largest magnitude of the output's weights or the token's inputs over 127; with
    4 bits, and of a layer that another tool quantised, the weights are those of their grid.
    """
    eps = torch.finfo(torch.float32).eps
    whole = all(p.dtype == torch.float32 for p in c.plain.parameters())
    plain = c.plain if whole else copy_model(c.plain).float()
    # forward(), not a call: hooks that the user put on the layer are not asked.
    magnitude = shared_copy(plain)
    for name, p in plain.named_parameters():
        magnitude._parameters[name] = nn.Parameter(p.abs(), requires_grad=False)
    steps = [copy_model(m).float() for _, m in c.steps[:fused]]
    if c.foreign is not None and c.foreign.activation:
        steps.insert(0, nn.ReLU())
    depth = math.prod(c.row.shape[1:])
    found = []
    for s in c.calls:
        sample = c.samples.get(s)
        x = timing_input(s) if sample is None else sample
        y, size = plain.forward(x.float()), magnitude.forward(x.float().abs())
        for step in steps:
            y, size = step(y), _magnitude(step, size)
        narrow = 0.0 if s.dtype == torch.float32 else torch.finfo(s.dtype).eps
        bound = 1.13 * (depth + 8) * eps * size + narrow * y.abs() + 1e-30
        if c.target.kind == "cuda":  # 8-bit weights are 16-bit ones for many tokens, with their scales
            bound += narrow * size
        rounding = {}
        for precision in precisions - {"float32"}:
            moved = _rounding(c, plain, magnitude, x.float(), precision)
            for step in steps:
                moved = moved * _scale(step)
            rounding[precision] = 1.14 * moved + 2.0**-90
        found.append(Reference(x, y, bound, rounding))
    return found


def _rounding(c: Candidate, plain: nn.Module, magnitude: nn.Module, x: Tensor, precision: str) -> Tensor:
    """How far a layer's outputs may move with weights and inputs on grids: per output, half a step of each
    weight times its input's magnitude, and of each input (a scale a token, or an image) times its weight's.
    """
    weights = cast(Tensor, plain.weight)
    weight = weights.abs().flatten(1)
    step = weight.amax(1) / (254 if c.foreign is None else math.inf)
    depth, u = weight.shape[1], x.abs()
    if isinstance(plain, nn.Linear):
        half = u.amax(-1, keepdim=True) / 254 if x.numel() else u.sum(-1, keepdim=True)
        half = torch.maximum(half, _static_error(c.module, x))
        if precision == "int4":
            steps = _steps_of_four(c, weight)
            grouped: Tensor = half * (weight + steps).sum(1) + nn.functional.linear(u, steps)
            return grouped
        linear: Tensor = half * weight.sum(1) + step * u.sum(-1, keepdim=True) + depth * half * step
        return linear
    places = weights.ndim - 2
    half = u.amax(tuple(range(-1 - places, 0)), keepdim=True) / 254
    ones = copy_model(magnitude)
    cast(Tensor, ones.weight).fill_(1)
    if ones.bias is not None:
        cast(Tensor, ones.bias).zero_()
    total, step = (t.reshape(-1, *[1] * places) for t in (weight.sum(1), step))
    rounding: Tensor = half * total + step * ones.forward(u) + depth * half * step
    return rounding


def may_round(c: Candidate) -> bool:
    """Whether a layer can be rounded to 4 bits here: a float Linear layer that no one has rounded before."""
    return c.foreign is None and isinstance(c.module, nn.Linear) and quantized_weight(c.module) is None


def four_of(c: Candidate) -> int | None:
    """Inputs that share a scale where `pared.quantize` has put the layer on a grid of at most 4 bits, and it
    is still there."""
    record = quantized_weight(c.module)
    if record is None or not isinstance(c.module, nn.Linear):
        return None
    four = int4_group(record.bits, record.symmetric, record.group, record.activation_scale)
    return None if four is None or on_grid(c.module.weight, record) is None else four


def _steps_of_four(c: Candidate, weight: Tensor) -> Tensor:
    """By weight (here without signs), how far 4 bits may move it: hardly, from a grid that is taken over."""
    record = quantized_weight(c.module)
    group = c.four or weight.shape[1]
    if record is not None and not c.rounds:
        steps = off_grid(record.bits) * record.scale
        group = record.group or weight.shape[1]
    else:
        padded = nn.functional.pad(weight, (0, -weight.shape[1] % group))
        steps = padded.reshape(weight.shape[0], -1, group).amax(2) / 14
    return steps.repeat_interleave(group, 1)[:, : weight.shape[1]]


def _scale(step: nn.Module) -> Tensor | float:
    """What a step multiplies each channel with."""
    if not isinstance(step, nn.BatchNorm2d):
        return 1.0
    assert step.running_var is not None  # can_fold has looked
    scale = torch.rsqrt(step.running_var + step.eps)
    return (scale if step.weight is None else scale * step.weight.abs()).reshape(-1, 1, 1)


def _static_error(module: nn.Module, x: Tensor) -> Tensor:
    """By token, how far a fixed grid is from its inputs, where `pared.quantize` gave the layer one."""
    record = quantized_weight(module)
    if record is None or record.activation_scale is None:
        return x.new_zeros(())
    low, high = (-128, 127) if record.activation_dtype == "int8" else (0, 255)
    scale, zero = record.activation_scale, record.activation_zero
    q = (torch.round(x / scale) + zero).clamp(low, high)
    # A whole step more: the kernel multiplies with 1 / scale, and rounds the other way close to a half.
    return (x - (q - zero) * scale).abs().amax(-1, keepdim=True) + scale


def layer_error(
    module: PackedModule, references: list[Reference], precision: str
) -> tuple[float, float, float]:
    """|new - dense| and its bound at the output where the first is the largest share of the second; and the
    root mean square of new - dense relative to that of dense."""
    worst = (0.0, 0.0)
    squares = [0.0, 0.0]
    for r in references:
        new = module(r.x).float()
        finite = r.output.isfinite()
        if not torch.equal(finite, new.isfinite()):
            return math.inf, 0.0, 0.0
        if not finite.any():
            continue
        bound = r.bound + r.rounding.get(precision, 0.0)
        difference = (new - r.output).abs()
        at = torch.where(finite, difference / bound, 0.0).argmax()
        error, limit = float(difference.flatten()[at]), float(bound.flatten()[at])
        if error > limit:
            return error, limit, 0.0
        worst = max(worst, (error, limit))
        if precision != "float32":
            for i, t in enumerate((difference, r.output)):
                squares[i] += float(t[finite].double().square().sum())
    return (*worst, math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0)


def _magnitude(step: nn.Module, size: Tensor) -> Tensor:
    """How large the terms are that make up the output of a step, given its input's."""
    if not isinstance(step, nn.BatchNorm2d):
        return size
    assert step.running_mean is not None  # can_fold has looked
    assert step.running_var is not None
    scale = torch.rsqrt(step.running_var + step.eps)
    shift = scale.new_zeros(scale.shape)
    if step.weight is not None:
        scale, shift = scale * step.weight.abs(), step.bias.abs()
    channel = (-1, 1, 1)
    return (size + step.running_mean.abs().reshape(channel)) * scale.reshape(channel) + shift.reshape(channel)
