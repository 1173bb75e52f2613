"""Channels and blocks that are removed for real: the small model equals the masked one, on any
architecture.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import pared
from pared.pruning import importance as importance_module
from pared.pruning import structured


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Biases, BatchNorm scales, shifts and statistics away from what they start with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            for p in m.parameters(recurse=False):
                p.copy_(
                    torch.randn(p.shape, generator=generator) * (0.5 if p.ndim == 1 else p[0].numel() ** -0.5)
                )
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=generator) * 0.3)
                m.running_var.copy_(torch.rand(m.running_var.shape, generator=generator) + 0.5)
    return model.eval()


class Net(nn.Module):
    """Residual, repeated concatenation, grouped and depthwise convolutions, flattening, no padding."""

    def __init__(self, width: int, groups: int, parts: str, kernel: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.parts = parts
        self.stem = nn.Conv2d(3, width, 3, bias=bias)
        self.bn = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 2 * width, kernel, bias=bias)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.mid = nn.Conv2d(2 * width, width, 1, groups=groups, bias=bias)
        self.depth = nn.Conv2d(width, width, 1, groups=width, bias=bias)
        self.join = nn.Conv2d(width * len(parts), width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width * 16, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.relu(self.bn(self.stem(x)))
        b = a + self.mid(F.silu(self.bn2(self.inner(a))))
        c = torch.tanh(self.depth(b))
        z = torch.cat([{"a": a, "b": b, "c": c}[p] for p in self.parts], 1)
        z = F.adaptive_avg_pool2d(self.bn3(self.join(z)), 4)
        return self.out(F.gelu(self.fc(z.flatten(1))))


def removed_channels(model: nn.Module, x: torch.Tensor, ratio: float, **kwargs: Any) -> Any:
    """The pruned model, the same with weights at zero, and the report."""
    chosen: list[Any] = []
    attempt = structured._attempt

    def spy(m: nn.Module, groups: Any, inputs: Any) -> Any:
        chosen[:] = list(groups)
        return attempt(m, groups, inputs)

    pruned, masked = copy.deepcopy(model), copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structured, "_attempt", spy)
        report = pared.prune_channels(pruned, x, ratio, **kwargs)
    modules = dict(masked.named_modules())
    with torch.no_grad():
        for group in chosen:
            for name, indices in group.producers.items():
                for channel in group.removed:
                    modules[name].weight[indices[channel]] = 0
    return pruned, masked, report


@settings(max_examples=12)
@given(
    width=st.sampled_from([4, 6, 8]),
    groups=st.sampled_from([1, 2]),
    parts=st.sampled_from(["a", "ab", "aa", "aba", "abc", "cc", "bac"]),
    kernel=st.sampled_from([1, 1]),
    bias=st.booleans(),
    ratio=st.sampled_from([0.25, 0.5, 0.9]),
    round_to=st.sampled_from([1, 2]),
    scope=st.sampled_from(["layer", "global"]),
    seed=st.integers(0, 99),
)
def test_removed_equals_masked(
    width: int,
    groups: int,
    parts: str,
    kernel: int,
    bias: bool,
    ratio: float,
    round_to: int,
    scope: str,
    seed: int,
) -> None:
    model = randomize(Net(width, groups, parts, kernel, bias), seed)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed + 1))
    pruned, masked, report = removed_channels(model, x, ratio, round_to=round_to, scope=scope)
    assert report.parameters < report.parameters_before
    assert report.parameters == sum(p.numel() for p in pruned.parameters())
    assert not report.approximate
    other = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed + 2))  # not the examples
    with torch.no_grad():
        torch.testing.assert_close(pruned(other), masked(other), rtol=1e-4, atol=1e-5)
    if scope == "layer" and ratio == 0.5 and round_to == 1:
        for _, before, after in report.groups:
            assert before > after >= 1


def test_a_shift_that_is_not_folded_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(nn.Sequential(nn.Linear(4, 12), nn.Sigmoid(), nn.Linear(12, 3)))
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(structured, "_add_bias", lambda module, shift: None)
    with pytest.raises(ValueError, match=r"model: expected one whose channels can be removed .* at 0"):
        pared.prune_channels(model, torch.randn(2, 4), 0.5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_padding_is_exact_inside_and_said_to_be_approximate() -> None:
    torch.manual_seed(0)
    model = randomize(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 4, 1),
        )
    )
    x = torch.randn(2, 3, 9, 9)
    pruned, masked, report = removed_channels(model, x, 0.5)
    assert report.approximate == ("2",)
    with torch.no_grad():
        a, b = pruned(x), masked(x)
    torch.testing.assert_close(a[..., 1:-1, 1:-1], b[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-5)
    assert report.error > 1e-3
    assert "exact but for the borders" in str(report)
    # A constant of zero (ReLU of a negative bias) has no borders.
    with torch.no_grad():
        model[0].bias.fill_(-0.1)
        model[2].bias.fill_(-0.1)
    model[1] = nn.ReLU()
    pruned, masked, report = removed_channels(model, x, 0.5)
    assert report.approximate == ()
    torch.testing.assert_close(pruned(x), masked(x), rtol=1e-4, atol=1e-5)


def test_a_small_transformer_keeps_what_a_norm_or_a_head_fixes() -> None:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q, self.k, self.v, self.o = (
                nn.LayerNorm(16),
                *(nn.Linear(16, 16) for _ in range(4)),
            )
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            q, k, v = (f(y).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(x)))

    model = randomize(nn.Sequential(nn.Linear(6, 16), Block(), nn.Linear(16, 3)))
    x = torch.randn(2, 5, 6)
    pruned, masked, report = removed_channels(model, x, 0.5)
    assert (("1.up",), 32, 16) in report.groups
    assert pruned[1].down.in_features == 16
    torch.testing.assert_close(pruned(x), masked(x), rtol=1e-4, atol=1e-5)
    assert any("normalises over its channels" in reason for _, reason in report.kept)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_heads_of_bert(attention: str) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        attn_implementation=attention,
    )
    model = randomize(BertModel(config, add_pooling_layer=False))
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():  # heads two and three of the first layer are the weakest
        for part in ("query", "key", "value"):
            getattr(model.encoder.layer[0].attention.self, part).weight[16:] *= 0.1
    pruned, masked, report = removed_channels(model, {"input_ids": ids}, 0.5)
    first = pruned.encoder.layer[0].attention
    assert first.self.query.out_features == first.output.dense.in_features == 16
    assert (first.self.num_attention_heads, first.self.attention_head_size) == (2, 8)
    kept = model.encoder.layer[0].attention.self.query.weight[:16]
    assert torch.equal(first.self.query.weight, kept)
    other = torch.randint(0, 50, (3, 7))
    torch.testing.assert_close(pruned(other)[0], masked(other)[0], rtol=1e-3, atol=1e-4)
    assert report.error < 1e-4


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return randomize(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 4),
        )
    )


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


GENERATOR = torch.Generator().manual_seed(0)
DATA = [
    (torch.randn(6, 3, 7, 7, generator=GENERATOR), torch.randint(0, 4, (6,), generator=GENERATOR))
    for _ in range(2)
]


@pytest.mark.parametrize("name", sorted({*importance_module.NAMES} - {"obc"}))
def test_every_importance_ranks_channels(name: str) -> None:
    kwargs: dict[str, Any] = {"data": DATA, "loss_fn": cross_entropy}
    pruned, masked, report = removed_channels(chain(), DATA[0][0], 0.5, importance=name, **kwargs)
    assert report.groups == ((("0",), 8, 4), (("3",), 12, 8))  # 6 rounded up to a multiple of 4
    assert report.kept == (("8", "its channels are the model's output"),)
    torch.testing.assert_close(pruned(DATA[1][0]), masked(DATA[1][0]), rtol=1e-4, atol=1e-5)
    assert report.importance.split()[0] in (name, "activation")


def test_magnitude_and_output_weight_choose_the_smallest() -> None:
    model = chain()
    norms = model[0].weight.detach().abs().sum((1, 2, 3))
    pruned = copy.deepcopy(model)
    pared.prune_channels(pruned, DATA[0][0], 0.5)
    keep = norms > norms.median()
    assert torch.equal(pruned[0].weight, model[0].weight[keep])
    outgoing = model[3].weight.detach().abs().sum((0, 2, 3))
    pruned = copy.deepcopy(model)
    pared.prune_channels(pruned, DATA[0][0], 0.5, importance="output_weight")
    assert torch.equal(pruned[0].weight, model[0].weight[outgoing > outgoing.median()])


def test_filters_modes_and_training_on() -> None:
    model = chain().train()
    report = pared.prune_channels(model, DATA[0][0], 0.5, exclude="3")
    assert [g[0] for g in report.groups] == [("0",)]
    assert ("3", "excluded") in report.kept
    assert model.training
    model(DATA[0][0]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    report = pared.prune_channels(model, DATA[0][0], 0.5, include="3")
    assert [g[0] for g in report.groups] == [("3",)]
    assert json.loads(report.to_json())["parameters"] == report.parameters
    assert "fewer parameters" in str(report)


def test_global_scope_takes_more_where_scores_are_small() -> None:
    model = chain()
    with torch.no_grad():
        model[0].weight[:6] *= 0.01
    report = pared.prune_channels(model, DATA[0][0], 0.3, scope="global", round_to=1)
    assert report.groups[0][2] == 2
    assert report.groups[1][2] == 12


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"ratio": 1.0}, ValueError, r"ratio: expected a number in \[0, 1\), got 1.0"),
        ({"ratio": "a"}, TypeError, "ratio: expected a number"),
        ({"round_to": 0}, ValueError, "round_to: expected a number of channels >= 1, got 0"),
        ({"scope": "row"}, ValueError, "scope: expected 'layer', 'global', got 'row'"),
        ({"importance": "wanda"}, ValueError, "data: expected batches, which 'wanda' needs, got None"),
        ({"include": "nothing"}, ValueError, "include: expected a filter that matches a layer with channels"),
        ({"exclude": "*"}, ValueError, "model: expected layers whose channels can be removed, got none"),
        ({"importance": lambda m: torch.ones(3)}, ValueError, "importance: expected scores of shape"),
    ],
)
def test_errors_leave_the_model(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    model = chain()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        pared.prune_channels(model, DATA[0][0], **{"ratio": 0.5, **kwargs})
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_a_model_that_cannot_be_traced() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError("not today")
            return self.fc(x)

    with pytest.raises(
        ValueError, match=r"model: expected one whose graph torch-pruning can trace .* not today"
    ):
        pared.prune_channels(Broken(), torch.ones(1, 4), 0.5)


# ---------------------------------------------------------------- blocks


class Residual(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(8, 8), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.fc(x)


def stack() -> nn.Module:
    torch.manual_seed(0)
    layers = [Residual(s) for s in (1.0, 0.01, 0.5, 0.02, 2.0)]
    return nn.Sequential(nn.Linear(4, 8), *layers, nn.Linear(8, 3))


@pytest.mark.parametrize("importance", ["block_influence", "change_rate", lambda name, module: module.scale])
def test_the_least_important_blocks_become_the_identity(importance: Any) -> None:
    model, x = stack(), torch.randn(6, 4)
    want = nn.Sequential(*[m for i, m in enumerate(model) if i not in (2, 4)])
    report = pared.prune_layers(model, x, 2, importance=importance)
    assert report.removed == ("2", "4")
    assert len(report.scores) == 5  # the first and the last layer change the width
    torch.testing.assert_close(model(x), want(x))
    assert report.parameters_before - report.parameters == 2 * 72
    assert "2 of 5 blocks removed" in str(report)
    assert json.loads(report.to_json())["removed"] == ["2", "4"]


def test_block_influence_is_one_minus_the_cosine_and_loss_changes_are_used() -> None:
    model, x = stack(), torch.randn(6, 4)
    with torch.no_grad():
        h = model[0](x)
        want = float((1 - F.cosine_similarity(h.double(), model[1](h).double(), dim=-1)).mean())
    scores = dict(pared.prune_layers(copy.deepcopy(model), x, 0).scores)
    assert scores["1"] == pytest.approx(want, rel=1e-6)
    data = [(x, torch.randint(0, 3, (6,)))]
    report = pared.prune_layers(
        copy.deepcopy(model), x, 1, importance="change_rate", data=data, loss_fn=cross_entropy
    )
    for name, score in report.scores:
        cut = copy.deepcopy(model)
        cut[int(name)] = nn.Identity()
        with torch.no_grad():
            change = cross_entropy(cut, data[0]) - cross_entropy(model, data[0])
        assert score == pytest.approx(abs(float(change)), rel=1e-4, abs=1e-6)


def test_blocks_of_bert() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(0, 50, (2, 7))
    report = pared.prune_layers(model, {"input_ids": ids}, 2)
    assert len(report.removed) == 2
    assert all(name.startswith("encoder.layer.") for name in report.removed)
    assert torch.isfinite(model(input_ids=ids)[0]).all()


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"n": 5}, ValueError, "n: expected 0 to 4, fewer than the 5 blocks"),
        ({"n": 1.0}, TypeError, "n: expected a number of blocks"),
        ({"n": 1, "importance": "size"}, ValueError, "importance: expected 'block_influence', 'change_rate'"),
        ({"n": 1, "include": "zzz"}, ValueError, "include: expected a filter that matches a block"),
    ],
)
def test_wrong_arguments_of_prune_layers(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pared.prune_layers(stack(), torch.randn(2, 4), **kwargs)
