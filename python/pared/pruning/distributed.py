"""Statistics of a data-parallel job: each process sees its share of the data, and all choose the same masks.

Where ``torch.distributed`` is initialised with several processes, what needs data is a joint call: every
process calls it with the same model and arguments and its own batches. Sums, norms, Hessians, histograms,
extremes and gradients are reduced once, behind the last batch, so the processes may have different numbers of
batches; what one of them raises, all of them raise; masks and rewritten weights are those of the first
process. Criteria that read weights alone exchange nothing.

Inside ``with process_group(group):`` only the processes of `group` take part; ``process_group(None)`` makes
the calls of this process its own again.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Processes", "current", "process_group", "together"]

_DEFAULT = object()
_chosen: contextvars.ContextVar[Any] = contextvars.ContextVar("pared_process_group", default=_DEFAULT)


@contextmanager
def process_group(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Calls inside reduce over `group`; None: this process alone. Outside, over all processes.

    Raises
    ------
    TypeError : `group` is no group of torch.distributed.
    """
    if dist.is_available():  # a process outside of a group has a number in its place
        outside = isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER
        known = outside or isinstance(group, dist.ProcessGroup)
    else:
        known = False
    if group is not None and not known:
        raise TypeError(f"group: expected a group of torch.distributed or None, got {type(group).__name__}")
    token = _chosen.set(group)
    try:
        yield
    finally:
        _chosen.reset(token)


@dataclass(frozen=True)
class Processes:
    """The processes that share the work. Every method is called by all of them, in the same order."""

    group: Any
    rank: int
    size: int

    def gather(self, value: object) -> list[Any]:
        """What each process has given, in the order of their ranks; for small things."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def add_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, in place: the same bits everywhere."""
        place = self._placed(tensor)
        dist.all_reduce(place, dist.ReduceOp.SUM, group=self.group)
        if place is not tensor:
            tensor.copy_(place)
        return tensor

    def first_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first process's values, in place."""
        bits = tensor.detach()
        place = self._placed(bits.to(torch.uint8) if bits.dtype == torch.bool else bits)
        dist.broadcast(place, group=self.group, group_src=0)
        if place is not bits:
            bits.copy_(place)
        return tensor

    def total(self, *counts: int) -> list[int]:
        """Sums of numbers."""
        return [int(n) for n in self.add_(torch.tensor(counts, dtype=torch.int64, device="cpu")).tolist()]

    def add(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Sums of lists of tensors; a process that saw nothing has fewer of them, or none."""
        shapes = self.gather([(tuple(t.shape), t.dtype, str(t.device.type)) for t in tensors])
        found = list(tensors)
        for shape, dtype, device in max(shapes, key=len)[len(found) :]:
            found.append(torch.zeros(shape, dtype=dtype, device=device))
        return [self.add_(t) for t in found]

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, or a copy, where the group's backend takes it: contiguous, on its kind of device."""
        backend = str(dist.get_backend(self.group))
        tensor = tensor.contiguous()
        if "nccl" in backend and "gloo" not in backend:
            return tensor.to(torch.device("cuda", torch.cuda.current_device()))
        return tensor.cpu() if backend in ("gloo", "mpi") else tensor


def current() -> Processes | None:
    """The processes to reduce over; None where there is only this one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = _chosen.get()
    if group is None:
        return None
    group = dist.group.WORLD if group is _DEFAULT else group
    size = dist.get_world_size(group)
    if size < 2:
        return None
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("process_group: expected a group that this process belongs to, got another one")
    return Processes(group, rank, size)


@contextmanager
def together(processes: Processes | None) -> Iterator[None]:
    """What one process raises inside, all raise at the end: none is left waiting for the others.

    Raises
    ------
    ValueError : on the processes that did not fail, with the rank and the text of the first one that did.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        if processes is None:
            raise
        error = raised
    if processes is None:
        return
    texts = processes.gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise ValueError(
                f"data: expected every process to finish its share, got from process {rank}: {text}"
            )
