"""What timing found out, kept for the next call: in the process, and on disk where the user says so.

Keys say all that a time depends on: the layer's geometry, its zeros (to 2 %), its calls, what follows it, and
the machine. So layers that are alike within a model are timed once, and a model that was accelerated before
is not timed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pared._store import JsonStore
from pared._target import Target
from pared._timing import Watch

__all__ = ["Choices", "Timed", "clear"]

# Of the entries' meaning: raised where kernels or the way of timing change without a new version of pared.
_VERSION = 1
_process: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class Timed:
    """What has been timed together.

    Attributes
    ----------
    layer : what was timed, a name for people.
    before : seconds of what the variants are compared with.
    variants : name -> (seconds, speed-up).
    tried : names of all that were to be timed; those without a time could not be.
    """

    layer: str
    before: float
    variants: dict[str, tuple[float, float]] = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, entry: Any) -> Timed | None:
        """From JSON; None for anything else."""
        try:
            variants = {str(k): (float(a), float(b)) for k, (a, b) in entry["variants"].items()}
            found = cls(
                str(entry["layer"]), float(entry["before"]), variants, [str(t) for t in entry["tried"]]
            )
        except (TypeError, KeyError, ValueError, AttributeError):
            return None
        numbers = [found.before, *(n for v in found.variants.values() for n in v)]
        return found if all(0 < n < 1e6 for n in numbers) else None


def clear() -> None:
    """Forget what this process has timed."""
    _process.clear()


class Choices:
    """The timings that one call of `pared.accelerate` knows and adds to.

    Parameters
    ----------
    cache : None keeps them in the process, and in the file that the environment variable PARED_CACHE names;
        a path keeps them in the process and in that file; False keeps nothing beyond this object.
    machine : what times depend on besides the layers; None: those of the CPU.
    watch : sees the runs that times come from: once one was disturbed, the rest is kept in this object alone.

    Attributes
    ----------
    here : keys that were timed through this object, not taken from an earlier call.
    """

    def __init__(
        self,
        cache: str | os.PathLike[str] | bool | None = None,
        machine: Mapping[str, Any] | None = None,
        watch: Watch | None = None,
    ) -> None:
        path = os.environ.get("PARED_CACHE") or None if cache is None else cache
        self._memory = {} if cache is False else _process
        self._watch = watch or Watch()
        self._own: dict[str, Any] = {}
        self._store = JsonStore(path, "pared timings", _VERSION) if path else None  # type: ignore[arg-type]
        self._file = self._store.read() if self._store else {}
        self._machine = {**(machine or Target().machine()), "pared": __import__("pared").__version__}
        self._new: dict[str, Any] = {}
        self.here: set[str] = set()

    def key(self, **parts: Any) -> str:
        """A key of these parts, JSON values, and the machine."""
        return json.dumps({**parts, "machine": self._machine}, sort_keys=True)

    def get(self, key: str | None) -> Timed | None:
        """What is known about `key`; None where nothing is, or where the key is None."""
        if key is None:
            return None
        found = (known[key] for known in (self._own, self._memory, self._file) if key in known)
        return Timed.parse(next(found, None))

    def put(self, key: str | None, found: Timed) -> None:
        """Keep what was timed, unless the key is None."""
        if key is not None:
            entry = self._own[key] = asdict(found)
            self.here.add(key)
            if not self._watch.disturbed:
                self._memory[key] = self._new[key] = entry

    def save(self) -> None:
        """Write what is new to the file, where there is one."""
        if self._store:
            self._store.add(self._new)
        self._new = {}
