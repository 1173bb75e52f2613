"""What a long run has done so far, on disk: a folder with one file an item, each written whole or not at all.

A run that is killed, at whatever point, and started again with the same arguments finds the items that were
done and goes on behind them. Nothing is pickled: an item is a safetensors file whose metadata is JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from pared._files import replacing

__all__ = ["Checkpoint", "Item", "digest", "fingerprint"]

_SETTINGS = "run.json"
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Item:
    """`values` : what JSON holds. `tensors` : by name, on the CPU."""

    values: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class Checkpoint:
    """The items of one run.

    Parameters
    ----------
    folder : made with the first item; None keeps nothing.
    settings : what the results depend on, as JSON takes it; a folder of other settings is refused.
    argument : the user's name for the folder, for error texts.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, settings: Mapping[str, Any], argument: str = "resume"
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.settings = json.dumps(settings, sort_keys=True)
        self.argument = argument
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{argument}: expected a folder, got a file: {self.folder}")
        with contextlib.suppress(FileNotFoundError):
            if (self.folder / _SETTINGS).read_text() != self.settings:
                raise ValueError(
                    f"{argument}: expected a folder of the same model and settings, got another's: "
                    f"{self.folder}; remove it to start over"
                )

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        text = quote(name, safe=" ,=")
        if len(text) > 150:
            text = f"{text[:120]}-{zlib.crc32(text.encode()):08x}"
        return self.folder / (text + _SUFFIX)

    def part(self, name: str) -> Path | None:
        """A folder for a run that is a part of this one."""
        return None if self.folder is None else self.folder / quote(name, safe=" ,=")

    def get(self, name: str) -> Item | None:
        """The item, or None where it is not done."""
        if self.folder is None or not (self.folder / _SETTINGS).exists() or not self._path(name).exists():
            return None
        try:
            with safe_open(self._path(name), framework="pt") as file:
                values = json.loads((file.metadata() or {})["values"])
                return Item(values, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as e:
            raise ValueError(
                f"{self.argument}: expected the files of an earlier run, got a damaged one: "
                f"{self._path(name)} ({e}); remove it to do that part again"
            ) from e

    def put(
        self,
        name: str,
        values: Mapping[str, Any] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Keep an item; it is on the disk when this returns."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / _SETTINGS).exists():
            with replacing(self.folder / _SETTINGS) as temporary:
                Path(temporary).write_text(self.settings)
        # A file may hold each memory once only, and only contiguous: copies.
        own = {
            k: t.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, t in (tensors or {}).items()
        }
        with replacing(self._path(name)) as temporary:
            save_file(own, temporary, metadata={"values": json.dumps(dict(values or {}))})

    def drop(self, name: str) -> None:
        """Forget an item."""
        if self.folder is not None:
            self._path(name).unlink(missing_ok=True)

    def finish(self) -> None:
        """The run is done: remove its files, and the folder unless there is more in it.

        A run that is part of another keeps them, until that one is done.
        """
        if self.folder is not None and not (self.folder.parent / _SETTINGS).exists():
            _clear(self.folder)


def _clear(folder: Path) -> None:
    if not (folder / _SETTINGS).exists():
        return  # none of ours
    for path in folder.iterdir():
        if path.is_dir():
            _clear(path)
        elif path.name.endswith((_SUFFIX, ".tmp")):  # the latter: what a kill left half written
            path.unlink(missing_ok=True)
    (folder / _SETTINGS).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def digest(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(data.data)


def fingerprint(model: nn.Module) -> int:
    """CRC-32 of all parameters and buffers, and of their names."""
    found = 0
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            found = zlib.crc32(f"{name} {tuple(tensor.shape)} {digest(tensor)}".encode(), found)
    return found
