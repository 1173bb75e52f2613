"""Selection on the device: `pared.ops`' thresholds, masks and largest elements for CUDA tensors.

Everything is enqueued on torch's current stream and nothing waits, but for ``nan="raise"``, which has to
look. Arguments are as `pared.ops` documents them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from pared import _cuda

__all__ = ["mask", "mask_blocks", "mask_groups", "mask_rows", "threshold", "topk"]

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_KEYS = ("abs", "identity", "square", "abs_mul")


@dataclass
class _Part:
    """Elements of one tensor that share their factors: all of them, or those of one group of outputs."""

    w: torch.Tensor
    first: int  # the part's first row
    rows: int
    cols: int
    stride: int
    taps: int  # of a column's channel, neighbours
    factors: torch.Tensor | None = None
    scale: bool = False  # factors are one row of float32, repeated

    @property
    def n(self) -> int:
        return self.rows * self.cols

    def pointer(self, t: torch.Tensor, stride: int) -> int:
        return t.data_ptr() + self.first * stride * t.element_size()

    def factor(self) -> tuple[int, str]:
        """Address and dtype of the first factor."""
        g = self.factors
        if g is None:
            return 0, "float32"
        return (
            g.data_ptr() if self.scale else g.data_ptr() + self.first * self.g_stride * g.element_size()
        ), (_DTYPES[g.dtype])

    def matrix(self, key: str) -> tuple[int, int, int, int, str, str, int, int, str]:
        """As the kernels of rows, groups and blocks take it."""
        g, g_dtype = self.factor()
        w = self.pointer(self.w, self.stride)
        return w, self.rows, self.cols, self.stride, _DTYPES[self.w.dtype], key, g, self.g_stride, g_dtype

    @property
    def g_stride(self) -> int:
        """Elements from one row of factors to the next."""
        if self.factors is None or self.scale:
            return 0
        return self.factors.stride(0) if self.factors.ndim >= 2 and self.factors.shape[0] > 1 else self.cols


class _Selection:
    """The tensors of a call, checked, as parts."""

    def __init__(
        self,
        tensors: list[Any],
        name: str,
        many: bool,
        key: str,
        other: list[Any] | None,
        col_scale: list[Any] | None,
        nan: str,
        rows: bool,
    ) -> None:
        if key not in _KEYS:
            raise ValueError(f"key: expected one of {', '.join(_KEYS)}, got {key!r}")
        if nan not in ("raise", "lowest"):
            raise ValueError(f'nan: expected "raise" or "lowest", got {nan!r}')
        if key == "abs_mul":
            if (other is None) == (col_scale is None):
                got = "neither" if other is None else "both"
                raise ValueError(
                    f"key: expected exactly one of other and col_scale with 'abs_mul', got {got}"
                )
        else:
            for given, text in ((other, "other"), (col_scale, "col_scale")):
                if given is not None:
                    raise ValueError(f"{text}: expected with key='abs_mul' only, got key={key!r}")
        if nan == "raise" and _cuda.capturing():
            raise ValueError(
                'nan: expected "lowest" while a CUDA graph is captured, got "raise", which has to wait'
            )
        for factors, text in ((other, "other"), (col_scale, "col_scale")):
            if factors is not None and len(factors) != len(tensors):
                raise ValueError(
                    f"{text}: expected {len(tensors)} tensors, one for each of {name}, got {len(factors)}"
                )
        self.key, self.nan, self.name = key, nan, name
        self.device: torch.device = next(t for t in tensors if _cuda.is_device_tensor(t)).device
        self.tensors: list[torch.Tensor] = []
        self.parts: list[_Part] = []
        self.owners: list[int] = []
        for i, t in enumerate(tensors):
            suffix = f"[{i}]" if many else ""
            g = other[i] if other is not None else None
            s = col_scale[i] if col_scale is not None else None
            parts = self._parts(t, g, s, name + suffix, suffix, rows)
            self.tensors.append(t)
            self.parts += parts
            self.owners += [i] * len(parts)
        self.place = _cuda.place_of(torch.empty(0, device=self.device))

    def _parts(self, w: Any, g: Any, scale: Any, name: str, suffix: str, rows: bool) -> list[_Part]:
        self._require_layout(w, name, rows)
        if w.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected dtype float32 or float16 or bfloat16, got {w.dtype}")
        if w.ndim < 2 and (rows or scale is not None):
            raise ValueError(f"{name}: expected [out, in] or [out, in/groups, ...taps], got {list(w.shape)}")
        count = w.shape[0] if w.ndim >= 2 else 1
        cols = math.prod(w.shape[1:]) if w.ndim >= 2 else w.numel()
        stride = w.stride(0) if w.ndim >= 2 and count > 1 else cols
        taps = max(1, math.prod(w.shape[2:]))
        if scale is not None:
            return self._scaled(w, scale, "col_scale" + suffix, _Part(w, 0, count, cols, stride, taps))
        if g is not None:
            self._require_layout(g, "other" + suffix, rows)
            if g.dtype != w.dtype:
                raise TypeError(f"other{suffix}: expected dtype {w.dtype}, got {g.dtype}")
            if g.shape != w.shape:
                raise ValueError(
                    f"other{suffix}: expected the shape of {name}, {list(w.shape)}, got {list(g.shape)}"
                )
        return [_Part(w, 0, count, cols, stride, taps, g)]

    def _scaled(self, w: torch.Tensor, scale: Any, name: str, whole: _Part) -> list[_Part]:
        self._require_layout(scale, name, False)
        if scale.dtype != torch.float32:
            raise TypeError(f"{name}: expected dtype float32, got {scale.dtype}")
        channels, count, cols = w.shape[1], whole.rows, whole.cols
        groups = scale.shape[0] if scale.ndim == 2 else 1
        fits = scale.ndim in (1, 2) and scale.shape[-1] in (cols, channels)
        if not fits or groups < 1 or count % groups:
            raise ValueError(
                f"{name}: expected [{channels}] (one factor for each input), [{cols}] (for each input and "
                f"tap) or one such row for each group of outputs, got {list(scale.shape)}"
            )
        columns = scale.reshape(groups, -1)
        if columns.shape[1] != cols:
            columns = (
                columns[:, :, None].expand(groups, channels, cols // max(channels, 1)).reshape(groups, cols)
            )
        each = count // groups
        return [
            replace(whole, first=i * each, rows=each, factors=columns[i], scale=True) for i in range(groups)
        ]

    def _require_layout(self, t: Any, name: str, rows: bool) -> None:
        _cuda.require_device(t, name, self.device)
        if rows and t.ndim == 2:
            if t.numel() and t.shape[1] > 1 and t.stride(1) != 1:
                raise ValueError(
                    f"{name}: expected contiguous rows, got stride {t.stride(1)}; call .contiguous()"
                )
        elif not t.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous memory, got strides {tuple(t.stride())}; call .contiguous()"
            )

    def require_masks(self, masks: list[Any], many: bool) -> None:
        if len(masks) != len(self.tensors):
            raise ValueError(f"out: expected {len(self.tensors)} masks, got {len(masks)}")
        inputs = [(t, f"{self.name}[{i}]" if many else self.name) for i, t in enumerate(self.tensors)]
        inputs += [(p.factors, "other") for p in self.parts if p.factors is not None and not p.scale]
        for i, m in enumerate(masks):
            name = f"out[{i}]" if many else "out"
            self._require_layout(m, name, False)
            if m.dtype != torch.bool:
                raise TypeError(f"{name}: expected dtype bool, got {m.dtype}")
            if m.shape != self.tensors[i].shape:
                raise ValueError(
                    f"{name}: expected the shape of {inputs[i][1]}, {list(self.tensors[i].shape)}, "
                    f"got {list(m.shape)}"
                )
            for other, text in inputs + [(b, f"out[{j}]") for j, b in enumerate(masks[:i])]:
                if _overlap(m, other):
                    raise ValueError(f"{name}: expected memory of its own, got some of {text}'s")

    def refuse_nans(self, nans: torch.Tensor) -> None:
        """Wait, and raise if there are NaN keys, unless they are welcome."""
        if self.nan == "raise" and (count := int(nans.item())):
            raise ValueError(
                f'{self.name}: expected no NaN among the keys, got {count} (nan="lowest" ranks them below '
                "every number)"
            )

    def mask_pointer(self, masks: list[torch.Tensor], i: int) -> int:
        return self.parts[i].pointer(masks[self.owners[i]], self.parts[i].cols)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    def span(t: torch.Tensor) -> tuple[int, int]:
        reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (reach + 1) * t.element_size()

    if not a.numel() or not b.numel():
        return False
    (a0, a1), (b0, b1) = span(a), span(b)
    return a0 < b1 and b0 < a1


class _Run:
    """A global selection that has been enqueued."""

    def __init__(self, s: _Selection, k: int, masks: list[torch.Tensor] | None) -> None:
        self.s = s
        self.sizes = [p.n for p in s.parts]
        total = sum(self.sizes)
        if not 0 <= k <= total:
            raise ValueError(f"k: expected 0 to {total} (the number of elements), got {k}")
        self.wanted = k
        self.k = max(k, 1)  # of nothing there is no k-th, but there may be NaNs
        self.counts = torch.zeros(4, dtype=torch.int64, device=s.device)
        self.value = torch.full((), math.inf, device=s.device)
        if total and (k or s.nan == "raise"):
            self._find(masks)
            s.refuse_nans(self.counts[3])
        if k == 0:
            self.value.fill_(math.inf)
            self.counts.zero_()

    def _find(self, masks: list[torch.Tensor] | None) -> None:
        s = self.s
        module, device, stream = s.place
        members = []
        for i, p in enumerate(s.parts):
            g, g_dtype = p.factor()
            target = 0 if masks is None else s.mask_pointer(masks, i)
            w = p.pointer(p.w, p.cols)
            members.append((w, p.n, _DTYPES[p.w.dtype], s.key, g, p.cols if p.scale else 0, g_dtype, target))
        nbytes = module.select_workspace(self.sizes, self.k, device)
        # torch's CUDA allocator aligns to 512 bytes, its CPU one to 64: the rest is for the emulator.
        memory = torch.empty(nbytes + 256, dtype=torch.uint8, device=s.device)
        self.memory = memory
        self.workspace = ((memory.data_ptr() + 255) // 256 * 256, nbytes)
        module.select_threshold(
            members, self.k, *self.workspace, self.value.data_ptr(), self.counts.data_ptr(), device, stream
        )

    def fill(self, masks: list[torch.Tensor]) -> None:
        """The masks that were given to the constructor."""
        module, device, stream = self.s.place
        if self.wanted:
            module.select_mask(self.sizes, self.k, *self.workspace, device, stream)
        else:
            for m in masks:
                m.zero_()


def threshold(
    tensors: list[Any],
    k: int,
    key: str,
    other: list[Any] | None,
    col_scale: list[Any] | None,
    nan: str,
    many: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value, above and ties of `pared.ops.Threshold`, 0-d tensors on the device."""
    run = _Run(_Selection(tensors, "scores", many, key, other, col_scale, nan, False), k, None)
    return run.value, run.counts[0], run.counts[1]


def mask(
    tensors: list[Any],
    k: int,
    key: str,
    other: list[Any] | None,
    col_scale: list[Any] | None,
    nan: str,
    many: bool,
    masks: list[Any],
) -> None:
    """Fills `masks`: the k largest of all elements."""
    s = _Selection(tensors, "scores", many, key, other, col_scale, nan, False)
    s.require_masks(masks, many)
    _Run(s, k, masks).fill(masks)


def mask_rows(
    tensors: list[Any],
    k: int,
    key: str,
    other: list[Any] | None,
    col_scale: list[Any] | None,
    nan: str,
    many: bool,
    masks: list[Any],
) -> None:
    """Fills `masks`: the k largest of every row."""
    s = _Selection(tensors, "scores", many, key, other, col_scale, nan, True)
    s.require_masks(masks, many)
    for i, p in enumerate(s.parts):
        if not 0 <= k <= p.cols:
            name = f"scores[{s.owners[i]}]" if many else "scores"
            raise ValueError(f"k: expected 0 to {p.cols} (the length of a row of {name}), got {k}")
    _fill_groups(s, k, None, masks)


def mask_groups(
    tensors: list[Any],
    n: int,
    m: int,
    key: str,
    other: list[Any] | None,
    col_scale: list[Any] | None,
    nan: str,
    many: bool,
    masks: list[Any],
) -> None:
    """Fills `masks`: the n largest of every m consecutive inputs."""
    if not (m >= 1 and 0 <= n <= m):
        raise ValueError(f"n, m: expected 0 <= n <= m and m >= 1, got {n}:{m}")
    s = _Selection(tensors, "x", many, key, other, col_scale, nan, True)
    s.require_masks(masks, many)
    _fill_groups(s, n, m, masks)


def _fill_groups(s: _Selection, k: int, group: int | None, masks: list[Any]) -> None:
    """The k largest of every `group` channels at one tap; None: of every row."""
    nans = torch.zeros((), dtype=torch.int64, device=s.device)
    module, device, stream = s.place
    for i, p in enumerate(s.parts):
        if not p.n:
            continue
        size, taps = (p.cols, 1) if group is None else (min(group, p.cols // p.taps), p.taps)
        module.select_groups(
            p.matrix(s.key),
            min(k, size),
            size,
            taps,
            s.mask_pointer(masks, i),
            nans.data_ptr() if s.nan == "raise" else 0,
            device,
            stream,
        )
    s.refuse_nans(nans)


def mask_blocks(
    tensors: list[Any],
    k: int,
    r: int,
    c: int,
    key: str,
    other: list[Any] | None,
    col_scale: list[Any] | None,
    nan: str,
    many: bool,
    masks: list[Any],
) -> None:
    """Fills `masks`: the elements of the k blocks of r outputs by c inputs with the largest scores."""
    if r < 1 or c < 1:
        raise ValueError(f"block: expected two positive sizes, got ({r}, {c})")
    s = _Selection(tensors, "x", many, key, other, col_scale, nan, True)
    s.require_masks(masks, many)
    counts = []
    for p in s.parts:
        if p.scale and p.rows != p.w.shape[0] and p.rows % r:
            raise ValueError(f"block: expected {r} to divide the rows of a group of col_scale, got {p.rows}")
        counts.append(-(-p.rows // r) * p.taps * -(-(p.cols // p.taps) // c))
    total = sum(counts)
    if not 0 <= k <= total:
        raise ValueError(f"k: expected 0 to {total} (the number of blocks), got {k}")
    # The scores are selected from as any tensor is.
    scores = torch.empty(total, device=s.device)
    chosen = torch.empty(total, dtype=torch.bool, device=s.device)
    blocks = [(r, c, p.taps) for p in s.parts]
    first = [sum(counts[:i]) for i in range(len(counts))]
    module, device, stream = s.place
    for p, block, at in zip(s.parts, blocks, first, strict=True):
        module.select_block_scores(p.matrix(s.key), block, scores.data_ptr() + 4 * at, device, stream)
    competing = _Selection([scores], "x", False, "identity", None, None, s.nan, False)
    _Run(competing, k, [chosen]).fill([chosen])
    for i, (p, block, at) in enumerate(zip(s.parts, blocks, first, strict=True)):
        target = s.mask_pointer(masks, i)
        module.select_expand_blocks(p.rows, p.cols, block, chosen.data_ptr() + at, target, device, stream)


def topk(
    x: torch.Tensor, k: int, key: str, other: torch.Tensor | None, nan: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices of the k largest of a vector, by key descending, equal keys by index."""
    s = _Selection([x], "x", False, key, None if other is None else [other], None, nan, False)
    selected = torch.empty(x.shape, dtype=torch.bool, device=s.device)
    run = _Run(s, k, [selected])
    indices = torch.empty(k, dtype=torch.int64, device=s.device)
    if k == 0:
        return x[:0].clone(), indices
    run.fill([selected])
    keys = torch.empty(k, dtype=torch.int32, device=s.device)
    module, device, stream = s.place
    module.select_compact(x.numel(), k, *run.workspace, keys.data_ptr(), indices.data_ptr(), device, stream)
    # What is left to sort are the k keys, integers in the order of the numbers.
    indices = indices[torch.sort(keys, descending=True, stable=True).indices]
    return x[indices], indices
