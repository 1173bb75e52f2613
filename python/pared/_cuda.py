"""The CUDA part: loaded on first use, from a shared object of its own that a build may lack."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from pared.ops._arrays import is_torch

if TYPE_CHECKING:
    import torch


def _load() -> Any:
    """The extension module. Raises ``RuntimeError`` that says how to get it when this build has none."""
    try:
        return importlib.import_module("pared._cuda_kernels")
    except ModuleNotFoundError as e:
        if e.name != "pared._cuda_kernels":
            raise
        raise RuntimeError(
            "CUDA: this installation of pared was built without its CUDA part; install it from source "
            "where a CUDA compiler is, with PARED_CUDA=on in the environment"
        ) from e


def _reason(kernels: Any) -> str | None:
    """Why no device can be used, or None."""
    try:
        count = kernels.device_count()
    except RuntimeError as e:
        return f"CUDA: no usable NVIDIA driver on this machine ({e})"
    return None if count else "CUDA: the driver shows no device on this machine"


@functools.cache
def kernels(device: int) -> Any:
    """The extension module, once `device` is known to run it.

    Raises ``RuntimeError`` when this build has no CUDA part, when the machine has no driver or no such
    device, or when the build has no code for the device's compute capability. A failure is not remembered.
    """
    module = _load()
    reason = _reason(module)
    if reason is not None:
        raise RuntimeError(reason)
    info = module.device_info(device)
    if not info["supported"]:
        major, minor = info["capability"]
        raise RuntimeError(
            f"CUDA: device {device} ({info['name']}) has compute capability {major}.{minor}; this build of "
            f"pared has code for {module.ARCHITECTURES}"
        )
    return module


def status() -> str:
    """One line on the CUDA part, for reports: what is missing, or the devices."""
    try:
        module = _load()
    except RuntimeError:
        return "not built"
    reason = _reason(module)
    if reason is not None:
        return reason.removeprefix("CUDA: ")
    lines = []
    for i in range(module.device_count()):
        d = module.device_info(i)
        major, minor = d["capability"]
        lines.append(f"{d['name']} ({major}.{minor}{'' if d['supported'] else ', not supported'})")
    return ", ".join(lines)


class Place(NamedTuple):
    """Where an operation runs: the extension, a device's index, and torch's current stream there."""

    module: Any
    device: int
    stream: int


# The tests put the emulated kernels here, and CPU tensors then stand for CUDA tensors.
_emulated: Any = None


def is_device_tensor(x: object) -> bool:
    """Whether the CUDA part is responsible for `x`. Never imports torch."""
    return is_torch(x) and (x.is_cuda or (_emulated is not None and x.device.type == "cpu"))


def place_of(x: torch.Tensor) -> Place:
    """The place of a device tensor. Raises ``RuntimeError`` as `kernels` does."""
    import torch

    if _emulated is not None:
        return Place(_emulated, 0, 0)
    index = x.device.index
    return Place(kernels(index), index, torch._C._cuda_getCurrentRawStream(index))


def require_device(x: object, name: str, device: torch.device) -> None:
    """Raise ``TypeError`` unless `x` is a tensor, ``ValueError`` unless it is on `device`."""
    if not is_torch(x):
        raise TypeError(f"{name}: expected a torch tensor on {device}, got {type(x).__name__}")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


def capturing() -> bool:
    """Whether torch's current stream is being captured into a CUDA graph: nothing may wait then."""
    import torch

    return _emulated is None and torch.cuda.is_current_stream_capturing()
