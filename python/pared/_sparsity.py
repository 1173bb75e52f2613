"""The weights that a model really computes with, whichever tool pruned it.

Recognised formats of a tensor `name` of a module:

``"plain"``
    an ordinary parameter; zeros in it are zeros (masks that were removed, a pruned checkpoint).
``"torch.nn.utils.prune"``
    masks attached by ``torch.nn.utils.prune``: parameter ``name_orig`` and buffer ``name_mask``, also when
    several of its methods are stacked.
``"torch.ao.pruning"``
    the ``FakeSparsity`` parametrisations that the sparsifiers of ``torch.ao.pruning`` attach.

Anything else (``weight_norm``, ``spectral_norm``, ``orthogonal``, a user's own parametrisation, a tensor that
is computed) raises ``ValueError``: its zeros would not survive the next forward pass.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

__all__ = [
    "bake",
    "bake_constants",
    "base_type",
    "effective_weight",
    "masked_names",
    "parameter_of",
    "weight_format",
]


# What to do where the weights of a model are in parts.
SHARDS = "prune before FullyShardedDataParallel wraps the model, or in its summon_full_params(model)"


def base_type(module: nn.Module) -> type[nn.Module]:
    """The module's class without the subclass that ``torch.nn.utils.parametrize`` puts in front of it."""
    return parametrize.type_before_parametrizations(module)


def weight_format(module: nn.Module, name: str = "weight") -> str:
    """How `module` holds the tensor `name`: one of the formats that this file's header lists.

    Raises
    ------
    ValueError : the module has no such tensor, or it is computed in a way that pared does not know.
    """
    if parametrize.is_parametrized(module, name):
        kinds = [type(p).__name__ for p in _parametrizations(module, name)]
        # By name: torch.ao.pruning is leaving torch for torchao, and the class is the same in both.
        if all(kind == "FakeSparsity" for kind in kinds):
            return "torch.ao.pruning"
        raise ValueError(_unknown(module, name, " + ".join(kinds)))
    if isinstance(module._parameters.get(name), torch.Tensor):
        return "plain"
    if f"{name}_orig" in module._parameters and f"{name}_mask" in module._buffers:
        return "torch.nn.utils.prune"
    if isinstance(getattr(module, name, None), torch.Tensor):
        inputs = sorted(key for key in module._parameters if key.startswith(f"{name}_"))
        if not inputs:
            raise ValueError(
                f"{name}: expected a parameter of {base_type(module).__name__}, got a tensor that is no "
                f"parameter; {SHARDS}"
            )
        raise ValueError(_unknown(module, name, f"a tensor computed from {', '.join(inputs)}"))
    known = sorted(key for key, value in module._parameters.items() if value is not None) or ["none"]
    raise ValueError(
        f"name: expected a parameter of {base_type(module).__name__} ({', '.join(known)}), got {name!r}"
    )


def is_freed(tensor: torch.Tensor) -> bool:
    """Whether the memory was given back, as sharded training does between steps: to read it crashes."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.numel() > 0 and tensor.data_ptr() == 0


def parameter_of(module: nn.Module, name: str = "weight") -> torch.Tensor:
    """The leaf tensor that an optimiser updates for `name`: itself, or the original under the masks."""
    kind = weight_format(module, name)
    if kind == "plain":
        tensor = module._parameters[name]
    elif kind == "torch.nn.utils.prune":
        tensor = module._parameters[f"{name}_orig"]
    else:
        tensor = module.parametrizations[name].original  # type: ignore[union-attr,index]
    assert isinstance(tensor, torch.Tensor)  # weight_format has looked
    return tensor


def effective_weight(module: nn.Module, name: str = "weight") -> torch.Tensor:
    """The tensor `name` as the forward pass uses it, detached, with every mask applied.

    Parameters
    ----------
    module : the layer, for example ``nn.Linear``.
    name : the tensor's name, for example ``"weight"`` or ``"in_proj_weight"``.

    Returns
    -------
    A tensor of the parameter's shape, dtype and device. A plain parameter is returned as a view of itself
    (nothing is copied: do not write to it); a masked one is a new tensor.

    Raises
    ------
    ValueError : unknown parametrisation, or no such tensor.
    """
    weight = parameter_of(module, name).detach()
    for mask in _masks(module, name):
        weight = weight * mask.to(weight.dtype)
    return weight


def bake(module: nn.Module, *, recurse: bool = True) -> list[str]:
    """Make pruning masks permanent, in place: true zeros, plain parameters, no hooks.

    The parameters stay the same objects, so optimisers and tied modules go on working. Parametrisations that
    are not pruning masks are left alone. Nothing changes when this raises.

    Parameters
    ----------
    module : a layer or a whole model.
    recurse : whether its submodules are baked too.

    Returns
    -------
    The qualified names of the tensors that were baked, for example ``["encoder.fc1.weight"]``.

    Raises
    ------
    ValueError : a mask is combined with an unknown parametrisation on the same tensor.
    """
    found = [
        (prefix, owner, name, weight_format(owner, name))
        for prefix, owner in (module.named_modules() if recurse else [("", module)])
        for name in masked_names(owner)
    ]
    zeroed: set[tuple[int, tuple[int, ...]]] = set()
    for _, owner, name, kind in found:
        original = parameter_of(owner, name)
        masks = _masks(owner, name)
        key = (id(original), tuple(id(mask) for mask in masks))
        with torch.no_grad():
            for mask in masks if key not in zeroed else []:
                original.mul_(mask.to(original.dtype))
                original.masked_fill_(mask == 0, 0)  # not -0.0, and not the NaN of 0 * inf
        zeroed.add(key)
        if kind == "torch.ao.pruning":
            parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
        else:
            _detach_torch_mask(owner, name)
    return [f"{prefix}.{name}" if prefix else name for prefix, _, name, _ in found]


def bake_constants(model: nn.Module) -> None:
    """Make the tensors that torch's ``weight_norm`` and ``spectral_norm``, both of their kinds, and
    ``orthogonal`` compute plain parameters, in place: in eval mode they are the same in every call.

    On the meta device the shapes alone are right, as everywhere there.
    """
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
        if not parametrize.is_parametrized(module):
            continue
        for name, chain in list(module.parametrizations.items()):  # type: ignore[operator,union-attr]
            if any(type(p).__module__ != parametrizations.__name__ for p in chain):
                continue
            # orthogonal looks at values, of which a meta tensor has none.
            plain = chain.original if chain.is_tensor and chain.original.is_meta else getattr(module, name)
            trained = any(p.requires_grad for p in chain.parameters(recurse=False))
            constant = nn.Parameter(plain.detach().clone(), trained)
            parametrize.remove_parametrizations(module, name, leave_parametrized=not chain.is_tensor)
            module._parameters[name] = constant


def _unknown(module: nn.Module, name: str, what: str) -> str:
    return (
        f"{name}: expected a plain parameter or pruning masks (torch.nn.utils.prune, torch.ao.pruning), got "
        f"an unknown parametrisation of {base_type(module).__name__}: {what}; remove it first, for example "
        "with torch.nn.utils.parametrize.remove_parametrizations, or leave the layer out"
    )


def _parametrizations(module: nn.Module, name: str) -> list[nn.Module]:
    return list(module.parametrizations[name])  # type: ignore[index]


def _masks(module: nn.Module, name: str) -> list[torch.Tensor]:
    kind = weight_format(module, name)
    if kind == "torch.nn.utils.prune":
        mask = module._buffers[f"{name}_mask"]
        return [] if mask is None else [mask]
    if kind == "torch.ao.pruning":
        return [p.mask for p in _parametrizations(module, name)]  # type: ignore[misc]
    return []


def masked_names(module: nn.Module) -> list[str]:
    """Names of the module's own tensors that carry a pruning mask; a scripted module has none: a mask's hook
    does not compile, and its buffers are no dictionary."""
    if isinstance(module, torch.jit.ScriptModule):
        return []
    names = [
        key.removesuffix("_mask")
        for key in module._buffers
        if key.endswith("_mask") and f"{key.removesuffix('_mask')}_orig" in module._parameters
    ]
    if parametrize.is_parametrized(module):
        for name in module.parametrizations:  # type: ignore[union-attr]
            if any(type(p).__name__ == "FakeSparsity" for p in _parametrizations(module, name)):
                names.append(name)
    return names


def _detach_torch_mask(module: nn.Module, name: str) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, BasePruningMethod) and getattr(hook, "_tensor_name", None) == name:
            del module._forward_pre_hooks[key]
    if hasattr(module, name):
        delattr(module, name)  # the masked copy that the hook left as a plain attribute
    original = module._parameters.pop(f"{name}_orig")
    del module._buffers[f"{name}_mask"]
    setattr(module, name, original)
