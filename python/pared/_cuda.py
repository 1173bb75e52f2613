"""The CUDA part: loaded on first use, from a shared object of its own that a build may lack."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

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


def threshold_mask(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """``abs(x) > threshold`` in one pass on `x`'s device, on torch's current stream; nothing waits.

    Parameters
    ----------
    x : CUDA tensor of float32, float16 or bfloat16, contiguous, any shape.
    threshold : float32, one element, on the same device: its value is read when the kernel runs.

    Returns
    -------
    bool tensor of `x`'s shape. NaN is not above anything, and nothing is above a NaN threshold.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came.
    RuntimeError : when the CUDA part is missing or cannot run on this device.
    """
    import torch

    for name, t in (("x", x), ("threshold", threshold)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name}: expected a CUDA tensor, got {type(t).__name__}")
        if not t.is_cuda:
            raise TypeError(f"{name}: expected a CUDA tensor, got one on {t.device}")
        if not t.is_contiguous():
            raise ValueError(f"{name}: expected contiguous memory, got strides {tuple(t.stride())}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"x: expected dtype float32 or float16 or bfloat16, got {x.dtype}")
    if threshold.dtype != torch.float32 or threshold.numel() != 1:
        raise TypeError(
            f"threshold: expected one float32 element, got {threshold.dtype} {list(threshold.shape)}"
        )
    if threshold.device != x.device:
        raise ValueError(f"threshold: expected a tensor on {x.device}, got one on {threshold.device}")
    device = x.device.index
    module = kernels(device)
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    module.threshold_mask(
        x.data_ptr(),
        str(x.dtype).removeprefix("torch."),
        x.numel(),
        threshold.data_ptr(),
        mask.data_ptr(),
        device,
        torch._C._cuda_getCurrentRawStream(device),
    )
    return mask
