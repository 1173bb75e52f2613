"""pared.prune(pattern="auto"): which pattern each layer gets, from given times and from the estimates, and
what the report says of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import pared
from pared._select import facts_of
from pared.pruning import auto
from pared.pruning.auto import MIN_GAIN, Layer, PatternChoice, agree, cuda_seconds, decide, planned_facts
from pared.pruning.patterns import parse_pattern

LINEAR = Layer(nn.Linear, (768, 768), 1, 4, {128: 2})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The estimates count threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def given(**seconds: float) -> Callable[[Layer, str | None, float, str], float]:
    """A stopwatch that the test decides: names of patterns, x for the blocks' cross."""
    return lambda layer, pattern, sparsity, precision: seconds[f"p{pattern}" if pattern else "dense"]


def test_a_coarser_pattern_has_to_be_a_good_deal_faster() -> None:
    for blocks, want in [(0.8, "4x1"), (0.86, "4x1"), (0.88, "unstructured"), (2.0, "unstructured")]:
        got = decide("w", LINEAR, 0.8, "cpu", "float32", given(dense=3, punstructured=1, p4x1=blocks))
        assert got.pattern == want
        assert f"{1 / blocks:.2f} times as fast" in got.reason
        assert got.estimates == {"dense": 3, "unstructured": 1, "4x1": blocks}


def test_each_step_is_compared_with_the_best_finer_one() -> None:
    times = {"dense": 9, "punstructured": 4.0, "p1x4": 2.0, "p4x4": 1.9}
    assert decide("w", LINEAR, 0.8, "cpu", "int8", given(**times)).pattern == "1x4"
    times["p4x4"] = 1.0
    assert decide("w", LINEAR, 0.8, "cpu", "int8", given(**times)).pattern == "4x4"
    times["p1x4"] = 3.9
    assert (
        "4.00 times as fast as unstructured" in decide("w", LINEAR, 0.8, "cpu", "int8", given(**times)).reason
    )


def test_zeros_that_save_nothing_are_said_to() -> None:
    got = decide("w", LINEAR, 0.1, "cpu", "float32", given(dense=1, punstructured=2, p4x1=2))
    assert got.pattern == "unstructured"
    assert "dense is as fast" in got.reason
    assert "10% zeros save no time" in got.reason


def test_layers_without_a_choice() -> None:
    for layer, text in [(None, "no kernel"), (Layer(nn.Linear, (8, 8), 1, 4, {}), "do not reach it")]:
        got = decide("w", layer, 0.8, "cpu", "float32", given())
        assert got == PatternChoice("w", "unstructured", {}, got.reason)
        assert text in got.reason
    conv = Layer(nn.Conv2d, (64, 64, 3, 3), 1, 2, {49: 1})
    assert "no CUDA kernel" in decide("w", conv, 0.8, "cuda", "float32", given()).reason


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "4x4"])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.Conv2d])
def test_planned_facts_are_those_of_pruned_weights(pattern: str, kind: type[nn.Module]) -> None:
    torch.manual_seed(3)
    sizes = {nn.Linear: (256, 192), nn.Conv1d: (64, 96, 5), nn.Conv2d: (32, 64, 3)}
    module: nn.Module = kind(*sizes[kind])
    pared.prune(module, 0.8, pattern=pattern)
    real = facts_of(module.weight)
    layer = Layer(kind, tuple(module.weight.shape), 1, 4, {1: 1})
    planned = planned_facts(layer, parse_pattern(pattern), 0.8)
    for name in ("rows", "cols", "cells", "taps", "kernel_rows"):
        assert getattr(planned, name) == getattr(real, name)
    for name in ("nnz", "quads", "words", "word_quads"):
        # Where they fall is chance: a few standard deviations.
        assert getattr(planned, name) == pytest.approx(getattr(real, name), rel=0.06)


def test_the_estimates_decide_on_the_cpu() -> None:
    # The kernel of four rows a load is faster with many tokens; with one, bitmaps read the fewest bytes.
    many = decide("w", Layer(nn.Linear, (3072, 768), 1, 4, {384: 1}), 0.9, "cpu", "float32")
    assert many.pattern == "4x1"
    assert many.estimates["4x1"] < many.estimates["unstructured"] < many.estimates["dense"]
    one = decide("w", Layer(nn.Linear, (3072, 768), 1, 4, {1: 1}), 0.5, "cpu", "float32")
    assert one.pattern == "unstructured"
    eight = decide("w", Layer(nn.Linear, (3072, 768), 1, 4, {128: 1}), 0.9, "cpu", "int8")
    assert eight.pattern in ("1x4", "4x4")


def test_the_table_for_cuda() -> None:
    def choice(sparsity: float, tokens: int, item_bytes: int = 2) -> str:
        layer = Layer(nn.Linear, (8192, 8192), 1, item_bytes, {tokens: 1})
        return decide("w", layer, sparsity, "cuda", "float32").pattern

    # Few tokens are bytes, which blocks hardly lessen; many are operations, which unstructured zeros do not.
    assert choice(0.9, 1) in ("unstructured", "64x64")
    assert choice(0.9, 8192) == "128x128"
    assert choice(0.5, 8192) == "2:4"
    assert choice(0.95, 8192, item_bytes=4) == "unstructured"
    small = Layer(nn.Linear, (96, 96), 1, 2, {8192: 1})
    assert "128x128" not in decide("w", small, 0.9, "cuda", "float32").estimates
    for pattern in (None, "unstructured", "64x64", "2:4"):
        assert math.isfinite(cuda_seconds(LINEAR, pattern, 0.5, "float32"))


@pytest.mark.parametrize("tokens", [1, 16, 512, 8192])
def test_why_blocks_of_64x128_are_not_chosen(tokens: int) -> None:
    """They cost more accuracy than 64x64 and are not estimated faster; blocks of more rows are."""
    layer = Layer(nn.Linear, (8192, 8192), 1, 2, {tokens: 1})
    square, wide, large = (cuda_seconds(layer, p, 0.9, "float32") for p in ("64x64", "64x128", "128x128"))
    assert wide == square
    assert (square > MIN_GAIN * large) == (tokens >= 512)
    assert "64x128" not in decide("w", layer, 0.9, "cuda", "float32").estimates


def test_one_pattern_for_all_where_a_method_needs_it() -> None:
    choices = [
        PatternChoice("a", "unstructured", {"unstructured": 1.0, "4x1": 1.0}, "first"),
        PatternChoice("b", "4x1", {"unstructured": 9.0, "4x1": 2.0}, "second"),
        PatternChoice("c", "unstructured", {}, "third"),
    ]
    agreed = agree(choices, "for a reason")
    assert [c.pattern for c in agreed] == ["4x1"] * 3
    assert agreed[0].reason.startswith("first; 4x1 as in most of the time, for a reason")
    assert agreed[1] is choices[1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.unused = nn.Linear(16, 16)
        self.lstm = nn.LSTM(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).mean((2, 3))
        y = self.down(self.up(y).relu())
        return self.lstm(self.down(self.up(y)))[0]


def fixed(layer: Layer, pattern: str | None, sparsity: float, precision: str) -> float:
    """Blocks pay where there are many outputs."""
    return {None: 9.0, "unstructured": 2.0, "4x1": 1.0 if layer.shape[0] >= 64 else 3.0}[pattern]


def test_a_model_with_a_pattern_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "cpu_seconds", fixed)
    torch.manual_seed(0)
    model = Net().train()
    model.lstm.eval()
    report = pared.prune(model, 0.75, pattern="auto", example_inputs=torch.randn(2, 8, 6, 6))
    found = {c.name: c for c in report.choices}
    assert found["up.weight"].pattern == "4x1"
    assert found["down.weight"].pattern == found["conv.weight"].pattern == "unstructured"
    assert "do not reach it" in found["unused.weight"].reason
    assert "no kernel" in found["lstm.weight_ih_l0"].reason
    assert report.pattern == "auto: unstructured, 4x1"
    blocks = (model.up.weight != 0).view(16, 4, 16)
    assert bool((blocks.all(1) == blocks.any(1)).all())
    assert report.sparsity == pytest.approx(0.75, abs=0.01)
    assert model.training
    assert not model.lstm.training
    assert "4x1 for up.weight: 4x1 2.00 times as fast as unstructured" in " ".join(str(report).split())
    stored = json.loads(report.to_json())["choices"]
    assert {c["name"]: c["pattern"] for c in stored} == {n: c.pattern for n, c in found.items()}


def test_calls_are_counted() -> None:
    model = Net()
    plan = pared.pruning.oneshot.make_plan(model, "unstructured", "magnitude", *[None] * 5, 0, 0)
    layers = auto.layers(model, plan.targets, [torch.randn(2, 8, 6, 6), torch.randn(3, 8, 4, 4)], None)
    calls = {t.name: layer and dict(layer.calls) for t, layer in zip(plan.targets, layers, strict=True)}
    assert calls["conv.weight"] == {72: 1, 48: 1}
    assert calls["up.weight"] == {2: 2, 3: 2}
    assert calls["unused.weight"] == {}
    assert calls["lstm.weight_ih_l0"] is None
    assert not model.conv._forward_hooks


def test_sparsities_by_layer_and_scopes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "cpu_seconds", fixed)
    for scope in ("layer", "row", "global"):
        model = Net()
        pared.prune(model, 0.5, pattern="auto", tokens=16, scope=scope, include=["up", "down"])
        blocks = (model.up.weight != 0).view(16, 4, 16)
        assert bool((blocks.all(1) == blocks.any(1)).all())
        assert int((model.down.weight == 0).sum()) == 512
    model = Net()
    report = pared.prune(model, {"up": 0.5, "down": 0.25}, pattern="auto", tokens=16)
    assert [c.name for c in report.choices] == ["up.weight", "down.weight"]
    assert int((model.down.weight == 0).sum()) == 256


def test_two_four_on_cuda() -> None:
    model = nn.Sequential(nn.Linear(4096, 4096, dtype=torch.bfloat16))
    report = pared.prune(model, 0.5, pattern="auto", tokens=8192, device="cuda")
    assert report.pattern == "auto: 2:4"
    assert bool(((model[0].weight != 0).view(4096, -1, 4).sum(-1) == 2).all())


def test_bad_input() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    x = torch.zeros(1, 8)
    for options, error, text in [
        ({}, ValueError, "tokens: expected it or example_inputs with pattern='auto', got neither"),
        ({"tokens": 1, "example_inputs": x}, ValueError, "tokens: expected it or example_inputs .* got both"),
        ({"tokens": 1.5}, TypeError, "tokens: expected a number of tokens, got float"),
        ({"tokens": 0}, ValueError, "tokens: expected a number of tokens >= 1, got 0"),
        ({"tokens": 1, "device": "tpu9"}, ValueError, "device: expected 'cpu' or 'cuda', got 'tpu9'"),
        ({"tokens": 1, "precision": "int9"}, ValueError, "precision: expected 'float32', 'int8', got 'int9'"),
        ({"tokens": 1, "pattern": "4x1"}, ValueError, "pattern: expected 'auto' with .* got '4x1'"),
        ({"tokens": 1, "sparsity": None}, TypeError, "sparsity: expected a number"),
    ]:
        before = model[0].weight.clone()
        with pytest.raises(error, match=text):
            pared.prune(model, **({"sparsity": 0.5, "pattern": "auto"} | options))
        assert torch.equal(model[0].weight, before)
