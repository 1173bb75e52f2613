"""Optimal Brain Surgeon on one matrix: which weights go, and how the others make up for it.

A layer's output error on its inputs X is the quadratic ``(w - w0) H (w - w0)^T / 2`` of each row, with
``H = 2/n X^T X``. Removing weight p with the best update of the others costs ``w_p**2 / (2 [H^-1]_pp)`` and
changes them by ``-w_p / [H^-1]_pp * [H^-1]_p``. Everything here follows from that:

`sweep`
    SparseGPT (Frantar and Alistarh, arXiv 2301.00774) and GPTQ (arXiv 2210.17323), and both in one pass:
    columns are settled from left to right, pruned, rounded or both, and the error of each is made up by those
    to the right. All rows share one factor of ``H^-1``.
`greedy`
    the exact greedy order, row by row: Optimal Brain Compression (arXiv 2208.11580), for small layers.
`least_squares`
    the best weights for given masks, in closed form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from pared import ops
from pared.pruning.calibration import _CONVOLUTIONS, INPUT, Observer, accumulator, columns
from pared.pruning.distributed import Processes
from pared.pruning.masks import keep_count
from pared.pruning.patterns import Pattern
from pared.pruning.targets import Target

__all__ = ["Hessian", "Matrices", "Rounding", "greedy", "least_squares", "solve", "sweep"]

# Columns whose errors are gathered before they reach the columns to the right: one product instead of many.
SPAN = 128


class Rounding(Protocol):
    """What `sweep` asks of a quantiser: the grid values nearest to a column. Zero has to be on the grid."""

    def enter(self, index: int, rest: torch.Tensor) -> None:
        """Columns from `index` on are about to be settled; `rest` [rows, remaining] is what they are now."""

    def column(self, index: int, w: torch.Tensor) -> torch.Tensor:
        """Column `index`, [rows], rounded."""
        ...


class Matrices:
    """A weight as matrices [rows, inputs], one for each set of rows that shares its inputs.

    One for most layers; one a group of a convolution; three for an attention's packed projections. A
    convolution's columns are ordered by tap, then channel, so that blocks and N:M groups are consecutive.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.shape = target.tensor.shape
        self.parts = 3 if target.parameter == "in_proj_weight" else target.groups
        self.rows = self.shape[1] if target.transposed else self.shape[0]
        self.channels = self.shape[0] if target.transposed else self.shape[1]
        self.taps = self.shape[2:].numel()

    @property
    def inputs(self) -> int:
        """Columns of each matrix."""
        return self.channels * self.taps

    def split(self, weight: torch.Tensor) -> list[torch.Tensor]:
        matrix = weight.t() if self.target.transposed else weight
        ordered = matrix.reshape(self.rows, self.channels, self.taps).transpose(1, 2).flatten(1)
        return list(ordered.chunk(self.parts)) if self.rows else []

    def join(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        ordered = torch.cat(list(matrices)).reshape(self.rows, self.taps, self.channels).transpose(1, 2)
        if self.target.transposed:
            return ordered.reshape(self.rows, self.channels).t()
        return ordered.reshape(self.shape)

    def units(self, width: int) -> list[tuple[int, int]]:
        """Runs of `width` consecutive inputs at one tap, the last of a tap shorter: columns [start, stop)."""
        starts = range(0, self.channels, width)
        return [
            (tap * self.channels + i, tap * self.channels + min(i + width, self.channels))
            for tap in range(self.taps)
            for i in starts
        ]


class Hessian(Observer):
    """``2/n X^T X`` of a layer's inputs, one for each of its `Matrices`; [inputs, inputs]."""

    events = frozenset({INPUT})

    def __init__(self, target: Target, pattern: Pattern | None = None) -> None:
        self.target, self.matrices = target, Matrices(target)
        size, dtype = self.matrices.inputs, accumulator(target.tensor)
        self.sums = [
            torch.zeros(size, size, dtype=dtype, device=target.tensor.device)
            for _ in range(self.matrices.parts)
        ]
        self.rows = [0] * self.matrices.parts
        self.turn = 0

    @staticmethod
    def nbytes(target: Target) -> int:
        """Memory that one takes."""
        matrices = Matrices(target)
        return matrices.parts * matrices.inputs**2 * (8 if target.tensor.dtype == torch.float64 else 4)

    def input(self, x: torch.Tensor) -> None:
        if isinstance(self.target.module, _CONVOLUTIONS):
            for part, rows in enumerate(self._unfolded(x)):
                for chunk in rows:
                    self._add(part, chunk)
        else:
            self._add(self.turn % len(self.sums), x)
            self.turn += 1

    def _add(self, part: int, x: torch.Tensor) -> None:
        x = x.to(self.sums[part].dtype)
        self.sums[part].addmm_(x.t(), x)
        self.rows[part] += x.shape[0]

    def _unfolded(self, x: torch.Tensor) -> Iterator[Iterator[torch.Tensor]]:
        """For each group the rows of the unfolded input, a few samples at a time."""
        module, channels = self.target.module, self.matrices.channels

        def rows(part: int) -> Iterator[torch.Tensor]:
            own = x[:, part * channels : (part + 1) * channels]
            step = max(1, 2**22 // max(1, own[:1].numel() * self.matrices.taps))
            for samples in torch.split(own, step):
                taps = torch.stack([c.flatten(2) for c in columns(module, samples)])
                yield taps.permute(1, 3, 0, 2).reshape(-1, self.matrices.inputs)

        return (rows(part) for part in range(self.matrices.parts))

    def tensors(self) -> Sequence[torch.Tensor]:
        return [s.diagonal() for s in self.sums]

    def reduce(self, processes: Processes) -> None:
        self.sums, self.rows = processes.add(self.sums), processes.total(*self.rows)

    def result(self) -> list[torch.Tensor]:
        if not all(self.rows):
            raise ValueError(
                f"data: expected batches that reach layer {self.target.layer!r}, got none that do"
            )
        return [s * (2.0 / n) for s, n in zip(self.sums, self.rows, strict=True)]


@dataclass(frozen=True)
class Inverse:
    """``H^-1 = U^T U`` with U upper triangular, of the damped H, and which inputs were never active."""

    upper: torch.Tensor
    dead: torch.Tensor

    @property
    def diagonal(self) -> torch.Tensor:
        """[H^-1]_pp for every p."""
        return self.upper.square().sum(0)


def invert(h: torch.Tensor, damping: float, where: str = "") -> Inverse:
    """Factor of the inverse of ``H + damping * mean(diag H) * I``, computed in float64.

    Inputs that are always zero get 1 on the diagonal: they are independent of all others.
    """
    dead = h.diagonal() == 0
    wide = h.to(torch.float64)
    wide = wide + torch.diag(dead.to(torch.float64))
    diagonal = wide.diagonal()
    size = float(diagonal.mean()) if diagonal.numel() else 0.0
    for attempt in range(6):
        share = damping * 10.0**attempt if attempt == 0 or damping > 0 else 1e-8 * 10.0**attempt
        damped = wide + torch.eye(wide.shape[0], dtype=wide.dtype, device=wide.device) * (share * size)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            return Inverse(upper.to(h.dtype), dead)
    raise ValueError(
        f"data: expected inputs whose second moments can be inverted{where}, got a matrix that stays "
        f"singular "
        "with damping; give more samples or a larger damping"
    )


def _spans(units: Sequence[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    """Consecutive units of together at most `size` columns (one unit at least)."""
    span: list[tuple[int, int]] = []
    for unit in units:
        if span and unit[1] - span[0][0] > size:
            yield span
            span = []
        span.append(unit)
    if span:
        yield span


def sweep(
    w: torch.Tensor,
    inverse: Inverse,
    *,
    units: Sequence[tuple[int, int]] | None = None,
    sparsity: float = 0.0,
    pattern: Pattern | None = None,
    alive: torch.Tensor | None = None,
    rounding: Rounding | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Settle the columns of `w` from left to right: prune, round, and let the rest make up for it.

    Parameters
    ----------
    w : [rows, inputs], as `inverse`.
    units : runs of columns that are pruned together or make a group (`Matrices.units`); None: single ones.
    sparsity, pattern : how much of each span of 128 columns goes, and in which form; None: nothing.
    alive : [rows, inputs] bool; False: zero, and stays so.
    rounding : grid of the weights that stay.

    Returns
    -------
    The new weights, and the mask of those that were kept, both [rows, inputs].
    """
    rows, size = w.shape
    w = w.clone()
    result = torch.zeros_like(w)
    mask = torch.ones_like(w, dtype=torch.bool) if alive is None else alive.clone()
    units = [(i, i + 1) for i in range(size)] if units is None else units
    u = inverse.upper
    budget = _Budget(rows, units, sparsity, pattern) if pattern is not None else None
    for span in _spans(units, SPAN):
        first, last = span[0][0], span[-1][1]
        part, factor = w[:, first:last], u[first:last, first:last]
        if budget is not None and pattern is not None and pattern.kind != "nm":
            score = _block_scores(part, factor, span, mask[:, first:last], inverse.dead[first:last])
            mask[:, first:last] &= budget.choose(score, span)
        errors = torch.empty_like(part)
        starts = dict(span)
        for j in range(last - first):
            if pattern is not None and pattern.kind == "nm" and first + j in starts:
                stop = starts[first + j] - first
                mask[:, first + j : first + stop] &= _group_mask(
                    part[:, j:stop], factor, slice(j, stop), mask[:, first + j : first + stop], pattern
                )
            if rounding is not None:
                rounding.enter(first + j, w[:, first + j :])
            column = part[:, j]
            kept = mask[:, first + j]
            q = torch.where(kept, column, 0.0)
            if rounding is not None:
                q = torch.where(kept, rounding.column(first + j, q), 0.0)
            result[:, first + j] = q
            error = (column - q) / factor[j, j]
            errors[:, j] = error
            part[:, j + 1 :].addr_(error, factor[j, j + 1 :], alpha=-1)
        w[:, last:].addmm_(errors, u[first:last, last:], alpha=-1)
    return result, mask


def _block_scores(
    part: torch.Tensor,
    factor: torch.Tensor,
    span: Sequence[tuple[int, int]],
    alive: torch.Tensor,
    dead: torch.Tensor,
) -> torch.Tensor:
    """Loss of removing each unit, [rows, units]: ``w_B ([H_F^-1]_BB)^-1 w_B^T``, F the columns not settled.

    The factor's lower right corners are the factors of the inverses that are left, so that the matrix in the
    middle is ``U_BB^T U_BB``.
    """
    part = torch.where(alive, part, 0.0) * ~dead
    first = span[0][0]
    if all(stop - start == 1 for start, stop in span):
        return (part / factor.diagonal()).square()
    scores = []
    for start, stop in span:
        own = slice(start - first, stop - first)
        solved = torch.linalg.solve_triangular(factor[own, own], part[:, own], upper=True, left=False)
        scores.append(solved.square().sum(1))
    return torch.stack(scores, 1)


def _group_mask(
    part: torch.Tensor, factor: torch.Tensor, own: slice, alive: torch.Tensor, pattern: Pattern
) -> torch.Tensor:
    score = torch.where(alive, (part / factor.diagonal()[own]).square(), -1.0).float().contiguous()
    return cast(torch.Tensor, ops.nm_mask(score, pattern.keep, pattern.cols, key="identity"))


class _Budget:
    """How many units each span keeps, so that the layer keeps exactly what the sparsity asks for."""

    def __init__(
        self, rows: int, units: Sequence[tuple[int, int]], sparsity: float, pattern: Pattern
    ) -> None:
        self.height = pattern.rows
        self.block_rows = -(-rows // pattern.rows)
        self.total = self.block_rows * len(units)
        self.keep = keep_count(self.total, sparsity)
        self.seen = self.kept = 0

    def choose(self, score: torch.Tensor, span: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Mask [rows, columns of the span]."""
        rows, n = score.shape
        if self.height > 1:
            padded = torch.nn.functional.pad(score, (0, 0, 0, -rows % self.height))
            score = padded.reshape(self.block_rows, self.height, n).sum(1)
        self.seen += self.block_rows * n
        keep = round(self.keep * self.seen / self.total) - self.kept
        self.kept += keep
        chosen = cast(torch.Tensor, ops.topk_mask(score.float().contiguous(), keep, key="identity"))
        widths = torch.tensor([stop - start for start, stop in span], device=chosen.device)
        tall = chosen.repeat_interleave(self.height, 0)[:rows]
        return tall.repeat_interleave(widths, 1)


def greedy(
    w: torch.Tensor,
    h: torch.Tensor,
    drop: int,
    *,
    alive: torch.Tensor | None = None,
    damping: float = 0.0,
    pattern: Pattern | None = None,
    units: Sequence[tuple[int, int]] | None = None,
    memory: int = 2**28,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact greedy removal, one weight at a time, with the update of the others after each.

    Parameters
    ----------
    w, h : [rows, inputs] and [inputs, inputs].
    drop : how many weights go in all; which rows lose more is decided by the losses. With N:M `pattern` each
        of the groups `units` keeps N and `drop` is not read.
    alive : as for `sweep`.
    memory : bytes for the inverse matrices of the rows that are worked on at a time.

    Returns
    -------
    The new weights, optimal for the masks, and the masks. About ``rows * inputs**3`` operations.
    """
    upper = invert(h, damping).upper.to(torch.float64)
    full = upper.t() @ upper
    size = w.shape[1]
    group = torch.zeros(size, dtype=torch.int64, device=w.device)
    limit = [size]
    if pattern is not None and pattern.kind == "nm" and units is not None:
        for i, (start, stop) in enumerate(units):
            group[start:stop] = i
        limit = [max(0, stop - start - pattern.keep) for start, stop in units]
    steps = min(sum(limit), size)
    step = max(1, memory // max(1, 8 * size * size))
    orders, losses = [], []
    for chunk in torch.split(w.to(torch.float64), step):
        order, loss = _traces(chunk, full, group, torch.tensor(limit, device=w.device), steps)
        orders.append(order)
        losses.append(loss)
    order, loss = torch.cat(orders), torch.cat(losses)
    if pattern is not None and pattern.kind == "nm":
        gone = torch.ones_like(order, dtype=torch.bool)
    else:
        # A row's next weight may be cheaper than the one before, but cannot go first: its running maximum.
        price = loss.cummax(1).values.float().neg_().contiguous()
        gone = cast(torch.Tensor, ops.topk_mask(price, drop, key="identity"))
    mask = torch.ones_like(w, dtype=torch.bool).scatter_(1, order, gone.logical_not())
    if alive is not None:
        mask &= alive
    return least_squares(w, h, mask, damping=damping, memory=memory), mask


def _traces(
    w: torch.Tensor, full: torch.Tensor, group: torch.Tensor, limit: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """In which order each row's weights go, and what each costs: [rows, steps] both."""
    rows, size = w.shape
    w = w.clone()
    inverse = full.expand(rows, size, size).clone()
    gone = torch.zeros(rows, size, dtype=torch.bool, device=w.device)
    left = limit.expand(rows, -1).clone()
    every = torch.arange(rows, device=w.device)
    order = torch.empty(rows, steps, dtype=torch.int64, device=w.device)
    loss = torch.empty(rows, steps, dtype=torch.float64, device=w.device)
    for i in range(steps):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        cost = (w.square() / diagonal).masked_fill(gone | (left[:, group] == 0), torch.inf)
        loss[:, i], p = cost.min(1)
        order[:, i] = p
        column, pivot = inverse[every, :, p], inverse[every, p, p].unsqueeze(1)
        w -= w[every, p].unsqueeze(1) / pivot * column
        inverse -= column.unsqueeze(2) * (column / pivot).unsqueeze(1)
        gone[every, p] = True
        left[every, group[p]] -= 1
        inverse[every, p, p] = 1.0  # settled: no division by zero
        w[every, p] = 0.0
    return order, loss / 2


def solve(systems: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``systems^-1 right`` of symmetric matrices [n, size, size], positive but for rounding; `right` is
    [n, size, any].

    By Cholesky's factors. torch 2.13 on the CPU gets the batched LU factors of ``torch.linalg.solve`` wrong
    from 257 rows on when it has several threads, so that the matrices without such factors go alone.
    """
    lower, failed = torch.linalg.cholesky_ex(systems)
    solved = torch.cholesky_solve(right, lower)
    for i in failed.nonzero().flatten().tolist():
        solved[i] = torch.linalg.solve(systems[i], right[i])
    return solved


def least_squares(
    w: torch.Tensor, h: torch.Tensor, mask: torch.Tensor, *, damping: float = 0.0, memory: int = 2**28
) -> torch.Tensor:
    """The weights under `mask` whose outputs are nearest to those of `w`: ``H_SS w_S = (H w0)_S`` row by
    row.
    """
    size = h.shape[0]
    wide = h.to(torch.float64)
    wide = wide + torch.diag((wide.diagonal() == 0).to(torch.float64))
    wide = wide + torch.eye(size, dtype=wide.dtype, device=wide.device) * (
        damping * float(wide.diagonal().mean())
    )
    step = max(1, memory // max(1, 8 * size * size))
    out = []
    for rows, kept in zip(torch.split(w.to(torch.float64), step), torch.split(mask, step), strict=True):
        m = kept.to(torch.float64)
        system = wide * m.unsqueeze(1) * m.unsqueeze(2) + torch.diag_embed(1.0 - m)
        out.append(solve(system, ((rows @ wide) * m).unsqueeze(2)).squeeze(2) * m)
    return torch.cat(out).to(w.dtype) if out else w.clone()


def output_error(w: torch.Tensor, w0: torch.Tensor, h: torch.Tensor) -> float:
    """Mean squared output error of the layer on its calibration inputs, summed over the outputs."""
    delta = (w - w0).to(torch.float64)
    return float((delta @ h.to(torch.float64)).mul_(delta).sum() / 2)
