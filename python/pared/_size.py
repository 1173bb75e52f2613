"""Bytes of a model, in memory and on disk."""

from __future__ import annotations

from typing import IO, Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pared.nn import PackedModule
from pared.nn._foreign import foreign_bytes


def memory_bytes(model: nn.Module) -> int:
    """Bytes of the storages behind parameters and buffers, each counted once; of layers on a device the
    weights there, not the copies that stay in the CPU's memory."""
    storages: dict[int, int] = {}
    moved = [m for m in model.modules() if isinstance(m, PackedModule) and m._on_device is not None]
    apart = {id(m.packed) for m in moved}
    for whole in [*model.parameters(), *(b for b in model.buffers() if id(b) not in apart)]:
        inner: list[str] = whole.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(whole) else []
        for t in [getattr(whole, name) for name in inner] or [whole]:
            if t.layout == torch.strided:
                s = t.untyped_storage()
                storages[s.data_ptr()] = s.nbytes()
    for m in moved:
        for t in m._device_tensors:
            s = t.untyped_storage()
            storages[s.data_ptr()] = s.nbytes()
    return sum(storages.values()) + sum(foreign_bytes(m) for m in model.modules())


class Counter:
    """A file that only counts what is written."""

    size = 0

    def flush(self) -> None:
        pass

    def write(self, data: Any) -> int:
        n = len(memoryview(data).cast("B"))
        self.size += n
        return n


def disk_bytes(model: nn.Module) -> int:
    """Bytes of the state dict as torch.save writes it."""
    counter = Counter()
    torch.save(model.state_dict(), cast(IO[bytes], counter))
    return counter.size
