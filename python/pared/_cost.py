"""What a model costs to run: products with its weights, and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pared._inputs import Example, one_pass, run_hooked
from pared._timing import interleave
from pared.nn import Conv2d, PackedModule
from pared.pruning.calibration import _CONVOLUTIONS
from pared.pruning.targets import _find

__all__ = ["model_seconds", "weight_uses"]

_MODEL_SECONDS = 1.0


def model_seconds(model: nn.Module, inputs: Sequence[Example]) -> float:
    """Median seconds of one pass over all inputs, in eval mode and without gradients."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            t = interleave(
                {"model": one_pass(model, list(inputs))}, budget=_MODEL_SECONDS, min_rounds=5, warmup=1
            )
    finally:
        for module, mode in modes:
            module.training = mode
    return t.median("model")


def weight_uses(model: nn.Module, inputs: Sequence[Example]) -> dict[str, tuple[float, int]]:
    """By tensor name: how often each weight is multiplied in one pass over `inputs`, and its non-zeros.

    The product of both is the layer's multiply-adds without those with zeros. Counted are the weights of
    linear, convolutional, recurrent and attention layers, plain or accelerated; products without weights (the
    scores of an attention) are not. Embeddings are looked up, not multiplied.
    """
    # By module and tensor: the name under which it counts, and its non-zeros.
    places: dict[tuple[int, str], tuple[str, int]] = {}
    for target in _find(dict(model.named_modules(remove_duplicate=False))):
        for module, parameter in target.places:
            if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
                places[id(module), parameter] = (target.name, int(torch.count_nonzero(target.weight)))
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, PackedModule):
            places[id(module), "weight"] = (
                f"{name}.weight" if name else "weight",
                module.packed_weight().nnz,
            )
    uses: dict[tuple[int, str], float] = {}

    def count(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(module, nn.MultiheadAttention):
            given = [*args, *(kwargs[k] for k in ("query", "key", "value") if k in kwargs)][:3]
            tokens = [x.numel() / max(1, x.shape[-1]) for x in given]
            split = zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), tokens, strict=True)
            # Its output projection is called as a function.
            found = {(id(module), n): t for n, t in split} | {(id(module.out_proj), "weight"): tokens[0]}
            found[id(module), "in_proj_weight"] = sum(tokens) / 3
        else:
            n = _positions(module, args, kwargs, output)
            found = {place: n for place in places if place[0] == id(module)}
        for place, n in found.items():
            uses[place] = uses.get(place, 0.0) + n

    owners = {place[0] for place in places}
    handles = [m.register_forward_hook(count, with_kwargs=True) for m in modules.values() if id(m) in owners]
    run_hooked(model, inputs, handles)
    total: dict[str, tuple[float, int]] = {}
    for place, (name, nonzero) in places.items():
        if place in uses:
            total[name] = (total.get(name, (0.0, 0))[0] + uses[place], nonzero)
    return total


def _positions(module: nn.Module, args: Any, kwargs: Any, output: Any) -> float:
    """How often a call multiplies each weight: tokens, or pixels of the output."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        x = args[0] if args else kwargs["input"]
        return x.data.shape[0] if isinstance(x, PackedSequence) else x.numel() / max(1, x.shape[-1])
    if not isinstance(output, Tensor):
        return 0.0
    if isinstance(module, (*_CONVOLUTIONS, Conv2d)):
        return output.numel() / max(1, output.shape[-1 - len(module.kernel_size)])
    return output.numel() / max(1, output.shape[-1])
