"""The timer of CUDA devices: events around replays of graphs, interleaved round by round.

A graph keeps the host's part out. It goes round copies of the operands that together exceed the L2 cache
where a model's weights do, so that each is read from memory, as in the model. The rest is `pared._timing`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from pared._timing import Timings

__all__ = ["Clock", "EventClock", "copies_beyond", "sample_rounds"]

# Of the L2: a line of the oldest copy is then gone under any replacement.
L2_FACTOR = 3.0
LEAST_ROUNDS = 3


class Clock(Protocol):
    """Seconds a call of each sample."""

    def prepare(self, call: Callable[[int], object], copies: int, graph: bool) -> Callable[[], float]: ...


class EventClock:
    """CUDA events around the replay of one graph that goes round all copies."""

    def __init__(self, warmup: int = 2) -> None:
        self.warmup = warmup

    def prepare(self, call: Callable[[int], object], copies: int, graph: bool) -> Callable[[], float]:
        """A function that takes one sample; ``call(i)`` enqueues the operation on copy `i`.

        Raises ``RuntimeError`` where `graph` asks for one and the call waits for the device.
        """
        import torch

        def round_() -> None:
            for i in range(copies):
                call(i)

        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.warmup):
                round_()
        torch.cuda.current_stream().wait_stream(side)
        run = round_
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                round_()
            run = captured.replay
        begin, end = (torch.cuda.Event(True) for _ in range(2))  # type: ignore[no-untyped-call]

        def sample() -> float:
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds: float = begin.elapsed_time(end) * 1e-3 / copies
            return seconds

        sample()
        return sample


def copies_beyond(l2: int, nbytes: int) -> int:
    """How many copies of `nbytes` exceed the L2 often enough; at least two."""
    return max(2, math.ceil(L2_FACTOR * l2 / max(1, nbytes)))


def sample_rounds(
    samplers: Mapping[str, Callable[[], float]], rounds: int, seed: int = 0, seconds: float = math.inf
) -> Timings:
    """Each sampler once a round, in an order drawn anew; after three rounds none begins beyond `seconds`."""
    names = list(samplers)
    random = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {n: [] for n in names}
    end = time.monotonic() + seconds
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.monotonic() > end:
            break
        for i in random.permutation(len(names)):
            samples[names[i]].append(samplers[names[i]]())
    # A tick of nothing would make a ratio of nothing.
    return Timings({n: np.maximum(np.asarray(s), 1e-9) for n, s in samples.items()}, dict.fromkeys(names, 1))
