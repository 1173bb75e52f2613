"""Copying models, replacing modules in them, and taking it all back."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pared._report import _ATTRIBUTE
from pared._sparsity import is_freed
from pared.nn import FoldedBatchNorm2d, Fused, MaxPool2d, PackedModule, ResidualBlock
from pared.nn._around import unguard
from pared.nn._attention import attending, detach
from pared.nn._encoder import encoding, separate

__all__ = ["copy_model", "module_names", "replace", "restore", "shared_copy", "tied_parameters"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def check_whole(model: nn.Module) -> None:
    """Raise ``ValueError`` for a model whose modules hold shards of their weights, or no memory."""
    # By name: importing torch.distributed.fsdp takes a second.
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError(
            "model: expected whole weights, got a model in FullyShardedDataParallel; load its full state "
            "dict (torch.distributed.checkpoint.state_dict) into a plain model"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_freed(tensor):
            raise ValueError(f"model: expected weights in memory, got {name!r}, whose memory was freed")


def copy_model(model: nn.Module, replaced: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy that also works where modules hold computed tensors, as attached masks leave them.

    `replaced`: id of an object -> what the copy has in its place.
    """
    check_whole(model)
    memo = dict(replaced or {})
    keep = []  # ids in the memo stay valid only while their objects live
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
                keep.append(value)
    try:
        new = copy.deepcopy(model, memo)
    except Exception as e:
        raise ValueError(
            f"model: expected a module that copy.deepcopy accepts, got {type(e).__name__}: {e}"
        ) from e
    for module in new.modules():
        if parametrize.is_parametrized(module):
            # torch gives a parametrised module a class of its own, which a deep copy shares: removing the
            # parametrisation from the copy would take the property away from the original.
            cls = type(module)
            members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
            module.__class__ = type(cls.__name__, cls.__bases__, members)
    return new


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree around the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def module_names(model: nn.Module) -> dict[int, list[str]]:
    """id of a module -> every qualified name that it has in the tree, first one first."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    return dict(names)


def replace(model: nn.Module, names: Iterable[str], new: nn.Module) -> nn.Module:
    """Put `new` in the place of each name; returns the model, or `new` itself for the name of the root."""
    for name in names:
        if not name:
            return new
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = new
    return model


def adopt_hooks(new: nn.Module, old: nn.Module) -> None:
    """Give `new` the forward hooks that the user put on `old`."""
    for attribute in _HOOKS:
        getattr(new, attribute).update(getattr(old, attribute, {}))


def tied_parameters(model: nn.Module) -> list[list[str]]:
    """Groups of parameter names that are one tensor."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [group for group in names.values() if len(group) > 1]


def restore(model: nn.Module) -> nn.Module:
    """Plain ``torch.nn`` modules again: to train on, to export, or for another engine.

    Weights are dense, zeros included, in their original dtype (biases too); fused activations are modules
    again; tied parameters are tied; the keys of the state dict are those of the model that was accelerated,
    with pruning masks, and the weights that torch's weight_norm, spectral_norm and orthogonal compute, baked
    in. Denormal weights come back as zeros.

    Parameters
    ----------
    model : what `pared.accelerate` returned, or any model with modules of `pared.nn`. It is not changed.

    Returns
    -------
    A new model in eval mode.

    Raises
    ------
    TypeError : not a module.
    ValueError : nothing in it is accelerated.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    accelerated = vars(model).get(_ATTRIBUTE)
    if accelerated is None and not any(isinstance(m, (PackedModule, Fused)) for m in model.modules()):
        raise ValueError(f"model: expected an accelerated model, got a plain {type(model).__name__}")
    from pared.pruning.linears import close_layers  # which imports this module

    plain = copy.deepcopy(model)
    vars(plain).pop(_ATTRIBUTE, None)
    unguard(plain)
    weights: dict[int, nn.Parameter] = {}  # packed buffers that several layers share
    biases: dict[int, nn.Parameter] = {}
    names = module_names(plain)
    for module in encoding(plain).values():
        separate(module)
    for module in attending(plain).values():
        detach(module)
    for module in list(plain.modules()):
        if isinstance(module, Fused):
            new: nn.Module = module.original.eval()
        elif isinstance(module, (FoldedBatchNorm2d, MaxPool2d, ResidualBlock)):
            new = module.to_module()
        elif isinstance(module, PackedModule):
            new = module.to_module()
            new.weight = weights.setdefault(id(module.packed), new.weight)  # type: ignore[arg-type]
            if module.bias is not None:
                new.bias = biases.setdefault(id(module.bias), new.bias)  # type: ignore[arg-type]
            adopt_hooks(new, module)
        else:
            continue
        plain = replace(plain, names[id(module)], new)
    if accelerated is not None and accelerated.opened:
        plain = close_layers(plain, accelerated.opened)
    for group in accelerated.ties if accelerated is not None else ():
        _tie(plain, group)
    if accelerated is not None:
        trainable = set(accelerated.trainable)
        for name, parameter in plain.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in trainable)
    return plain


def _tie(model: nn.Module, names: list[str]) -> None:
    """Make the named parameters one tensor again, where nobody has changed one of them since."""
    first = model.get_parameter(names[0])
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        if torch.equal(getattr(owner, child), first):
            setattr(owner, child, first)
