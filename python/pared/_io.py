"""`pared.save` and `pared.load`: a model and its weights in one file, without pickle.

The container is `pared._format`'s; docs/format.md specifies it. A file holds logical weights, never packed
ones, so it loads on any machine and is packed for the kernels that run there.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, cast

import numpy as np
import torch

import pared
from pared import _format
from pared._format import (
    Bytes,
    Entry,
    FormatError,
    Reader,
    Writer,
    expect_object,
    refuse,
    require,
    shorten,
)

__all__ = ["FormatError", "load", "save"]

Path = str | os.PathLike[str] | IO[bytes]

_LISTED = 10  # names in an error message


def save(model: torch.nn.Module, path: Path, *, overwrite: bool = True) -> None:
    """Write a model to one file that `load` reads on this or another machine.

    Stored are the parameters and buffers, bit for bit, buffers that the ``state_dict`` leaves out included.
    A tensor that is rich in zeros takes less space, whichever kernel runs it. Not stored are the model's
    code, hooks, memory formats and devices: `load` takes the architecture from the caller.

    Parameters
    ----------
    model : any module; what `pared.accelerate` returned, or a plain one. Not modified.
    path : file name, or a binary file object, which is written from its position on. A named file appears as
        a
        whole or not at all: the data goes to a temporary file beside it that then takes its name.
    overwrite : whether a file of that name may be replaced.

    Raises
    ------
    FileExistsError : the file exists and `overwrite` is False.
    ValueError : a tensor that the format cannot hold, such as one on the meta device, a quantized or a
        sparse one.
    OSError : what writing the file raised. The earlier file is then still there.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    writer = Writer()
    ties = _collect(model, writer)
    with _writing(path, overwrite) as file:
        writer.write(file, {"pared": pared.__version__, "ties": ties})


def load(path: Path, model: torch.nn.Module | Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Read a file that `save` wrote into the same architecture.

    Parameters
    ----------
    path : file name, or a binary file object that can seek; it is read from its position to its end.
    model : the plain architecture, as it was before `pared.accelerate`: a module, which is not modified, or a
        function without arguments (or a class) that makes one. Its weights are not used, so the meta device
        serves::

            with torch.device("meta"):
                model = Net()
            model = pared.load("model.pared", model)

    Returns
    -------
    The model with the stored weights in eval mode. Tensors keep the device that the
    architecture had them on; from the meta device they go to the CPU. Tensors that were tied are tied.

    Raises
    ------
    FormatError : a ``ValueError``. The file is corrupt, truncated, foreign or of a later version, or the
        names, shapes and dtypes of its tensors are not those of the architecture; the message lists the
        differences.

    Notes
    -----
    Nothing in a file is executed, and no name in it reaches anything but a registered parameter or buffer.
    Memory beyond the result is that of the largest layer. The file is read, not mapped, so that one which
    shrinks meanwhile gives an error, and every tensor begins on a 64-byte boundary as torch allocates it.
    """
    with _reading(path) as file:
        reader = Reader(file)
        about = expect_object(reader.about, "file: metadata", ("pared", "ties"))
        ties = _check_ties(about["ties"], reader.tensors)
        module = _architecture(model)
        slots = _slots(module)
        _compare(slots, reader.tensors, ties)
        _fill(slots, reader, ties)
    _check_complete(module)
    return module.eval()


# -- tensors of a module ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """A registered parameter or buffer: where it hangs, and what is there."""

    owner: torch.nn.Module
    attribute: str
    kind: str
    tensor: torch.Tensor


def _slots(model: torch.nn.Module) -> dict[str, _Slot]:
    """Every parameter and buffer by name; one that several names lead to, under each."""
    slots = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        base = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                slots[base + name] = _Slot(module, name, "parameter", parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind = "local" if name in module._non_persistent_buffers_set else "buffer"
                slots[base + name] = _Slot(module, name, kind, buffer)
    return slots


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_storable(name: str, tensor: torch.Tensor) -> None:
    if torch.nn.parameter.is_lazy(tensor):
        what = "a lazy parameter without a shape (run the model once)"
    elif tensor.is_meta:
        what = "one on the meta device, which has no data"
    elif tensor.layout != torch.strided or tensor.is_quantized:
        what = f"one of layout {tensor.layout}, dtype {tensor.dtype}"
    elif type(tensor.detach()) is not torch.Tensor:
        what = f"the subclass {type(tensor.detach()).__name__}"
    elif _dtype_name(tensor) not in _format.DTYPES:
        what = f"dtype {tensor.dtype}"
    else:
        return
    raise ValueError(f"model: {name}: expected a plain tensor of numbers, got {what}")


def _to_bytes(tensor: torch.Tensor) -> Bytes:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return cast(Bytes, flat.view(torch.uint8).numpy())


def _identity(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same memory seen the same way."""
    if not tensor.numel():
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _collect(model: torch.nn.Module, writer: Writer) -> dict[str, str]:
    """Give the writer every tensor once; returns which other names are tied to which of them."""
    for prefix, module in model.named_modules():
        if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
            raise ValueError(f"model: {prefix or 'the root'}: expected tensors only, got extra state")
    ties: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, slot in _slots(model).items():
        tensor = slot.tensor
        _check_storable(name, tensor)
        owner = first.setdefault(_identity(tensor), name)
        if owner == name:
            writer.add(name, slot.kind, _dtype_name(tensor), tensor.shape, partial(_to_bytes, tensor))
        else:
            ties[name] = owner
    return ties


# -- loading ---------------------------------------------------------------------------------------


def _architecture(model: torch.nn.Module | Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A module of the caller's architecture that is ours to change. Of a given one, a copy without the
    weights.
    """
    if isinstance(model, torch.nn.Module):
        memo: dict[int, Any] = {}
        for slot in _slots(model).values():
            if slot.kind != "local" and not torch.nn.parameter.is_lazy(slot.tensor):
                empty = torch.empty_like(slot.tensor, device="meta")
                if slot.kind == "parameter":
                    empty = torch.nn.Parameter(empty, requires_grad=slot.tensor.requires_grad)
                memo[id(slot.tensor)] = empty
        for child in model.modules():
            for value in vars(child).values():
                if isinstance(value, torch.Tensor) and not value.is_leaf:  # as pruning's masks leave behind
                    memo[id(value)] = value.detach().clone()
        return copy.deepcopy(model, memo)
    if not callable(model):
        raise TypeError(f"model: expected a module or a function that makes one, got {type(model).__name__}")
    made = model()
    if not isinstance(made, torch.nn.Module):
        raise TypeError(
            f"model: expected a function that returns a module, got {type(made).__name__} from it"
        )
    return made


def _check_ties(data: object, tensors: Mapping[str, Entry]) -> dict[str, str]:
    ties = expect_object(data, "file: ties")
    for name, target in ties.items():
        require(name not in tensors, f"file: {shorten(name)} is stored and tied")
        require(
            isinstance(target, str) and target in tensors,
            f"file: {shorten(name)} is tied to an unknown tensor",
        )
    return ties


def _compare(slots: Mapping[str, _Slot], tensors: Mapping[str, Entry], ties: Mapping[str, str]) -> None:
    """Raise `FormatError` with every difference between the file and the architecture."""
    stored = {**tensors, **{name: tensors[target] for name, target in ties.items()}}
    problems: list[str] = []
    # A local buffer that exists keeps its value, one on the meta device needs the file's; the file may know
    # more.
    needed = {name for name, slot in slots.items() if slot.kind != "local" or slot.tensor.is_meta}
    missing = sorted(needed - stored.keys())
    unexpected = sorted(n for n in stored.keys() - slots.keys() if stored[n].kind != "local")
    for title, names in (("missing in the file", missing), ("unexpected in the file", unexpected)):
        if names:
            listed = ", ".join(shorten(n) for n in names[:_LISTED])
            problems.append(
                f"{title}: {listed}" + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
            )
    different = []
    for name in sorted(needed & stored.keys()):
        slot, entry = slots[name], stored[name]
        if torch.nn.parameter.is_lazy(slot.tensor):
            different.append(f"{name!r}: a lazy parameter without a shape (run the model once)")
            continue
        want = (slot.kind == "parameter", _dtype_name(slot.tensor), tuple(slot.tensor.shape))
        have = (entry.kind == "parameter", entry.dtype, entry.shape)
        if want != have:
            texts = (f"{'parameter' if p else 'buffer'} {d} {list(s)}" for p, d, s in (want, have))
            different.append(f"{name!r}: expected {next(texts)}, got {next(texts)}")
    problems += different[:_LISTED]
    if len(different) > _LISTED:
        problems.append(f"and {len(different) - _LISTED} more differ")
    # One tensor of one module cannot hold two values.
    values: dict[tuple[int, str], str] = {}
    for name in sorted(needed & stored.keys()):
        key = (id(slots[name].owner), slots[name].attribute)
        if values.setdefault(key, stored[name].name) != stored[name].name:
            problems.append(f"{name!r}: shared in the model, two tensors in the file")
    if problems:
        refuse("model: expected the architecture that the file was saved from; " + "; ".join(problems))


def _read_tensor(reader: Reader, entry: Entry) -> torch.Tensor:
    tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    flat = tensor.reshape(-1).view(torch.uint8).numpy() if entry.size else np.empty(0, np.uint8)
    reader.read(entry, cast(Bytes, flat))
    return tensor


def _fill(slots: Mapping[str, _Slot], reader: Reader, ties: Mapping[str, str]) -> None:
    """Give every slot the file's tensor: a new one, as ``load_state_dict(assign=True)`` does."""
    names: dict[str, list[str]] = {name: [name] for name in reader.tensors}
    for name, target in ties.items():
        names[target].append(name)
    for stored, users in names.items():
        targets = [
            slots[n] for n in users if n in slots and (slots[n].kind != "local" or slots[n].tensor.is_meta)
        ]
        if not targets:
            continue
        tensor = _read_tensor(reader, reader.tensors[stored])
        device = targets[0].tensor.device
        if device.type != "meta":
            tensor = tensor.to(device)
        parameter: torch.nn.Parameter | None = None
        for slot in targets:
            if slot.kind != "parameter":
                setattr(slot.owner, slot.attribute, tensor)
                continue
            if parameter is None:
                parameter = torch.nn.Parameter(tensor, requires_grad=slot.tensor.requires_grad)
            setattr(slot.owner, slot.attribute, parameter)


def _check_complete(module: torch.nn.Module) -> None:
    """Raise ``ValueError`` for unregistered tensors without data, which no file can know of."""
    for prefix, child in module.named_modules():
        for name, value in vars(child).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                where = prefix or type(child).__name__
                raise ValueError(
                    f"model: {where}.{name}: expected a registered buffer or a tensor with data, got a plain "
                    "attribute on the meta device; make the model on the CPU instead"
                )


# -- files -----------------------------------------------------------------------------------------


def _check_binary(file: Any, *methods: str) -> None:
    if isinstance(file, io.TextIOBase):
        raise TypeError("path: expected a binary file, got one opened as text")
    for method in methods:
        if not hasattr(file, method):
            raise TypeError(
                f"path: expected a file name or a binary file, got {type(file).__name__} without {method}()"
            )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    if isinstance(path, (str, os.PathLike)):
        with open(path, "rb") as file:
            yield file
        return
    _check_binary(path, "read", "seek", "tell")
    yield path


@contextlib.contextmanager
def _writing(path: Path, overwrite: bool) -> Iterator[IO[bytes]]:
    """A file to write to, which replaces the named one when the block ends well and vanishes otherwise."""
    if not isinstance(path, (str, os.PathLike)):
        _check_binary(path, "write")
        if isinstance(path, io.RawIOBase):  # whose write() may take a part only
            buffered = io.BufferedWriter(path)
            yield buffered
            buffered.flush()
            buffered.detach()
        else:
            yield path
        return
    target = os.path.realpath(path)  # a link keeps pointing where it does
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
        if not overwrite:
            raise FileExistsError(f"path: expected a new file, got {os.fspath(path)!r} which exists")
        if not stat.S_ISREG(mode):
            raise ValueError(f"path: expected a regular file, got {os.fspath(path)!r} which is none")
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        # "x" gives the permissions that the process gives to any new file, which tempfile does not.
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, target)
        else:
            os.link(temporary, target)  # unlike rename, fails when another process was faster
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    if os.name == "posix":  # so that the new name, too, is on the disk
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
