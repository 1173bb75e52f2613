"""Quantisation: the grid's closed forms, GPTQ, ranges, equalisation, straight-through training, errors."""

from __future__ import annotations

import copy
import itertools
import json
import math
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
from pared.pruning import obs
from pared.pruning.patterns import parse_pattern
from pared.pruning.targets import Target
from pared.quant import (
    InputRange,
    equalize,
    finish_qat,
    int8_weight,
    prepare_qat,
    quantized,
    simulate,
    smooth,
)
from pared.quant.grid import GridRounding, fit, steps


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 8)).eval()


def inputs(n: int = 300, seed: int = 1) -> list[torch.Tensor]:
    mix = torch.randn(32, 32, generator=torch.Generator().manual_seed(7)) / 4
    generator = torch.Generator().manual_seed(seed)
    return list((torch.randn(n, 32, generator=generator) @ mix).split(100))


def state(model: nn.Module) -> dict[str, bytes]:
    return {k: v.detach().contiguous().numpy().tobytes() for k, v in model.state_dict().items()}


# ---------------------------------------------------------------- the grid


@settings(max_examples=40)
@given(
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
    method=st.sampled_from(["minmax", "mse"]),
)
def test_zero_is_on_the_grid_and_errors_are_half_a_step(
    bits: int, symmetric: bool, seed: int, method: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 33, generator=generator, dtype=torch.float64) + torch.randn(5, 1, generator=generator)
    x[:, ::7] = 0
    grid = fit(x, bits, symmetric=symmetric, method=method)
    rounded, codes = grid.round(x), grid.codes(x)
    low, high = steps(bits, symmetric)
    assert codes.min() >= low
    assert codes.max() <= high
    assert torch.equal(codes, codes.round())
    assert (rounded[x == 0] == 0).all()
    inside = (codes > low) & (codes < high)
    # The range ends half a step beyond the last code when the zero point is rounded.
    error = (rounded - x).abs() / grid.scale
    assert not inside.any() or float(error[inside].max()) <= 0.5 + 1e-9
    if method == "minmax":
        assert float(error.max()) <= (0.5 if symmetric else 1.0) + 1e-9
    again = fit(rounded, bits, symmetric=symmetric).round(rounded)
    if method == "minmax" and symmetric:
        torch.testing.assert_close(again, rounded, rtol=1e-12, atol=1e-12)


def test_a_bit_is_worth_six_decibels_on_uniform_data() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 200_000, generator=generator, dtype=torch.float64) * 2 - 1
    power = x.square().mean()
    noise = []
    for bits in range(4, 13):
        error = (fit(x, bits).round(x) - x).square().mean()
        noise.append(10 * math.log10(float(power / error)))
        # Steps of 1 / q over [-1, 1]: 4 q**2, with q = 2**(b - 1) - 1 as the most negative code is not used.
        assert noise[-1] == pytest.approx(20 * math.log10(2 * steps(bits, True)[1]), abs=0.05)
    gains = [b - a for a, b in itertools.pairwise(noise)]
    # 20 log10(2) = 6.02 in the limit; the code that is not used shows at few bits
    assert gains[-1] == pytest.approx(20 * math.log10(2), abs=0.05)
    assert all(6.0 < g < 6.7 for g in gains)


def test_per_channel_is_at_least_as_fine_as_per_tensor_and_mse_as_minmax() -> None:
    torch.manual_seed(0)
    w = torch.randn(16, 64) * torch.rand(16, 1) * 4
    for bits in (3, 4, 8):
        whole = fit(w.reshape(1, -1), bits)
        tensor = (whole.round(w.reshape(1, -1)).reshape(w.shape) - w).square().sum()
        channel = (fit(w, bits).round(w) - w).square().sum()
        searched = (fit(w, bits, method="mse").round(w) - w).square().sum(1)
        assert channel < tensor
        assert (searched <= (fit(w, bits).round(w) - w).square().sum(1)).all()


# ---------------------------------------------------------------- GPTQ


def problem(rows: int, size: int, samples: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    x = torch.randn(samples, size, generator=generator, dtype=torch.float64) @ (mix + 0.3)
    return torch.randn(rows, size, generator=generator, dtype=torch.float64), 2 / samples * x.t() @ x


@pytest.mark.parametrize("size", [1, 7, 128, 300])
def test_gptq_with_a_multiple_of_the_identity_is_round_to_nearest(size: int) -> None:
    w, _ = problem(6, size)
    h = 3.7 * torch.eye(size, dtype=torch.float64)
    for bits in (3, 4, 8):
        rounding = GridRounding(bits, symmetric=True, group=None, method="minmax")
        new, _ = obs.sweep(w, obs.invert(h, 0.01), rounding=rounding)
        assert torch.equal(new, fit(w, bits).round(w))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [None, 32])
def test_gptq_beats_rounding_by_a_fifth(bits: int, group: int | None) -> None:
    w, h = problem(32, 96)
    rounding = GridRounding(bits, symmetric=True, group=group, method="minmax")
    new, _ = obs.sweep(w, obs.invert(h, 0.01), rounding=rounding)
    nearest = torch.cat([fit(p, bits).round(p) for p in w.split(group or 96, dim=1)], 1)
    assert obs.output_error(new, w, h) <= 0.8 * obs.output_error(nearest, w, h)


def test_pruned_and_rounded_in_one_pass_beats_one_after_the_other() -> None:
    w, h = problem(32, 96)
    inverse = obs.invert(h, 0.01)
    pattern = parse_pattern("2:4")
    units = [(i, i + 4) for i in range(0, 96, 4)]
    rounding = GridRounding(4, symmetric=True, group=None, method="minmax")
    both, mask = obs.sweep(w, inverse, units=units, sparsity=0.5, pattern=pattern, rounding=rounding)
    assert (mask.reshape(32, 24, 4).sum(2) == 2).all()
    assert (both[~mask] == 0).all()
    pruned, _ = obs.sweep(w, inverse, units=units, sparsity=0.5, pattern=pattern)
    after = fit(pruned, 4).round(pruned)
    assert obs.output_error(both, w, h) < obs.output_error(after, w, h)


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_lie_on_the_grids_that_the_layers_keep(bits: int, method: str, symmetric: bool) -> None:
    model, dense = mlp(), mlp()
    report = pared.quantize(model, inputs(), bits=bits, method=method, symmetric=symmetric)
    assert [x.bits for x in report.layers] == [bits] * 3
    for layer in model:
        if isinstance(layer, nn.Linear):
            record = quantized(layer)
            assert record is not None
            codes = record.codes(layer.weight.detach()).double()
            torch.testing.assert_close(
                (codes - record.zero) * record.scale, layer.weight.detach().double(), rtol=1e-5, atol=1e-7
            )
            assert codes.unique().numel() > 2 ** min(bits, 8) / 4
    with torch.no_grad():
        x = inputs()[0]
        error = float(F.mse_loss(model(x), dense(x)).sqrt() / dense(x).std())
    assert error < {4: 0.3, 8: 0.02, 16: 1e-4}[bits]
    assert json.loads(report.to_json())["layers"][0]["bits"] == bits
    assert "gptq" in str(report) or method == "rtn"


def test_gptq_is_better_than_rounding_on_held_out_outputs() -> None:
    held_out, dense = inputs(seed=5), mlp()
    for bits in (3, 4):
        error = {}
        for method in ("gptq", "rtn"):
            model = mlp()
            pared.quantize(model, inputs(2000), bits=bits, method=method)
            with torch.no_grad():
                error[method] = sum(float(F.mse_loss(model[0](x), dense[0](x))) for x in held_out)
        assert error["gptq"] <= 0.8 * error["rtn"]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_of_a_pruned_model_stay_exactly_zero(method: str, symmetric: bool) -> None:
    model = mlp()
    pared.prune(model, 0.8)
    zero = [m.weight.detach() == 0 for m in model if isinstance(m, nn.Linear)]
    pared.quantize(model, inputs(), bits=4, method=method, symmetric=symmetric)
    for m, z in zip([m for m in model if isinstance(m, nn.Linear)], zero, strict=True):
        assert (m.weight.detach()[z] == 0).all()


def test_pruned_in_the_same_pass() -> None:
    model = mlp()
    report = pared.quantize(model, inputs(), bits=8, pattern="2:4")
    assert all(x.sparsity >= 0.5 for x in report.layers)  # a weight may round to zero besides
    for m in model:
        if isinstance(m, nn.Linear):
            assert ((m.weight != 0).reshape(m.out_features, -1, 4).sum(2) <= 2).all()


def test_int8_weights_are_taken_over_by_the_dense_int8_rule() -> None:
    """``max|w| / 127`` of a row that lies on its grid and reaches its end is the grid's own scale."""
    model = mlp()
    pared.quantize(model, inputs(), bits=8, method="rtn")
    for m in model:
        if isinstance(m, nn.Linear):
            record = quantized(m)
            assert record is not None
            w = m.weight.detach()
            scale = w.abs().amax(1, keepdim=True) / 127
            assert torch.equal((w / scale).round(), record.codes(w).float())


@pytest.mark.parametrize("activations", ["token", "static"])
def test_packed_int8_weights_compute_what_was_simulated(activations: str) -> None:
    model = mlp()
    pared.quantize(model, inputs(), bits=8, activations=activations)
    layer, x = model[2], inputs()[0]
    hidden = torch.relu(model[0](x)).detach()
    packed = int8_weight(layer)
    assert torch.equal(
        torch.from_numpy(packed.to_quantized()[0]), quantized(layer).codes(layer.weight.detach())
    )
    with torch.no_grad(), simulate(layer):
        want = layer(hidden)
    got = pared.ops.linear(hidden, packed, layer.bias.detach())
    assert float((got - want).abs().max()) <= 0.01 * float(want.abs().max())
    with pytest.raises(ValueError, match="layer: expected one that quantize has put on a symmetric grid"):
        int8_weight(nn.Linear(3, 3))


def test_bits_by_filter_and_auto() -> None:
    model = mlp()
    report = pared.quantize(model, inputs(), bits={"0": 4, "*": 8})
    assert [x.bits for x in report.layers] == [4, 8, 8]
    model = mlp()
    report = pared.quantize(model, inputs(), bits={"2": 4})
    assert [x.name for x in report.layers] == ["2.weight"]
    assert ("0.weight", "no filter in bits matches") in report.kept
    assert [x.bits for x in pared.quantize(mlp(), inputs(), max_error=1.0).layers] == [4] * 3
    assert [x.bits for x in pared.quantize(mlp(), inputs()).layers] == [8] * 3
    report = pared.quantize(mlp(), inputs(), max_error=0.0)
    assert [x.bits for x in report.layers] == [16] * 3
    for layer in report.layers:  # every width was measured, and is worse with fewer bits
        (_, four, _), (_, eight, _), (bits, sixteen, seconds) = layer.tried
        assert four > eight > sixteen == layer.error
        assert (bits, seconds) == (16, None)


def test_auto_takes_the_fastest_width_that_is_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """With given times: layer 0 is faster with 8 bits, layer 2 as floating point, layer 4 has no kernel."""
    asked = []

    def seconds(
        model: nn.Module, x: Any, precision: str, formats: Any, group: Any
    ) -> dict[str, tuple[float, float]]:
        asked.append(precision)
        assert "int8" in (formats or ["int8"])
        return {"0": (1.0, 3.0 if formats else 1.2), "2": (1.0, 0.5 if formats else 1.0)}

    monkeypatch.setattr("pared._accelerate.layer_seconds", seconds)
    options: dict[str, Any] = {"example_inputs": inputs()[0]}
    report = pared.quantize(mlp(), inputs(), **options)
    assert [x.bits for x in report.layers] == [8, 16, 8]
    assert "int8" in asked
    # Four bits take the kernels of eight here, so they cost the same: the narrower one, where it is allowed.
    report = pared.quantize(mlp(), inputs(), max_error=1.0, **options)
    assert [x.bits for x in report.layers] == [4, 16, 4]
    assert json.loads(report.to_json())["layers"][0]["tried"][0][0] == 4


def test_auto_with_real_kernels_flows_into_accelerate() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 16)).eval()
    data = [torch.randn(64, 256) for _ in range(3)]
    report = pared.quantize(model, data, example_inputs=data[0])
    assert all(s is not None and s > 0 for layer in report.layers for _, _, s in layer.tried)
    codes = {n: quantized(m).codes(m.weight.detach()) for n, m in model.named_modules() if quantized(m)}
    fast = pared.accelerate(model, data[0], precision="int8", formats=["int8"], min_speedup=0, max_error=1)
    for layer in report.layers:
        name = layer.name.removesuffix(".weight")
        if layer.bits <= 8:  # the codes are taken over as they are: nothing is calibrated again
            q, _ = fast.get_submodule(name).packed_weight().to_quantized()
            assert torch.equal(torch.from_numpy(q), codes[name])
    pared.quantize(model, data, bits=16)
    fast = pared.accelerate(model, data[0], precision="int8", formats=["int8"], min_speedup=0, max_error=1)
    assert not pared.report(fast).converted  # 16 bits are not rounded to 8 behind the user's back


def test_resumes_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "state"
    options: dict[str, Any] = {"bits": 5, "activations": "static", "bias_correction": True}
    want = mlp()
    report = pared.quantize(want, inputs(), **options)
    model = mlp()
    before = state(model)
    sweep, calls = obs.sweep, []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sweep(*args, **kwargs)

    monkeypatch.setattr(obs, "sweep", dies)
    with pytest.raises(KeyboardInterrupt):
        pared.quantize(model, inputs(), resume=folder, **options)
    assert state(model) == before
    with pytest.raises(ValueError, match="resume: expected a folder of the same model and settings"):
        pared.quantize(model, inputs(), resume=folder, **{**options, "bits": 6})
    calls.clear()
    assert pared.quantize(model, inputs(), resume=folder, **options) == report
    assert len(calls) == 1  # the two layers that were done are not done again
    assert state(model) == state(want)
    for a, b in zip(want, model, strict=True):
        if isinstance(a, nn.Linear):
            assert all(
                torch.equal(torch.as_tensor(x), torch.as_tensor(y))
                for x, y in zip(vars(quantized(a)).values(), vars(quantized(b)).values(), strict=True)
                if not isinstance(x, str | None)
            )
    assert not folder.exists()


def test_convolutions_groups_and_attention() -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)).eval()
    dense = copy.deepcopy(conv)
    data = [torch.randn(6, 4, 8, 8) for _ in range(3)]
    report = pared.quantize(conv, data, bits=8, group=4, bias_correction=True)
    assert all(x.error < 0.02 for x in report.layers)
    assert float((conv(data[0]) - dense(data[0])).detach().abs().max()) < 0.05
    record = quantized(conv[2])
    assert record is not None
    assert record.scale.shape == (6, 9)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    report = pared.quantize(layer, [torch.randn(8, 5, 16)], bits=8)
    assert len(report.layers) == 4
    assert all(x.error < 0.02 for x in report.layers)


def test_bias_correction_keeps_the_mean_output() -> None:
    data, dense = inputs(), mlp()
    means = {}
    for correct in (False, True):
        model = mlp()
        pared.quantize(model, data, bits=3, method="rtn", include="0", bias_correction=correct)
        means[correct] = (model[0](torch.cat(data)) - dense[0](torch.cat(data))).mean(0).abs().max()
    assert means[True] < 1e-5 < means[False]


# ---------------------------------------------------------------- ranges of activations


def observed(x: torch.Tensor, parts: int = 3) -> InputRange:
    layer = nn.Linear(1, 1)
    observer = InputRange(Target(layer, "", "weight", ["weight"]))
    for part in x.reshape(-1, 1).chunk(parts):
        observer.input(part)
    return observer.result()


def test_ranges() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, generator=generator, dtype=torch.float64)
    x[0], x[1] = 60.0, -50.0  # outliers
    seen = observed(x)
    assert seen.range("minmax") == (-50.0, 60.0)
    low, high = seen.range("percentile", share=0.999)
    assert high == pytest.approx(float(x.quantile(0.999)), abs=0.07)  # a bin is 128 / 2048
    assert low == pytest.approx(float(x.quantile(0.001)), abs=0.07)
    error = {}
    for method in ("minmax", "percentile", "mse", "kl"):
        grid = seen.grid(method)
        assert grid.dtype == "uint8"
        error[method] = float((grid.round(x) - x).square().mean())
    assert error["mse"] == min(error.values())
    assert seen.grid("minmax", symmetric=True).scale == pytest.approx(60 / 127)
    relu = observed(x.relu()).grid("minmax")
    assert (relu.zero, relu.dtype) == (0, "uint8")
    assert relu.scale == pytest.approx(60 / 255)


def test_training_with_rounded_weights_asks_for_plain_ones() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    torch.nn.utils.prune.l1_unstructured(model[1], "weight", 0.5)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"got masks of another tool on '1\.weight'"):
        prepare_qat(model, bits=4)
    assert list(model.state_dict()) == before
    assert not torch.nn.utils.parametrize.is_parametrized(model[0])


def test_distributions_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(50_000, generator=generator, dtype=torch.float64)
    uniform = torch.rand(50_000, generator=generator, dtype=torch.float64) - 0.5
    laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    poisson = torch.poisson(torch.full((50_000,), 3.0), generator=generator).double()
    for x, name, kurtosis in (
        (normal, "gaussian", 0.0),
        (laplace, "laplace", 3.0),
        (poisson, "poisson", 1 / 3),
    ):
        seen = observed(x).distribution()
        assert seen.fit == name
        assert seen.kurtosis == pytest.approx(kurtosis, abs=0.4)
        assert seen.mean == pytest.approx(float(x.mean()), abs=1e-9)
        assert seen.std == pytest.approx(float(x.std(correction=0)), abs=1e-9)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "kl"])
def test_static_grids_are_kept_and_simulated(observer: str) -> None:
    model, dense = mlp(), mlp()
    report = pared.quantize(model, inputs(), bits=8, activations="static", observer=observer)
    record = quantized(model[2])
    assert record is not None
    assert record.activation_dtype == "uint8"
    assert record.activation_zero == 0  # behind a ReLU
    assert report.layers[1].activation == (record.activation_scale, 0, "uint8")
    x = torch.cat(inputs())
    with torch.no_grad():
        whole = float(model[:2](x).max()) / 255  # a step of the grid that clips nothing
        assert record.activation_scale is not None
        share = record.activation_scale / whole
        assert share == pytest.approx(1.0, abs=0.05) if observer == "minmax" else 0.2 < share < 1.05
        plain = model(x)
        with simulate(model):
            rounded = model(x)
        assert not torch.equal(plain, rounded)
        error = float((rounded - dense(x)).norm() / dense(x).norm())
        assert error < (0.2 if observer == "kl" else 0.05)
        assert torch.equal(model(x), plain)


# ---------------------------------------------------------------- equalisation


def test_equalisation_keeps_the_function_and_balances_the_ranges() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5)
    ).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 2, 8).reshape(-1, 1, 1, 1))
    dense = copy.deepcopy(model)
    assert equalize(model) == [("0", "2"), ("2", "5")]
    x = torch.randn(4, 3, 7, 7)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-3, atol=1e-4)
    a, b = model[0].weight.detach().flatten(1).abs().amax(1), model[2].weight.detach().abs().amax((0, 2, 3))
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)
    per_tensor = []
    for m in (dense, model):
        flat = m[0].weight.detach().reshape(1, -1)
        lost = (fit(flat, 8).round(flat) - flat).reshape(8, -1).norm(dim=1)
        per_tensor.append(float((lost / flat.reshape(8, -1).norm(dim=1)).max()))
    assert per_tensor[1] < per_tensor[0] / 2
    with pytest.raises(ValueError, match="model: expected layers that follow each other"):
        equalize(nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 3)))


class Block(nn.Module):
    def __init__(self, post: bool = False) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.post = nn.LayerNorm(16), nn.Linear(16, 12), nn.Linear(16, 12), post

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        out = self.a(y) * self.b(y)
        return out + y[..., :12] if self.post else out


def test_smoothing_moves_outliers_into_weights_and_leaves_residual_readers() -> None:
    torch.manual_seed(0)
    data = [torch.randn(50, 16)]
    model = Block().eval()
    with torch.no_grad():
        model.norm.weight[3] = 80.0
    dense = copy.deepcopy(model)
    assert smooth(model, data) == ["norm"]
    torch.testing.assert_close(model(data[0]), dense(data[0]), rtol=1e-3, atol=1e-3)
    before, after = (m.norm(data[0]).detach().abs().amax(0) for m in (dense, model))
    assert after.max() / after.median() < (before.max() / before.median()) / 3
    again = copy.deepcopy(dense)
    assert smooth(again, data, {"norm": ["a", "b"]}, alpha=0.8) == ["norm"]
    post = Block(post=True).eval()
    with torch.no_grad():
        post.norm.weight[3] = 80.0
    weights = state(post)
    assert smooth(post, data) == []
    assert state(post) == weights


# ---------------------------------------------------------------- training


def test_qat_rounds_forwards_and_passes_gradients_straight_through() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[:, 3] = 0
    dense = copy.deepcopy(model)
    assert prepare_qat(model, bits=4) == ["0.weight", "2.weight", "4.weight"]
    x = inputs()[0]
    want = fit(dense[0].weight.detach(), 4).round(dense[0].weight.detach())
    assert torch.equal(model[0].weight.detach(), want)
    rounded = copy.deepcopy(dense)
    for a, b in zip(rounded, model, strict=True):
        if isinstance(a, nn.Linear):
            with torch.no_grad():
                a.weight.copy_(b.weight)
    model(x).square().sum().backward()
    rounded(x).square().sum().backward()
    torch.testing.assert_close(model[0].parametrizations.weight.original.grad, rounded[0].weight.grad)
    y = dense(x).detach()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] * 0.7
    trained = model(x).detach()
    assert finish_qat(model) == ["0.weight", "2.weight", "4.weight"]
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), trained)
    assert model[0].weight.detach()[0].unique().numel() <= 15
    with pytest.raises(ValueError, match="model: expected one that prepare_qat has prepared"):
        finish_qat(model)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"bits": 1}, ValueError, "bits: expected 2 to 16 bits, got 1"),
        (
            {"bits": "8"},
            ValueError,
            "bits: expected 2 to 16, a mapping from filters to bits or 'auto', got '8'",
        ),
        ({"bits": 8.0}, TypeError, "bits: expected a number of bits"),
        (
            {"bits": {"nope": 8}},
            ValueError,
            "bits: expected filters that match a selected weight, got 'nope'",
        ),
        ({"bits": {"0": 99}}, ValueError, r"bits\['0'\]: expected 2 to 16 bits, got 99"),
        ({"method": "gptk"}, ValueError, "method: expected 'gptq', 'rtn', got 'gptk'; did you mean 'gptq'"),
        ({"group": 48}, ValueError, "group: expected a divisor of 128 or None, got 48"),
        (
            {"observer": "max"},
            ValueError,
            "observer: expected 'minmax', 'percentile', 'mse', 'kl', got 'max'",
        ),
        ({"activations": "dynamic"}, ValueError, "activations: expected 'token', 'static', got 'dynamic'"),
        ({"sparsity": 2}, ValueError, "sparsity: expected a number"),
        ({"data": None}, ValueError, "data: expected batches, which 'quantize' needs, got None"),
        (
            {"data": iter(inputs())},
            TypeError,
            "data: expected batches that can be gone through several times",
        ),
        ({"data": [torch.full((2, 32), torch.nan)]}, ValueError, "data: expected finite"),
        ({"include": "nothing"}, ValueError, "include: expected a filter that matches"),
    ],
)
def test_errors_leave_the_model(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    model = mlp()
    before = state(model)
    with pytest.raises(error, match=message):
        pared.quantize(model, **{"data": inputs(), "bits": 8, **kwargs})
    assert state(model) == before
    assert not any(m._forward_pre_hooks for m in model.modules())
