"""The timer of CUDA devices: events around replays of graphs, interleaved round by round.

A graph keeps the host's part out. It goes round copies of the operands that together exceed the L2 cache
where a model's weights do, so that each is read from memory, as in the model. The rest is `pared._timing`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pared._timing import Timings

if TYPE_CHECKING:
    import torch

__all__ = ["Clock", "EventClock", "captured", "copies_beyond", "sample_rounds"]

# Of the L2: a line of the oldest copy is then gone under any replacement.
L2_FACTOR = 3.0
LEAST_ROUNDS = 3
# Of the device's clock, before the first event: 100 us. The host takes less to enqueue a graph, for which the
# device would wait between the events.
BUSY_CYCLES = 200_000
# Graphs whose capture has failed. Where torch has not noted the end of it, it asks them in later captures.
_failed: list[torch.cuda.CUDAGraph] = []


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `call` enqueues on torch's current device.

    Raises ``RuntimeError`` where a graph cannot hold it, because it waits for the device for example. Torch
    can capture others afterwards, and its current stream is what it was.
    """
    import torch

    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # The inner context does not leave its stream when the capture ends with an error.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
            call()
    except BaseException:
        # Nor, before torch 2.12, does it tell the allocator, which from then on refuses each capture and
        # torch.cuda.empty_cache(). Where it did, this finds no such pool.
        device = torch.cuda.current_device()
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
            _failed.append(graph)
        raise
    return graph


class Clock(Protocol):
    """Seconds a call of each sample."""

    def prepare(self, call: Callable[[int], object], copies: int, graph: bool) -> Callable[[], float]: ...


class EventClock:
    """CUDA events around the replay of one graph that goes round all copies."""

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
            for _ in range(2 if graph else 1):  # what is too slow for a graph may take seconds
                round_()
        torch.cuda.current_stream().wait_stream(side)
        run = captured(round_).replay if graph else round_
        begin, end = (torch.cuda.Event(True) for _ in range(2))  # type: ignore[no-untyped-call]

        def sample() -> float:
            if graph:
                torch.cuda._sleep(BUSY_CYCLES)  # type: ignore[no-untyped-call]
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds: float = begin.elapsed_time(end) * 1e-3 / copies
            return seconds

        if graph:
            sample()  # brings it to the device
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
