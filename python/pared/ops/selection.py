"""Selection: the k largest of one tensor or of many, by row, by block and in N:M groups, without a sort."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

from pared import _core, _cuda
from pared._errors import is_integer
from pared._types import Array
from pared.ops._arrays import (
    dtype_of_kind,
    empty_like_kind,
    integer,
    refuse_grad,
    require_array,
    word,
)

if TYPE_CHECKING:
    import torch

__all__ = ["Threshold", "block_mask", "nm_mask", "select_threshold", "topk", "topk_mask"]


class Threshold(NamedTuple):
    """The k-th largest key of a selection.

    Attributes
    ----------
    value : the key itself, in key space: what ``abs(w)``, ``w``, ``w * w`` or ``abs(w * other)`` gives in
        float32. Infinity when k is 0; NaN when ``nan="lowest"`` and k reaches into the NaNs.
    above : how many keys are strictly greater.
    ties : how many of the keys equal to `value` are selected: ``k - above``, those of the lowest index.

    Of CUDA tensors the three are 0-d tensors on the device (float32, int64, int64): nothing has waited.
    """

    value: Any
    above: Any
    ties: Any


def select_threshold(
    scores: Array | Sequence[Array],
    k: int,
    key: str = "abs",
    *,
    other: Array | Sequence[Array] | None = None,
    col_scale: Array | Sequence[Array] | None = None,
    nan: str = "raise",
) -> Threshold:
    """The k-th largest key among all elements of one tensor, or of several taken as one.

    Parameters
    ----------
    scores : float32, float16 or bfloat16, any shape, contiguous; or a list or tuple of such, whose dtypes may
        differ. Nothing is copied or concatenated. More than 2**31 elements are welcome.
    k : 0 to the number of elements.
    key : "abs" (default) ``|w|``, "identity" ``w``, "square" ``w * w``, or "abs_mul": ``|w * other|``, or
        ``|w * col_scale|``. Keys are float32 (16-bit elements are widened first, products rounded once) and
        never stored.
    other : with "abs_mul", a tensor of the shape and dtype of `scores` (one for each).
    col_scale : with "abs_mul", non-negative float32 factors of the columns of a weight ``[out, in, *taps]``:
        ``[in]``, one for each input, or ``[in * taps]``, one for each column of the flattened row; ``[groups,
        ...]`` gives every group of ``out / groups`` consecutive outputs its own (grouped convolutions).
    nan : "raise" (default) refuses NaN keys; "lowest" ranks them below every number, equal to each other.

    Returns
    -------
    Threshold

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came; `k` out of range; a NaN key.

    Notes
    -----
    On CUDA the selection is enqueued on torch's current stream and nothing waits, so that a CUDA graph can
    hold it, but for ``nan="raise"``, which has to look and is refused while a graph is captured. The sign of
    `col_scale` is not looked at.

    -0.0 equals 0.0. One read of the data: a sample brackets the rank, one pass counts what is above the
    bracket and gathers the few keys inside, which are then selected from exactly; the idea goes back to Floyd
    and Rivest, "Expected time bounds for selection" (CACM 18, 1975).
    """
    tensors, many = _tensors(scores, "scores")
    key, nan = word(key, "key"), word(nan, "nan")
    if _on_device(tensors):
        from pared import _cuda_selection

        factors = _factors(other, col_scale, many)
        return Threshold(*_cuda_selection.threshold(tensors, integer(k, "k"), key, *factors, nan, many))
    d = _core.select_threshold(tensors, integer(k, "k"), key, *_factors(other, col_scale, many), nan, many)
    return Threshold(d["value"], d["above"], d["ties"])


@overload
def topk_mask(
    scores: Sequence[Array],
    k: int,
    key: str = ...,
    dim: int | None = ...,
    *,
    other: Array | Sequence[Array] | None = ...,
    col_scale: Array | Sequence[Array] | None = ...,
    nan: str = ...,
    out: Array | Sequence[Array] | None = ...,
) -> list[Array]: ...
@overload
def topk_mask(
    scores: Array,
    k: int,
    key: str = ...,
    dim: int | None = ...,
    *,
    other: Array | Sequence[Array] | None = ...,
    col_scale: Array | Sequence[Array] | None = ...,
    nan: str = ...,
    out: Array | Sequence[Array] | None = ...,
) -> Array: ...
def topk_mask(
    scores: Array | Sequence[Array],
    k: int,
    key: str = "abs",
    dim: int | None = None,
    *,
    other: Array | Sequence[Array] | None = None,
    col_scale: Array | Sequence[Array] | None = None,
    nan: str = "raise",
    out: Array | Sequence[Array] | None = None,
) -> Array | list[Array]:
    """A bool mask of exactly the k largest keys: of all elements together, or of every row.

    Ties go to the lowest index, in the order of the sequence and of C-contiguous memory within a tensor.

    Parameters
    ----------
    scores, key, other, col_scale, nan : as for `select_threshold`.
    k : how many are True, in all (``dim=None``) or in each row (``dim=1``).
    dim : None, or 1: a row is one output of a weight ``[out, in, *taps]`` with everything that belongs to it.
        The rows of a two-dimensional tensor may be apart in memory.
    out : bool masks to fill instead of new ones, of the shape of `scores`, contiguous. Untouched when a
        global selection raises; unspecified when a row-wise one finds a NaN.

    Returns
    -------
    A mask of the shape and kind of `scores`, or a list of masks when `scores` is a sequence.

    Raises
    ------
    TypeError, ValueError : as `select_threshold`.
    """
    tensors, many = _tensors(scores, "scores")
    key, nan = word(key, "key"), word(nan, "nan")
    if not (dim is None or (is_integer(dim) and dim == 1)):
        raise ValueError(f"dim: expected None or 1, got {dim!r}")
    masks = _masks(tensors, out, many)
    if _on_device(tensors):
        from pared import _cuda_selection

        fill = _cuda_selection.mask if dim is None else _cuda_selection.mask_rows
        fill(tensors, integer(k, "k"), key, *_factors(other, col_scale, many), nan, many, masks)
        return masks if many else masks[0]
    run = _core.topk_mask if dim is None else _core.topk_mask_rows
    run(tensors, integer(k, "k"), key, *_factors(other, col_scale, many), nan, many, masks, out is None)
    return masks if many else masks[0]


def topk(
    x: Array, k: int, key: str = "abs", *, other: Array | None = None, nan: str = "raise"
) -> tuple[Array, Array]:
    """The k elements with the largest keys, largest first; equal keys in order of their index.

    Parameters
    ----------
    x : [n], float32, float16 or bfloat16, contiguous.
    k : 0 to n.
    key, other, nan : as for `select_threshold`.

    Returns
    -------
    values : [k], elements of `x` (not their keys), of its kind and dtype.
    indices : [k], int64.

    Raises
    ------
    TypeError, ValueError : as `select_threshold`. RuntimeError when `x` needs a gradient.
    """
    require_array(x, "x")
    refuse_grad(x, "x")
    count = integer(k, "k")
    key, nan = word(key, "key"), word(nan, "nan")
    if x.ndim != 1:
        raise ValueError(f"x: expected one dimension, got shape {list(x.shape)}")
    if not 0 <= count <= x.shape[0]:
        raise ValueError(f"k: expected 0 to {x.shape[0]} (the number of elements), got {count}")
    if _on_device([x]):
        from pared import _cuda_selection

        return _cuda_selection.topk(
            cast("torch.Tensor", x), count, key, cast("torch.Tensor | None", other), nan
        )
    values = empty_like_kind(x, (count,))
    indices = empty_like_kind(x, (count,), dtype_of_kind(x, "int64"))
    _core.topk(x, count, key, None if other is None else [other], nan, values, indices)
    return values, indices


@overload
def block_mask(
    x: Sequence[Array],
    k: int,
    block: tuple[int, int] = ...,
    key: str = ...,
    *,
    other: Array | Sequence[Array] | None = ...,
    col_scale: Array | Sequence[Array] | None = ...,
    nan: str = ...,
    out: Array | Sequence[Array] | None = ...,
) -> list[Array]: ...
@overload
def block_mask(
    x: Array,
    k: int,
    block: tuple[int, int] = ...,
    key: str = ...,
    *,
    other: Array | Sequence[Array] | None = ...,
    col_scale: Array | Sequence[Array] | None = ...,
    nan: str = ...,
    out: Array | Sequence[Array] | None = ...,
) -> Array: ...
def block_mask(
    x: Array | Sequence[Array],
    k: int,
    block: tuple[int, int] = (1, 4),
    key: str = "abs",
    *,
    other: Array | Sequence[Array] | None = None,
    col_scale: Array | Sequence[Array] | None = None,
    nan: str = "raise",
    out: Array | Sequence[Array] | None = None,
) -> Array | list[Array]:
    """A bool mask of the elements of the k blocks with the largest norm.

    A block is R consecutive outputs by C consecutive inputs of a weight ``[out, in]``; for a convolution
    weight ``[out, in/groups, *taps]`` C consecutive input channels at one tap. Blocks at the edges are as if
    padded with zeros. Blocks are numbered by (output, tap, input), ties go to the lowest number.

    Parameters
    ----------
    x : one weight or a sequence whose blocks compete; the rows of a two-dimensional one may be apart in
        memory.
    k : 0 to the number of blocks of all weights.
    block : (R, C).
    key : a block's score is the sum of its elements' keys: "abs" the L1 norm, "square" the squared L2 norm,
        "identity" the sum, "abs_mul" the sum of ``|w * other|`` or ``|w * col_scale|``. Summed in float32,
        down the rows and then from left to right, on every instruction set alike.
    other, col_scale, nan : as for `select_threshold`; NaN is judged on the block's score.
    out : as for `topk_mask`.

    Returns
    -------
    A mask of the shape and kind of `x`, or a list of masks when `x` is a sequence.

    Raises
    ------
    TypeError, ValueError : as `select_threshold`.
    """
    tensors, many = _tensors(x, "x")
    key, nan = word(key, "key"), word(nan, "nan")
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise ValueError(f"block: expected (rows, columns), got {block!r}")
    r, c = integer(block[0], "block"), integer(block[1], "block")
    masks = _masks(tensors, out, many)
    k, factors = integer(k, "k"), _factors(other, col_scale, many)
    if _on_device(tensors):
        from pared import _cuda_selection

        _cuda_selection.mask_blocks(tensors, k, r, c, key, *factors, nan, many, masks)
    else:
        _core.block_mask(tensors, k, r, c, key, *factors, nan, many, masks, out is None)
    return masks if many else masks[0]


@overload
def nm_mask(
    x: Sequence[Array],
    n: int,
    m: int,
    key: str = ...,
    *,
    other: Array | Sequence[Array] | None = ...,
    col_scale: Array | Sequence[Array] | None = ...,
    nan: str = ...,
    out: Array | Sequence[Array] | None = ...,
) -> list[Array]: ...
@overload
def nm_mask(
    x: Array,
    n: int,
    m: int,
    key: str = ...,
    *,
    other: Array | Sequence[Array] | None = ...,
    col_scale: Array | Sequence[Array] | None = ...,
    nan: str = ...,
    out: Array | Sequence[Array] | None = ...,
) -> Array: ...
def nm_mask(
    x: Array | Sequence[Array],
    n: int,
    m: int,
    key: str = "abs",
    *,
    other: Array | Sequence[Array] | None = None,
    col_scale: Array | Sequence[Array] | None = None,
    nan: str = "raise",
    out: Array | Sequence[Array] | None = None,
) -> Array | list[Array]:
    """A bool mask of the n largest keys in every m consecutive inputs.

    Groups run along ``in`` of a weight ``[out, in]``, and along the input channels at one tap of a
    convolution weight ``[out, in/groups, *taps]``. A last group of r < m inputs keeps ``min(n, r)``. Ties go
    to the lowest input.

    Parameters
    ----------
    x : one weight or a sequence; the rows of a two-dimensional one may be apart in memory.
    n, m : 0 <= n <= m; 2, 4 for the hardware's pattern.
    key, other, col_scale, nan : as for `select_threshold`.
    out : as for `topk_mask`; unspecified when a NaN is found.

    Returns
    -------
    A mask of the shape and kind of `x`, or a list of masks when `x` is a sequence.

    Raises
    ------
    TypeError, ValueError : as `select_threshold`.
    """
    tensors, many = _tensors(x, "x")
    key, nan = word(key, "key"), word(nan, "nan")
    masks = _masks(tensors, out, many)
    n, m, factors = integer(n, "n"), integer(m, "m"), _factors(other, col_scale, many)
    if _on_device(tensors):
        from pared import _cuda_selection

        _cuda_selection.mask_groups(tensors, n, m, key, *factors, nan, many, masks)
    else:
        _core.nm_mask(tensors, n, m, key, *factors, nan, many, masks, out is None)
    return masks if many else masks[0]


def _tensors(x: Any, name: str) -> tuple[list[Any], bool]:
    """The tensors as a list, and whether they came as a sequence."""
    many = isinstance(x, list | tuple)
    tensors = list(x) if many else [x]
    for i, t in enumerate(tensors):
        require_array(t, f"{name}[{i}]" if many else name)
    return tensors, many


def _on_device(tensors: list[Any]) -> bool:
    """Whether a selection is the CUDA part's."""
    return any(_cuda.is_device_tensor(t) for t in tensors)


def _factors(other: Any, col_scale: Any, many: bool) -> tuple[list[Any] | None, list[Any] | None]:
    """`other` and `col_scale` as lists beside the tensors."""

    def listed(x: Any, name: str) -> list[Any] | None:
        if x is None:
            return None
        tensors, sequence = _tensors(x, name)
        if sequence != many:
            got = "a sequence" if sequence else "one tensor"
            raise TypeError(f"{name}: expected {'a sequence' if many else 'one tensor'}, got {got}")
        return tensors

    return listed(other, "other"), listed(col_scale, "col_scale")


def _masks(tensors: list[Any], out: Any, many: bool) -> list[Array]:
    """The masks to fill: the caller's, or new ones of the tensors' kinds."""
    if out is not None:
        masks, sequence = _tensors(out, "out")
        if sequence != many:
            raise TypeError(f"out: expected {'a sequence' if many else 'one mask'} as with the input")
        return masks
    return [empty_like_kind(t, tuple(t.shape), dtype_of_kind(t, "bool")) for t in tensors]
