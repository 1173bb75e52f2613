"""Where a model runs: what `pared.accelerate` asks of the CPU and of a CUDA device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pared import _core, _cuda
from pared._cuda_conv import check_geometry
from pared._cuda_two_four import unavailable
from pared._select import Shortlist, shortlist
from pared._surgery import copy_model
from pared._timing import Timings, interleave
from pared._timing_cuda import Clock, EventClock, copies_beyond, sample_rounds
from pared.nn import Linear, PackedModule
from pared.nn._base import as_images
from pared.ops._device import DeviceWeight
from pared.ops._estimate import Facts
from pared.ops._formats import FORMATS

__all__ = ["Cuda", "LayerCall", "Target", "target_of"]

_ROUNDS = 15
# Copies of a small layer: what its own replay costs is then spread over enough calls.
_MOST_COPIES = 64
_16_BITS = (torch.float16, torch.bfloat16)
# Counts of tokens at which the packed and the dense way of a weight for few tokens are compared.
_CROSSOVER = (64, 96, 128, 192, 256)


@dataclass(frozen=True)
class LayerCall:
    """A layer and what follows it, called with one input."""

    module: nn.Module
    x: Tensor
    steps: Sequence[nn.Module]

    def __call__(self) -> Tensor:
        y = self.module(self.x)
        for step in self.steps:
            y = step(y)
        return cast(Tensor, y)

    @property
    def nbytes(self) -> int:
        """What the layer's weights take where it runs."""
        on_device = getattr(self.module, "_on_device", None)
        if on_device is not None:
            return int(on_device.nbytes)
        return sum(t.nbytes for t in (*self.module.parameters(), *self.module.buffers()))

    def copy(self) -> LayerCall:
        """With weights of its own, where it runs."""
        if isinstance(self.module, PackedModule) and self.module._on_device is not None:
            new = object.__new__(type(self.module))
            new.__dict__.update(self.module.__dict__)
            layout, tensors = self.module._on_device.parts()
            new._hold(DeviceWeight.from_parts(layout, [t.clone() for t in tensors]))
            return dataclasses.replace(self, module=new)
        return dataclasses.replace(self, module=copy_model(self.module))


class Target:
    """The CPU."""

    kind = "cpu"
    device = torch.device("cpu")

    def machine(self) -> dict[str, Any]:
        """What times depend on, for the report."""
        return {
            "cpu": _core.cpu_brand(),
            "isa": _core.isa(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def shortlist(
        self, names: Sequence[str], layer: nn.Module, facts: Facts, calls: Mapping[int, int]
    ) -> Shortlist:
        """Of the formats that suit a layer, those to time."""
        return shortlist(names, facts, calls, torch.get_num_threads())

    def suits(
        self, name: str, density: float, quads: float, calls: Mapping[int, int], dtype: torch.dtype
    ) -> bool:
        """Whether a format is worth trying for a layer."""
        return FORMATS[name].worth_trying(density, quads, calls)

    def place(self, module: PackedModule, calls: Mapping[int, int]) -> None:
        """Put a packed layer where it runs, for calls of so many tokens. Raises ``ValueError`` where it
        cannot."""

    def time(self, calls: Mapping[str, Callable[[], object]], **bounds: Any) -> Timings:
        """Time calls on the host's clock; see `pared._timing.interleave`."""
        return interleave(calls, **bounds)

    def computes_together(self, a: Linear, b: Linear) -> bool:
        """Whether `a` computes `b` as well, where both get the same input (`Linear.share_with`)."""
        return _core.shares_inputs(a.packed, b.packed)

    def time_layers(self, calls: Mapping[str, LayerCall], seconds: float) -> Timings:
        """Time variants of a layer against each other."""
        return self.time(calls, budget=seconds, min_rounds=7, max_rounds=200, precision=0.05, warmup=1)

    def time_models(
        self, calls: Mapping[str, Callable[[], None]], seconds: float
    ) -> tuple[Timings, str | None]:
        """Time whole models against each other; and a remark."""
        return (
            self.time(calls, budget=seconds, min_rounds=5, max_rounds=400, precision=0.02, warmup=1),
            None,
        )


class Cuda(Target):
    """A CUDA device.

    Parameters
    ----------
    device : with its index.
    model_bytes : of the dense model: what exceeds the L2 cache is read from memory in every pass.
    """

    kind = "cuda"

    def __init__(self, device: torch.device, model_bytes: int, clock: Clock | None = None) -> None:
        self.device = device
        self.clock = clock or EventClock()
        self._properties = self.properties()
        self.cold = model_bytes > self._properties["l2"]
        self._crossovers: dict[Any, int] = {}

    def properties(self) -> dict[str, Any]:
        """Name, compute capability, bytes of L2. Raises ``RuntimeError`` where pared has no code for it."""
        _cuda.kernels(self.device.index)
        p = torch.cuda.get_device_properties(self.device)
        return {"name": p.name, "capability": [p.major, p.minor], "l2": p.L2_cache_size}

    def machine(self) -> dict[str, Any]:
        p = self._properties
        return {**super().machine(), "device": p["name"], "capability": p["capability"], "cold": self.cold}

    def suits(
        self, name: str, density: float, quads: float, calls: Mapping[int, int], dtype: torch.dtype
    ) -> bool:
        if name == "int8":
            return True
        if name == "csr":
            return density <= 0.4
        if name == "bsr8":
            return density <= 0.85
        if name == "2:4":
            return dtype in _16_BITS and density <= 0.5
        few = min(calls, default=0) <= _CROSSOVER[-1]
        return dtype in _16_BITS and (name == "int8wo" or density <= 0.85) and (name == "bsr" or few)

    def shortlist(
        self, names: Sequence[str], layer: nn.Module, facts: Facts, calls: Mapping[int, int]
    ) -> Shortlist:
        """All of them, there being no model of times for a GPU, but blocks where the weight has none, 2:4
        where it does not follow that, and convolutions that are no products of pixels."""
        weight = cast(Tensor, layer.weight)
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            weight = as_images(weight)
            pads = (0, 0) if isinstance(layer.padding, str) else layer.padding
            try:
                check_geometry(tuple(weight.shape), layer.groups, pads)
            except ValueError as e:
                return Shortlist({}, [], dict.fromkeys(names, str(e).removeprefix("device: ")))
            weight = weight.flatten(1)
        size = 16
        used = nn.functional.pad(weight != 0, (0, -weight.shape[1] % size, 0, -weight.shape[0] % size))
        blocks = used.view(used.shape[0] // size, size, -1, size).any(3).any(1)
        share = float(blocks.float().mean()) if blocks.numel() else 1.0
        full = f"{100 * share:.0f}% of the blocks of 16x16 have non-zeros" if share > 0.9 else None
        why = {n: full for n in names if n in ("bsr", "bsr8")}
        if "2:4" in names:
            why["2:4"] = unavailable(weight)
        passed_over = {n: reason for n, reason in why.items() if reason is not None}
        return Shortlist({}, [n for n in names if n not in passed_over], passed_over)

    def place(self, module: PackedModule, calls: Mapping[int, int]) -> None:
        weight: Any = module._device_weight(self.device)
        if hasattr(weight, "few_tokens"):
            weight = dataclasses.replace(weight, few_tokens=self._crossover(weight))
        elif hasattr(weight, "tuned"):
            weight = weight.tuned(max(calls, default=1))
        module._hold(weight)

    def _crossover(self, weight: Any) -> int:
        """Up to how many tokens the packed weight is faster than the dense one made of it; the shape of a
        call alone decides then."""
        key = (weight.shape, weight.format, weight.dtype, round(50 * math.log(max(1, weight.nbytes))))
        if key not in self._crossovers:
            best = 32
            for tokens in _CROSSOVER:
                x = torch.randn(tokens, weight.shape[1], device=self.device).to(weight.dtype)
                packed, dense = (dataclasses.replace(weight, few_tokens=few) for few in (tokens, 0))
                t = self._sample({"packed": [partial(packed.linear, x)], "dense": [partial(dense.linear, x)]})
                if t.median("packed") > t.median("dense"):
                    break
                best = tokens
            self._crossovers[key] = best
        return self._crossovers[key]

    def _current(self) -> AbstractContextManager[Any]:
        """The device is torch's current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _sample(self, calls: Mapping[str, Sequence[Callable[[], object]]]) -> Timings:
        """Each call goes round its copies, at least eight times in all."""

        def turn(mine: Sequence[Callable[[], object]]) -> Callable[[int], object]:
            return lambda i: mine[i % len(mine)]()

        with self._current():
            samplers = {n: self.clock.prepare(turn(c), max(8, len(c)), True) for n, c in calls.items()}
            return sample_rounds(samplers, _ROUNDS)

    def computes_together(self, a: Linear, b: Linear) -> bool:
        weights = a._on_device, b._on_device
        if a.activation != b.activation or weights[0] is None or weights[1] is None:
            return False
        return weights[0].joins(weights[1])

    def time(self, calls: Mapping[str, Callable[[], object]], **bounds: Any) -> Timings:
        """Time calls as graphs."""
        return self._sample({n: [c] for n, c in calls.items()})

    def time_layers(self, calls: Mapping[str, LayerCall], seconds: float) -> Timings:
        copies: dict[str, list[LayerCall]] = {}
        for name, call in calls.items():
            n = copies_beyond(self._properties["l2"], call.nbytes) if self.cold else 1
            copies[name] = [call, *(call.copy() for _ in range(min(n, _MOST_COPIES) - 1))]
        return self._sample(copies)

    def time_models(
        self, calls: Mapping[str, Callable[[], None]], seconds: float
    ) -> tuple[Timings, str | None]:
        def timed(graph: bool) -> Timings:
            def one(call: Callable[[], None]) -> Callable[[int], object]:
                return lambda i: call()

            with self._current():
                samplers = {n: self.clock.prepare(one(call), 1, graph) for n, call in calls.items()}
                return sample_rounds(samplers, _ROUNDS)

        eager = timed(False)
        first, second = calls
        try:
            captured = timed(True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            return eager, f"no CUDA graph can hold the model ({type(e).__name__}): times are of eager calls"
        slow = eager.speedup(second, first).value
        remark = f"times are of CUDA graphs; called without one, the model is {slow:.2f}x"
        return captured, remark


def target_of(model: nn.Module) -> Target:
    """The target of a model. Raises ``ValueError`` where its tensors are on several devices or on one without
    kernels, ``RuntimeError`` where the CUDA part cannot run there."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    places = {t.device: name for name, t in reversed(tensors)}
    if len(places) > 1:
        listed = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise ValueError(f"model: expected all of it on one device, got {listed}")
    device = next(iter(places), torch.device("cpu"))
    if device.type == "cpu":
        return Target()
    if device.type != "cuda":
        raise ValueError(
            f"model: expected a model on the CPU or on a CUDA device, got {next(iter(places.values()))} on "
            f"{device}; there are no kernels for it: model.to('cpu') first"
        )
    return Cuda(device, sum(t.nbytes for _, t in tensors))
