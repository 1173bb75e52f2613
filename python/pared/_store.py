"""Small measurements kept between processes: one JSON file, a dictionary of entries under a version.

What is measured once need not be measured again, but none of it is needed: a file that cannot be read is
measured anew, one that cannot be written is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: a file is still replaced as a whole, but the later of two writers wins
    fcntl = None  # type: ignore[assignment]

__all__ = ["JsonStore", "user_cache"]


def user_cache() -> Path | None:
    """The folder for what pared keeps about this machine: ``$XDG_CACHE_HOME/pared`` or ``~/.cache/pared``.

    None where the user has no home, as in a container that runs under a number alone.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "pared"
    try:
        return Path.home() / ".cache" / "pared"
    except RuntimeError:
        return None


class JsonStore:
    """Entries of one kind in one file, which several processes may read and write at once.

    Parameters
    ----------
    path : of the file. It need not exist; its folder is made when something is written.
    kind : what the entries are, for example ``"pared machine"``: a file of another kind is not touched.
    version : of their meaning. Entries of another version are dropped.
    warn : whether to say so where the file cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, version: int, *, warn: bool = True) -> None:
        self.path, self.kind, self.version, self._warns = Path(path), kind, version, warn

    def _warn(self, text: str) -> None:
        if self._warns:
            warnings.warn(f"{self.path}: {text}", stacklevel=3)

    def read(self) -> dict[str, Any]:
        """The entries; none where the file is not one of this kind."""
        entries, problem = self._read()
        if problem is not None:
            self._warn(f"ignored, expected a cache that pared wrote ({problem})")
        return entries

    def _read(self) -> tuple[dict[str, Any], Exception | None]:
        """The entries, and what is wrong with the file."""
        try:
            data = json.loads(self.path.read_bytes())
            if data["kind"] != self.kind:
                raise ValueError(f"expected a file of kind {self.kind!r}, got {data['kind']!r}")
            entries = data["entries"] if data["version"] == self.version else {}
            if not isinstance(entries, dict):
                raise ValueError("expected a dictionary of entries")
        except FileNotFoundError:
            return {}, None
        # RecursionError: brackets without end. OSError: a folder, no permission.
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            return {}, e
        return entries, None

    def add(self, entries: Mapping[str, Any]) -> None:
        """Write these entries beside those that are there, where that is possible."""
        if not entries:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                merged = {**self._read()[0], **entries}  # whoever read it has been told what is wrong
                text = json.dumps({"kind": self.kind, "version": self.version, "entries": merged}, indent=1)
                self._replace(text)
        except OSError as e:
            self._warn(f"not written ({e})")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, from reading to replacing. The lock is a file of its own: the other one's
        name changes hands."""
        if fcntl is None:
            yield
            return
        with open(self.path.with_name(self.path.name + ".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _replace(self, text: str) -> None:
        temporary = self.path.with_name(f".{self.path.name[:100]}.{secrets.token_hex(6)}.tmp")
        try:
            temporary.write_text(text)
            os.replace(temporary, self.path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
