"""Ctrl-C between two states of a model, and not inside the step from one to the other."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["uninterrupted"]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block ends: for the moment in which a model is half written."""
    handler = signal.getsignal(signal.SIGINT)
    # Python runs handlers in the main thread alone. What is no function ignores the signal, or the process
    # ends by it.
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])
