"""Error texts: argument, what was expected, what came."""

from __future__ import annotations

import difflib
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = [
    "check_ascending",
    "check_callable",
    "check_choice",
    "check_count",
    "check_flag",
    "check_known",
    "check_number",
    "check_path",
    "check_positive",
    "choice_error",
    "close_matches",
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
    if isinstance(got, bool) or not isinstance(got, int | float):
        raise TypeError(f"{want} {got!r:.60}")
    if not 0 <= got <= sys.float_info.max:
        raise ValueError(f"{want} {got!s:.20}")
    return float(got)


def check_positive(argument: str, got: object) -> float:
    """`got` as a float, finite and above 0. Raises ``TypeError`` or ``ValueError``."""
    number = check_number(argument, got)
    if not number:
        raise ValueError(f"{argument}: expected a number > 0, got {got!r}")
    return number


def check_count(argument: str, got: object, what: str) -> int:
    """`got`, an int of at least 1; `what` it counts. Raises ``TypeError`` or ``ValueError``."""
    if isinstance(got, bool) or not isinstance(got, int):
        raise TypeError(f"{argument}: expected a number of {what}, got {type(got).__name__}")
    if got < 1:
        raise ValueError(f"{argument}: expected a number of {what} >= 1, got {got}")
    return got


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
    """Raise ``TypeError`` unless `got` can be called; `what`: how, for example ``"(model) -> number"``."""
    if not callable(got):
        raise TypeError(f"{argument}: expected a callable {what}, got {type(got).__name__}")


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
