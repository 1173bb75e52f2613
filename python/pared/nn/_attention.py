"""pared's attention kernel inside models of transformers, through their registry of attention functions.

An attention module of transformers asks ``self.config._attn_implementation`` which function computes it. Here
single modules are given a configuration of their own that says "pared" where the model's says "sdpa"; masks
and everything else of the model stay those of "sdpa".
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from pared import _core
from pared.ops._library import attention_op

__all__ = [
    "AttentionConfig",
    "attend",
    "attending",
    "detach",
    "pared_attention",
    "recording",
    "torch_attention",
]

_NAME = "pared"
_REPLACED = "sdpa"  # torch's own attention: what the kernel computes the same as
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_mode_depth = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing

# What tells of the calls that the kernel takes, while `recording`: (module, query, key, value, mask, scale,
# is_causal).
_listener: ContextVar[Callable[..., None] | None] = ContextVar("_listener", default=None)


class AttentionConfig:
    """A model's configuration as one attention module sees it: with "pared" in the place of "sdpa".

    Everything else is read from and written to the model's own configuration.

    Attributes
    ----------
    original : the model's configuration.
    """

    original: Any

    def __init__(self, original: Any) -> None:
        object.__setattr__(self, "original", original)
        _register()

    @property
    def _attn_implementation(self) -> str | None:
        name: str | None = self.original._attn_implementation
        return _NAME if name == _REPLACED else name

    def __getattr__(self, name: str) -> Any:
        if name == "original":  # asked for by copy and pickle, before it is there
            raise AttributeError(name)
        return getattr(self.original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.original, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return AttentionConfig, (self.original,)  # a process that unpickles it registers the function


def attending(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that were given the kernel, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(vars(m).get("config"), AttentionConfig)}


def attend(module: nn.Module) -> bool:
    """Give an attention module of transformers the kernel; False where it can be none: it has no
    configuration that chooses an attention function, or is a whole model, which makes masks by it."""
    config = vars(module).get("config")
    models = sys.modules.get("transformers.modeling_utils")
    if models is None or isinstance(module, models.PreTrainedModel):
        return False
    if getattr(config, "_attn_implementation", None) != _REPLACED:
        return False
    vars(module)["config"] = AttentionConfig(config)
    return True


def detach(module: nn.Module) -> None:
    """Take the kernel back."""
    config = vars(module).get("config")
    if isinstance(config, AttentionConfig):
        vars(module)["config"] = config.original


@contextmanager
def recording(listener: Callable[..., None]) -> Iterator[None]:
    """Tell `listener` of each call that the kernel takes."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def torch_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What transformers computes with "sdpa"."""
    return _functions()[_REPLACED](module, *args, **kwargs)


def _functions() -> Any:
    return importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS


# What transformers' own function takes beside the arguments below, so that calls with it are left to it.
_further: tuple[str, ...] = ()


def _register() -> None:
    global _further
    functions = _functions()
    mine = inspect.signature(pared_attention).parameters
    theirs = inspect.signature(functions[_REPLACED]).parameters
    _further = ("softcap", "output_attentions", *(n for n in theirs if n not in mine))
    functions.register(_NAME, pared_attention)


def pared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' ``sdpa_attention_forward``, which computes what the kernel does not take."""
    # `is`: tensors are among them, and output_attentions=False.
    theirs_alone = any(kwargs.get(n) is not None and kwargs[n] is not False for n in _further)
    if dropout or theirs_alone or not _fits(query, key, value, attention_mask):
        theirs: tuple[Tensor, None] = torch_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return theirs
    batch, heads, queries, features = query.shape
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and queries > 1
    scale = features**-0.5 if scaling is None else scaling
    mask = attention_mask
    if mask is not None:
        mask = mask.expand(batch, heads, queries, key.shape[2])
    if is_compiling() or type(query) is not Tensor or _mode_depth() or _tracing():
        return attention_op(query, key, value, mask, scale, causal), None
    listener = _listener.get()
    if listener is not None:
        listener(module, query, key, value, mask, scale, causal)
    out = query.new_empty((batch, queries, heads, value.shape[3]))
    _core.attention(query, key, value, mask, out.transpose(1, 2), scale, causal)
    return out, None


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel computes what torch does with these."""
    for x in (query, key, value):
        if (
            x.dtype != query.dtype
            or x.dtype not in _DTYPES
            or x.device.type != "cpu"
            or x.ndim != 4
            or x.stride(3) != 1
            or (x.requires_grad and torch.is_grad_enabled())
        ):
            return False
    same = query.shape[0] == key.shape[0] == value.shape[0] and key.shape[1] == value.shape[1]
    if not same or query.shape[3] != key.shape[3] or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        return False
    return mask is None or (
        mask.ndim == 4
        and mask.dtype in (torch.bool, torch.float32, query.dtype)
        and mask.shape[3] == key.shape[2]
        and not (mask.requires_grad and torch.is_grad_enabled())
    )
