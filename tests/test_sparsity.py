"""pared._sparsity: the weights that a model computes with, whichever tool pruned it."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn

from pared._sparsity import bake, effective_weight, parameter_of, weight_format
from pared._surgery import copy_model


def sparsifier_masks(model: nn.Module, tensor_fqn: str) -> None:
    from torch.ao.pruning import WeightNormSparsifier

    s = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1), zeros_per_block=1)
    s.prepare(model, [{"tensor_fqn": tensor_fqn}])
    s.step()


def masked_layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    out: dict[str, nn.Module] = {}
    linear = nn.Linear(12, 8)
    torch_prune.l1_unstructured(linear, "weight", amount=0.5)
    out["torch.nn.utils.prune"] = linear
    stacked = nn.Conv2d(4, 6, 3)
    torch_prune.random_unstructured(stacked, "weight", amount=0.3)
    torch_prune.ln_structured(stacked, "weight", amount=0.5, n=2, dim=0)
    out["stacked"] = stacked
    model = nn.Sequential(nn.Linear(16, 8))
    sparsifier_masks(model, "0.weight")
    out["torch.ao.pruning"] = model[0]
    return out


@pytest.mark.parametrize("kind", ["torch.nn.utils.prune", "stacked", "torch.ao.pruning"])
def test_effective_weight_is_what_the_forward_pass_uses(kind: str) -> None:
    layer = masked_layers()[kind]
    assert weight_format(layer) == ("torch.nn.utils.prune" if kind == "stacked" else kind)
    w = effective_weight(layer)
    assert not w.requires_grad
    assert 0 < int((w == 0).sum()) < w.numel()
    x = torch.randn(3, 4, 9, 9) if isinstance(layer, nn.Conv2d) else torch.randn(3, layer.in_features)
    want = layer(x)
    with pytest.raises(RuntimeError, match="deepcopy") if kind != "torch.ao.pruning" else nullcontext():
        copy.deepcopy(layer)
    plain = copy_model(layer)
    bake(plain)
    assert weight_format(plain) == "plain"
    assert torch.equal(plain(x), want)
    assert torch.equal(plain.weight.detach(), w)


@pytest.mark.parametrize("kind", ["torch.nn.utils.prune", "stacked", "torch.ao.pruning"])
def test_bake_keeps_the_parameter_and_leaves_a_plain_module(kind: str) -> None:
    layer = masked_layers()[kind]
    model = nn.Sequential(layer, nn.ReLU())
    param = parameter_of(layer)
    pointer = param.data_ptr()
    assert bake(model) == ["0.weight"]
    assert layer.weight is param
    assert layer.weight.data_ptr() == pointer
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}
    assert not dict(layer.named_buffers())
    assert not layer._forward_pre_hooks
    assert type(layer) in (nn.Linear, nn.Conv2d)
    assert layer.weight.requires_grad
    assert bake(model) == []


def test_bake_writes_positive_zeros_even_over_infinity() -> None:
    layer = nn.Linear(4, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-1.0, float("inf"), 2.0, -3.0]]))
    torch_prune.custom_from_mask(layer, "weight", torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    bake(layer)
    assert torch.equal(layer.weight.detach(), torch.tensor([[0.0, 0.0, 2.0, -3.0]]))
    assert not torch.signbit(layer.weight.detach()[0, 0])


def test_plain_weight_is_not_copied() -> None:
    layer = nn.Linear(5, 3)
    assert weight_format(layer) == "plain"
    assert effective_weight(layer).data_ptr() == layer.weight.data_ptr()
    assert parameter_of(layer) is layer.weight


def test_recurrent_and_attention_names() -> None:
    rnn = nn.LSTM(6, 5)
    torch_prune.l1_unstructured(rnn, "weight_hh_l0", amount=0.5)
    w = effective_weight(rnn, "weight_hh_l0")
    assert int((w == 0).sum()) == w.numel() // 2
    x = torch.randn(2, 1, 6)
    bake(rnn)
    fresh = nn.LSTM(6, 5)
    fresh.load_state_dict(rnn.state_dict())
    assert torch.equal(rnn(x)[0], fresh(x)[0])  # the flat list that the RNN kernels read follows
    assert torch.equal(rnn.weight_hh_l0.detach(), w)
    mha = nn.MultiheadAttention(8, 2)
    torch_prune.l1_unstructured(mha, "in_proj_weight", amount=0.25)
    assert int((effective_weight(mha, "in_proj_weight") == 0).sum()) == 48


def unknown_layers() -> dict[str, nn.Module]:
    from torch.nn.utils import parametrizations, spectral_norm

    both = nn.Sequential(nn.Linear(8, 8))
    sparsifier_masks(both, "0.weight")
    parametrizations.orthogonal(both[0])
    return {
        "weight_norm": parametrizations.weight_norm(nn.Linear(4, 4)),
        "old spectral_norm": spectral_norm(nn.Linear(4, 4)),
        "orthogonal": parametrizations.orthogonal(nn.Linear(4, 4)),
        "mask and orthogonal": both[0],
    }


@pytest.mark.parametrize("kind", ["weight_norm", "old spectral_norm", "orthogonal", "mask and orthogonal"])
def test_unknown_parametrisation(kind: str) -> None:
    layer = unknown_layers()[kind]
    for call in (effective_weight, parameter_of, weight_format):
        with pytest.raises(ValueError, match=r"unknown parametrisation of Linear: .*; remove it first"):
            call(layer)


def test_bake_leaves_other_parametrisations_alone_and_is_atomic() -> None:
    layers = unknown_layers()
    assert bake(layers["weight_norm"]) == []
    masked = nn.Linear(4, 4)
    torch_prune.l1_unstructured(masked, "weight", amount=0.5)
    model = nn.Sequential(masked, layers["mask and orthogonal"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="unknown parametrisation"):
        bake(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_no_such_tensor() -> None:
    with pytest.raises(
        ValueError, match=r"name: expected a parameter of Linear \(bias, weight\), got 'kernel'"
    ):
        effective_weight(nn.Linear(2, 2), "kernel")


def test_tied_parameter_stays_tied() -> None:
    a, b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    b.weight = a.weight
    mask = (torch.rand(6, 6) < 0.5).float()
    torch_prune.custom_from_mask(a, "weight", mask)
    torch_prune.custom_from_mask(b, "weight", mask)
    bake(nn.Sequential(a, b))
    assert a.weight is b.weight
    assert torch.equal(a.weight.detach() == 0, mask == 0)
