"""`as_linears`: attention, and transformers' Conv1D and experts, as Linear layers, with the same outputs.

nn.MultiheadAttention keeps three projections in one tensor and computes with it in functions; transformers'
Conv1D keeps its weight as [in, out], and its mixtures of experts have one tensor for all of them. Masks work
on the first two as they are. Kernels and the removal of heads and channels work on Linear layers, and this
makes them so, with the same outputs. `pared.accelerate` opens such layers itself (`open_layers`) and
`pared.restore` closes them again (`close_layers`).

A subclass of nn.Linear, nn.Conv1d or nn.Conv2d with a forward of its own (transformers' FalconLinear) may
compute what they do: `accelerate` compares its outputs, and makes it one of them (`as_plain`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from pared._sparsity import base_type, weight_format
from pared.pruning.targets import unwrap

__all__ = [
    "AS_PLAIN",
    "Attention",
    "Encoder",
    "Experts",
    "as_linears",
    "as_plain",
    "close_layers",
    "open_layers",
    "plain_kind",
]

# The layers that kernels take.
PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d)
# The tensors of transformers' experts: [experts, 2 x inner, width] and [experts, width, inner].
_EXPERTS = ("gate_up_proj", "down_proj")
# What is opened as a subclass of a torch layer, by how it is named in a report.
AS_PLAIN = " as nn."


class Attention(nn.Module):
    """nn.MultiheadAttention with a Linear layer for each of its four projections: the same arguments and
    outputs.

    Attributes
    ----------
    q_proj, k_proj, v_proj, out_proj : the projections.
    num_heads : heads that are left.
    """

    # What torch's transformer layers ask before they compute with an attention's packed weight themselves.
    in_proj_bias = None
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    _qkv_same_embed_dim = False

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        size = module.embed_dim
        if module._qkv_same_embed_dim:
            weights = list(module.in_proj_weight.detach().chunk(3))
            trained = [module.in_proj_weight.requires_grad] * 3
        else:
            own = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
            weights, trained = [w.detach() for w in own], [w.requires_grad for w in own]
        packed = module.in_proj_bias
        biases = [None] * 3 if packed is None else list(packed.detach().chunk(3))
        for name, w, flag, b in zip(("q_proj", "k_proj", "v_proj"), weights, trained, biases, strict=True):
            linear = nn.Linear(w.shape[1], size, b is not None, device="meta")
            linear.weight = nn.Parameter(w.clone(), flag)
            if b is not None:
                linear.bias = nn.Parameter(b.clone(), cast(torch.Tensor, packed).requires_grad)
            setattr(self, name, linear)
        out = module.out_proj
        self.out_proj = nn.Linear(size, size, out.bias is not None, device="meta")
        self.out_proj.weight, self.out_proj.bias = out.weight, out.bias
        self.num_heads, self.dropout, self.batch_first = module.num_heads, module.dropout, module.batch_first
        self.train(module.training)

    def to_module(self) -> nn.MultiheadAttention:
        """nn.MultiheadAttention again, around copies of the weights.

        Raises
        ------
        ValueError : heads have been removed: it has no such shape.
        """
        parts, out = (self.q_proj, self.k_proj, self.v_proj), self.out_proj
        size = out.out_features
        if any(p.out_features != size for p in parts) or self.q_proj.in_features != size:
            raise ValueError(f"module: expected all heads of {size} channels, got {self.q_proj.out_features}")
        new = nn.MultiheadAttention(
            size,
            self.num_heads,
            self.dropout,
            bias=self.q_proj.bias is not None,
            batch_first=self.batch_first,
            kdim=self.k_proj.in_features,
            vdim=self.v_proj.in_features,
            device="meta",
        )
        if new._qkv_same_embed_dim:
            weight = torch.cat([p.weight.detach() for p in parts])
            new.in_proj_weight = nn.Parameter(weight, parts[0].weight.requires_grad)
        else:
            for name, p in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), parts, strict=True):
                setattr(new, name, p.weight)
        if self.q_proj.bias is not None:
            bias = torch.cat([p.bias.detach() for p in parts])
            new.in_proj_bias = nn.Parameter(bias, parts[0].bias.requires_grad)
        new.out_proj.weight, new.out_proj.bias = out.weight, out.bias
        return new.train(self.training)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As nn.MultiheadAttention: the output, and the weights of the attention or None."""
        batched = query.ndim == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        n, length, keys = query.shape[0], query.shape[1], key.shape[1]
        heads = self.num_heads
        q = self.q_proj(query).view(n, length, heads, -1).transpose(1, 2)
        k = self.k_proj(key).view(n, keys, heads, -1).transpose(1, 2)
        v = self.v_proj(value).view(n, keys, heads, -1).transpose(1, 2)
        mask = _added(attn_mask, q.dtype)
        if mask is not None and mask.ndim == 3:
            mask = mask.view(n, heads, length, keys)
        padding = _added(key_padding_mask, q.dtype)
        if padding is not None:
            padding = padding.view(n, 1, 1, keys)
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        weights: torch.Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, dropout) if dropout else weights
            y = weights @ v
        else:
            causal = is_causal and mask is None
            y = functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = self.out_proj(y.transpose(1, 2).reshape(n, length, -1))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights


def _added(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask as what is added to the scores: True becomes minus infinity."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)


class Encoder(nn.TransformerEncoder):
    """nn.TransformerEncoder that calls its layers, padded or not.

    torch packs padded sequences into a nested tensor where it can compute a layer in one call, and puts zeros
    where they were padded. The layers here take padded tensors; what torch would have put there is put there.
    """

    _nests: bool

    def forward(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        y = super().forward(src, mask, src_key_padding_mask, is_causal)
        padding = src_key_padding_mask
        nests = self._nests and not self.training and src.ndim == 3 and mask is None
        if padding is None or not nests or not torch.backends.mha.get_fastpath_enabled():
            return y
        kept = padding.logical_not() if padding.dtype == torch.bool else padding == 0
        if self.mask_check and (
            torch.compiler.is_compiling() or not torch._nested_tensor_from_mask_left_aligned(src, kept)
        ):
            return y
        empty = y.new_zeros(y.shape[-1])
        return torch.where(kept.unsqueeze(-1), y, empty if self.norm is None else self.norm(empty))


class Experts(nn.Module):
    """Experts of a mixture, of any class of transformers that has them in two tensors, with Linear layers for
    each: the same arguments and outputs.

    A module becomes one in place, by its class: what else it has stays.

    Attributes
    ----------
    gate_up_proj, down_proj : the layers of each expert.
    """

    gate_up_proj: nn.ModuleList
    down_proj: nn.ModuleList
    act_fn: nn.Module
    _original: type[nn.Module]

    @classmethod
    def open(cls, module: nn.Module) -> None:
        """Make `module` one of them, around copies of its weights."""
        for name in _EXPERTS:
            weight = cast(nn.Parameter, module._parameters.pop(name))
            layers = nn.ModuleList()
            for own in weight.detach():
                layers.append(nn.Linear(own.shape[1], own.shape[0], bias=False, device="meta"))
                layers[-1].weight = nn.Parameter(own.clone(), weight.requires_grad)
            module.add_module(name, layers.train(module.training))
        module.__class__, module._original = cls, type(module)  # type: ignore[assignment]

    def close(self) -> None:
        """The class that it had, around copies of the weights."""
        for name in _EXPERTS:
            weights = [cast(nn.Parameter, layer.weight) for layer in self.get_submodule(name).children()]
            del self._modules[name]
            stacked = torch.stack([w.detach() for w in weights])
            self._parameters[name] = nn.Parameter(stacked, weights[0].requires_grad)
        self.__class__ = self._original  # type: ignore[assignment]
        del self._original

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, width] and, of each token, [tokens, k] experts and their weights: [tokens, width].

        Each expert gets its own tokens. Where it is traced, which knows no sizes that values decide, it gets
        all of them.
        """
        traced = torch.compiler.is_compiling() or torch._C._is_tracing()
        experts = range(len(self.down_proj))
        y = torch.zeros_like(hidden_states)
        if traced:
            for i in experts:
                share = (top_k_weights * (top_k_index == i)).sum(1, keepdim=True)
                y = y + (self._expert(i, hidden_states) * share).to(y.dtype)
            return y
        for i in sorted({*top_k_index.flatten().tolist()}):
            if i in experts:  # a router may give a number beyond them, for none
                tokens, place = torch.where(top_k_index == i)
                part = self._expert(i, hidden_states[tokens]) * top_k_weights[tokens, place, None]
                y.index_add_(0, tokens, part.to(y.dtype))
        return y

    def _expert(self, i: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj[i](x).chunk(2, dim=-1)
        y: torch.Tensor = self.down_proj[i](self.act_fn(gate) * up)
        return y


def _are_experts(module: nn.Module) -> bool:
    """Whether it is a class of transformers with the experts that most of its models have: two tensors, the
    gates before what they gate, and nothing else that computes."""
    kind = base_type(module)
    flags = {"has_gate": True, "is_concatenated": True, "has_bias": False, "is_transposed": False}
    flags |= {"has_post_expert_norm": False, "_is_expert_parallel": False}
    gate = getattr(kind, "_apply_gate", None)
    return (
        kind.__module__.startswith("transformers.")
        and module._parameters.keys() == {*_EXPERTS}
        # On a GPU transformers' grouped product asks the host for no sizes.
        and all(p is not None and p.ndim == 3 and not p.is_cuda for p in module._parameters.values())
        and module._modules.keys() == {"act_fn"}
        and not module._buffers
        and all(vars(module).get(name) is value for name, value in flags.items())
        and getattr(gate, "__name__", "") == "_default_apply_gate"
    )


def plain_kind(module: nn.Module) -> type[nn.Module] | None:
    """nn.Linear, nn.Conv1d or nn.Conv2d for a module of a subclass that holds no more than they do: whether
    it computes what they do its outputs tell. None for everything else.
    """
    for kind in PLAIN:
        if isinstance(module, kind) and base_type(module) is not kind:
            same = module._parameters.keys() == {"weight", "bias"} and not (
                module._buffers or module._modules
            )
            return kind if same else None
    return None


def as_plain(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Give modules the class that `plain_kind` says, in place; returns by name what they were."""
    found = {}
    for name in names:
        module = model.get_submodule(name)
        kind = plain_kind(module)
        if kind is not None:
            found[name] = (module, kind, f"{type(module).__name__}{AS_PLAIN}{kind.__name__}")
    for module, kind, _ in found.values():
        module.__class__ = kind
    return {name: text for name, (_, _, text) in found.items()}


def _linear(module: nn.Module) -> nn.Linear:
    weight = cast(torch.Tensor, module.weight)
    bias = cast("nn.Parameter | None", module.bias)
    new = nn.Linear(weight.shape[0], weight.shape[1], bias is not None, device="meta")
    new.weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    if bias is not None:
        new.bias = bias
    return new.train(module.training)


def _conv1d(linear: nn.Linear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D  # there was one, so it is installed

    with torch.device("meta"):
        new: nn.Module = Conv1D(linear.out_features, linear.in_features)  # type: ignore[no-untyped-call]
    new.weight = nn.Parameter(linear.weight.detach().t().contiguous(), linear.weight.requires_grad)
    new.bias = linear.bias
    return new.train(linear.training)


def _problem(old: nn.Module) -> str | None:
    """Why a layer cannot be opened: what was expected, and what it is."""
    tensors = ["weight"]
    if isinstance(old, nn.MultiheadAttention):
        if old.bias_k is not None or old.add_zero_attn:
            return "attentions without bias_k and add_zero_attn, got one with them"
        same = old._qkv_same_embed_dim
        tensors = ["in_proj_weight"] if same else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    elif _are_experts(old):
        tensors = [*_EXPERTS]
    if any(weight_format(old, t) != "plain" for t in tensors):
        return (
            "plain weights, got masks of another tool (make them permanent first, for example with "
            "pared.prune(model, 0.0))"
        )
    return None


def _closed(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that can be opened, inner ones first: by exact type, for a subclass may compute something
    else.
    """
    found = []
    for name, module in model.named_modules():
        kind = base_type(module)
        conv1d = kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
        if kind in (nn.MultiheadAttention, nn.TransformerEncoder) or conv1d or _are_experts(module):
            found.append((name, module))
    return sorted(found, key=lambda pair: isinstance(pair[1], nn.TransformerEncoder))


def open_layers(
    model: nn.Module, only: Collection[str] | None = None, *, skip: bool = False
) -> tuple[nn.Module, dict[str, str]]:
    """Put Linear layers in the place of nn.MultiheadAttention and transformers' Conv1D and experts, in place.

    Parameters
    ----------
    only : names of the modules to open; None: all but subclasses. An encoder around them is opened with them.
    skip : leave what cannot be opened; otherwise it raises.

    Returns
    -------
    The model (a new module where it is such a layer itself), and by every name of what was opened its type.

    Raises
    ------
    ValueError : an attention that is more than Linear layers, or masks of another tool. Nothing has changed.
    """
    from pared._surgery import adopt_hooks, module_names, replace
    from pared.quant.weights import pass_on

    names = module_names(model)
    chosen: list[tuple[str, nn.Module]] = []
    for name, old in _closed(model):
        if only is not None and name not in only:
            continue
        if (problem := _problem(old) if not isinstance(old, nn.TransformerEncoder) else None) is None:
            chosen.append((name, old))
        elif not skip:
            raise ValueError(f"model: expected {problem} in {name or 'the model'!r}")
    shared: dict[int, nn.Parameter] = {}  # tied weights stay tied
    opened: dict[str, str] = {}
    for _, old in chosen:
        kind = base_type(old).__name__
        if isinstance(old, nn.TransformerEncoder):
            if not any(isinstance(m, Attention) for m in old.modules()):
                continue
            old.__class__ = Encoder
            encoder = cast(Encoder, old)
            encoder._nests = bool(getattr(old, "use_nested_tensor", False))
            encoder.use_nested_tensor = False
        elif _are_experts(old):
            Experts.open(old)
        else:
            if isinstance(old, nn.MultiheadAttention):
                new: nn.Module = Attention(old)
                size = old.embed_dim
                for i, part in enumerate(("q_proj", "k_proj", "v_proj")):
                    projection = new.get_submodule(part)
                    if old._qkv_same_embed_dim:
                        pass_on(old, projection, slice(i * size, (i + 1) * size))
                    else:
                        pass_on(old, projection, parameter=f"{part}_weight")
                pass_on(old.out_proj, new.get_submodule("out_proj"))
            else:
                new = _linear(old)
                pass_on(old, new)
                new.weight = shared.setdefault(id(old.weight), cast(nn.Parameter, new.weight))
            adopt_hooks(new, old)
            model = replace(model, names[id(old)], new)
        opened |= dict.fromkeys(names[id(old)], kind)
    if only is not None:
        known = dict(model.named_modules(remove_duplicate=False))
        opened |= as_plain(model, [name for name in only if name in known])
    return model, opened


def close_layers(model: nn.Module, opened: Mapping[str, str]) -> nn.Module:
    """Put back the modules that `open_layers` opened, with the weights as they are now; in place. What was of
    a subclass of nn.Linear, nn.Conv1d or nn.Conv2d stays one of them.

    Parameters
    ----------
    opened : what `open_layers` returned, or a part of it.

    Returns
    -------
    The model, or a new module where it is such a layer itself.
    """
    from pared._surgery import adopt_hooks, module_names, replace

    names = module_names(model)
    weights: dict[int, nn.Parameter] = {}
    replaced = [name for name, kind in opened.items() if AS_PLAIN not in kind]
    for old in dict.fromkeys(model.get_submodule(name) for name in replaced):
        mine = [n for n in names[id(old)] if n in opened]
        if isinstance(old, Encoder):
            old.__class__ = nn.TransformerEncoder  # type: ignore[assignment]
            old.use_nested_tensor = old._nests
            del old._nests
            continue
        if isinstance(old, Experts):
            old.close()
            continue
        if isinstance(old, Attention):
            new: nn.Module = old.to_module()
        else:
            new = _conv1d(cast(nn.Linear, old))
            new.weight = weights.setdefault(id(old.weight), cast(nn.Parameter, new.weight))
        adopt_hooks(new, old)
        model = replace(model, mine, new)
    return model


def as_linears(model: nn.Module) -> nn.Module:
    """Replace nn.MultiheadAttention and transformers' Conv1D and experts by modules that compute with Linear
    layers.

    In place, with the same outputs, so that `pared.prune_channels` removes whole heads and channels, and that
    `pared.prune` and `pared.quantize` see the experts of a mixture, of Mixtral for example.
    `pared.accelerate` does this by itself, and `pared.restore` takes it back. The state dict has other keys
    (``q_proj.weight``, ``gate_up_proj.0.weight``, ...) and, for Conv1D, transposed weights: a model that is
    to load such a file goes through this function first.

    Parameters
    ----------
    model : any module. One that is itself such a layer is returned as a new module.

    Returns
    -------
    The model.

    Raises
    ------
    ValueError : nothing to replace; an attention with `bias_k` or `add_zero_attn`, which are no Linear
        layers; masks of another tool. The model is then untouched.
    """
    new, opened = open_layers(unwrap(model))
    if not opened:
        raise ValueError(
            "model: expected nn.MultiheadAttention, or transformers' Conv1D or experts, got none of them"
        )
    return new
