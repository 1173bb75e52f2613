"""pared.compress: the sparsest model that keeps the metric; the user's own is not touched."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pared
from pared._checkpoint import Checkpoint
from pared._compress import Compressed, Step
from pared.pruning import obs
from pared.training import FineTune


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_and_data() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(256, 16)
    return model, [(x[:128], x[:128, 0]), (x[128:], x[128:, 0])]


def zeros(model: nn.Module) -> float:
    weights = torch.cat([m.weight.detach().flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    return float((weights == 0).double().mean())


def by_sparsity(limit: float) -> Any:
    """A metric that falls off a cliff beyond `limit`."""

    def evaluate(model: nn.Module) -> float:
        plain = model if any(isinstance(m, nn.Linear) for m in model.modules()) else pared.restore(model)
        return 0.0 if zeros(plain) > limit + 0.01 else 1.0

    return evaluate


@pytest.mark.parametrize(("limit", "want"), [(0.62, 0.6), (0.0, 0.0), (0.99, 0.95), (0.3, 0.3)])
def test_finds_the_sparsest_that_keeps_the_bound(limit: float, want: float) -> None:
    model, data = model_and_data()
    before = copy.deepcopy(model.state_dict())
    result = pared.compress(model, data, by_sparsity(limit), importance="magnitude", min_speedup=0)
    assert result.sparsity == want
    assert result.metric == 1.0
    assert zeros(result.pruned) == pytest.approx(want, abs=0.01)
    assert [s.what for s in result.steps].count("prune") <= 4  # bisection over ten
    assert all(s.accepted == (s.sparsity <= limit + 0.01) for s in result.steps)
    assert result.steps[-1] == Step("accelerate", want, 1.0, True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    x = data[0][0]
    torch.testing.assert_close(result.model(x), result.pruned.eval()(x), rtol=1e-4, atol=1e-5)
    assert json.loads(result.to_json())["sparsity"] == want
    assert "metric 1 -> 1" in str(result)


def test_fine_tuning_holds_the_zeros_and_sparsegpt_needs_none() -> None:
    model, data = model_and_data()
    seen = []

    def fine_tune(m: nn.Module, pruner: pared.Pruner) -> None:
        optimizer = torch.optim.Adam(m.parameters(), lr=1e-2)
        before = zeros(m)
        for x, y in data:
            optimizer.zero_grad()
            F.mse_loss(m(x)[:, 0], y).backward()
            optimizer.step()
            pruner.step()
        assert zeros(m) == before
        seen.append(before)

    result = pared.compress(model, data, lambda m: 1.0, fine_tune=fine_tune, sparsities=(0.5, 0.9))
    assert seen == pytest.approx([0.5, 0.9], abs=0.01) or seen == pytest.approx([0.9], abs=0.01)
    assert result.sparsity == 0.9
    result = pared.compress(model, data, lambda m: 1.0, pattern="2:4")
    assert result.sparsity == 0.5
    assert [(s.what, s.sparsity) for s in result.steps] == [("prune", 0.5), ("accelerate", 0.5)]


def test_searches_each_layer_under_a_budget() -> None:
    model, data = model_and_data()
    result = pared.compress(model, data, by_sparsity(0.7), search="parameters", min_speedup=0)
    assert result.plan is not None
    assert result.plan.cost <= result.plan.budget
    assert result.sparsity == 0.6  # of all parameters; biases stay
    pruned = sum(int(torch.count_nonzero(p)) for p in result.pruned.parameters())
    assert pruned == result.plan.cost
    assert "sum of errors" in str(result)
    result = pared.compress(
        model, data, lambda m: 1.0, search="macs", pattern="2:4", sparsities=(0.1, 0.5, 0.9)
    )
    assert result.sparsity == 0.5  # more than 2:4 gives is not even tried
    assert result.plan is not None
    assert set(result.plan.sparsities.values()) == {0.5}


def test_quantises_and_rolls_back() -> None:
    model, data = model_and_data()
    options: dict[str, Any] = {"min_speedup": 0, "max_error": 1.0, "quantize": {"bits": 8}}
    result = pared.compress(model, data, lambda m: 1.0, formats=["int8"], **options)
    assert result.quantized is not None
    assert [s.what for s in result.steps[-2:]] == ["quantize", "accelerate"]
    assert {x.kernel for x in result.report.layers} == {"int8"}

    def no_eight_bits(m: nn.Module) -> float:
        weights = [p for p in m.parameters() if p.ndim == 2]
        hooks = any(x._forward_pre_hooks for x in m.modules())
        return 0.0 if hooks or not weights else 1.0

    result = pared.compress(model, data, no_eight_bits, formats=["csr"], sparsities=(0.5,), **options)
    assert result.quantized is None
    tried = [(s.what, s.sparsity, s.accepted) for s in result.steps]
    assert tried == [
        ("prune", 0.5, True),
        ("quantize", 0.5, False),
        ("accelerate", 0.5, False),  # the packed model has no weights to count: refused as well
        ("quantize", 0.0, False),
        ("accelerate", 0.0, False),
    ]


# ---- killed and taken up again


class Killed(BaseException):
    pass


def full_run(folder: Path | None, seen: list[str] | None = None) -> Compressed:
    """Every step there is, from the same start."""
    model, data = model_and_data()

    def loss(m: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if seen is not None:
            seen.append("train")
        x, y = batch
        return F.mse_loss(F.dropout(m(x), 0.2)[:, 0], y)

    return pared.compress(
        model,
        torch.utils.data.DataLoader(data, batch_size=None, shuffle=True),  # type: ignore[arg-type]
        lambda m: 0.0 if sum(map(zeros_of, m.modules())) > 0.75 else 1.0 + torch.rand(()).item(),
        max_drop=1.0,
        search="parameters",
        sparsities=(0.3, 0.5, 0.7, 0.9),
        fine_tune=FineTune(
            loss,
            lambda p: torch.optim.Adam(p, lr=1e-2),
            steps=5,
            every=3,  # inside of an epoch
            scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        ),
        quantize={"bits": 8, "activations": "static"},
        example_inputs=data[0][0],
        formats=["int8"],
        min_speedup=0,
        max_error=1.0,
        checkpoint=folder,
    )


def zeros_of(module: nn.Module) -> float:
    if not isinstance(module, nn.Linear) or module.in_features != 16:
        return 0.0
    return float((module.weight == 0).double().mean())


def same(a: Compressed, b: Compressed) -> None:
    assert [a.steps, a.metric, a.sparsity, a.plan, a.quantized] == [
        b.steps,
        b.metric,
        b.sparsity,
        b.plan,
        b.quantized,
    ]
    for left, right in ((a.pruned, b.pruned), (a.model, b.model)):
        for (name, x), (_, y) in zip(left.state_dict().items(), right.state_dict().items(), strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_is_killed_at_any_point_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    want = full_run(None)
    assert {s.accepted for s in want.steps if s.what == "prune"} == {True, False}
    assert [s.what for s in want.steps[-2:]] == ["quantize", "accelerate"]
    put = Checkpoint.put
    puts = deaths = 0

    def dies(self: Checkpoint, *args: Any, **kwargs: Any) -> None:
        nonlocal puts
        puts += 1
        if when == "before" and puts == 2:
            raise Killed
        put(self, *args, **kwargs)
        if when == "after":
            raise Killed

    # Every run keeps one item and is killed: right behind it, or when the next is done and not yet kept.
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "put", dies)
        while True:
            try:
                puts = 0
                result = full_run(tmp_path / "run")
                break
            except Killed:
                deaths += 1
    assert deaths > 12
    same(result, want)
    seen: list[str] = []
    same(full_run(tmp_path / "run", seen), want)  # all is there: nothing is trained again
    assert not seen


def test_a_process_that_is_killed_leaves_a_run_to_take_up(tmp_path: Path) -> None:
    """SIGKILL at moments that are drawn, process after process."""
    script = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_compress
rng = random.Random(0)
for _ in range(6):
    child = os.fork()
    if not child:
        test_compress.full_run(test_compress.Path(sys.argv[2]))
        os._exit(0)
    time.sleep(rng.uniform(0.01, 0.3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
    arguments = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "run")]
    subprocess.run(arguments, check=True, timeout=300)
    same(full_run(tmp_path / "run"), full_run(None))


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    model, data = model_and_data()
    pared.compress(model, data, lambda m: 1.0, checkpoint=tmp_path / "run", importance="magnitude")
    with pytest.raises(ValueError, match="checkpoint: expected a folder of the same model and settings"):
        pared.compress(model, data, lambda m: 1.0, checkpoint=tmp_path / "run", importance="wanda")


def test_a_layer_by_layer_criterion_goes_on_inside_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = model_and_data()
    options: dict[str, Any] = {"sparsities": (0.5,), "formats": ["csr"], "min_speedup": 0}
    want = pared.compress(model, data, lambda m: 1.0, **options)
    sweep, calls = obs.sweep, []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return sweep(*args, **kwargs)

    monkeypatch.setattr(obs, "sweep", dies)
    with pytest.raises(Killed):
        pared.compress(model, data, lambda m: 1.0, checkpoint=tmp_path / "run", **options)
    calls[:] = [1, 1]
    same(pared.compress(model, data, lambda m: 1.0, checkpoint=tmp_path / "run", **options), want)
    assert len(calls) == 3  # the first layer was not settled again


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"search": "speed"}, ValueError, "search: expected 'parameters', 'macs', 'time' or None"),
        ({"quantize": 8}, TypeError, "quantize: expected True, False or options, got int"),
        ({"fine_tune": 3}, TypeError, "fine_tune: expected a FineTune or a callable, got int"),
        ({"max_drop": -1}, ValueError, "max_drop: expected a finite number >= 0, got -1"),
        ({"sparsities": (0.9, 0.5)}, ValueError, "sparsities: expected ascending numbers"),
        ({"sparsities": (1.5,)}, ValueError, "sparsities: expected a number"),
        ({"evaluate": lambda m: float("nan")}, ValueError, r"evaluate: expected a number, .* got NaN"),
        ({"data": []}, ValueError, "data: expected at least one batch"),
        ({"data": iter([1])}, TypeError, "data: expected batches that can be gone through several times"),
    ],
)
def test_errors(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    model, data = model_and_data()
    with pytest.raises(error, match=message):
        pared.compress(model, **{"data": data, "evaluate": lambda m: 1.0, **kwargs})
