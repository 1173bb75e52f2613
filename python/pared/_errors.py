"""Error texts: argument, what was expected, what came."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["choice_error", "close_matches"]


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
