"""Sparsity as a function of the training step, for `pared.Pruner`.

A schedule is any callable ``step -> sparsity`` with sparsity in [0, 1). Those here are 0 before `begin`,
exactly `initial` at `begin`, and exactly `final` from `end` on.

>>> round(Polynomial(0.5, 0.8, begin=1000, end=2000)(1500), 6)
0.7625
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from pared._errors import as_float, check_callable, is_integer, is_real

__all__ = ["Exponential", "Linear", "OneShot", "Polynomial", "Schedule"]

Schedule: TypeAlias = Callable[[int], float]


def check_schedule(schedule: object) -> None:
    """Raise ``TypeError`` unless `schedule` can be called with a step, and is no class."""
    what = "(step) -> sparsity, such as a pared.schedules object"
    if isinstance(schedule, type):
        raise TypeError(f"schedule: expected a callable {what}, got the class {schedule.__name__}")
    check_callable("schedule", schedule, what)


def _check_sparsity(name: str, value: object) -> None:
    if not is_real(value):
        raise TypeError(f"{name}: expected a number in [0, 1), got {type(value).__name__}")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a sparsity in [0, 1), got {value!r}")


def _check_step(name: str, value: object) -> None:
    if not is_integer(value):
        raise TypeError(f"{name}: expected a step number, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected a step >= 0, got {value}")


@dataclass(frozen=True)
class OneShot:
    """All at once: 0 before step `at`, `sparsity` from it on."""

    sparsity: float
    at: int = 0

    def __post_init__(self) -> None:
        _check_sparsity("sparsity", self.sparsity)
        _check_step("at", self.at)

    def __call__(self, step: int) -> float:
        _check_step("step", step)
        return self.sparsity if step >= self.at else 0.0


@dataclass(frozen=True)
class _Ramp:
    """From `initial` at step `begin` to `final` at step `end`."""

    initial: float
    final: float
    begin: int
    end: int

    def __post_init__(self) -> None:
        _check_sparsity("initial", self.initial)
        _check_sparsity("final", self.final)
        _check_step("begin", self.begin)
        _check_step("end", self.end)
        if self.end <= self.begin:
            raise ValueError(f"end: expected a step after begin={self.begin}, got {self.end}")

    def _between(self, progress: float) -> float:
        """The sparsity at `progress` in (0, 1) of the way."""
        raise NotImplementedError

    def __call__(self, step: int) -> float:
        _check_step("step", step)
        if step < self.begin:
            return 0.0
        if step == self.begin:
            return self.initial
        if step >= self.end:
            return self.final
        return self._between((step - self.begin) / (self.end - self.begin))


@dataclass(frozen=True)
class Linear(_Ramp):
    """``s_i + (s_f - s_i) * p`` with ``p = (step - begin) / (end - begin)``.

    Nothing is pruned before step `begin`; `initial` (s_i) from it on; `final` (s_f) from step `end` on.
    Sparsities are in [0, 1), steps >= 0; ``TypeError`` and ``ValueError`` name the argument.
    """

    def _between(self, progress: float) -> float:
        return self.initial + (self.final - self.initial) * progress


@dataclass(frozen=True)
class Polynomial(_Ramp):
    """``s_f + (s_i - s_f) * (1 - p)**power``: fast at first, gentle near the end.

    The cubic of Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878), by default. `initial`,
    `final`, `begin`, `end` and p as in `Linear`; `power` is above 0.
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_real(self.power):
            raise TypeError(f"power: expected a number > 0, got {type(self.power).__name__}")
        if not 0 < as_float(self.power) < 1e300:
            raise ValueError(f"power: expected a number > 0, got {self.power!r}")

    def _between(self, progress: float) -> float:
        return float(self.final + (self.initial - self.final) * (1.0 - progress) ** self.power)


@dataclass(frozen=True)
class Exponential(_Ramp):
    """The density decays exponentially: ``1 - s = (1 - s_i) * ((1 - s_f) / (1 - s_i))**p``.

    Each step removes the same share of the weights that are left, as iterative magnitude pruning does.
    `initial`, `final`, `begin`, `end` and p as in `Linear`.
    """

    def _between(self, progress: float) -> float:
        density = 1.0 - self.initial
        return float(1.0 - density * ((1.0 - self.final) / density) ** progress)
