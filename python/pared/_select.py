"""Which packed formats of a layer are worth timing: what their estimated times say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pared.nn._base import as_images
from pared.ops._estimate import Facts, Work, estimate
from pared.ops._formats import FORMATS

__all__ = ["Shortlist", "facts_of", "shortlist"]

# Formats of one precision that are timed, and how far above the least estimate one of them may be. Both are
# from `python -m bench.estimate check`: with them the fastest is nearly always among those that are timed.
_TIMED = 3
_WITHIN = 2.3


def facts_of(weight: Tensor, groups: int = 1) -> Facts:
    """What the packed forms of a weight depend on; ``[out, in]`` or ``[out, in/groups, (kh,) kw]``."""
    w = as_images(weight.detach())
    convolution = w.ndim == 4
    used = (w.permute(0, 2, 3, 1).reshape(-1, w.shape[1]) if convolution else w) != 0
    taps = w.shape[2] * w.shape[3] if convolution else 0
    rows, depth = w.shape[0], w.shape[1]
    # [rows, taps * depth], each tap's channels padded to whole blocks of four.
    used = nn.functional.pad(used, (0, -depth % 4)).reshape(rows, -1)
    quads = nn.functional.pad(used, (0, 0, 0, -rows % 4)).reshape(-1, 4, used.shape[1])
    quads = quads[:, 0] | quads[:, 1] | quads[:, 2] | quads[:, 3]
    counts = [torch.count_nonzero(t) for t in (used, quads, _words(used), _words(quads))]
    nnz, n_quads, n_words, n_word_quads = (int(n) for n in counts)
    return Facts(
        rows,
        depth * max(1, taps) * groups,
        w.numel(),
        nnz,
        n_quads,
        n_words,
        n_word_quads,
        taps,
        w.shape[2] if convolution else 0,
        2 if w.dtype == torch.bfloat16 else 4,
    )


def _words(used: Tensor) -> Tensor:
    """Four flags at a time, as integers."""
    return used.contiguous().view(torch.int32)


@dataclass(frozen=True)
class Shortlist:
    """What is to be timed, and what is not.

    Attributes
    ----------
    estimates : seconds of all calls, by format.
    timed : formats to time, the least estimate first.
    passed_over : format -> why it is not timed.
    """

    estimates: dict[str, float]
    timed: list[str]
    passed_over: dict[str, str] = field(default_factory=dict)


def _works(name: str, facts: Facts) -> dict[str, Work]:
    """What a format would do with the weight, by the kind of each packing that it holds."""
    f = FORMATS[name]
    kinds = [FORMATS[part].weight.kind for part in f.combines] or [f.weight.kind]
    return {kind: facts.work(kind) for kind in kinds}


def shortlist(names: Sequence[str], facts: Facts, calls: Mapping[int, int], threads: int) -> Shortlist:
    """Of these formats, those that may be the fastest for the calls (positions -> how many), at each
    precision: an exact kernel takes the place of one with 8 bits that costs too much accuracy.

    A format that combines others is estimated with the faster of them for each call.
    """
    works = {name: _works(name, facts) for name in names}
    estimates = {
        name: sum(
            count * min(estimate(kind, work, n, threads) for kind, work in mine.items())
            for n, count in calls.items()
        )
        for name, mine in works.items()
    }
    timed: list[str] = []
    passed_over: dict[str, str] = {}
    for exact in (True, False):
        mine = [n for n in names if (FORMATS[n].precision == "float32") == exact]
        mine.sort(key=lambda n: estimates[n])
        chosen: list[str] = []
        for name in mine:
            least = estimates[mine[0]]
            same = next((n for n in chosen if list(works[n].values()) == list(works[name].values())), None)
            if same is not None:
                passed_over[name] = f"the same kernel and zeros as {same}"
            elif estimates[name] > _WITHIN * least:
                passed_over[name] = (
                    f"estimated to take {estimates[name] / least:.1f} times as long as {mine[0]}"
                )
            elif len(chosen) == _TIMED:
                passed_over[name] = f"estimated to be slower than {', '.join(chosen)}"
            else:
                chosen.append(name)
        timed += chosen
    timed.sort(key=lambda n: estimates[n])
    return Shortlist(estimates, timed, passed_over)
