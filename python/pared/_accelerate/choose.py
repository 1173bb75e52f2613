"""Which kernel a layer gets: its candidates made, checked, timed and compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pared._accelerate import timing
from pared._accelerate.bounds import Reference, layer_error, references_of
from pared._accelerate.layers import DTYPES, Candidate, Plan, UnfitError, Variant
from pared._choices import Choices, Timed
from pared._fusion import activation_of
from pared._report import KEPT, CandidateTime
from pared._select import Shortlist, facts_of
from pared.nn import RULES, PackedModule
from pared.nn._base import pack
from pared.ops._estimate import Facts
from pared.ops._formats import FORMATS
from pared.ops.int4 import Int4
from pared.ops.int8 import QuantizedWeight
from pared.ops.packed import PackedWeight
from pared.quant.weights import quantized as quantized_weight


def decide(
    c: Candidate,
    packed: dict[Any, PackedWeight],
    timed: Choices,
    formats: Sequence[str],
    min_speedup: float,
) -> None:
    """Find out which variant of a layer is the fastest; sets `chosen` or says why not.

    The estimates say which formats are worth timing, `timed` what is known about layers like this one. What
    has not been timed yet is packed, checked and timed; of what has, only the best variant is packed.
    """
    row = c.row
    reason = c.refused or hopeless(c)
    if reason:
        return c.keep_dense(reason)
    facts = facts_of(cast(Tensor, c.plain.weight), getattr(c.plain, "groups", 1))
    tokens = _positions(c)
    suitable = _suitable(c, facts, tokens, formats, min_speedup)
    record = quantized_weight(c.module)
    if record is not None and record.bits > 8:  # that 8 are too few has been measured
        suitable = [name for name in suitable if FORMATS[name].precision == "float32"]
    if not suitable:
        return c.keep_dense(f"no kernel is faster with {100 * row.sparsity:.1f}% zeros at these shapes")
    short = c.target.shortlist(suitable, c.plain, facts, tokens)
    if not short.timed:
        reasons = "; ".join(dict.fromkeys(short.passed_over.values()))
        return c.keep_dense(f"no kernel suits this layer ({reasons})")
    # Fusing saves passes over memory, but torch's own code for an activation may be faster: all are timed.
    plans = {
        _plan_text(c, plan): plan
        for plan in (Plan(name, fused) for name in short.timed for fused in range(len(c.steps) + 1))
    }
    workshop = Workshop(c, packed, {plan.precision for plan in plans.values()})
    key = _timing_key(c, facts, timed)
    known = timed.get(key)
    try:
        if known is None or not plans.keys() <= set(known.tried):
            variants = {text: v for text, plan in plans.items() if (v := workshop.make(plan)) is not None}
            if not variants:
                return c.keep_dense("8 bits are not finite in the same places")
            before = timing.time_layer(c, variants)
            known = Timed(c.name, before, {t: (v.after, v.speedup) for t, v in variants.items()}, [*plans])
            timed.put(key, known)
        times = {text: known.variants[text] for text in plans if text in known.variants}
        _list_candidates(c, short, plans, known)
        best, v = "", None
        while times and v is None:
            best = _best(times, plans)
            v = workshop.make(plans[best], times[best])
            if v is None:
                del times[best]  # 8 bits that another layer's inputs suit and this one's do not
        if v is None:
            return c.keep_dense("8 bits are not finite in the same places")
        row.before, row.speedup, row.error, row.bound = known.before, v.speedup, v.error, v.bound
        as_timed = "" if key is None or key in timed.here else ", as timed before"
        if known.layer != c.name:
            as_timed = f", as timed for {known.layer}"
        if v.speedup < min_speedup:
            return c.keep_dense(f"{best} is {v.speedup:.2f}x, less than {min_speedup:g}x{as_timed}")
        _add_milder(v, workshop, {t: x for t, x in times.items() if x[1] >= min_speedup}, plans)
    except UnfitError as e:
        return c.keep_dense(str(e))
    except torch.OutOfMemoryError:
        return c.keep_dense("the device has no memory left to try kernels beside the model")
    reason = f"{v.speedup:.2f}x faster than {c.foreign.tool if c.foreign else 'dense'}{as_timed}"
    if v.speedup < 1:
        reason = f"min_speedup={min_speedup:g} asks for it"
    if v.quantized:
        bits = "4-bit weights with 8-bit inputs" if v.precision == "int4" else "8 bits"
        bits = "its integers are taken over, 8-bit inputs" if c.foreign else bits
        reason += f"; {bits} change its output by {100 * v.damage:.1f}% (rms)"
    c.choose(v, reason)


class Workshop:
    """Makes the variants of one layer, each once: packed, and checked against the layer's own outputs.

    Parameters
    ----------
    packed : weights that have been packed, also by other layers.
    precisions : of the variants.
    """

    def __init__(self, c: Candidate, packed: dict[Any, PackedWeight], precisions: set[str]) -> None:
        self.c, self.packed, self.precisions = c, packed, precisions
        self.references: dict[int, list[Reference]] = {}
        self.made: dict[Plan, Variant | None] = {}

    def make(self, plan: Plan, times: tuple[float, float] | None = None) -> Variant | None:
        """The variant, with the (seconds, speed-up) that are known of it; None where there is none: a batch
        normalisation that cannot be undone, 8 bits that are not finite where the layer's outputs are.

        Raises
        ------
        UnfitError : an exact kernel, or its rounding to 8 bits, differs by more than its bound.
        """
        if plan not in self.made:
            self.made[plan] = self._make(plan)
        v = self.made[plan]
        if v is not None and times is not None:
            v.after, v.speedup = times
        return v

    def _make(self, plan: Plan) -> Variant | None:
        c = self.c
        weight = self._weight(plan.format)
        try:
            module = _convert(c, plan.format, weight, plan.fused)
            c.target.place(module, _positions(c))
        except ValueError:
            return None
        if plan.fused not in self.references:
            self.references[plan.fused] = references_of(c, plan.fused, self.precisions)
        error, bound, damage = layer_error(module, self.references[plan.fused], plan.precision)
        if math.isinf(error) and plan.quantized:
            return None  # a token that is not finite gives NaN in all outputs
        if math.isinf(error):
            raise UnfitError(f"{plan.format} is not finite in the same places: zeros skip inf and NaN inputs")
        if error > bound:
            raise UnfitError(f"{plan.format} differs by {error:.1e}, more than its bound {bound:.1e}")
        return Variant(module, plan.fused, error, bound, damage)

    def _weight(self, format: str) -> PackedWeight:
        c = self.c
        if c.foreign is not None:
            kind = cast(type[QuantizedWeight], FORMATS[format].weight)
            taken = ("foreign", id(c.module), format)
            if taken not in self.packed:
                self.packed[taken] = kind(torch.from_numpy(kind.from_torch(c.module).packed))
            return self.packed[taken]
        weight, groups = cast(Tensor, c.module.weight), getattr(c.module, "groups", 1)
        record = quantized_weight(c.module)
        key = (id(weight), groups, format, id(record))
        if key not in self.packed:
            try:
                if format == "int4" and c.rounds:
                    rounded = Int4.from_dense(weight, group=cast(int, c.four))
                    self.packed[key] = Int4(torch.from_numpy(rounded.packed))
                else:
                    self.packed[key] = pack(format, weight.cpu(), groups, record)
            except ValueError as e:
                raise ValueError(f"model: layer {c.name!r}: {e}") from e
        return self.packed[key]


def _add_milder(
    v: Variant, workshop: Workshop, times: dict[str, tuple[float, float]], plans: dict[str, Plan]
) -> None:
    """Say what takes the place of 4 bits, and of 8: the fastest with more of them, down to none."""
    for bits in ("int8", "float32") if v.precision == "int4" else ("float32",) if v.quantized else ():
        these = {t: x for t, x in times.items() if plans[t].precision == bits}
        while these and v.milder is None:
            text = _best(these, plans)
            v.milder = workshop.make(plans[text], these.pop(text))
            # From a grid of 4 bits that was taken over, 8 bits are a second rounding.
            if v.milder is not None and bits == "int8" and v.milder.damage >= v.damage:
                v.milder = None
        v = v.milder or v


def _best(times: dict[str, tuple[float, float]], plans: dict[str, Plan]) -> str:
    """The fastest, by (seconds, speed-up); within the noise, the one with fewer modules to call is the better
    one."""
    close = 0.98 * max(speedup for _, speedup in times.values())
    near = {text: speedup for text, (_, speedup) in times.items() if speedup >= close}
    return max(near, key=lambda text: (plans[text].fused, near[text]))


def _plan_text(c: Candidate, plan: Plan) -> str:
    norm = " + batchnorm" if c.norm(plan.fused) is not None else ""
    activation = None if plan.fused == 0 else activation_of(c.steps[plan.fused - 1][1])
    return f"{plan.format}{norm}{f' + {activation}' if activation else ''}"


def _timing_key(c: Candidate, facts: Facts, timed: Choices) -> str | None:
    """What the times of a layer's variants depend on; None where that is not known.

    Alike are layers of one geometry, called with the same inputs, whose zeros differ in number and blocks by
    no more than about 2 %: the blocks of a transformer. The whole model is timed in the end all the same.
    """
    modules = [c.module, *(m for _, m in c.steps)]
    if any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        return None
    record = quantized_weight(c.module)
    counts = (facts.nnz, facts.quads, facts.words, facts.word_quads)
    return timed.key(
        modules=[[type(m).__module__, type(m).__qualname__, m.extra_repr()] for m in modules],
        dtype=str(cast(Tensor, c.plain.weight).dtype),
        zeros=[round(50 * math.log(n)) if n else None for n in counts],
        calls=sorted([[*s.shape], [*s.stride], str(s.dtype), n] for s, n in c.calls.items()),
        fixed=record is not None and record.activation_scale is not None,
        four=c.four,
    )


def _list_candidates(c: Candidate, short: Shortlist, plans: dict[str, Plan], known: Timed) -> None:
    """Note in the report what was considered."""
    found = [CandidateTime(KEPT, None, known.before)]
    for text, plan in plans.items():
        measured = known.variants.get(text)
        found.append(
            CandidateTime(
                text,
                short.estimates.get(plan.format) if plan.fused == 0 else None,
                measured and measured[0],
                "" if measured else "not for this layer's inputs or normalisation",
            )
        )
    found += [CandidateTime(n, short.estimates.get(n), None, why) for n, why in short.passed_over.items()]
    c.row.candidates = found


def _convert(c: Candidate, format: str, weight: PackedWeight, fused: int) -> PackedModule:
    """The accelerated layer with the first `fused` steps in it."""
    norm = c.norm(fused)
    activation = None if fused == 0 else activation_of(c.steps[fused - 1][1])
    if c.foreign is not None:
        activation = activation or c.foreign.activation
    rule = RULES[type(c.plain)]
    if norm is None:
        return rule.module.from_module(c.plain, format=format, activation=activation, weight=weight)
    return rule.module.from_module(c.module, format=format, activation=activation, norm=norm)


def hopeless(c: Candidate) -> str | None:
    """A reason to keep the layer that no kernel can change."""
    if not c.calls:
        return "not called with the example inputs"
    for s in c.calls:
        if s.dtype not in DTYPES:
            return f"called with {s.dtype}; kernels take float32, bfloat16 and float16"
    if min(c.row.shape) == 0 or not any(math.prod(s.shape) for s in c.calls):
        return "nothing to compute"
    return None


def _positions(c: Candidate) -> dict[int, int]:
    """Output positions of a call -> calls with so many."""
    found: dict[int, int] = {}
    for s, count in c.calls.items():
        if isinstance(c.plain, (nn.Conv1d, nn.Conv2d)):
            strides = c.plain.stride
            sizes = s.shape[-len(strides) :]
            image = [-(-size // step) for size, step in zip(sizes, strides, strict=True)]
            n = math.prod(image) * (s.shape[0] if len(s.shape) == len(strides) + 2 else 1)
        else:
            n = math.prod(s.shape[:-1])
        found[n] = found.get(n, 0) + count
    return found


def _suitable(
    c: Candidate, facts: Facts, positions: dict[int, int], formats: Sequence[str], min_speedup: float
) -> list[str]:
    """The formats that may beat torch; all that exist when everything is to be converted."""
    known = [name for name in RULES[type(c.plain)].formats if name in formats]
    if c.foreign is not None:
        known = [name for name in known if FORMATS[name].precision == "int8"]
    if c.four is None:
        known = [name for name in known if FORMATS[name].precision != "int4"]
    if min_speedup == 0:
        return known
    density, quad_density = 1.0 - c.row.sparsity, min(1.0, 4 * facts.quads / max(1, facts.cells))
    dtype = cast(Tensor, c.plain.weight).dtype
    return [n for n in known if c.target.suits(n, density, quad_density, positions, dtype)]
