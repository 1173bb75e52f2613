"""`pared.save` and `pared.load`: a model and its weights in one file, without pickle.

The container is `pared._format`'s; docs/format.md specifies it. A file holds logical weights, never packed
ones, so it loads on any machine and is packed for the kernels that run there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import stat
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, cast

import numpy as np
import torch

import pared
from pared import _format
from pared._errors import check_flag
from pared._files import replacing
from pared._format import (
    Bytes,
    Entry,
    FormatError,
    Reader,
    Writer,
    expect_list,
    expect_object,
    refuse,
    require,
    shorten,
)
from pared._fusion import activation_of, between, leads_to
from pared._report import _ATTRIBUTE, Report
from pared._residual import residual_block
from pared._sparsity import bake, bake_constants
from pared._surgery import adopt_hooks, check_whole, copy_model, module_names, replace
from pared.nn import RULES, FoldedBatchNorm2d, Fused, Linear, MaxPool2d, PackedModule, ResidualBlock
from pared.nn._around import guard
from pared.nn._attention import attend, attending
from pared.nn._base import ACTIVATIONS, as_images
from pared.nn._encoder import encoding, fuse_layer
from pared.nn._fold import can_fold
from pared.nn._foreign import hides_weights
from pared.ops._formats import FORMATS
from pared.ops.int8 import IntegerWeight
from pared.ops.packed import PackedWeight
from pared.pruning.linears import open_layers

__all__ = ["FormatError", "load", "save"]

Path = str | os.PathLike[str] | IO[bytes]

_LISTED = 10  # names in an error message


def save(model: torch.nn.Module, path: Path, *, overwrite: bool = True) -> None:
    """Write a model to one file that `load` reads on this or another machine.

    Stored are the parameters and buffers, bit for bit, buffers that the ``state_dict`` leaves out included;
    of accelerated layers the dense weights that their packed ones stand for; and the report. A tensor that is
    rich in zeros takes less space, whichever kernel runs it. Not stored are the model's code, hooks, memory
    formats and devices: `load` takes the architecture from the caller.

    Parameters
    ----------
    model : any module; what `pared.accelerate` returned, or a plain one. Not modified.
    path : file name, or a binary file object, which is written from its position on. A named file appears as
        a whole or not at all: the data goes to a temporary file beside it that then takes its name, and the
        permissions of the file that had it.
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
    check_flag("overwrite", overwrite)
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "model: expected an uncompiled module, got one from torch.compile: save the one inside"
        )
    from pared._levels import Levels, collect_levels  # which imports this module

    writer = Writer()
    about = collect_levels(model, writer) if isinstance(model, Levels) else _collect(model, writer)
    with _writing(path, overwrite) as file:
        writer.write(file, about)


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
    The model with the stored weights, in eval mode. Layers that were accelerated are packed anew for this
    machine; `pared.report` gives the report of the machine that accelerated them. Tensors keep the device
    that the architecture had them on; from the meta device they go to the CPU. What was tied is tied.

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
        if "levels" in reader.about:
            from pared._levels import load_levels

            return load_levels(reader, model)
        about = _About.parse(reader)
        module = _architecture(model)
        if about.layers or about.report:
            bake(module)  # accelerate has applied the masks that pruning attached
            bake_constants(module)
        module = _open(module, about.report.opened if about.report else {})
        layers = _match_layers(module, about, reader.tensors)
        slots = _slots(module)
        for group in about.report.ties if about.report else ():
            known = len(group) > 1 and slots.keys() >= set(group)
            require(known, f"file: report: ties: expected names in the model, got {shorten(group)}")
        _compare(slots, reader.tensors, about.ties, layers)
        module = _fill(module, slots, reader, about.ties, layers)
    for name in about.fused:
        module = replace(module, [name], Fused(module.get_submodule(name)))
    for name, followers in about.handed.items():
        _hand_over(module, name, followers)
    for name, others in about.shared.items():
        _share(module, name, others)
    for name in about.attention:
        _attend(module, name)
    for name in about.pools:
        module = replace(module, [name], _pool(module, name))
    for name in sorted(about.residuals, key=lambda n: n.count("."), reverse=True):  # inner ones first
        module = replace(module, [name], _residual(module, name))
    for name in about.encoders:
        _encode(module, name)
    _check_complete(module)
    guard(module)
    if about.report is not None:
        setattr(module, _ATTRIBUTE, about.report)
        module.requires_grad_(False)  # for inference, as accelerate returns it
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
    """Every parameter and buffer of plain modules by name; one that several names lead to, under each."""
    slots = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule):
            continue
        base = _join(prefix, "")
        for name, parameter in module._parameters.items():
            if parameter is not None:
                slots[base + name] = _Slot(module, name, "parameter", parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind = "local" if name in module._non_persistent_buffers_set else "buffer"
                slots[base + name] = _Slot(module, name, kind, buffer)
    return slots


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


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


def _hand_over(model: torch.nn.Module, name: str, followers: list[str]) -> None:
    modules = dict(model.named_modules())
    layers = [modules.get(n) for n in (name, *followers)]
    head = layers[0]
    ways = zip([name, *followers], followers, strict=False)
    if not (followers and isinstance(head, Linear) and all(leads_to(model, a, b) for a, b in ways)):
        refuse(f"file: handed: expected linear layers that follow each other, got {[name, *followers]}")
    try:
        passed = between(model, [name, *followers])
        head.hand_to(*cast(list[Linear], layers[1:]), between=passed)
    except (TypeError, ValueError) as e:
        refuse(f"file: handed: layer {shorten(name)}: {e}")


def _share(model: torch.nn.Module, name: str, others: list[str]) -> None:
    modules = dict(model.named_modules())
    layers = [modules.get(n) for n in (name, *others)]
    head = layers[0]
    if not (others and isinstance(head, Linear)):
        refuse(f"file: shared: expected linear layers, got {shorten([name, *others])}")
    try:
        head.share_with(*cast(list[Linear], layers[1:]))
    except TypeError as e:
        refuse(f"file: shared: layer {shorten(name)}: {e}")
    except ValueError:
        return  # packed otherwise on this machine: they compute one by one


def _attend(model: torch.nn.Module, name: str) -> None:
    module = dict(model.named_modules()).get(name)
    if module is None or not attend(module):
        found = "nothing" if module is None else f"{type(module).__name__} with another attention function"
        refuse(
            f"model: expected an attention module of transformers at {shorten(name)}, as in the file, with "
            f'attn_implementation="sdpa", got {found}'
        )


def _names_of(model: torch.nn.Module, kind: type[torch.nn.Module]) -> list[str]:
    return [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, kind)]


def _pool(model: torch.nn.Module, name: str) -> MaxPool2d:
    module = dict(model.named_modules(remove_duplicate=False)).get(name)
    try:
        return MaxPool2d.from_module(cast(torch.nn.MaxPool2d, module))
    except (TypeError, ValueError):
        refuse(
            f"model: expected nn.MaxPool2d at {shorten(name)}, as in the file, got {type(module).__name__}"
        )


def _residual(model: torch.nn.Module, name: str) -> ResidualBlock:
    module = dict(model.named_modules(remove_duplicate=False)).get(name)
    block = None if module is None else residual_block(module)
    if block is None:
        refuse(
            f"model: expected a block whose convolutions add a residual at {shorten(name)}, as in the file, "
            f"got {type(module).__name__}"
        )
    return block


def _encode(model: torch.nn.Module, name: str) -> None:
    module = dict(model.named_modules()).get(name)
    if module is None:
        refuse(f"model: expected a layer at {shorten(name)}, as in the file, got nothing")
    # Where this version of the model's library builds it otherwise, its own forward computes the same.
    fuse_layer(module)


def _collect(model: torch.nn.Module, writer: Writer) -> dict[str, Any]:
    """Give the writer every tensor once; returns the metadata that goes with them."""
    check_whole(model)
    for prefix, module in model.named_modules():
        if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
            raise ValueError(f"model: {prefix or 'the root'}: expected tensors only, got extra state")
        if hides_weights(module):
            raise ValueError(
                f"model: {prefix or 'the root'}: expected tensors only, got {type(module).__module__}."
                f"{type(module).__name__}, which hides its weights; pared.accelerate(..., precision='int8') "
                "takes over those that are called with floats"
            )
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
    report = vars(model).get(_ATTRIBUTE)
    return {
        "pared": pared.__version__,
        "layers": _collect_packed(model, writer, ties, report.ties if report else []),
        "fused": {
            name: activation_of(module.original)
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, Fused)
        },
        "handed": _collect_together(model, "_handed"),
        "shared": _collect_together(model, "_sharers"),
        "attention": [*attending(model)],
        "pools": _names_of(model, MaxPool2d),
        "residuals": _names_of(model, ResidualBlock),
        "encoders": [*encoding(model)],
        "ties": ties,
        "report": dataclasses.asdict(report) if report else None,
    }


def _collect_together(model: torch.nn.Module, attribute: str) -> dict[str, list[str]]:
    """Name of a linear layer that computes others as well, those in `attribute` -> their names."""
    modules = list(model.named_modules())
    names = {id(m): name for name, m in modules}
    found = {name: getattr(m, attribute) for name, m in modules if isinstance(m, Linear)}
    return {
        name: [names[id(f)] for f in others]
        for name, others in found.items()
        if others and all(id(f) in names for f in others)
    }


def _collect_packed(
    model: torch.nn.Module, writer: Writer, ties: dict[str, str], groups: list[list[str]]
) -> dict[str, dict[str, Any]]:
    """Add the tensors of the accelerated layers, and to `ties`; returns the layers."""
    # A tensor that several layers shared before some of them were packed is still stored once, unless packing
    # has changed a bit of it. Others with equal contents stay apart, as they were.
    group = {name: names[0] for names in groups for name in names}
    contents: dict[object, str] = {}
    for name, entry in writer.entries.items():
        contents.setdefault((group.get(name, name), entry.content), name)
    layers = {}
    first: dict[object, str] = {}
    norms = {id(m.layer): name for name, m in model.named_modules() if isinstance(m, FoldedBatchNorm2d)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, PackedModule):
            continue
        if module.format not in RULES[module.plain].formats:
            raise ValueError(
                f"model: {prefix or 'the root'}: expected a format that a file holds, got {module.format}"
            )
        layers[prefix] = {
            "type": module.plain.__name__,
            "format": module.format,
            "norm": norms.get(id(module)),
            "activation": module.activation,
            "input": _input_range(module),
        }
        for attribute, tensor in module.stored().items():
            name = _join(prefix, attribute)
            packed = module.packed if attribute.startswith("weight") else module.get_buffer(attribute)
            identity = (_identity(packed), attribute == "weight_scale")
            owner = first.setdefault(identity, name)
            if owner == name:
                source = partial(_plain_bytes, module, attribute)
                entry = writer.add(name, "parameter", _dtype_name(tensor), tensor.shape, source)
                owner = contents.setdefault((group.get(name, name), entry.content), name)
                if owner != name:
                    writer.discard(name)
                    first[identity] = owner
            if owner != name:
                ties[name] = owner
    return layers


def _plain_bytes(module: PackedModule, attribute: str) -> Bytes:
    return _to_bytes(module.stored()[attribute])


def _input_range(module: PackedModule) -> list[float] | None:
    """How the input is quantized where that is fixed: scale, zero, low, high."""
    weight = module.packed_weight()
    fixed = weight.activations if isinstance(weight, IntegerWeight) else None
    return None if fixed is None else [*fixed]


# -- metadata --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """How an accelerated layer is stored.

    Attributes
    ----------
    type : plain class.
    format : packed format.
    norm : name of the batch normalisation that is folded into it.
    activation : fused activation.
    input : scale, zero, low and high of the input's bytes, where they are fixed.
    """

    type: str
    format: str
    norm: str | None
    activation: str | None
    input: list[float] | None


@dataclass(frozen=True)
class _About:
    """The metadata beside the tensors."""

    pared: str
    layers: dict[str, _Layer]
    fused: dict[str, str]
    handed: dict[str, list[str]]
    shared: dict[str, list[str]]
    attention: list[str]
    pools: list[str]
    residuals: list[str]
    encoders: list[str]
    ties: dict[str, str]
    report: Report | None

    @classmethod
    def parse(cls, reader: Reader) -> _About:
        where = "file: metadata"
        later: dict[str, Any] = {"shared": {}, "attention": [], "encoders": [], "pools": [], "residuals": []}
        about_file = {**later, **expect_object(reader.about, where)}
        data = expect_object(about_file, where, [f.name for f in dataclasses.fields(cls)])
        about: _About = _build(cls, data, where)
        for layer in data["layers"].values():
            expect_object(layer, f"{where}: layers", [f.name for f in dataclasses.fields(_Layer)])
        for name, target in about.ties.items():
            require(name not in reader.tensors, f"file: {shorten(name)} is stored and tied")
            require(target in reader.tensors, f"file: {shorten(name)} is tied to an unknown tensor")
        for name, layer in about.layers.items():
            known = layer.activation is None or layer.activation in ACTIVATIONS
            require(known, f"file: layer {shorten(name)}: unknown activation {shorten(layer.activation)}")
        return about


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value`, parsed JSON, as the type `kind`: of what dataclasses here and in reports are made of."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        # The report of another version of pared may have other fields.
        hints = typing.get_type_hints(kind)
        data = expect_object(value, where)
        known = {n: _build(hints[n], v, f"{where}: {n}") for n, v in data.items() if n in hints}
        try:
            return cast(Any, kind)(**known)
        except TypeError:
            refuse(f"{where}: expected the fields {sorted(hints)}, got {shorten(sorted(data))}")
    if origin is list:
        return [_build(arguments[0], v, where) for v in expect_list(value, where)]
    if origin is dict:
        return {
            n: _build(arguments[1], v, f"{where}: {shorten(n)}")
            for n, v in expect_object(value, where).items()
        }
    if origin in (typing.Union, types.UnionType):
        optional = value is None and type(None) in arguments
        return None if optional else _build(arguments[0], value, where)
    number = kind is float and type(value) is int and abs(value) < 1 << 63
    require(type(value) is kind or number, f"{where}: expected {kind.__name__}, got {shorten(value)}")
    return value


# -- loading ---------------------------------------------------------------------------------------


def _architecture(model: torch.nn.Module | Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A module of the caller's architecture that is ours to change; of a given one, an empty copy."""
    if isinstance(model, torch.nn.Module):
        if any(isinstance(m, PackedModule) for m in model.modules()):
            raise ValueError(
                "model: expected the plain architecture, got accelerated layers; pared.restore it first"
            )
        empty: dict[int, torch.Tensor] = {}
        for slot in _slots(model).values():
            if slot.kind != "local" and not torch.nn.parameter.is_lazy(slot.tensor):
                tensor = torch.empty_like(slot.tensor, device="meta")
                if slot.kind == "parameter":
                    tensor = torch.nn.Parameter(tensor, requires_grad=slot.tensor.requires_grad)
                empty[id(slot.tensor)] = tensor
        return copy_model(model, empty)
    if not callable(model):
        raise TypeError(f"model: expected a module or a function that makes one, got {type(model).__name__}")
    made = model()
    if not isinstance(made, torch.nn.Module):
        raise TypeError(
            f"model: expected a function that returns a module, got {type(made).__name__} from it"
        )
    return made


@dataclass
class _Target:
    """A module of the architecture that becomes an accelerated layer once its tensors are there."""

    module: torch.nn.Module
    names: list[str]
    layer: _Layer
    norm: torch.nn.Module | None
    waiting: set[str]  # names of tensors
    shape: tuple[int, ...]  # of the plain weight, as are the next two
    dtype: torch.dtype
    trainable: bool


def _open(model: torch.nn.Module, opened: dict[str, str]) -> torch.nn.Module:
    """The architecture with Linear layers where accelerate put them in the place of other modules."""
    if not opened:
        return model
    try:
        model, found = open_layers(model, opened)
    except ValueError as e:
        refuse(f"{e}, as in the file")
    missing = [f"{kind} {shorten(name)}" for name, kind in opened.items() if found.get(name) != kind]
    require(not missing, f"model: expected {', '.join(missing[:_LISTED])}, as in the file, got none")
    return model


def _match_layers(model: torch.nn.Module, about: _About, stored: Mapping[str, Entry]) -> dict[int, _Target]:
    """By the id of the module, what the file says is accelerated; checked against what can be."""
    names = module_names(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    targets: dict[int, _Target] = {}
    for name, layer in about.layers.items():
        module = modules.get(name)
        if module is None or id(module) in targets:
            require(module is not None, f"model: expected a layer {shorten(name)}, as in the file, got none")
            continue
        rule = RULES.get(type(module))
        if rule is None or type(module).__name__ != layer.type:
            found = type(module).__name__
            if found == layer.type:  # another library's: torch.ao's quantized Linear, for example
                found = f"{type(module).__module__}.{found}"
            refuse(f"model: layer {name!r}: expected {shorten(layer.type)}, as in the file, got {found}")
        if layer.format not in rule.formats:
            known = ", ".join(rule.formats)
            refuse(f"file: layer {name!r}: unknown format {shorten(layer.format)}, known are {known}")
        mine = names[id(module)]
        same = all(about.layers.get(n) == layer for n in mine)
        require(same, f"model: layer {name!r}: shared in the model as {mine}, not so in the file")
        shape, dtype = tuple(module.weight.shape), module.weight.dtype
        trainable = module.weight.requires_grad
        kind = FORMATS[layer.format].weight
        if issubclass(kind, IntegerWeight) and layer.norm is None:
            scale = _join(name, "weight_scale")
            entry = stored.get(about.ties.get(scale, scale))
            _expect_integers(module, kind, entry.shape if entry is not None else ())
        tensors = {_join(n, t) for n in mine for t, _ in module.named_parameters(recurse=False)}
        norm = None if layer.norm is None else modules.get(layer.norm)
        if layer.norm is not None:
            if norm is None or not can_fold(module, norm) or len(names[id(norm)]) > 1 or id(norm) in targets:
                found = "nothing" if norm is None else type(norm).__name__
                refuse(
                    f"model: layer {name!r}: expected a batch normalisation at {shorten(layer.norm)}, "
                    f"as in the file, got {found}"
                )
            own = [*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)]
            tensors |= {_join(layer.norm, t) for t, _ in own}
        target = _Target(module, mine, layer, norm, tensors, shape, dtype, trainable)
        targets[id(module)] = target
        if norm is not None:
            targets[id(norm)] = target
    for name, activation in about.fused.items():
        module = modules.get(name)
        if module is None or activation_of(module) != activation:
            text = f"model: expected activation {shorten(activation)} at {shorten(name)}, as in the file"
            refuse(f"{text}, got {'nothing' if module is None else type(module).__name__}")
    return targets


def _expect_integers(module: torch.nn.Module, kind: type[IntegerWeight], scales: tuple[int, ...]) -> None:
    """Give a plain layer, which is ours, the parameters that a file holds of a quantized one."""
    (dtype, shape), scales = kind.stored_like(tuple(cast(torch.Tensor, module.weight).shape), scales)
    integers = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    module.weight = torch.nn.Parameter(integers, requires_grad=False)
    scale = torch.empty(scales, device="meta")
    module.register_parameter("weight_scale", torch.nn.Parameter(scale, requires_grad=False))


def _compare(
    slots: Mapping[str, _Slot],
    tensors: Mapping[str, Entry],
    ties: Mapping[str, str],
    layers: Mapping[int, _Target],
) -> None:
    """Raise `FormatError` with every difference between the file and the architecture."""
    stored = {**tensors, **{name: tensors[target] for name, target in ties.items()}}
    problems: list[str] = []
    # A local buffer with data keeps it, one on the meta device needs the file's; the file may know more.
    needed = {name for name, slot in slots.items() if slot.kind != "local" or slot.tensor.is_meta}
    missing = sorted(needed - stored.keys())
    unexpected = sorted(n for n in stored.keys() - slots.keys() if stored[n].kind != "local")
    for title, names in (("missing in the file", missing), ("unexpected in the file", unexpected)):
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            problems.append(f"{title}: {', '.join(shorten(n) for n in names[:_LISTED])}{more}")
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
        if id(slot.owner) in layers and slot.tensor.device.type not in ("cpu", "meta"):
            different.append(
                f"{name!r}: an accelerated layer, on {slot.tensor.device}; kernels run on the CPU"
            )
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
    tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="cpu")
    flat = tensor.reshape(-1).view(torch.uint8).numpy() if entry.size else np.empty(0, np.uint8)
    reader.read(entry, cast(Bytes, flat))
    return tensor


def _fill(
    model: torch.nn.Module,
    slots: dict[str, _Slot],
    reader: Reader,
    ties: Mapping[str, str],
    layers: Mapping[int, _Target],
) -> torch.nn.Module:
    """Give every slot the file's tensor, a new one, as ``load_state_dict(assign=True)`` does.

    A layer that was accelerated is packed when its last tensor is there, and its dense weight dropped: that
    uses up `slots`, which knows the plain layer.
    """
    users: dict[str, list[str]] = {name: [name] for name in reader.tensors}
    for name, target in ties.items():
        users[target].append(name)
    packed: dict[object, Any] = {}
    for stored, names in users.items():
        targets = {n: slots.pop(n) for n in names if n in slots}
        targets = {n: s for n, s in targets.items() if s.kind != "local" or s.tensor.is_meta}
        if not targets:
            continue
        old = next(iter(targets.values())).tensor
        tensor = _read_tensor(reader, reader.tensors[stored])
        if not old.is_meta:
            tensor = tensor.to(old.device)
        parameter: torch.nn.Parameter | None = None
        for name, slot in targets.items():
            if slot.kind != "parameter":
                setattr(slot.owner, slot.attribute, tensor)
            else:
                if parameter is None:
                    parameter = torch.nn.Parameter(tensor, requires_grad=slot.tensor.requires_grad)
                setattr(slot.owner, slot.attribute, parameter)
            layer = layers.get(id(slot.owner))
            if layer is not None:
                layer.waiting.discard(name)
                if not layer.waiting:
                    model = _pack(model, layer, packed, ties)
    return model


def _pack(
    model: torch.nn.Module, target: _Target, packed: dict[object, Any], ties: Mapping[str, str]
) -> torch.nn.Module:
    """Replace a plain layer by its accelerated module; layers whose weights are tied share the packed one."""
    device = cast(torch.Tensor, target.module.weight).device
    if device.type != "cpu":  # packed on the CPU, and then moved
        target.module = copy_model(target.module).cpu()
    name = _join(target.names[0], "weight")
    key = (ties.get(name, name), target.layer.format, getattr(target.module, "groups", 1))
    try:
        new = RULES[type(target.module)].module.from_module(
            target.module,
            format=target.layer.format,
            activation=target.layer.activation,
            weight=packed.get(key) or _quantized(target),
            norm=cast(Any, target.norm),
        )
        if device.type != "cpu":
            new.to(device)
    except (TypeError, ValueError) as e:
        refuse(f"file: layer {target.names[0]!r}: {e}")
    new._requires_grad = (target.trainable, new._requires_grad[1])
    adopt_hooks(new, target.module)
    model = replace(model, target.names, new)
    if target.norm is None:
        packed[key] = new.packed_weight()
    else:
        folded = FoldedBatchNorm2d.from_module(cast(torch.nn.BatchNorm2d, target.norm), new)
        model = replace(model, [cast(str, target.layer.norm)], folded)
    target.module = new
    return model


def _quantized(target: _Target) -> PackedWeight | None:
    """The packed weight of a layer that is stored quantized; None for others."""
    kind = FORMATS[target.layer.format].weight
    if not issubclass(kind, IntegerWeight) or target.norm is not None:
        return None
    fixed = target.layer.input
    if fixed is not None:
        require(
            len(fixed) == 4 and all(v == int(v) for v in fixed[1:]), "input: expected scale, zero, low, high"
        )
    q, scale = target.module.weight, target.module.weight_scale
    packed = kind.from_stored(
        target.shape,
        as_images(cast(torch.Tensor, q).detach()).numpy(),
        cast(torch.Tensor, scale).detach().numpy(),
        str(target.dtype).removeprefix("torch."),
        None if fixed is None else (fixed[0], int(fixed[1]), int(fixed[2]), int(fixed[3])),
        getattr(target.module, "groups", 1),
    )
    return kind(torch.as_tensor(packed.packed, device="cpu"))


def _check_complete(model: torch.nn.Module) -> None:
    """Raise ``ValueError`` for unregistered tensors without data, which no file can know of."""
    for prefix, child in model.named_modules():
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
    mode = None
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
        if not overwrite:
            raise FileExistsError(f"path: expected a new file, got {os.fspath(path)!r} which exists")
    with replacing(target, overwrite) as temporary, open(temporary, "xb") as file:
        # "x" gives the permissions that the process gives to any new file, which tempfile does not.
        if mode is not None:
            os.chmod(temporary, stat.S_IMODE(mode))  # before there is anything to read
        yield file
