"""Attention and Conv1D layers as Linear layers: the same outputs; kernels and removal that now reach them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import pared
from pared.pruning import as_linears
from pared.pruning.linears import Attention

TOLERANCE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(16, 4, **options)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 10, "vdim": 12, "batch_first": True}]
)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_computes_the_same(options: dict[str, Any], training: bool, need_weights: bool) -> None:
    old = attention(**options).train(training)
    new = as_linears(copy.deepcopy(old))
    assert isinstance(new, Attention)
    assert new.training == training
    first = options.get("batch_first", False)
    shape = (lambda n, t, e: (n, t, e)) if first else (lambda n, t, e: (t, n, e))
    q = torch.randn(shape(2, 5, 16))
    k, v = torch.randn(shape(2, 7, old.kdim)), torch.randn(shape(2, 7, old.vdim))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    masks: list[dict[str, Any]] = [
        {},
        {"key_padding_mask": padding},
        {"attn_mask": torch.triu(torch.ones(5, 7, dtype=torch.bool), 3)},
        {"attn_mask": torch.randn(8, 5, 7), "key_padding_mask": padding.float() * -1e9},
        {"average_attn_weights": False},
    ]
    for mask in masks:
        want, weights = old(q, k, v, need_weights=need_weights, **mask)
        got, mine = new(q, k, v, need_weights=need_weights, **mask)
        torch.testing.assert_close(got, want, **TOLERANCE)
        assert (mine is None) == (weights is None)
        if weights is not None:
            torch.testing.assert_close(mine, weights, **TOLERANCE)


def test_attention_of_one_sequence() -> None:
    old = attention().eval()
    new = as_linears(copy.deepcopy(old))
    x = torch.randn(5, 16)
    for a, b in zip(old(x, x, x), new(x, x, x), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def test_torchs_encoder_and_its_kernels() -> None:
    model, x = encoder(), torch.randn(3, 6, 16)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[2, 3:] = True
    want = [model(x), model(x, src_key_padding_mask=padding)]
    assert as_linears(model) is model
    got = [model(x), model(x, src_key_padding_mask=padding)]
    torch.testing.assert_close(got[0], want[0], **TOLERANCE)
    torch.testing.assert_close(got[1][~padding], want[1][~padding], **TOLERANCE)
    pared.prune(model, 0.8)
    fast = pared.accelerate(model, x, min_speedup=0)
    names = {name for name, m in fast.named_modules() if isinstance(m, pared.nn.Linear)}
    assert {"layers.0.self_attn.q_proj", "layers.1.self_attn.out_proj"} <= names
    torch.testing.assert_close(fast(x), model(x), **TOLERANCE)


def test_heads_of_an_attention_are_removed() -> None:
    """Removed equals masked: prune_channels checks it, and this does so again from the report."""
    model, x = as_linears(encoder()), torch.randn(3, 6, 16)
    report = pared.prune_channels(model, x, 0.5, include="*.self_attn*", round_to=1)
    own = model.layers[0].self_attn  # type: ignore[union-attr,index]
    assert own.num_heads == 2
    assert own.q_proj.out_features == own.v_proj.out_features == own.out_proj.in_features == 8
    assert report.error < 1e-4
    assert model(x).shape == x.shape


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False
    )
    return transformers.GPT2Model(config).eval()


def test_gpt2_as_linears_with_kernels_and_fewer_channels() -> None:
    model = gpt2()
    inputs = {"input_ids": torch.randint(0, 50, (2, 9))}
    want = model(**inputs).last_hidden_state
    as_linears(model)
    assert not any(type(m).__name__ == "Conv1D" for m in model.modules())
    torch.testing.assert_close(model(**inputs).last_hidden_state, want, **TOLERANCE)
    report = pared.prune_channels(model, inputs, 0.5, include="*.mlp.*", round_to=1)
    assert model.h[0].mlp.c_fc.out_features == model.h[0].mlp.c_proj.in_features == 32
    assert report.error < 1e-4
    pared.prune(model, 0.7)
    fast = pared.accelerate(model, inputs, min_speedup=0)
    assert isinstance(fast.h[0].mlp.c_fc, pared.nn.Linear)  # type: ignore[union-attr,index]
    torch.testing.assert_close(
        fast(**inputs).last_hidden_state, model(**inputs).last_hidden_state, **TOLERANCE
    )


def test_ties_names_flags_and_hooks_stay() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    first, second = conv1d(6, 6), conv1d(6, 6)
    second.weight = first.weight
    first.weight.requires_grad_(False)
    calls: list[int] = []
    first.register_forward_hook(lambda *a: calls.append(1))
    model = nn.ModuleDict({"a": first, "b": second, "again": first})
    x = torch.randn(3, 6)
    want = second(first(x))
    new: Any = as_linears(model)
    assert new["a"] is new["again"]
    assert new["a"].weight is new["b"].weight
    assert not new["a"].weight.requires_grad
    torch.testing.assert_close(new["b"](new["a"](x)), want)
    assert calls == [1, 1]


def test_a_wrong_projection_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    old = attention().eval()
    new: Any = as_linears(copy.deepcopy(old))
    new.k_proj, new.v_proj = new.v_proj, new.k_proj
    x = torch.randn(5, 2, 16)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(new(x, x, x)[0], old(x, x, x)[0], **TOLERANCE)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(3, 3), "expected nn.MultiheadAttention or transformers' Conv1D layers, got none"),
        (
            lambda: nn.Sequential(attention(add_bias_kv=True)),
            "without bias_k and add_zero_attn, got one .* '0'",
        ),
        (lambda: attention(add_zero_attn=True), "got one with them in 'the model'"),
    ],
)
def test_what_cannot_be_replaced(model: Any, message: str) -> None:
    made = model()
    before = list(made.state_dict())
    with pytest.raises(ValueError, match=message):
        as_linears(made)
    assert list(made.state_dict()) == before
