"""Files that appear as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], overwrite: bool = True) -> Iterator[str]:
    """The name of a file to write beside `path`, which takes its name when the block ends well and vanishes
    otherwise. It is on the disk before it has that name, so that not even a power cut leaves half a file.

    Raises
    ------
    FileExistsError : a file of that name was there first, and `overwrite` is False.
    FileNotFoundError : there is no such folder.
    ValueError : something else has that name, a folder or a device; /dev/null is not to become a file.
    """
    folder, name = os.path.split(os.fspath(path))
    if not os.path.isdir(folder or os.curdir):
        raise FileNotFoundError(errno.ENOENT, f"{name}: expected a folder that exists", folder)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"path: expected a regular file, got {os.fspath(path)!r} which is none")
    temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if overwrite:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # unlike rename, fails when another process was faster
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    # So that the new name, too, is on the disk, where the system can do that.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder or ".", os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
