"""What one unit of pruning is: a weight, a block of R outputs by C inputs, or the N:M rule."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pared._errors import choice_error

__all__ = ["Pattern", "parse_pattern"]

_NAMES = ("unstructured", "1x4", "4x1", "4x4", "16x1", "2:4", "4:8")


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern.

    Attributes
    ----------
    text : as the user wrote it.
    kind : "unstructured", "block" or "nm".
    rows, cols : a block's outputs and inputs; 1 and M for N:M.
    keep : N of N:M.
    """

    text: str
    kind: str
    rows: int = 1
    cols: int = 1
    keep: int = 0

    @property
    def rule_sparsity(self) -> float:
        """The sparsity that N:M gives."""
        return 1.0 - self.keep / self.cols

    def __str__(self) -> str:
        return self.text


def parse_pattern(pattern: object) -> Pattern:
    """``"unstructured"``, ``"RxC"`` or ``"N:M"``; ``ValueError`` with the nearest choice otherwise."""
    if not isinstance(pattern, str):
        kind = type(pattern).__name__
        raise TypeError(f"pattern: expected a string such as 'unstructured', '1x4' or '2:4', got {kind}")
    if pattern == "unstructured":
        return Pattern(pattern, "unstructured")
    if m := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", pattern):
        rows, cols = int(m[1]), int(m[2])
        return Pattern(pattern, "unstructured" if rows == cols == 1 else "block", rows, cols)
    if m := re.fullmatch(r"([1-9]\d?):([1-9]\d?)", pattern):
        keep, group = int(m[1]), int(m[2])
        if keep < group:
            return Pattern(pattern, "nm", 1, group, keep)
        raise ValueError(f"pattern: expected N:M with N < M, got {pattern!r}")
    raise choice_error("pattern", pattern, _NAMES, "any other RxC block or N:M rule")
