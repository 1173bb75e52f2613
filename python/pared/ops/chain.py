"""Several linear operations in one call, with what lies between two of them kept in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from pared import _core
from pared._types import Array
from pared.ops._formats import FORMATS
from pared.ops.packed import PackedWeight


def chain_of(weights: Sequence[PackedWeight]) -> str | None:
    """How linear layers with these weights go in one call, `Format.chain`; None where they do not."""
    kinds = {FORMATS[w.kind].chain if len(w.shape) == 2 else None for w in weights}
    return kinds.pop() if len(kinds) == 1 else None


def linear_chain(
    x: Array,
    weights: Sequence[PackedWeight],
    biases: Sequence[Array | None] | None = None,
    activations: Sequence[str | None] | None = None,
) -> Array:
    """``linear`` for each weight in turn, as in the feed-forward part of a transformer.

    With float32 weights, the activations between two layers stay in the layout that the kernels compute in
    (reduction outermost) and in the cache, instead of being transposed into rows of tokens and back. They are
    float32 there, whatever the dtype of `x`.

    With int8 and int4 weights, a few tokens at a time go through all layers: each is quantized for the next
    layer as soon as its last output is there. The result is that of one `linear` after the other, to the bit.

    Parameters
    ----------
    x : [..., in], float32, bfloat16 or float16, last axis contiguous.
    weights : two or more of CSR, BSR and Dense, or of Int8, Bitmap8, BSRInt8 and Int4, [out, in] each; `in`
        of each is `out` of the one before.
    biases : [out] float32 or None for each weight; None: no biases.
    activations : a name as `linear` takes it, or None, for each weight; None: no activations.

    Returns
    -------
    [..., out of the last weight], of `x`'s kind and dtype.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came.
    RuntimeError : grad mode is on and `x` or a bias asks for a gradient; pared's operations have none.
    """
    # One call for everything, as in `linear`.
    packed: Any = weights
    if isinstance(weights, list | tuple):
        packed = [w.packed if isinstance(w, PackedWeight) else _refused(w, i) for i, w in enumerate(weights)]
    y: Array = _core.linear_chain(x, packed, biases, activations)
    return y


def _refused(w: object, i: int) -> NoReturn:
    known = ", ".join(f.weight.__name__ for f in FORMATS.values() if f.chain is not None)
    raise TypeError(f"weights: expected linear weights ({known}), got {type(w).__name__} at {i}")
