"""Which tensors of a model are pruned: the prunable module types, the filters, ties between weights.

A target is one weight tensor: ``weight`` of Linear, Conv1d, Conv2d, Conv3d and of transformers' Conv1D
(stored as [in, out]); the input projections of MultiheadAttention (its output projection is a Linear of its
own); the input, hidden and projection matrices of RNN, LSTM, GRU and of their cells. Embeddings, and
weights tied to one, are pruned only when a filter of `include` is meant for them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from pared._errors import check_callable, check_count, close_matches
from pared._sparsity import SHARDS, base_type, effective_weight, is_freed, parameter_of
from pared.nn import PackedModule

__all__ = ["Filter", "Filters", "Target", "collect", "unwrap"]

Filter: TypeAlias = "str | re.Pattern[str] | type[nn.Module] | nn.Module | Callable[[str, nn.Module], bool]"
Filters: TypeAlias = "Filter | Sequence[Filter] | None"

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass
class Target:
    """One prunable tensor, and every place that shares it.

    Attributes
    ----------
    module, layer, parameter : the module, its qualified name ("" for the model itself), the tensor's name.
    names : qualified tensor names of all places that share it, this one first.
    places : the distinct modules among those places, with the tensor's name in each.
    embedding : name of an embedding among those places, if any.
    problem : why it cannot be pruned, if it cannot; an error only when the filters select it.
    """

    module: nn.Module
    layer: str
    parameter: str
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    embedding: str | None = None
    problem: str | None = None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def tensor(self) -> torch.Tensor:
        """The parameter as it is now (`load_state_dict(assign=True)` may have replaced it)."""
        return parameter_of(self.module, self.parameter)

    @property
    def weight(self) -> torch.Tensor:
        """The tensor that the forward pass uses, detached."""
        return effective_weight(self.module, self.parameter)

    @property
    def type(self) -> str:
        return base_type(self.module).__name__

    @property
    def transposed(self) -> bool:
        return _is_transformers_conv1d(self.module)

    @property
    def groups(self) -> int:
        groups = getattr(self.module, "groups", 1)
        return groups if isinstance(groups, int) else 1


def unwrap(model: object) -> nn.Module:
    """The user's own module inside ``torch.compile`` and DataParallel wrappers: names read as written."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    module = model
    while True:
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        else:
            return module


def check_values(model: nn.Module) -> None:
    """Raise ``ValueError`` where a parameter has no values yet, lazy or on the meta device."""
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter) or p.is_meta:
            raise ValueError(f"model: expected weights with values, got {name!r} without any (lazy or meta)")


def _is_transformers_conv1d(module: nn.Module) -> bool:
    # By name: transformers need not be installed, and its module path has moved over the years.
    return any(c.__name__ == "Conv1D" for c in type(module).__mro__) and hasattr(module, "nf")


def _parameters(module: nn.Module) -> Iterator[str]:
    """Names of the module's own prunable tensors."""
    simple = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_EMBEDDINGS)
    if isinstance(module, simple) or _is_transformers_conv1d(module):
        yield "weight"
    elif isinstance(module, nn.MultiheadAttention):
        same = module._qkv_same_embed_dim
        yield from ("in_proj_weight",) if same else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    elif isinstance(module, nn.RNNBase):
        yield from (name for group in module._all_weights for name in group if name.startswith("weight"))
    elif isinstance(module, nn.RNNCellBase):
        yield from ("weight_ih", "weight_hh")


def _dimensions(module: nn.Module) -> int:
    """Of the module's own prunable tensors."""
    return 2 + sum(
        isinstance(module, kind) * n for kind, n in ((nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3))
    )


def _prefixes(name: str) -> list[str]:
    """``"a.b.c"`` -> ``["a", "a.b", "a.b.c"]``: the containers that a name lies in, and itself."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


class _Matcher:
    """One include or exclude filter."""

    def __init__(self, argument: str, given: object) -> None:
        self.argument = argument
        self.given = given
        self.regex: re.Pattern[str] | None = None
        if isinstance(given, re.Pattern):
            self.regex = given
        elif isinstance(given, str) and given.startswith("re:"):
            try:
                self.regex = re.compile(given[3:])
            except re.error as error:
                raise ValueError(
                    f"{argument}: expected a regular expression after 're:', got {given!r} ({error})"
                ) from None
        elif isinstance(given, type):
            if not issubclass(given, nn.Module):
                raise TypeError(f"{argument}: expected a module type, got the class {given.__name__}")
        elif callable(given) and not isinstance(given, nn.Module):
            check_callable(argument, given, "(name, module) -> bool")
        elif not isinstance(given, str | nn.Module):
            raise TypeError(
                f"{argument}: expected a glob, a regular expression, a module type, a module or a callable "
                f"(name, module) -> bool, got {type(given).__name__}"
            )

    def __str__(self) -> str:
        if isinstance(self.given, re.Pattern):
            return f"re:{self.given.pattern}"
        if isinstance(self.given, nn.Module):
            return f"a {type(self.given).__name__} module"
        return (
            self.given if isinstance(self.given, str) else getattr(self.given, "__name__", repr(self.given))
        )

    def matches(self, name: str, layer: str, module: nn.Module, modules: dict[str, nn.Module]) -> bool:
        """Whether the filter selects `name` (a tensor of `module`, or a module) or a container of it."""
        if self.regex is not None:
            return any(self.regex.search(prefix) for prefix in _prefixes(name))
        if isinstance(self.given, str):
            return any(fnmatch.fnmatchcase(prefix, self.given) for prefix in _prefixes(name))
        if isinstance(self.given, (type, nn.Module)):
            around = [module, *(modules[p] for p in _prefixes(layer) if p in modules)]
            if isinstance(self.given, type):
                return any(isinstance(m, self.given) for m in around)
            return any(m is self.given for m in around)
        assert callable(self.given)
        return bool(self.given(layer, module))

    def selects(self, target: Target, modules: dict[str, nn.Module]) -> bool:
        """Whether the filter selects any of the places that share the target's tensor."""
        layers = ((name, name.rpartition(".")[0]) for name in target.names)
        return any(self.matches(name, layer, modules[layer], modules) for name, layer in layers)


def _matchers(argument: str, filters: object) -> list[_Matcher]:
    if filters is None:
        return []
    if isinstance(filters, (list, tuple, set, frozenset)):
        if not filters:
            raise ValueError(
                f"{argument}: expected at least one filter or None, got an empty {type(filters).__name__}"
            )
        return [_Matcher(argument, f) for f in filters]
    return [_Matcher(argument, filters)]


def _no_match(
    matcher: _Matcher, names: Iterable[str], modules: dict[str, nn.Module], what: str
) -> ValueError:
    names = list(names)
    text = (
        f"{matcher.argument}: expected a filter that matches {what}, got {str(matcher)!r}, which matches none"
    )
    if isinstance(matcher.given, str) and matcher.regex is None:
        word = matcher.given.strip("*").strip(".")
        pool = sorted({p for name in names for p in _prefixes(name)})
        near = close_matches(word, pool) or [p for p in pool if word and word.casefold() in p.casefold()][:3]
        if near:
            text += f"; near misses: {', '.join(near)}"
    elif isinstance(matcher.given, type):
        text += f"; module types here: {', '.join(sorted({base_type(m).__name__ for m in modules.values()}))}"
    shown = ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
    return ValueError(f"{text}; prunable: {shown}")


def _memory(module: nn.Module, parameter: str, qualified: str) -> tuple[tuple[object, ...], str | None]:
    """What tells the tensor from others, and what keeps it from being pruned.

    By memory, so that parameters that share it without being one object count once as well.
    """
    alone = (id(module), parameter)
    try:
        tensor = parameter_of(module, parameter)
    except ValueError as error:
        return alone, f"model: expected a weight that can be pruned, got {qualified!r}: {error}"
    if isinstance(tensor, UninitializedParameter) or tensor.is_meta:
        return alone, f"model: expected weights with values, got {qualified!r} without any (lazy or meta)"
    if type(tensor.detach()) is not torch.Tensor:
        return alone, (
            f"{qualified!r}: expected a plain tensor, got the subclass {type(tensor).__name__}; prune before "
            "the model is quantized or sharded (torchao, fully_shard)"
        )
    if tensor.layout != torch.strided:
        return alone, f"model: expected dense weights, got {qualified!r} of layout {tensor.layout}"
    if tensor.dtype not in _DTYPES:
        return (
            alone,
            f"model: expected floating-point weights, 16 to 64 bits, got {tensor.dtype} in {qualified!r}",
        )
    if is_freed(tensor):
        return alone, f"model: expected weights in memory, got {qualified!r}, whose memory was freed"
    if tensor.ndim != _dimensions(module):
        return alone, (
            f"{qualified!r}: expected the whole weight of {base_type(module).__name__}, got a tensor of "
            f"shape {list(tensor.shape)}, as sharding leaves on each process; {SHARDS}"
        )
    if not tensor.numel():
        return alone, None
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.device), None


def _find(modules: dict[str, nn.Module]) -> list[Target]:
    """Every prunable tensor in registration order; tensors that share memory are one target."""
    found: dict[tuple[object, ...], Target] = {}
    for layer, module in modules.items():
        for parameter in _parameters(module):
            qualified = f"{layer}.{parameter}" if layer else parameter
            key, problem = _memory(module, parameter, qualified)
            target = found.setdefault(key, Target(module, layer, parameter, problem=problem))
            target.names.append(qualified)
            if all(place != (module, parameter) for place in target.places):
                target.places.append((module, parameter))
            if isinstance(module, _EMBEDDINGS):
                target.embedding = qualified
            elif isinstance(
                target.module, _EMBEDDINGS
            ):  # a tie is shown under the layer that multiplies by it
                target.module, target.layer, target.parameter = module, layer, parameter
                target.names.insert(0, target.names.pop())
    return list(found.values())


def _unknown(model: nn.Module) -> dict[str, str]:
    """Names of matrices in modules that have no prunable tensor, the stacked experts of a mixture of
    transformers for example, and of their layers."""
    return {
        f"{layer}.{name}" if layer else name: layer
        for layer, module in model.named_modules()
        if next(_parameters(module), None) is None and not isinstance(module, ParametrizationList)
        for name, tensor in module.named_parameters(recurse=False)
        if sum(n > 1 for n in tensor.shape) > 1
    }


def collect(
    model: nn.Module, include: object, exclude: object, keep_first: object, keep_last: object
) -> tuple[list[Target], list[tuple[str, str]]]:
    """The tensors to prune, and ``(name, reason)`` of those that stay as they are.

    Parameters
    ----------
    model : module without wrappers (see `unwrap`).
    include, exclude : one filter or a list of them. A string is a glob over qualified names (``*`` crosses
        dots), or a regular expression after ``"re:"`` (searched); a compiled pattern, a module type, a
        module of the model, or a callable ``(layer name, module) -> bool``. What matches a container
        selects everything in it; exclude wins. An embedding, or a weight tied to one, is pruned only when
        one of the include filters selects nothing else (``"wte"``, ``nn.Embedding``).
    keep_first, keep_last : how many of the selected layers stay dense, in registration order. A layer is a
        module; an LSTM with eight matrices is one.

    Raises
    ------
    TypeError, ValueError : naming the argument, what was expected and what came; a filter that matches
        nothing (for `include`: no prunable tensor) lists near misses.
    """
    first, last = (
        check_count(name, n, "layers", 0)
        for name, n in (("keep_first", keep_first), ("keep_last", keep_last))
    )
    inside, outside = _matchers("include", include), _matchers("exclude", exclude)
    modules = dict(model.named_modules(remove_duplicate=False))
    targets = _find(modules)
    names = [t.name for t in targets]
    if not inside and any(isinstance(m, PackedModule) for m in modules.values()):
        raise ValueError(
            "model: expected plain layers, got accelerated ones, whose weights stay as they are; "
            "pared.restore it first, or name plain layers with include"
        )
    if not targets:
        raise ValueError(
            f"model: expected a module with prunable weights, got {type(model).__name__} without any"
        )

    for matcher in inside:
        if not any(matcher.selects(t, modules) for t in targets):
            raise _no_match(matcher, names, modules, "a prunable weight")
    unknown = _unknown(model)
    places = {**{name: name for name in modules if name}, **unknown}
    for matcher in outside:
        if not any(matcher.selects(t, modules) for t in targets) and not any(
            matcher.matches(name, layer, modules[layer], modules) for name, layer in places.items()
        ):
            raise _no_match(matcher, names, modules, "a module or a weight")
    # '*' and 'model.*' do not mean the embeddings; a filter that selects nothing else does.
    plain = [t for t in targets if t.embedding is None]
    own = [m for m in inside if not any(m.selects(t, modules) for t in plain)]

    chosen: list[Target] = []
    kept: list[tuple[str, str]] = []
    for target in targets:
        if inside and not any(m.selects(target, modules) for m in inside):
            kept.append((target.name, "not included"))
        elif any(m.selects(target, modules) for m in outside):
            kept.append((target.name, "excluded"))
        elif target.embedding is not None and not any(m.selects(target, modules) for m in own):
            tied = "" if target.embedding == target.name else f"tied to {target.embedding}; "
            kept.append((target.name, f"{tied}an embedding needs an include filter of its own"))
        else:
            chosen.append(target)

    if not inside:
        kept += [
            (name, f"no layer of {type(modules[layer]).__name__} is pruned")
            for name, layer in unknown.items()
            if not any(m.matches(name, layer, modules[layer], modules) for m in outside)
        ]

    layers = list(dict.fromkeys(t.layer for t in chosen))
    if first + last:
        if first + last >= len(layers):
            raise ValueError(
                f"keep_first, keep_last: expected fewer than the {len(layers)} selected layers in all, got "
                f"{first} + {last}"
            )
        dense = {*layers[:first], *layers[len(layers) - last :]}
        kept += [
            (t.name, "keep_first" if t.layer in layers[:first] else "keep_last")
            for t in chosen
            if t.layer in dense
        ]
        chosen = [t for t in chosen if t.layer not in dense]
    if not chosen:
        raise ValueError(
            "include, exclude: expected filters that leave something to prune, got none; prunable: "
            + ", ".join(names[:5])
        )
    for target in chosen:
        if target.problem is not None:
            raise ValueError(target.problem)
    return chosen, kept
