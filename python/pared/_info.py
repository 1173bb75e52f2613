"""What runs on this machine."""

from __future__ import annotations

from typing import NamedTuple

from pared import _core


class KernelInfo(NamedTuple):
    """One compiled kernel: its name ``<op>_<variant>__<isa>``, and whether this machine can run it."""

    name: str
    op: str
    isa: str
    doc: str
    supported: bool


def isa() -> str:
    """The instruction-set level in force: ``PARED_ISA`` if set, else the highest supported here."""
    return _core.isa()


def kernels() -> list[KernelInfo]:
    """Every kernel in this build, lowest level first within an operation."""
    return [KernelInfo(**k) for k in _core.kernels()]
