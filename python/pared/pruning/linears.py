"""`as_linears`: attention and transformers' Conv1D as Linear layers, with the same outputs.

nn.MultiheadAttention keeps three projections in one tensor and computes with it in functions; transformers'
Conv1D keeps its weight as [in, out]. Masks work on both as they are. Kernels and the removal of heads and
channels work on Linear layers, and this makes them so, with the same outputs.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from pared._sparsity import weight_format
from pared.pruning.targets import _is_transformers_conv1d, unwrap

__all__ = ["Attention", "as_linears"]


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


def _linear(module: nn.Module) -> nn.Linear:
    weight = cast(torch.Tensor, module.weight)
    bias = cast("nn.Parameter | None", module.bias)
    new = nn.Linear(weight.shape[0], weight.shape[1], bias is not None, device="meta")
    new.weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    if bias is not None:
        new.bias = bias
    return new.train(module.training)


def as_linears(model: nn.Module) -> nn.Module:
    """Replace nn.MultiheadAttention and transformers' Conv1D by modules that compute with Linear layers.

    In place, with the same outputs: `pared.accelerate` then finds kernels for them, and
    `pared.prune_channels` removes whole heads and channels. The state dict has other keys
    (``q_proj.weight``, ...) and, for Conv1D, transposed weights: a model that is to load such a file
    goes through this function first.

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
    from pared._surgery import adopt_hooks, module_names, replace

    module = unwrap(model)
    names = module_names(module)
    found: dict[int, nn.Module] = {}
    for name, old in module.named_modules():
        attention = isinstance(old, nn.MultiheadAttention)
        if not attention and not _is_transformers_conv1d(old):
            continue
        label = name or "the model"
        if attention and (old.bias_k is not None or old.add_zero_attn):
            raise ValueError(
                f"model: expected attentions without bias_k and add_zero_attn, got one with them in {label!r}"
            )
        tensors = ["in_proj_weight"] if attention else ["weight"]
        if attention and not old._qkv_same_embed_dim:
            tensors = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        if any(weight_format(old, t) != "plain" for t in tensors):
            raise ValueError(
                f"model: expected plain weights, got masks of another tool on {label!r}; make them permanent "
                "first, for example with pared.prune(model, 0.0)"
            )
        found[id(old)] = old
    if not found:
        raise ValueError(
            "model: expected nn.MultiheadAttention or transformers' Conv1D layers, got none of them"
        )
    shared: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for old in found.values():
        if isinstance(old, nn.MultiheadAttention):
            new: nn.Module = Attention(old)
        else:
            linear = _linear(old)
            linear.weight = shared.setdefault(id(old.weight), cast(nn.Parameter, linear.weight))
            new = linear
        adopt_hooks(new, old)
        module = replace(module, names[id(old)], new)
    return module
