"""Whole layers of transformer encoders in one call of the extension.

A layer keeps its class, as far as ``isinstance`` goes, its children and its name: its class becomes a
subclass whose ``forward`` makes one call where everything is as this module understands it, and is the
layer's own everywhere else: traced or compiled, in training, with hooks inside, with arguments that ask for
more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional

from pared import _core
from pared.nn._attention import AttentionConfig
from pared.nn._fused import Fused, class_below, subclass
from pared.nn.linear import Linear

__all__ = ["EncoderLayer", "encoding", "fits", "fuse_layer", "own_class", "separate"]

_PLAN = "_pared_plan"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_mode_depth = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing
_grad_enabled = torch.is_grad_enabled
_global = torch.nn.modules.module

# What a call means: the input, a mask as the attention kernel takes it (broadcast over all four axes),
# whether it is causal. None: leave it to the layer's own forward.
Call = tuple[Tensor, Tensor | None, bool]


@dataclass(frozen=True)
class Structure:
    """Where the parts of a layer are, and what they compute.

    Attributes
    ----------
    linears : paths of q, k, v, out, up and down.
    norms : paths of the normalisation behind (before) the attention and of that of the feed-forward pair.
    inner : paths of everything else inside.
    heads, scale : of the attention.
    norm_first, batch_first : as of ``nn.TransformerEncoderLayer``.
    activation : of the feed-forward pair, where it is not up's own.
    read : gives what a call means, from its arguments.
    """

    linears: tuple[str, ...]
    norms: tuple[str, str]
    inner: tuple[str, ...]
    heads: int
    scale: float
    norm_first: bool
    batch_first: bool
    read: Callable[[Structure, tuple[Any, ...], Mapping[str, Any]], Call | None]
    activation: str = ""


class _Plan:
    """A structure with its modules looked up, and the extension's object for the tensors that they hold."""

    def __init__(self, layer: nn.Module, structure: Structure) -> None:
        self.structure = structure
        # Each module inside, and where it hangs: what shows that something was replaced.
        self.edges: list[tuple[dict[str, nn.Module | None], str, nn.Module, dict[str, Any]]] = []
        for path in (*structure.linears, *structure.norms, *structure.inner):
            parent, _, name = path.rpartition(".")
            holder, module = layer.get_submodule(parent), layer.get_submodule(path)
            self.edges.append((holder._modules, name, module, vars(module)))
        self.linears: list[Any] = [layer.get_submodule(p) for p in structure.linears]
        self.norms: list[Any] = [layer.get_submodule(p) for p in structure.norms]
        self.buffers = [(m._buffers, n) for m in self.linears for n in ("packed", "bias")]
        self.parameters = [(m._parameters, n) for m in self.norms for n in ("weight", "bias")]
        # The tensors that the native object was made of, and that object: one value, since several threads
        # may find both out of date.
        self.made: tuple[list[Tensor | None], Any] | None = None

    def untouched(self) -> bool:
        """Whether the modules are those of the structure, in eval mode, and nothing listens to them."""
        for holder, name, module, inside in self.edges:
            if (
                holder.get(name) is not module
                or inside["training"]
                or inside["_forward_hooks"]
                or inside["_forward_pre_hooks"]
                or "forward" in inside
            ):
                return False
        return not (_global._global_forward_hooks or _global._global_forward_pre_hooks)

    def kernel(self, layer: nn.Module) -> Any:
        """The extension's layer around the tensors as they are now; None where they ask for gradients, or
        are no longer what it takes."""
        now: list[Tensor | None] = [d[n] for d, n in self.buffers]
        now += [d[n] for d, n in self.parameters]
        if _grad_enabled() and any(t is not None and t.requires_grad for t in now):
            return None
        made = self.made
        if made is None or any(a is not b for a, b in zip(made[0], now, strict=True)):
            if structure_of(layer) is None:
                return None
            s = self.structure
            native = _core.EncoderLayer(
                now[0:12:2],
                now[1:12:2],
                [m._act or (s.activation if i == 4 else "") for i, m in enumerate(self.linears)],
                now[12:],
                [m.eps for m in self.norms],
                s.heads,
                s.scale,
                s.norm_first,
            )
            made = self.made = now, native
        return made[1]


class EncoderLayer:
    """What a layer's class is given before itself: ``forward`` in one call, where it can be."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own forward, with its arguments."""
        y = _one_call(self, args, kwargs)
        plain: Any = super()
        return plain.forward(*args, **kwargs) if y is None else y

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made here, in whatever process unpickles; the plan is made again when it is called.
        state = {k: v for k, v in vars(self).items() if k != _PLAN}
        return _made, (own_class(self),), state


def own_class(layer: object) -> type[Any]:
    """The class of a layer, without what `fuse_layer` has put before it."""
    return class_below(EncoderLayer, type(layer)) if isinstance(layer, EncoderLayer) else type(layer)


def _made(plain: type[nn.Module]) -> nn.Module:
    kind = subclass(EncoderLayer, plain)
    module: nn.Module = kind.__new__(kind)
    return module


def _one_call(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    if is_compiling() or _mode_depth() or _tracing():
        return None
    inside = vars(layer)
    plan: _Plan | None = inside.get(_PLAN)
    if plan is None:
        structure = structure_of(layer)
        if structure is None:
            return None
        plan = inside[_PLAN] = _Plan(layer, structure)
    if inside["training"] or not plan.untouched():
        return None
    call = plan.structure.read(plan.structure, args, kwargs)
    if call is None:
        return None
    x, mask, causal = call
    if (
        type(x) is not Tensor
        or x.dtype not in _DTYPES
        or x.ndim != 3
        or not x.is_cpu
        or x.layout is not torch.strided
        or (x.requires_grad and _grad_enabled())
    ):
        return None
    batch_first = plan.structure.batch_first
    if mask is not None:
        tokens = x.shape[1 if batch_first else 0]
        full = (x.shape[0 if batch_first else 1], plan.structure.heads, tokens, tokens)
        wrong = mask.dtype not in (torch.bool, *_DTYPES) or (mask.requires_grad and _grad_enabled())
        if wrong or mask.ndim != 4 or any(a not in (1, b) for a, b in zip(mask.shape, full, strict=True)):
            return None
        mask = mask.expand(full)
    out, x = x.new_empty(x.shape), x.contiguous()
    while (kernel := plan.kernel(layer)) is not None:
        if kernel(x, mask, out, batch_first, causal):
            return out
        plan.made = None  # half() and share_memory() give tensors other memory in place
    return None


# -- what is understood ----------------------------------------------------------------------------


def structure_of(layer: nn.Module) -> Structure | None:
    """How a layer is built; None where that is not fully understood, or a part has no kernel."""
    if isinstance(layer, torch.jit.ScriptModule):
        return None
    plain = own_class(layer)
    if plain is nn.TransformerEncoderLayer:
        return _torch_layer(layer)
    return _of_transformers(layer, plain)


def _parts(layer: nn.Module, children: Mapping[str, Collection[str]]) -> bool:
    """Whether the modules at these paths have exactly these children, and no tensors of their own."""
    for path, names in children.items():
        try:
            module = layer.get_submodule(path)
        except AttributeError:
            return False
        own = [*module._parameters.values(), *module._buffers.values()]
        if set(module._modules) != set(names) or any(t is not None for t in own):
            return False
    return True


def _leaves_fit(
    layer: nn.Module, linears: tuple[str, ...], norms: tuple[str, ...], rest: tuple[str, ...]
) -> bool:
    """Whether all leaves are what they are called: packed layers of the CPU, normalisations over the last
    axis, and modules that do nothing in eval mode; all activations but that of the first of the feed-forward
    pair none."""
    for i, path in enumerate(linears):
        m = layer.get_submodule(path)
        if type(m) is not Linear or m._on_device is not None or (i != 4 and m.activation is not None):
            return False
    q, k, v, *_ = (layer.get_submodule(path) for path in linears)
    if not q.out_features == k.out_features == v.out_features:
        return False
    for path in norms:
        m = layer.get_submodule(path)
        if type(m) is not nn.LayerNorm or len(m.normalized_shape) != 1:
            return False
        if any(p is not None and p.dtype not in _DTYPES for p in (m.weight, m.bias)):
            return False
    return all(type(layer.get_submodule(p)) in (nn.Dropout, nn.Identity, Fused) for p in rest)


def _returns_a_tensor(plain: type[nn.Module], names: tuple[str, ...]) -> bool:
    """Whether forward says that it takes these arguments first and returns a tensor, as transformers says
    it."""
    signature = inspect.signature(plain.forward)
    said = signature.return_annotation
    first = list(signature.parameters)[1 : 1 + len(names)]
    return first == [*names] and said in (Tensor, "torch.Tensor", "Tensor")


@dataclass(frozen=True)
class Layout:
    """How layers of transformers with these children are built.

    Attributes
    ----------
    children : of every module inside that has some, by path.
    attention : the path of the module that calls the attention.
    heads, scale : its attributes.
    linears, norms, rest, norm_first : as of `Structure`.
    takes : the names of forward's first arguments.
    named : classes, where others with the same children compute something else; None: all of them.
    """

    children: Mapping[str, frozenset[str]]
    attention: str
    heads: str
    scale: str
    linears: tuple[str, ...]
    norms: tuple[str, str]
    rest: tuple[str, ...]
    norm_first: bool
    takes: tuple[str, ...] = ("hidden_states", "attention_mask")
    named: frozenset[str] | None = None

    def structure(self, layer: nn.Module, plain: type[nn.Module]) -> Structure | None:
        """That of a layer; None where it is another's, or a part has no kernel."""
        if self.named is not None and plain.__name__ not in self.named:
            return None
        if not _parts(layer, self.children) or not plain.__module__.startswith("transformers.models."):
            return None
        own: Any = layer.get_submodule(self.attention)
        if not (_returns_a_tensor(plain, self.takes) and _is_sdpa(own) and _plainly(layer)):
            return None
        if not _leaves_fit(layer, self.linears, self.norms, self.rest):
            return None
        inner = (*self.rest, *(path for path in self.children if path))
        heads, scale = getattr(own, self.heads), float(getattr(own, self.scale))
        read = partial(_hidden_states, self.takes)
        return Structure(self.linears, self.norms, inner, heads, scale, self.norm_first, True, read)


def _is_sdpa(attention: nn.Module) -> bool:
    """Whether an attention module's function is torch's, by its config, and every key is seen."""
    config = vars(attention).get("config")
    if isinstance(config, AttentionConfig):
        config = config.original
    causal = getattr(attention, "is_causal", True) or getattr(attention, "is_decoder", False)
    return getattr(config, "_attn_implementation", None) == "sdpa" and not causal


def _plainly(layer: nn.Module) -> bool:
    """Whether nothing is asked for that most layers do not do."""
    unusual = ("is_decoder", "add_cross_attention", "chunk_size_feed_forward")
    return not any(getattr(m, n, False) for n in unusual for m in (layer, *layer.children()))


def _named(*names: str) -> frozenset[str]:
    return frozenset(names)


_BERT_TAIL = {
    "intermediate": _named("dense", "intermediate_act_fn"),
    "attention.output": _named("dense", "dropout"),
    "output": _named("dense", "dropout"),
}
_QKV = ("query", "key", "value")
_OUT = ("attention.output.dense", "intermediate.dense", "output.dense")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _speech(norm_first: bool, *classes: str) -> Layout:
    """Layers of BART's kind, in either order."""
    norms = ("self_attn_layer_norm", "final_layer_norm")
    return Layout(
        {
            "": _named(
                "self_attn", "self_attn_layer_norm", "activation_fn", "fc1", "fc2", "final_layer_norm"
            ),
            "self_attn": _named(*_PROJECTIONS, "out_proj"),
        },
        "self_attn",
        "num_heads",
        "scaling",
        (*(f"self_attn.{n}" for n in (*_PROJECTIONS, "out_proj")), "fc1", "fc2"),
        norms,
        ("activation_fn",),
        norm_first,
        named=_named(*classes),
    )


_LAYOUTS = (
    Layout(  # BERT, RoBERTa, ELECTRA
        {
            "": _named("attention", "intermediate", "output"),
            "attention": _named("self", "output"),
            "attention.self": _named(*_QKV, "dropout"),
            "intermediate": _BERT_TAIL["intermediate"],
            "attention.output": _BERT_TAIL["attention.output"] | {"LayerNorm"},
            "output": _BERT_TAIL["output"] | {"LayerNorm"},
        },
        "attention.self",
        "num_attention_heads",
        "scaling",
        (*(f"attention.self.{n}" for n in _QKV), *_OUT),
        ("attention.output.LayerNorm", "output.LayerNorm"),
        (
            "attention.self.dropout",
            "attention.output.dropout",
            "intermediate.intermediate_act_fn",
            "output.dropout",
        ),
        norm_first=False,
    ),
    Layout(  # DistilBERT
        {
            "": _named("attention", "sa_layer_norm", "ffn", "output_layer_norm"),
            "attention": _named("q_lin", "k_lin", "v_lin", "out_lin", "dropout"),
            "ffn": _named("lin1", "lin2", "activation", "dropout"),
        },
        "attention",
        "n_heads",
        "scaling",
        (*(f"attention.{n}_lin" for n in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2"),
        ("sa_layer_norm", "output_layer_norm"),
        ("attention.dropout", "ffn.activation", "ffn.dropout"),
        norm_first=False,
    ),
    Layout(  # ViT, DeiT, AST
        {
            "": _named("attention", "layernorm_before", "layernorm_after", "mlp", "dropout"),
            "attention": _named(*_PROJECTIONS, "o_proj"),
            "mlp": _named("activation_fn", "fc1", "fc2"),
        },
        "attention",
        "num_attention_heads",
        "scaling",
        (*(f"attention.{n}" for n in (*_PROJECTIONS, "o_proj")), "mlp.fc1", "mlp.fc2"),
        ("layernorm_before", "layernorm_after"),
        ("mlp.activation_fn", "dropout"),
        norm_first=True,
    ),
    Layout(  # YOLOS, VideoMAE
        {
            "": _named("attention", "intermediate", "output", "layernorm_before", "layernorm_after"),
            "attention": _named("attention", "output"),
            "attention.attention": _named(*_QKV),
            **_BERT_TAIL,
        },
        "attention.attention",
        "num_attention_heads",
        "scaling",
        (*(f"attention.attention.{n}" for n in _QKV), *_OUT),
        ("layernorm_before", "layernorm_after"),
        ("attention.output.dropout", "intermediate.intermediate_act_fn", "output.dropout"),
        norm_first=True,
        takes=("hidden_states",),
    ),
    Layout(  # SigLIP, and CLIP with an activation that a kernel computes
        {
            "": _named("self_attn", "layer_norm1", "layer_norm2", "mlp"),
            "self_attn": _named(*_PROJECTIONS, "out_proj"),
            "mlp": _named("activation_fn", "fc1", "fc2"),
        },
        "self_attn",
        "num_heads",
        "scale",
        (*(f"self_attn.{n}" for n in (*_PROJECTIONS, "out_proj")), "mlp.fc1", "mlp.fc2"),
        ("layer_norm1", "layer_norm2"),
        ("mlp.activation_fn",),
        norm_first=True,
    ),
    _speech(True, "WhisperEncoderLayer"),
    _speech(False, "BartEncoderLayer"),
)


def _of_transformers(layer: nn.Module, plain: type[nn.Module]) -> Structure | None:
    return next((s for layout in _LAYOUTS if (s := layout.structure(layer, plain)) is not None), None)


def _hidden_states(
    names: tuple[str, ...], s: Structure, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Call | None:
    """(hidden_states, attention_mask, ...), with nothing else asked for."""
    given = dict(zip(names, args, strict=False))
    # `is`: tensors are among them, and output_attentions=False.
    if any(a is not None and a is not False for a in args[len(names) :]):
        return None
    for n, a in kwargs.items():
        if n in names:
            given[n] = a
        elif a is not None and a is not False and n != "use_cache":  # an encoder has no cache
            return None
    x, mask = given.get("hidden_states"), given.get("attention_mask")
    if not isinstance(x, Tensor) or not (mask is None or isinstance(mask, Tensor)):
        return None
    return x, mask, False


def _torch_layer(layer: Any) -> Structure | None:
    from pared.pruning.linears import Attention  # which imports this package

    own = layer._modules.get("self_attn")
    names = {"self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2"}
    activation = layer.activation
    if isinstance(activation, nn.Module):
        names.add("activation")
    attention = {"q_proj", "k_proj", "v_proj", "out_proj"}
    if type(own) is not Attention or not _parts(layer, {"": names, "self_attn": attention}):
        return None
    linears = (*(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")), "linear1", "linear2")
    norms = ("norm1", "norm2")
    rest = ("dropout", "dropout1", "dropout2")
    if not _leaves_fit(layer, linears, norms, rest):
        return None
    after = ""
    if type(activation) is not Fused:
        # The layer calls it behind up, which then has none of its own.
        found = _activation(activation)
        if found is None or layer.linear1.activation is not None:
            return None
        after = found
    scale = (own.q_proj.out_features // own.num_heads) ** -0.5
    inner = (*rest, "self_attn", *(("activation",) if "activation" in names else ()))
    first, batch_first = layer.norm_first, own.batch_first
    return Structure(linears, norms, inner, own.num_heads, scale, first, batch_first, _source, after)


def _activation(function: Any) -> str | None:
    """The kernel's name of an activation of nn.TransformerEncoderLayer, a function or a module."""
    if type(function) is nn.GELU:
        # torch's own call for a whole layer takes the erf form for either.
        return "gelu" if function.approximate == "none" else None
    if type(function) is nn.ReLU:
        return "relu"
    return {functional.relu: "relu", functional.gelu: "gelu"}.get(function)


def _source(s: Structure, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """(src, src_mask, src_key_padding_mask, is_causal) of nn.TransformerEncoderLayer; its masks are True
    where a key is not seen."""
    names = ("src", "src_mask", "src_key_padding_mask", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, mask, padding = (given.get(n) for n in names[:3])
    if len(args) > 4 or not given.keys() <= set(names) or not isinstance(x, Tensor) or x.ndim != 3:
        return None
    n, length = (x.shape[0], x.shape[1]) if s.batch_first else (x.shape[1], x.shape[0])
    parts = []
    if mask is not None:
        if mask.ndim == 3 and mask.shape[0] == n * s.heads:
            parts.append(mask.view(n, s.heads, length, length))
        elif mask.ndim == 2:
            parts.append(mask[None, None])
        else:
            return None
    if padding is not None:
        if tuple(padding.shape) != (n, length):
            return None
        parts.append(padding.view(n, 1, 1, length))
    if not parts:
        return x, None, bool(given.get("is_causal"))
    if all(p.dtype == torch.bool for p in parts):
        hidden = parts[0] if len(parts) == 1 else parts[0] | parts[1]
        return x, hidden.logical_not(), False
    added = [
        torch.zeros(p.shape, device=p.device).masked_fill_(p, -torch.inf) if p.dtype == torch.bool else p
        for p in parts
    ]
    return x, added[0] if len(added) == 1 else added[0] + added[1], False


# -- giving and taking -----------------------------------------------------------------------------


def fits(layer: nn.Module) -> bool:
    """Whether a layer can be computed in one call."""
    return structure_of(layer) is not None


def fuse_layer(layer: nn.Module) -> bool:
    """Let a layer be computed in one call; False where it cannot be."""
    if isinstance(layer, EncoderLayer):
        return True
    if not fits(layer):
        return False
    object.__setattr__(layer, "__class__", subclass(EncoderLayer, type(layer)))
    return True


def separate(layer: nn.Module) -> None:
    """Give a layer its own class back."""
    if isinstance(layer, EncoderLayer):
        vars(layer).pop(_PLAN, None)
        object.__setattr__(layer, "__class__", own_class(layer))


def encoding(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are computed in one call, by name."""
    return {n: m for n, m in model.named_modules() if issubclass(type(m), EncoderLayer)}
