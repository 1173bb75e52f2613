"""Several linear operations in one call, with what lies between two of them kept in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pared._types import Array
from pared.ops._arrays import activation_name, empty_like_kind, refuse_grad, require_array
from pared.ops._formats import FORMATS
from pared.ops.packed import PackedWeight


def chain_of(weights: Sequence[PackedWeight]) -> Callable[..., None] | None:
    """What computes linear layers with these weights in one call; None where nothing does."""
    kernels = {FORMATS[w.kind].chain if len(w.shape) == 2 else None for w in weights}
    return kernels.pop() if len(kernels) == 1 else None


def _listed(x: Any, name: str, n: int | None = None) -> list[Any]:
    """A list or tuple as a list, of n entries if given. Raises ``TypeError`` or ``ValueError``."""
    if not isinstance(x, list | tuple):
        raise TypeError(f"{name}: expected a list or a tuple, got {type(x).__name__}")
    if n is not None and len(x) != n:
        raise ValueError(f"{name}: expected {n} entries, one for each weight, got {len(x)}")
    return list(x)


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
    require_array(x, "x")
    weights = _listed(weights, "weights")
    for i, w in enumerate(weights):
        if not isinstance(w, PackedWeight) or chain_of([w]) is None:
            known = ", ".join(f.weight.__name__ for f in FORMATS.values() if f.chain is not None)
            got = f" of shape {list(w.shape)}" if isinstance(w, PackedWeight) else ""
            raise TypeError(f"weights: expected linear weights ({known}), got {type(w).__name__}{got} at {i}")
    n = len(weights)
    if n < 2:
        raise ValueError(f"weights: expected two or more, got {n}")
    bias = [None] * n if biases is None else _listed(biases, "biases", n)
    activation = [""] * n
    if activations is not None:
        activation = [activation_name(a) for a in _listed(activations, "activations", n)]
    chain = chain_of(weights)
    if chain is None:
        got = ", ".join(type(w).__name__ for w in weights)
        raise TypeError(f"weights: expected float32 weights alone or int8 weights alone, got {got}")
    refuse_grad(x, "x")
    for b in bias:
        refuse_grad(b, "biases")
    out = empty_like_kind(x, (*x.shape[:-1], weights[-1].shape[0]))
    chain(x, [w.packed for w in weights], bias, out, activation)
    return out
