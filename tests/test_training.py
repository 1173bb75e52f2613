"""Loops, penalties and losses around the Pruner: closed forms, invariants that hold at every step, errors."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pared
from pared import training
from pared.training import (
    Movement,
    Proximal,
    RigL,
    Sensitivity,
    SlimmingPenalty,
    allocate,
    distillation_loss,
    feature_loss,
    prune_until,
    sensitivity,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


def batch(n: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 16, generator=generator)
    return x, (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, after: Any = None) -> None:
    x, y = batch(256)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if after is not None:
            after()


def accuracy(model: nn.Module) -> float:
    x, y = batch(500, seed=1)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


# ---------------------------------------------------------------- losses and penalties


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    y = torch.randint(0, 4, (5,))
    p, q = (t / 3).softmax(1), (s / 3).softmax(1)
    want = 9 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(distillation_loss(s, t, temperature=3.0), want)
    mixed = distillation_loss(s, t, y, temperature=3.0, alpha=0.25)
    torch.testing.assert_close(mixed, 0.25 * want + 0.75 * F.cross_entropy(s, y))
    mixed.backward()
    assert t.grad is None
    assert distillation_loss(s, s).abs() < 1e-6
    with pytest.raises(ValueError, match="teacher: expected logits of shape"):
        distillation_loss(s, t[:, :3])
    with pytest.raises(ValueError, match="temperature: expected a number > 0, got 0"):
        distillation_loss(s, t, temperature=0)


def test_features_follow_the_teacher_layer_by_layer_alike() -> None:
    torch.manual_seed(0)
    s = [torch.randn(5, 4, requires_grad=True), torch.randn(5, 3)]
    t = [torch.randn(5, 4, requires_grad=True), 1000 * torch.randn(5, 3)]
    terms = [((a - b) ** 2).sum() / (b**2).sum() for a, b in zip(s, t, strict=True)]
    loss = feature_loss(s, t)
    torch.testing.assert_close(loss, (terms[0] + terms[1]) / 2)
    loss.backward()
    assert s[0].grad is not None
    assert t[0].grad is None
    torch.testing.assert_close(feature_loss(s[0], t[0]), terms[0])
    assert feature_loss(s, s) == 0
    assert torch.isfinite(feature_loss(s[1], torch.zeros(5, 3)))
    with pytest.raises(ValueError, match=r"teacher\[1\]: expected shape \[5, 3\], got \[5, 4\]"):
        feature_loss(s, [t[0], t[0]])
    with pytest.raises(ValueError, match="teacher: expected 2 layers, got 1"):
        feature_loss(s, t[:1])


def test_slimming_penalty() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.5, 0.0]))
    penalty = SlimmingPenalty(model, 0.1)()
    assert float(penalty.detach()) == pytest.approx(0.35)
    penalty.backward()
    assert torch.equal(model[1].weight.grad, 0.1 * model[1].weight.detach().sign())
    with pytest.raises(ValueError, match="model: expected BatchNorm layers with scales, got none"):
        SlimmingPenalty(mlp())


def test_the_proximal_step_is_the_minimiser_and_makes_zeros() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    w = model[0].weight.detach().clone()
    Proximal(model, optimizer, 0.2, include="0").step()
    new = model[0].weight.detach()
    t = 0.1
    assert torch.equal(new == 0, w.abs() <= t)
    torch.testing.assert_close(new, w.sign() * (w.abs() - t).clamp(min=0))
    # argmin (v - w)^2 / 2 + t |v| on a grid
    grid = torch.linspace(-1, 1, 4001)
    value = (grid - w[0, 0]) ** 2 / 2 + t * grid.abs()
    assert float(new[0, 0]) == pytest.approx(float(grid[value.argmin()]), abs=1e-3)
    for penalty, dim in (("outputs", 1), ("inputs", 0)):
        model = mlp()
        w = model[0].weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        Proximal(model, optimizer, 0.27, penalty=penalty, include="0").step()
        norm = w.norm(dim=dim, keepdim=True)
        want = w * (1 - 0.135 * math.sqrt(w.shape[dim]) / norm).clamp(min=0)
        torch.testing.assert_close(model[0].weight.detach(), want)
    with pytest.raises(ValueError, match="penalty: expected 'l1', 'outputs', 'inputs', got 'l2'"):
        Proximal(mlp(), optimizer, 1.0, penalty="l2")


def test_l1_training_ends_with_exact_zeros_where_subtracting_the_sign_does_not() -> None:
    zeros = {}
    for proximal in (True, False):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = Proximal(model, optimizer, 5e-3)

        def subtract(m: nn.Module = model) -> None:
            with torch.no_grad():
                for layer in (m[0], m[2]):
                    layer.weight.sub_(5e-4 * layer.weight.sign())

        train(model, optimizer, 150, step.step if proximal else subtract)
        zeros[proximal] = int((model[0].weight == 0).sum())
    assert zeros[True] > 40
    assert zeros[False] == 0


# ---------------------------------------------------------------- masks that move


def test_rigl_keeps_its_sparsity_and_grows_where_gradients_are_large() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rigl = RigL(model, 0.8, optimizer=optimizer, share=0.5, update_every=5, end=100)
    x, y = batch(256)
    changed = 0
    for step in range(1, 31):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        before, w, g = rigl.masks[0], model[0].weight.detach().clone(), model[0].weight.grad.clone()
        rigl.step()
        mask = rigl.masks[0]
        assert int(mask.sum()) == 16 * 24 - round(0.8 * 16 * 24)
        assert not (model[0].weight[~mask] != 0).any()
        grown, dropped = mask & ~before, before & ~mask
        if step % 5:
            assert torch.equal(mask, before)
        elif grown.any():
            changed += 1
            assert int(grown.sum()) == int(dropped.sum())
            assert g.abs()[grown].min() >= g.abs()[~mask & ~before].max()
            assert w.abs()[dropped].max() <= w.abs()[before & mask].min()
            assert not (model[0].weight[grown] != 0).any()
            for value in optimizer.state[model[0].weight].values():
                if value.shape == mask.shape:
                    assert not (value[~(mask & before)] != 0).any()
    assert changed == 6
    optimizer.zero_grad()
    rigl.step_count = 34
    with pytest.raises(ValueError, match=r"step: expected gradients of '0\.weight', got none"):
        rigl.step()
    with pytest.raises(ValueError, match=r"share: expected a number in \[0, 1\)"):
        RigL(mlp(), 0.5, share=1.0)


def test_movement_sums_minus_gradient_times_weight() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    movement = Movement(model)
    pruner = pared.Pruner(model, pared.schedules.OneShot(0.5, at=3), importance=movement, optimizer=optimizer)
    want = torch.zeros_like(model[0].weight)
    x, y = batch(256)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        movement.update()
        want -= (model[0].weight.grad * model[0].weight).detach()
        optimizer.step()
        pruner.step()
    alive = model[0].weight.detach() != 0
    assert int(alive.sum()) == 192
    assert want[alive].min() >= want[~alive].max()
    with pytest.raises(ValueError, match=r"importance: expected update\(\) after a backward pass"):
        pared.prune(mlp(), 0.5, importance=Movement(mlp()))


# ---------------------------------------------------------------- until the metric breaks


def trained() -> nn.Sequential:
    model = mlp()
    train(model, torch.optim.Adam(model.parameters(), lr=1e-2), 80)
    return model


def test_prunes_until_the_metric_breaks_and_rolls_back() -> None:
    model = trained()
    before = accuracy(model)

    def retrain(m: nn.Module, pruner: pared.Pruner) -> None:
        train(m, torch.optim.Adam(m.parameters(), lr=1e-2), 20, pruner.step)

    report = prune_until(model, accuracy, max_drop=0.02, retrain=retrain, rounds=8)
    assert report.baseline == before
    assert accuracy(model) == report.metric >= report.bound == before - 0.02
    weights = torch.cat([m.weight.detach().flatten() for m in model if isinstance(m, nn.Linear)])
    assert float((weights == 0).double().mean()) >= report.sparsity - 0.01
    assert report.sparsity == max(r.sparsity for r in report.rounds if r.accepted) >= 0.5
    assert any(not r.accepted for r in report.rounds)
    assert json.loads(report.to_json())["sparsity"] == report.sparsity


def test_a_bound_that_nothing_keeps_leaves_the_model() -> None:
    model = trained()
    before = copy.deepcopy(model.state_dict())
    report = prune_until(model, lambda m: -float((m[0].weight == 0).sum()), max_drop=0.5, rounds=3)
    assert report.sparsity == 0.0
    assert not any(r.accepted for r in report.rounds)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))

    def broken(m: nn.Module, pruner: Any) -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        prune_until(model, accuracy, retrain=broken)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_rewinding_takes_the_survivors_back() -> None:
    model = mlp()
    early = copy.deepcopy(model.state_dict())
    train(model, torch.optim.Adam(model.parameters(), lr=1e-2), 60)
    kept = pared.prune(copy.deepcopy(model), 0.5).kept
    prune_until(model, lambda m: 1.0, rewind=early, rounds=1)
    w = model[0].weight.detach()
    assert torch.equal(w[w != 0], early["0.weight"][w != 0])
    assert sum(int((m.weight != 0).sum()) for m in model if isinstance(m, nn.Linear)) == kept
    with pytest.raises(ValueError, match="rewind: expected a state_dict of the model"):
        prune_until(model, accuracy, rewind={})
    with pytest.raises(ValueError, match="pattern: expected one whose sparsity can grow, got '2:4'"):
        prune_until(model, accuracy, pattern="2:4")


# ---------------------------------------------------------------- sensitivity


def test_sensitivity_prunes_one_layer_at_a_time_and_puts_it_back(tmp_path: Path) -> None:
    model = trained()
    before = copy.deepcopy(model.state_dict())
    scan = sensitivity(model, accuracy, ratios=(0.5, 0.9))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    for name in ("0", "2"):
        for i, ratio in enumerate((0.5, 0.9)):
            cut = copy.deepcopy(model)
            pared.prune(cut, ratio, include=name)
            assert scan.metrics[f"{name}.weight"][i] == accuracy(cut)
    assert "90%" in str(scan)
    assert json.loads(scan.to_json())["weights"] == {"0.weight": 384, "2.weight": 96}
    scan.plot(str(tmp_path / "scan.png"))
    assert (tmp_path / "scan.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    scan = Sensitivity(1.0, (0.5,), {"a": (1.0,)}, {"a": 100})
    with pytest.raises(ImportError, match=r"plot needs matplotlib: pip install 'pared\[report\]'"):
        scan.plot(tmp_path / "scan.png")
    assert not (tmp_path / "scan.png").exists()


def test_allocation_takes_from_where_it_costs_least() -> None:
    scan = Sensitivity(
        1.0, (0.5, 0.9), {"a": (1.0, 0.99), "b": (0.9, 0.2), "c": (0.95, 0.9)}, {"a": 100, "b": 100, "c": 100}
    )
    assert allocate(scan, 0.3) == {"a": 0.9, "b": 0.0, "c": 0.0}
    assert allocate(scan, 0.6) == {"a": 0.9, "b": 0.0, "c": 0.9}
    assert allocate(scan, 0.0) == {"a": 0.0, "b": 0.0, "c": 0.0}
    with pytest.raises(ValueError, match=r"sparsity: expected at most 0\.9, which the largest ratio"):
        allocate(scan, 0.95)


def test_everything_public_is_documented() -> None:
    assert all(getattr(training, name).__doc__ for name in training.__all__)
