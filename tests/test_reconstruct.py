"""SparseGPT, OBC and the walk through a model: closed forms in float64, counts, resuming, errors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import pared
from pared.pruning import OBC, SparseGPT, calibration, obs, reconstruct
from pared.pruning.patterns import parse_pattern
from pared.pruning.targets import Target


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(rows: int, size: int, seed: int = 0, samples: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the Hessian of correlated inputs; float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    x = torch.randn(samples, size, generator=generator, dtype=torch.float64) @ (mix + 0.3)
    w = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return w, 2 / samples * x.t() @ x


def loss(w: torch.Tensor, w0: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return ((w - w0) @ h * (w - w0)).sum(1) / 2


def constrained(w0: torch.Tensor, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Minimum of the quadratic with the masked weights at zero, row by row, from the Lagrangian."""
    out = []
    inverse = torch.linalg.inv(h)
    for row, kept in zip(w0, mask, strict=True):
        gone = ~kept
        multiplier = torch.linalg.solve(inverse[gone][:, gone], row[gone])
        out.append(row - inverse[:, gone] @ multiplier)
    return torch.stack(out)


# ---------------------------------------------------------------- one matrix


@settings(max_examples=20)
@given(size=st.integers(2, 20), seed=st.integers(0, 999))
def test_removing_one_weight_is_the_constrained_least_squares_solution(size: int, seed: int) -> None:
    w, h = problem(1, size, seed)
    inverse = obs.invert(h, 0.0)
    costs = w.square() / inverse.diagonal / 2
    new, mask = obs.greedy(w, h, 1)
    p = int((~mask).nonzero()[0, 1])
    assert p == int(costs.argmin())
    want = constrained(w, h, mask)
    assert (new - want).abs().max() <= 1e-8 * w.abs().max()
    torch.testing.assert_close(loss(new, w, h), costs[:, p], rtol=1e-8, atol=1e-12)
    update = w - w[0, p] / inverse.diagonal[p] * (inverse.upper.t() @ inverse.upper)[p]
    assert (new - update).abs().max() <= 1e-8 * w.abs().max()


def test_the_factor_is_of_the_inverse_and_dead_inputs_are_independent() -> None:
    _, h = problem(1, 12)
    h[5] = h[:, 5] = 0
    inverse = obs.invert(h, 0.0)
    assert inverse.dead.tolist() == [i == 5 for i in range(12)]
    filled = h + torch.diag(inverse.dead.double())
    torch.testing.assert_close(inverse.upper.t() @ inverse.upper @ filled, torch.eye(12, dtype=torch.float64))
    assert inverse.upper[5].abs().sum() == inverse.upper[:, 5].abs().sum() == 1


def test_greedy_is_the_exact_greedy_order_and_ends_at_the_optimum_of_its_masks() -> None:
    w0, h = problem(3, 8)
    for drop in (5, 12):
        new, mask = obs.greedy(w0, h, drop)
        # Written out: of all weights of all rows the cheapest, with an exact solution after each.
        kept = torch.ones_like(w0, dtype=torch.bool)
        for _ in range(drop):
            cheapest, best = torch.inf, (0, 0)
            for r, c in itertools.product(range(3), range(8)):
                if kept[r, c]:
                    trial = kept[r : r + 1].clone()
                    trial[0, c] = False
                    before = loss(constrained(w0[r : r + 1], h, kept[r : r + 1]), w0[r : r + 1], h)
                    after = loss(constrained(w0[r : r + 1], h, trial), w0[r : r + 1], h)
                    if float(after - before) < cheapest:
                        cheapest, best = float(after - before), (r, c)
            kept[best] = False
        assert torch.equal(mask, kept)
        torch.testing.assert_close(new, constrained(w0, h, mask), rtol=1e-8, atol=1e-9)


def test_greedy_n_of_m_and_memory() -> None:
    w, h = problem(6, 16)
    units = [(i, i + 4) for i in range(0, 16, 4)]
    new, mask = obs.greedy(w, h, 0, pattern=parse_pattern("2:4"), units=units)
    assert (mask.reshape(6, 4, 4).sum(2) == 2).all()
    again, _ = obs.greedy(w, h, 0, pattern=parse_pattern("2:4"), units=units, memory=1)
    torch.testing.assert_close(new, again)
    free, _ = obs.greedy(w, h, 48)
    assert loss(free, w, h).sum() < loss(new, w, h).sum()


@pytest.mark.parametrize("size", [1, 5, 128, 129, 200])
def test_sweep_without_correlation_is_magnitude_over_input_norm(size: int) -> None:
    torch.manual_seed(0)
    w = torch.randn(6, size, dtype=torch.float64)
    scale = torch.rand(size, dtype=torch.float64) + 0.5
    new, mask = obs.sweep(
        w, obs.invert(torch.diag(scale), 0.0), sparsity=0.5, pattern=parse_pattern("unstructured")
    )
    assert int(mask.sum()) == obs.keep_count(6 * size, 0.5)
    assert torch.equal(new, torch.where(mask, w, 0.0))  # nothing to make up for
    score = w.square() * scale
    for start in range(0, size, obs.SPAN):
        own = slice(start, start + obs.SPAN)
        kept, gone = score[:, own][mask[:, own]], score[:, own][~mask[:, own]]
        if kept.numel() and gone.numel():
            assert kept.min() >= gone.max()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1x4", "4x2", "3x5"])
def test_sweep_updates_each_row_for_the_best_given_what_is_settled(pattern: str) -> None:
    """Once a column is settled, those to the right are the optimum given all the settled ones."""
    parsed = parse_pattern(pattern)
    w0, h = problem(8, 24, samples=400)
    width = 1 if pattern == "unstructured" else parsed.cols
    units = [(i, min(i + width, 24)) for i in range(0, 24, width)]
    new, mask = obs.sweep(w0, obs.invert(h, 0.0), units=units, sparsity=0.5, pattern=parsed)
    assert torch.equal(new != 0, mask)
    settled = 23  # the last weight of a row that keeps it is the optimum given the 23 others
    for row, row0, kept in zip(new, w0, mask, strict=True):
        if kept[settled]:
            rest = (row - row0)[:settled] @ h[:settled, settled] / h[settled, settled]
            assert row[settled] == pytest.approx(float(row0[settled] - rest), abs=1e-9)
    plain = torch.where(mask, w0, 0.0)
    assert loss(new, w0, h).sum() < loss(plain, w0, h).sum()
    best = obs.least_squares(w0, h, mask)
    assert (loss(best, w0, h) <= loss(new, w0, h) * (1 + 1e-9)).all()
    torch.testing.assert_close(best, constrained(w0, h, mask), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("threads", [1, 2])
def test_wide_systems_are_solved_by_any_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    w, h = problem(5, 300, samples=900)
    mask = torch.rand(5, 300, generator=torch.Generator().manual_seed(2)) > 0.4
    torch.testing.assert_close(obs.least_squares(w, h, mask), constrained(w, h, mask), rtol=1e-6, atol=1e-7)
    # Without Cholesky factors: symmetric, but not positive.
    signs = torch.diag(torch.where(torch.arange(300) % 2 == 0, 1.0, -1.0).double()).expand(3, -1, -1).clone()
    right = torch.randn(3, 300, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(obs.solve(signs, right), signs @ right)


def test_obc_takes_wide_layers_with_several_threads() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(260, 4)), torch.randn(400, 260)
    with torch.no_grad():
        before = model(x)
    magnitude = copy.deepcopy(model)
    pared.prune(model, 0.3, importance="obc", data=[x])
    pared.prune(magnitude, 0.3)
    with torch.no_grad():
        assert (model(x) - before).norm() < 0.8 * (magnitude(x) - before).norm()


def test_the_score_of_a_block_is_the_loss_of_removing_it() -> None:
    w, h = problem(5, 12)
    units = [(0, 4), (4, 8), (8, 12)]
    inverse = obs.invert(h, 0.0)
    every = torch.ones_like(w, dtype=torch.bool)
    score = obs._block_scores(w, inverse.upper, units, every, inverse.dead)
    # The last block has no columns to its right: removing it can be made up for by nothing.
    delta = w[:, 8:]
    tail = torch.linalg.inv(torch.linalg.inv(h)[8:, 8:])
    assert tail.shape == (4, 4)
    torch.testing.assert_close(score[:, 2], (delta @ h[8:, 8:] * delta).sum(1), rtol=1e-8, atol=1e-10)
    # The first can be made up for by all others.
    mask = every.clone()
    mask[:, :4] = False
    torch.testing.assert_close(score[:, 0] / 2, loss(constrained(w, h, mask), w, h), rtol=1e-8, atol=1e-10)


def test_zeros_stay_zero_through_a_sweep() -> None:
    w, h = problem(8, 40)
    alive = torch.rand(8, 40, generator=torch.Generator().manual_seed(1)) > 0.7
    new, mask = obs.sweep(
        w * alive, obs.invert(h, 0.01), sparsity=0.5, pattern=parse_pattern("unstructured"), alive=alive
    )
    assert not (new[~alive] != 0).any()
    assert not (mask & ~alive).any()


# ---------------------------------------------------------------- Hessians


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(10, 7),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.Conv2d(6, 9, (3, 2), groups=3, padding=(2, 1)),
        nn.Conv1d(4, 6, 3, dilation=2),
    ],
    ids=str,
)
def test_matrices_and_hessians_reproduce_the_layer(layer: Any) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    target = Target(layer, "", "weight", ["weight"], [(layer, "weight")])
    matrices = obs.Matrices(target)
    weight = layer.weight.detach()
    assert torch.equal(matrices.join(matrices.split(weight)), weight)
    shape = {nn.Linear: (4, 3, 10), nn.Conv1d: (4, 4, 11), nn.Conv2d: (4, 6, 7, 6)}[type(layer)]
    x = torch.randn(shape, dtype=torch.float64)
    observer = obs.Hessian(target)
    calibration.collect(layer, [target], {"weight": observer}, [x[:1], x[1:]], None, "a test")
    other = torch.randn_like(weight)
    n = observer.rows[0]
    energy = sum(
        float((m @ h * m).sum()) for m, h in zip(matrices.split(other), observer.result(), strict=True)
    )
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight.copy_(other)
        assert energy == pytest.approx(2 / n * float(layer(x).square().sum()), rel=1e-9)


# ---------------------------------------------------------------- models


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 8))


def inputs(n: int = 300, seed: int = 1) -> list[torch.Tensor]:
    mix = torch.randn(32, 32, generator=torch.Generator().manual_seed(7)) / 4  # correlated, always alike
    generator = torch.Generator().manual_seed(seed)
    return list((torch.randn(n, 32, generator=generator) @ mix).split(100))


def state(model: nn.Module) -> dict[str, bytes]:
    return {k: v.detach().contiguous().numpy().tobytes() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("pattern", ["unstructured", "1x4", "4x4", "2:4"])
@pytest.mark.parametrize("importance", ["sparsegpt", "obc"])
def test_exact_counts_and_smaller_output_errors_than_wanda(pattern: str, importance: str) -> None:
    if importance == "obc" and "x" in pattern:
        with pytest.raises(ValueError, match=r"pattern: expected 'unstructured' or N:M for 'obc', got '.x4'"):
            pared.prune(mlp(), 0.5, pattern=pattern, importance=importance, data=inputs())
        return
    data, held_out = inputs(), inputs(seed=2)
    error = {}
    for name in (importance, "wanda", "random"):
        model, dense = mlp(), mlp()
        report = pared.prune(model, 0.5, pattern=pattern, importance=name, data=data, scope=None)
        assert report.sparsity == 0.5
        with torch.no_grad():
            error[name] = sum(float(F.mse_loss(model[0](x), dense[0](x))) for x in held_out)
    assert error[importance] < error["wanda"] < error["random"]


def test_convolutions_with_groups_and_blocks_of_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
    )
    data = [torch.randn(8, 8, 9, 9) for _ in range(3)]
    for pattern in ("1x4", "2:4", "2x4"):
        pruned = copy.deepcopy(model)
        report = pared.prune(pruned, 0.5, pattern=pattern, importance="sparsegpt", data=data)
        assert report.sparsity == 0.5
        for layer in pruned:
            if isinstance(layer, nn.Conv2d):
                w = layer.weight.detach() != 0
                groups = w.reshape(w.shape[0], -1, 4, *w.shape[2:])
                if pattern == "2:4":
                    assert (groups.sum(2) == 2).all()
                else:
                    assert torch.equal(groups.any(2), groups.all(2))


def test_transformer_layers_and_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    data = [torch.randn(20, 6, 16) for _ in range(2)]
    dense, wanda = copy.deepcopy(layer), copy.deepcopy(layer)
    report = pared.prune(layer, 0.5, importance="sparsegpt", data=data)
    assert [x.sparsity for x in report.layers] == [0.5] * 4
    pared.prune(wanda, 0.5, importance="wanda", data=data)
    x = torch.randn(20, 6, 16)
    with torch.no_grad():
        assert F.mse_loss(layer(x), dense(x)) < F.mse_loss(wanda(x), dense(x))
    conv = Conv1D(6, 32)
    linear = nn.Linear(32, 6)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
    for module in (conv, linear):
        pared.prune(module, 0.5, importance="sparsegpt", data=inputs())
    torch.testing.assert_close(conv.weight.detach().t(), linear.weight.detach())


def test_existing_zeros_stay() -> None:
    model = mlp()
    pared.prune(model, 0.3)
    before = [m.weight.detach() == 0 for m in model if isinstance(m, nn.Linear)]
    for importance in ("sparsegpt", "obc"):
        pruned = copy.deepcopy(model)
        pared.prune(pruned, 0.5, importance=importance, data=inputs())
        after = [m.weight.detach() == 0 for m in pruned if isinstance(m, nn.Linear)]
        assert not any(bool((a & ~b).any()) for a, b in zip(before, after, strict=True))


def test_each_layer_is_fitted_to_what_the_pruned_ones_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    collect = reconstruct.collect

    def spy(model: nn.Module, targets: list[Target], *args: Any, **kwargs: Any) -> None:
        seen.append([t.name for t in targets])
        collect(model, targets, *args, **kwargs)

    monkeypatch.setattr(reconstruct, "collect", spy)
    pared.prune(mlp(), 0.5, importance="sparsegpt", data=inputs())
    assert seen == [["0.weight"], ["2.weight"], ["4.weight"]]
    model = nn.ModuleDict({"layers": nn.ModuleList([mlp(), mlp()])})
    target = [Target(m, n, "weight", [n]) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert [reconstruct._stage(model, t.layer) for t in target] == ["layers.0"] * 3 + ["layers.1"] * 3


class Killed(Exception):
    pass


def test_resumes_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    want = mlp()
    pared.prune(want, 0.5, importance="sparsegpt", data=inputs())
    model = mlp()
    before = state(model)
    sweep, calls = obs.sweep, []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return sweep(*args, **kwargs)

    monkeypatch.setattr(obs, "sweep", dies)
    with pytest.raises(Killed):
        pared.prune(model, 0.5, importance=SparseGPT(resume=path), data=inputs())
    assert state(model) == before  # as it was
    assert path.exists()
    with pytest.raises(ValueError, match="resume: expected a folder of the same model and settings"):
        pared.prune(model, 0.6, importance=SparseGPT(resume=path), data=inputs())
    calls.clear()
    pared.prune(model, 0.5, importance=SparseGPT(resume=path), data=inputs())
    assert len(calls) == 1  # the two layers that were done are not done again
    assert state(model) == state(want)
    assert not path.exists()


def test_pruner_takes_the_score_without_the_update() -> None:
    model = mlp()
    w = model[0].weight.detach().clone()
    pruner = pared.Pruner(model, lambda step: 0.5, importance="sparsegpt", data=inputs())
    pruner.step()
    alive = model[0].weight.detach() != 0
    assert torch.equal(model[0].weight.detach()[alive], w[alive])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "data: expected batches, which 'sparsegpt' needs, got None"),
        (
            {"data": iter(inputs())},
            TypeError,
            "data: expected batches that can be gone through several times",
        ),
        ({"data": []}, ValueError, "data: expected at least one batch"),
        (
            {"data": [torch.full((4, 32), torch.nan)]},
            ValueError,
            "data: expected finite .* layer '0' in batch 0",
        ),
        (
            {"data": inputs(), "scope": "global"},
            ValueError,
            "scope: expected 'layer' or None with 'sparsegpt'",
        ),
    ],
)
def test_errors_leave_the_model(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    model = mlp()
    before = state(model)
    with pytest.raises(error, match=message):
        pared.prune(model, 0.5, importance="sparsegpt", **kwargs)
    assert state(model) == before


def test_a_layer_that_is_not_reached_undoes_the_others() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(32, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Net()
    before = state(model)
    with pytest.raises(ValueError, match="data: expected batches that reach layer 'unused'"):
        pared.prune(model, 0.5, importance="sparsegpt", data=inputs())
    assert state(model) == before


def test_few_samples_and_options() -> None:
    model = mlp()
    report = pared.prune(model, 0.5, importance="sparsegpt", data=[inputs()[0][:2]])  # rank two of 32
    assert report.sparsity == 0.5
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(ValueError, match="damping: expected a finite number >= 0, got -1"):
        SparseGPT(damping=-1)
    with pytest.raises(TypeError, match="damping: expected a finite number"):
        OBC(damping="a lot")  # type: ignore[arg-type]
