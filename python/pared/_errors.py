"""Error texts: argument, what was expected, what came."""

from __future__ import annotations

import difflib
import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeGuard

__all__ = [
    "as_float",
    "check_ascending",
    "check_budget",
    "check_callable",
    "check_choice",
    "check_count",
    "check_flag",
    "check_indent",
    "check_known",
    "check_metric",
    "check_number",
    "check_path",
    "check_positive",
    "check_text",
    "choice_error",
    "close_matches",
    "is_integer",
    "is_real",
]


def close_matches(word: str, names: Iterable[str], n: int = 3) -> list[str]:
    """Up to `n` of `names` that look like `word`, nearest first; case does not count."""
    by_folded: dict[str, str] = {}
    for name in names:
        by_folded.setdefault(name.casefold(), name)
    found = difflib.get_close_matches(word.casefold(), by_folded, n=n, cutoff=0.5)
    return [by_folded[f] for f in found]


def choice_error(argument: str, got: object, choices: Iterable[str], also: str = "") -> ValueError:
    """A ``ValueError`` that lists the choices and suggests the nearest; `also`: what else is accepted."""
    names = list(choices)
    text = f"{argument}: expected {', '.join(repr(name) for name in names)}"
    if also:
        text += f" or {also}"
    text += f", got {got!r}"
    near = close_matches(got, names, n=1) if isinstance(got, str) else []
    return ValueError(text + (f"; did you mean {near[0]!r}?" if near else ""))


def check_choice(argument: str, got: object, choices: Iterable[str], also: str = "") -> None:
    """Raise the error of `choice_error` unless `got` is one of the words."""
    names = list(choices)
    if not isinstance(got, str) or got not in names:
        raise choice_error(argument, got, names, also)


def check_flag(argument: str, got: object) -> None:
    """Raise ``TypeError`` unless `got` is a bool: what else is true is more often a slip."""
    if not isinstance(got, bool):
        raise TypeError(f"{argument}: expected True or False, got {got!r}")


def check_number(argument: str, got: object, also: str = "") -> float:
    """`got` as a float, finite and at least 0. Raises ``TypeError`` or ``ValueError``."""
    want = f"{argument}: expected a finite number >= 0{also and f' or {also}'}, got"
    if not is_real(got):
        raise TypeError(f"{want} {got!r:.60}")
    value = as_float(got)
    if not 0 <= value < math.inf:
        raise ValueError(f"{want} {got!s:.20}")
    return value


def as_float(got: float) -> float:
    """`got` as Python's float; what is too large for one is infinite."""
    try:
        return float(got)
    except OverflowError:
        return math.inf if got > 0 else -math.inf


def check_positive(argument: str, got: object) -> float:
    """`got` as a float, finite and above 0. Raises ``TypeError`` or ``ValueError``."""
    want = f"{argument}: expected a number > 0, got"
    if not is_real(got):
        raise TypeError(f"{want} {type(got).__name__}")
    value = as_float(got)
    if not 0 < value < math.inf:
        raise ValueError(f"{want} {got!s:.20}")
    return value


def check_count(argument: str, got: object, what: str, least: int = 1) -> int:
    """`got`, an integer of at least `least`; `what` it counts. Raises ``TypeError`` or ``ValueError``."""
    if not is_integer(got):
        raise TypeError(f"{argument}: expected a number of {what}, got {type(got).__name__}")
    if got < least:
        raise ValueError(f"{argument}: expected a number of {what} >= {least}, got {got!s:.20}")
    return int(got)


def check_known(options: Mapping[str, object], function: Callable[..., object], taken: Iterable[str]) -> None:
    """Raise ``TypeError`` for the first of `options` that `function` lacks, or that is one of `taken`."""
    known = inspect.signature(function).parameters.keys() - set(taken)
    for name, value in options.items():
        if name not in known:
            what = f"an option of pared.{function.__name__} ({', '.join(sorted(known))})"
            near = close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name}: expected {what}, got {value!r:.60}{hint}")


def check_callable(argument: str, got: object, what: str) -> None:
    """Raise ``TypeError`` unless `got` can be called; `what`: how, for example ``"(model) -> number"``.

    Where the signature can be seen it has to take as many positional arguments as `what` names.
    """
    if not callable(got):
        raise TypeError(f"{argument}: expected a callable {what}, got {type(got).__name__}")
    try:
        signature = inspect.signature(got)
    except (TypeError, ValueError):  # some of C and of C++ have none
        return
    try:
        signature.bind(*what[1 : what.index(")")].split(", "))
    except TypeError as e:
        name = getattr(got, "__name__", type(got).__name__)
        raise TypeError(f"{argument}: expected a callable {what}, got {name}{signature!s:.80}: {e}") from None


def check_budget(budget: object) -> float:
    """A share of a model's cost, in (0, 1]. Raises ``TypeError`` or ``ValueError``."""
    if not is_real(budget):
        raise TypeError(f"budget: expected a share in (0, 1], got {type(budget).__name__}")
    if not 0 < budget <= 1:
        raise ValueError(
            f"budget: expected a share in (0, 1] of what the model costs now, got {budget!r:.60}"
        )
    return float(budget)


def check_metric(got: Any, want: str = "evaluate: expected a number, higher is better,") -> float:
    """What a user's ``evaluate`` returned (or what `want` says) as a float, not NaN. Raises ``TypeError`` or
    ``ValueError``.
    """
    try:
        if isinstance(got, bool | str | bytes):
            raise TypeError
        value = float(got)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: torch's, of more than one number
        raise TypeError(f"{want} got {got!r:.60}") from None
    if math.isnan(value):
        raise ValueError(f"{want} got NaN")
    return value


def check_indent(got: object) -> int | None:
    """The `indent` of ``to_json``. Raises ``TypeError`` or ``ValueError``."""
    return None if got is None else check_count("indent", got, "blanks, or None,", 0)


def is_integer(got: object) -> TypeGuard[int]:
    """Whether `got` is an integer, numpy's included; a bool is none."""
    return isinstance(got, Integral) and not isinstance(got, bool)


def is_real(got: object) -> TypeGuard[float]:
    """Whether `got` is a real number, numpy's included; a bool is none."""
    return isinstance(got, Real) and not isinstance(got, bool)


def check_text(argument: str, got: object) -> None:
    """Raise ``TypeError`` unless `got` is a string."""
    if not isinstance(got, str):
        raise TypeError(f"{argument}: expected a string, got {type(got).__name__}")


def check_path(argument: str, got: object, also: str = "") -> None:
    """Raise ``TypeError`` unless `got` is the name of a file."""
    if not isinstance(got, str | os.PathLike):
        raise TypeError(f"{argument}: expected a file name{also and f', {also}'}, got {type(got).__name__}")


def check_ascending(argument: str, got: Any, check: Callable[[object], float]) -> tuple[float, ...]:
    """Shares, each the next larger, as `check` gives them. Raises ``TypeError`` or ``ValueError``."""
    if isinstance(got, str | bytes | Mapping) or not isinstance(got, Iterable):
        raise TypeError(f"{argument}: expected a list of ascending numbers in [0, 1), got {got!r}")
    found = tuple(map(check, got))
    if not found or any(a >= b for a, b in itertools.pairwise(found)):
        raise ValueError(f"{argument}: expected ascending numbers in [0, 1), got {got!r}")
    return found
