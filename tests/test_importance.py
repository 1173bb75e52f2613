"""Criteria that need data, gradients or the layers around: closed forms, second implementations, errors."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score
from torch import nn
from torch.nn import functional as F

import pared
from pared.pruning import (
    Activation,
    Entropy,
    Fisher,
    MutualInformation,
    OutputWeight,
    Statistics,
    calibration,
    criteria,
    importance,
)
from pared.pruning.patterns import parse_pattern
from pared.pruning.targets import Target


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def chain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def images(n: int = 12, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 7, 7, generator=generator)
    y = torch.randint(0, 4, (n,), generator=generator)
    return [(x[:5], y[:5]), (x[5:], y[5:])]


def observe(
    name: Any, model: nn.Module, data: Any, loss_fn: Any = None, pattern: str = "unstructured"
) -> dict[str, torch.Tensor]:
    """Scores of every selected tensor, as the selection gets them."""
    from pared.pruning import oneshot

    plan = oneshot.make_plan(model, pattern, name, None, data, loss_fn, None, None, 0, 0)
    seen = oneshot.observe(plan, data, loss_fn)
    return {s.target.name: s.scores for s in oneshot.score_all(plan, seen)}


def state(model: nn.Module) -> dict[str, bytes]:
    return {k: v.detach().contiguous().numpy().tobytes() for k, v in model.state_dict().items()}


# ---------------------------------------------------------------- all of them


REWRITES = {"sparsegpt", "obc"}


@pytest.mark.parametrize("name", sorted({*importance.NAMES} - REWRITES))
@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "2:4"])
def test_every_name_prunes_to_the_exact_count_and_leaves_the_rest(name: str, pattern: str) -> None:
    model = chain().train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    exclude = "8" if name == "bn_scale" else None
    if pattern == "2:4":  # three input channels make no group of four
        exclude = ["0", "8"] if name == "bn_scale" else "0"
    before = copy.deepcopy(model)
    report = pared.prune(
        model, 0.5, pattern=pattern, importance=name, data=images(), loss_fn=cross_entropy, exclude=exclude
    )
    assert report.sparsity == pytest.approx(0.5, abs=0.05)  # blocks at the edges are smaller than others
    assert model.training
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    for (key, new), old in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        if key in {layer.name for layer in report.layers}:
            assert name == "woodfisher" or torch.equal(new[new != 0], old[new != 0])
        else:
            assert torch.equal(new, old)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["gradient", "taylor", "fisher", "wanda", "activation", "entropy"])
def test_scores_do_not_depend_on_the_batches(name: str) -> None:
    (a, b), model = images(), chain()
    whole = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))]
    first, second = (observe(name, model, data, cross_entropy) for data in ([a, b], whole))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------- gradients


def test_gradient_and_taylor_are_those_of_the_mean_loss() -> None:
    model, data = chain().eval(), images()
    x, y = torch.cat([b[0] for b in data]), torch.cat([b[1] for b in data])
    F.cross_entropy(model(x), y).backward()
    gradient = observe("gradient", copy.deepcopy(model), data, cross_entropy)
    taylor = observe("taylor", copy.deepcopy(model), data, cross_entropy)
    for i in (0, 3, 8):
        w = model[i].weight
        torch.testing.assert_close(gradient[f"{i}.weight"], w.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(taylor[f"{i}.weight"], (w.grad * w).detach(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("pattern", "r", "c"), [("2x3", 2, 3), ("4x1", 4, 1)])
def test_the_sum_over_a_block_is_inside_the_absolute_value(pattern: str, r: int, c: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(12, 8)
    data = [(torch.randn(20, 12), torch.randint(0, 8, (20,)))]
    product = observe("taylor", model, data, cross_entropy)["weight"]
    scores = observe("taylor", model, data, cross_entropy, pattern)["weight"]
    want = product.reshape(8 // r, r, 12 // c, c).sum((1, 3))
    got = scores.reshape(8 // r, r, 12 // c, c)
    torch.testing.assert_close(got.sum((1, 3)), want)
    torch.testing.assert_close(got[:, 0, :, 0], want)
    # Contributions that cancel make a block worthless, however large they are.
    outside = product.abs().reshape(8 // r, r, 12 // c, c).sum((1, 3))
    assert not torch.equal(want.abs().flatten().argsort(), outside.flatten().argsort())
    kept = pared.prune(model, 0.5, pattern=pattern, importance="taylor", data=data, loss_fn=cross_entropy)
    alive = (model.weight.detach() != 0).reshape(8 // r, r, 12 // c, c).all(3).all(1)
    assert kept.sparsity == 0.5
    assert want.abs()[alive].min() >= want.abs()[~alive].max()


def test_fisher_of_softmax_regression_is_x_sigma_x() -> None:
    """With labels drawn from the model the Fisher matrix is X^T Sigma X: here each label stands with its
    probability, as the weight sqrt(p) of a sample's loss."""
    torch.manual_seed(0)
    n, features, classes = 7, 5, 4
    model = nn.Linear(features, classes).double()
    x = torch.randn(n, features, dtype=torch.float64)
    p = model(x).softmax(1).detach()
    samples = x.repeat_interleave(classes, 0)
    labels = torch.arange(classes).repeat(n)

    def loss(m: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return (F.cross_entropy(m(batch[0]), batch[1], reduction="none") * batch[2].sqrt()).mean()

    data = [(samples, labels, p.flatten() * classes)]
    observer = criteria._SampleGradients(Target(model, "", "weight"), parse_pattern("unstructured"))
    calibration.collect(
        model, [Target(model, "", "weight", ["weight"])], {"weight": observer}, data, loss, "fisher"
    )
    sigma = p * (1 - p)  # the diagonal of diag(p) - p p^T
    want = torch.einsum("nk,nf->kf", sigma, x.square()) / n
    torch.testing.assert_close(observer.result(), want, rtol=1e-10, atol=1e-12)


def test_fisher_is_the_mean_of_squares_and_not_the_square_of_the_mean() -> None:
    model, data = chain().eval(), images()
    samples = [(b[0][i : i + 1], b[1][i : i + 1]) for b in data for i in range(len(b[1]))]
    want = {k: torch.zeros_like(p) for k, p in model.named_parameters()}
    for sample in samples:
        model.zero_grad()
        cross_entropy(model, sample).backward()
        for k, p in model.named_parameters():
            want[k] += p.detach() ** 2 * p.grad**2 / 2 / len(samples)
    model.zero_grad()
    scores = observe("fisher", model, data, cross_entropy)
    for key, score in scores.items():
        torch.testing.assert_close(score, want[key], rtol=1e-4, atol=1e-10)
    gradient = observe("gradient", model, data, cross_entropy)["0.weight"]
    wrong = gradient**2 / 2 * model[0].weight.detach() ** 2
    assert not torch.allclose(wrong, scores["0.weight"], rtol=0.1)


def test_fisher_of_a_block_squares_the_sum() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    data = [(torch.randn(6, 8), torch.randint(0, 4, (6,)))]
    want = torch.zeros(2, 2)
    for i in range(6):
        model.zero_grad()
        cross_entropy(model, (data[0][0][i : i + 1], data[0][1][i : i + 1])).backward()
        want += (model.weight * model.weight.grad).detach().reshape(2, 2, 2, 4).sum((1, 3)) ** 2 / 2 / 6
    got = observe(Fisher(), model, data, cross_entropy, "2x4")["weight"].reshape(2, 2, 2, 4)
    torch.testing.assert_close(got[:, 0, :, 0], want, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(got.sum((1, 3)), want, rtol=1e-4, atol=1e-9)


def test_existing_zeros_do_not_hide_a_block_that_is_scored_as_one() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    data = [(torch.randn(6, 8), torch.randint(0, 4, (6,)))]
    with torch.no_grad():
        model.weight[0, 0] = 0  # where the block's score is kept
        model.weight[0, 4:] = 0
    for name in ("taylor", "fisher"):
        scores = observe(name, model, data, cross_entropy, "1x4")["weight"]
        assert scores[0, 0].abs() > 0
        assert scores[0, 4] == (0 if name == "taylor" else -math.inf)


# ---------------------------------------------------------------- wanda


@settings(max_examples=20)
@given(rows=st.integers(1, 9), cols=st.integers(2, 17), seed=st.integers(0, 1000))
def test_wanda_with_equal_norms_is_magnitude_by_row(rows: int, cols: int, seed: int) -> None:
    torch.manual_seed(seed)
    a = nn.Linear(cols, rows)
    b = copy.deepcopy(a)
    signs = torch.randint(0, 2, (11, cols)).float() * 2 - 1
    pared.prune(a, 0.5, importance="wanda", data=[signs * 3.0])
    pared.prune(b, 0.5, importance="magnitude", scope="row")
    assert torch.equal(a.weight, b.weight)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Conv2d(6, 9, (3, 2), stride=2, dilation=(1, 2), groups=3, padding=(2, 1)),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(4, 6, 1, stride=2),
    ],
    ids=str,
)
def test_input_norms_of_a_convolution_are_those_of_its_unfolded_input(layer: nn.Conv2d) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    x = torch.randn(5, layer.in_channels, 9, 8)
    scores = observe("wanda", layer, [x[:2], x[2:]])["weight"]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    cols = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    norms = cols.square().sum((0, 2)).sqrt().reshape(layer.groups, 1, -1)
    w = layer.weight.detach()
    want = w.reshape(layer.groups, w.shape[0] // layer.groups, -1) * norms
    torch.testing.assert_close(scores.reshape(want.shape), want)


def test_wanda_sees_every_input_of_a_transformer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(3, 5, 16)
    inputs: dict[str, torch.Tensor] = {}
    attention = layer.self_attn
    q, k, v = (
        t.unflatten(2, (2, 8)).transpose(1, 2)
        for t in F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, 2)
    )
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    inputs["self_attn.in_proj_weight"] = x
    inputs["self_attn.out_proj.weight"] = heads
    inputs["linear1.weight"] = layer.norm1(x + attention.out_proj(heads))
    inputs["linear2.weight"] = F.relu(layer.linear1(inputs["linear1.weight"]))
    scores = observe("wanda", layer, [x[:1], x[1:]])
    assert scores.keys() == inputs.keys()
    for name, score in scores.items():
        norms = inputs[name].flatten(0, 1).norm(dim=0)
        torch.testing.assert_close(
            score, dict(layer.named_parameters())[name].detach() * norms, rtol=1e-4, atol=1e-5
        )


def test_wanda_of_separate_projections_reads_each_input() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    q, k, v = torch.randn(2, 3, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    scores = observe("wanda", attention, [(q, k, v)])
    for name, x in (("q_proj_weight", q), ("k_proj_weight", k), ("v_proj_weight", v)):
        want = getattr(attention, name).detach() * x.flatten(0, 1).norm(dim=0)
        torch.testing.assert_close(scores[name], want)


def test_wanda_of_transformers_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer, x = Conv1D(6, 10), torch.randn(4, 3, 10)
    want = layer.weight.detach() * x.flatten(0, 1).norm(dim=0).unsqueeze(1)
    torch.testing.assert_close(observe("wanda", layer, [x])["weight"], want)
    pared.prune(layer, 0.5, importance="wanda", data=[x])
    assert ((layer.weight != 0).sum(0) == 5).all()


def test_the_kept_score_is_larger_the_freer_the_pattern() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 24), torch.randn(50, 64) * torch.rand(64) * 3
    score = observe("wanda", layer, [x])["weight"].abs()
    kept = {}
    for pattern in ("unstructured", "4:8", "2:4"):
        pruned = copy.deepcopy(layer)
        pared.prune(pruned, 0.5, pattern=pattern, importance="wanda", data=[x])
        kept[pattern] = (score * (pruned.weight.detach() != 0)).sum(1)
    assert (kept["unstructured"] >= kept["4:8"]).all()
    assert (kept["4:8"] >= kept["2:4"]).all()
    assert (kept["unstructured"] > kept["2:4"]).any()


# ---------------------------------------------------------------- activations


def unit(scores: torch.Tensor) -> torch.Tensor:
    flat = scores.reshape(scores.shape[0], -1)
    assert (flat == flat[:, :1]).all()
    return flat[:, 0].double()


def test_activations_are_taken_after_batch_norm_and_relu() -> None:
    model, data = chain().eval(), images()
    x = torch.cat([b[0] for b in data])
    hidden = model[:3](x).transpose(0, 1).flatten(1).double()
    last = model(x).t().double()
    want: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "mean": lambda a: a.mean(1),
        "max": lambda a: a.amax(1),
        "min": lambda a: a.amin(1),
        "variance": lambda a: a.var(1, correction=0),
        "apoz": lambda a: 1 - (a <= 0).double().mean(1),
    }
    for statistic, function in want.items():
        scores = observe(Activation(statistic), model, data)
        for name, activations in (("0.weight", hidden), ("8.weight", last)):
            got = unit(scores[name])
            torch.testing.assert_close(got, function(activations.detach()), rtol=1e-5, atol=1e-6)


def test_one_relu_module_that_serves_two_layers_is_told_apart() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(4, 6), nn.Linear(6, 5), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(self.b(self.relu(self.a(x))))

    torch.manual_seed(0)
    net, x = Net(), torch.randn(9, 4)
    scores = observe("activation", net, [x])
    torch.testing.assert_close(unit(scores["a.weight"]), net.a(x).relu().mean(0).detach().double())
    torch.testing.assert_close(unit(scores["b.weight"]), net(x).mean(0).detach().double())


@settings(max_examples=30)
@given(
    scale=st.floats(1e-3, 1e4),
    bins=st.sampled_from([4, 16, 64]),
    seed=st.integers(0, 99),
    parts=st.integers(1, 5),
)
def test_histograms_grow_without_a_trace(scale: float, bins: int, seed: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64) * scale
    x *= torch.logspace(-2, 1, 60, dtype=torch.float64).unsqueeze(1)
    whole, cut, back = criteria.Histogram(bins), criteria.Histogram(bins), criteria.Histogram(bins)
    whole.add(x)
    for part in x.chunk(parts):
        cut.add(part)
    for part in reversed(x.chunk(parts)):
        back.add(part)
    peak = float(x.abs().max())
    assert peak < whole.limit <= 2 * peak
    want = torch.stack([torch.histc(c, bins=bins, min=-whole.limit, max=whole.limit) for c in x.t()]).to(
        torch.int64
    )
    for h in (whole, cut, back):
        assert h.limit == whole.limit
        assert torch.equal(h.counts.sum(2), want)


def test_entropy_and_mutual_information_against_numpy_and_sklearn() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    x = torch.randn(300, 6)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5)
    scores = unit(observe(Entropy(32), layer, [x[:100], x[100:]])["weight"])
    out = layer(x).detach().double()
    limit = 2.0 ** math.ceil(math.log2(float(out.abs().max())))
    labelled = [(x[:100], y[:100]), (x[100:], y[100:])]
    information = unit(observe(MutualInformation(32, classes=3), layer, labelled)["weight"])
    for u in range(5):
        binned = np.digitize(out[:, u].numpy(), np.linspace(-limit, limit, 33))
        p = np.unique(binned, return_counts=True)[1] / 300
        assert scores[u] == pytest.approx(float(-(p * np.log(p)).sum()), rel=1e-6)
        joint = len(set(zip(binned.tolist(), y.tolist(), strict=True)))
        bias = (len(set(binned.tolist())) + 3 - joint - 1) / 600
        assert information[u] == pytest.approx(mutual_info_score(binned, y.numpy()) + bias, rel=1e-6)


def test_mutual_information_of_independent_labels_is_near_zero_and_finds_the_informative_weight() -> None:
    torch.manual_seed(0)
    x = torch.randn(3000, 4)
    y = (x[:, 2] > 0).long()
    layer = nn.Linear(4, 3)
    nn.init.constant_(layer.weight, 0.5)
    single = observe(MutualInformation(16, classes=2, single=True), layer, [(x, y)])["weight"]
    assert (single.argmax(1) == 2).all()
    # ln 2, but for what a bin at zero does not resolve
    assert single[:, 2] == pytest.approx([math.log(2)] * 3, abs=0.02)
    others = single[:, [0, 1, 3]]
    assert others.abs().max() < 0.01
    assert others.min() < 0 < others.max()  # the correction centres it on zero


# ---------------------------------------------------------------- the layers around


def test_output_weight_and_propagation_on_a_chain() -> None:
    model = chain()
    scores = observe("output_weight", model, None)
    torch.testing.assert_close(
        unit(scores["0.weight"]), model[3].weight.detach().abs().sum((0, 2, 3)).double(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        unit(scores["3.weight"]), model[8].weight.detach().abs().sum(0).double(), rtol=1e-5, atol=0
    )
    assert (unit(scores["8.weight"]) == 1).all()
    euclid = unit(observe(OutputWeight(2), model, None)["3.weight"])
    torch.testing.assert_close(euclid, model[8].weight.detach().norm(dim=0).double(), rtol=1e-5, atol=0)
    scores = observe("propagation", model, None)
    s2 = model[8].weight.detach().abs().sum(0)
    torch.testing.assert_close(unit(scores["3.weight"]), s2.double(), rtol=1e-5, atol=0)
    s1 = (model[3].weight.detach().abs().sum((2, 3)) * s2.unsqueeze(1)).sum(0)
    torch.testing.assert_close(unit(scores["0.weight"]), s1.double(), rtol=1e-5, atol=0)


def test_units_behind_flatten_and_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1, groups=4), nn.Flatten(), nn.Linear(36, 3))
    scores = observe("output_weight", model, None)
    torch.testing.assert_close(
        unit(scores["0.weight"]), model[1].weight.detach().abs().flatten().double(), rtol=1e-5, atol=0
    )
    want = model[3].weight.detach().abs().reshape(3, 4, 9).sum((0, 2))
    torch.testing.assert_close(unit(scores["1.weight"]), want.double(), rtol=1e-5, atol=0)


def test_geometric_median_and_bn_scale() -> None:
    model = chain()
    scores = unit(observe("geometric_median", model, None)["3.weight"])
    w = model[3].weight.detach().flatten(1).double()
    want = torch.stack([(w - row).norm(dim=1).sum() for row in w])
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(8))
    found = unit(observe("bn_scale", model[:6], None)["0.weight"])
    torch.testing.assert_close(found, model[1].weight.detach().double())


def test_change_rate_removes_each_unit() -> None:
    model, data = chain().eval(), images()
    x, y = torch.cat([b[0] for b in data]), torch.cat([b[1] for b in data])
    scores = observe("change_rate", model, data, cross_entropy)
    base = F.cross_entropy(model(x), y)
    for i in (0, 3):
        for u in range(model[i].out_channels):
            cut = copy.deepcopy(model)
            with torch.no_grad():
                cut[i].weight[u] = 0
                cut[i].bias[u] = 0
                want = float((F.cross_entropy(cut(x), y) - base).abs())
            assert unit(scores[f"{i}.weight"])[u] == pytest.approx(want, rel=1e-3, abs=1e-6)
    output = observe("change_rate", model[:1], [x])["0.weight"]
    a = model[0](x).detach()
    want = a.transpose(0, 1).flatten(1).norm(dim=1) / a.norm()
    torch.testing.assert_close(unit(output), want.double(), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- a user's own


def test_the_protocol_alone_gets_gradients_or_input_norms() -> None:
    class Mine:
        name, scope, key = "mine", "layer", "abs"

        def __init__(self, gradients: bool) -> None:
            self.needs_data, self.needs_gradients = True, gradients

        def score(self, module: nn.Module, statistics: Statistics) -> torch.Tensor:
            return statistics.weight * statistics.observed

    model, data = chain().eval(), images()
    for gradients, name in ((True, "taylor"), (False, "wanda")):
        mine = observe(Mine(gradients), model, data, cross_entropy)
        theirs = observe(name, model, data, cross_entropy)
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_pruner_collects_at_each_choice() -> None:
    model, data = chain(), images()
    pruner = pared.Pruner(
        model, lambda step: 0.2 * step, importance="taylor", data=data, loss_fn=cross_entropy, scope="layer"
    )
    pruner.step()
    with torch.no_grad():
        model[8].weight.mul_(torch.randn_like(model[8].weight))
    scores = observe("taylor", model, data, cross_entropy)["8.weight"].abs()
    pruner.step()
    alive = model[8].weight.detach() != 0
    assert scores[alive].min() >= scores[~alive].max()
    assert pruner.finalize().sparsity == pytest.approx(0.4, abs=0.02)
    with pytest.raises(TypeError, match="data: expected batches that can be gone through at every choice"):
        pared.Pruner(chain(), lambda step: 0.5, importance="wanda", data=iter(data))


def test_dict_batches_and_keys_that_the_model_does_not_take() -> None:
    model, data = chain(), images()
    keyed = [{"input": x, "labels": y} for x, y in data]
    a, b = observe("wanda", model, data), observe("wanda", model, keyed)
    assert all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- errors: what and where, model as it was


def bad_images(value: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = images()
    data[1][0][2, 0, 3, 3] = value
    return data


def detached(model: nn.Module, batch: Any) -> torch.Tensor:
    return cross_entropy(model, batch).detach()


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (chain, {"importance": "wanda"}, "data: expected batches, which 'wanda' needs, got None"),
        (
            chain,
            {"importance": "taylor", "data": images()},
            r"loss_fn: expected a callable \(model, batch\) -> scalar, which 'taylor' needs, got None",
        ),
        (
            chain,
            {"importance": "taylor", "data": images(), "loss_fn": detached},
            "loss_fn: expected a loss that depends on the model's weights, got one without a gradient in "
            "batch 0",
        ),
        (
            chain,
            {"importance": "fisher", "data": images(), "loss_fn": lambda m, b: m(b[0])},
            r"loss_fn: expected a scalar tensor from \(model, batch\), got shape \[1, 4\] in batch 0",
        ),
        (
            chain,
            {"importance": "wanda", "data": iter(())},
            "data: expected at least one batch, got none; an iterator .* is exhausted",
        ),
        (
            chain,
            {"importance": "wanda", "data": bad_images(float("nan"))},
            "data: expected finite activations .* got NaN or infinity at layer '0' in batch 1",
        ),
        (
            chain,
            {"importance": "taylor", "data": bad_images(float("nan")), "loss_fn": cross_entropy},
            "data: expected batches with a finite loss, got nan in batch 1",
        ),
        (
            chain,
            {"importance": "activation", "data": bad_images(float("inf"))},
            "data: expected finite activations .* at layer '0' in batch 1",
        ),
        (
            chain,
            {"importance": "entropy", "data": bad_images(float("nan"))},
            "data: expected finite activations",
        ),
        (
            Half,
            {"importance": "wanda", "data": [torch.ones(2, 4)]},
            "data: expected batches that reach layer 'unused', got none that do",
        ),
        (
            Half,
            {"importance": "taylor", "data": [torch.ones(2, 4)], "loss_fn": lambda m, b: m(b).sum()},
            "loss_fn: .* every selected weight, got no gradient of unused.weight",
        ),
        (
            lambda: nn.LSTM(4, 4),
            {"importance": "wanda", "data": [torch.ones(2, 1, 4)]},
            "importance: expected layers whose inputs and outputs can be observed, which 'wanda' needs, "
            "got LSTM",
        ),
        (chain, {"importance": "bn_scale"}, "importance: expected a BatchNorm .* none after '8'"),
        (
            lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 4)),
            {"importance": "output_weight"},
            "importance: expected a chain of layers, got 6 units of '0' before '1' with 4 inputs",
        ),
        (
            chain,
            {"importance": "mutual_information", "data": [b[0] for b in images()]},
            r"data: expected batches \(inputs, labels\), which mutual information needs, got Tensor",
        ),
        (
            chain,
            {"importance": MutualInformation(classes=2), "data": images()},
            "classes: expected more than the largest label 3, got 2",
        ),
    ],
)
def test_errors_say_what_and_where(model: Any, kwargs: dict[str, Any], message: str) -> None:
    model = model().train()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        pared.prune(model, 0.5, **kwargs)
    assert state(model) == before
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("data", "message"),
    [(torch.ones(2, 3), "got one Tensor; for a single batch"), ({"x": 1}, "got one dict"), (3, "got int")],
)
def test_data_of_the_wrong_type(data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"data: expected an iterable of batches, {message}"):
        pared.prune(nn.Linear(3, 3), 0.5, importance="wanda", data=data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Activation("median"), "statistic: expected 'mean', .* got 'median'"),
        (lambda: Entropy(7), "bins: expected a positive multiple of 4, at most 65536, got 7"),
        (lambda: OutputWeight(3), "p: expected 1 or 2, got 3"),
    ],
)
def test_options_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


METHODS = ("score", "observe", "measure", "compensate", "reconstruct")


@pytest.mark.parametrize("name", importance.NAMES)
def test_methods_of_the_protocol_name_what_they_do_not_take(name: str) -> None:
    """As `pared.prune` is never called: by a user who tries a criterion by hand."""
    criterion: Any = importance.resolve(name)
    layer = nn.Linear(6, 4)
    target = Target(layer, "fc", "weight")
    good = {
        "module": layer,
        "model": layer,
        "statistics": Statistics("fc", "weight", layer.weight.detach(), observed=object()),
        "target": target,
        "targets": [target],
        "pattern": parse_pattern("unstructured"),
        "dropped": torch.zeros(4, 6, dtype=torch.bool),
    }
    seen = 0
    for method in METHODS:
        function = getattr(criterion, method, None)
        if function is None:
            continue
        taken = inspect.signature(function).parameters
        for argument in taken.keys() & good.keys():
            for bad in (None, 3, "fc", [layer], {"a": 1}, nn.ReLU):
                with pytest.raises(TypeError, match=f"^{argument}: expected .*, got "):
                    function(**{k: bad if k == argument else good.get(k) for k in taken})
                seen += 1
        if "statistics" in taken and (hasattr(criterion, "observe") or hasattr(criterion, "measure")):
            with pytest.raises(ValueError, match=r"^observed: expected what observe\(\) or .*, got None"):
                function(layer, Statistics("fc", "weight", layer.weight.detach()))
    assert seen
