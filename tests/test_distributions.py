"""pared.quant.distributions: histograms, fits and ranges against what the values say themselves."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import pared
from pared.pruning.targets import Target
from pared.quant import InputRange, distributions
from pared.quant._plots import density, page
from pared.quant.observers import BINS, OBSERVERS


def model() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    pared.prune(made, 0.5, include="0")
    return made


def observed(x: torch.Tensor) -> InputRange:
    seen = InputRange(Target(nn.Linear(1, 1), "", "weight", ["weight"]))
    for part in x.reshape(-1, 1).chunk(3):
        seen.input(part)
    return seen


@pytest.mark.parametrize("bits", [2, 4, 8, 10])
@pytest.mark.parametrize("range_", [(-4.5, 4.5), (-2.0, 3.0), (0.0, 2.0)])
def test_error_of_a_grid_is_that_of_rounding_every_value(bits: int, range_: tuple[float, float]) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[::3] = 0  # exact on every grid, however wide the bins
    low, high = range_
    scale = (high - low) / (2**bits - 1)
    zero = round(-low / scale)
    rounded = ((x / scale).round() + zero).clamp(0, 2**bits - 1)
    want = float(((rounded - zero) * scale - x).square().mean())
    assert observed(x).squared_error(low, high, bits) == pytest.approx(want, rel=0.03)


def test_a_bit_is_worth_six_decibels() -> None:
    x = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    seen = observed(x)
    errors = [seen.squared_error(-1.0, 1.0, bits) for bits in (4, 5, 6, 7, 8)]
    gains = [10 * math.log10(a / b) for a, b in itertools.pairwise(errors)]
    # One step more or less than a power of two: 2**b - 1 steps.
    assert gains == pytest.approx([6.02] * 4, abs=0.35)


def test_bars_hold_every_value_once() -> None:
    x = torch.tensor([-1.0, -0.5, 0.0, 0.0, 0.25, 0.25, 3.0], dtype=torch.float64)
    seen = observed(x)
    for most in (1, 7, 128, BINS):
        for zeros in (False, True):
            start, step, counts = seen.bars(most, zeros)
            assert len(counts) <= most
            assert sum(counts) == (7 if zeros else 5)
            assert start <= -1.0
            assert start + step * len(counts) > 3.0
            for value in x.unique().tolist():
                own = int((x == value).sum())
                if value or zeros:
                    assert counts[int((value - start) / step)] >= own


@pytest.mark.parametrize(("name", "parameters"), [("gaussian", (0.3, 0.7)), ("laplace", (-1.0, 0.4))])
def test_densities_integrate_to_one(name: str, parameters: tuple[float, ...]) -> None:
    width = 0.001
    total = sum(density(name, parameters, -10 + width * i) for i in range(20_000)) * width
    assert total == pytest.approx(1.0, abs=1e-6)
    assert sum(density("poisson", (3.0,), float(k)) for k in range(60)) == pytest.approx(1.0)


def test_fits_have_the_parameters_of_what_was_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(100_000, generator=generator, dtype=torch.float64) - 0.5
    laplace = 2.0 - 0.5 * uniform.sign() * torch.log1p(-2 * uniform.abs())
    fitted = observed(laplace).distribution()
    assert fitted.fit == "laplace"
    assert fitted.parameters["laplace"] == pytest.approx((2.0, 0.5), abs=0.02)
    for rate in (3.0, 300.0):  # bins narrower than an integer, and of one
        poisson = torch.poisson(torch.full((50_000,), rate), generator=generator).double()
        d = observed(poisson).distribution()
        k = torch.distributions.Poisson(rate)
        assert d.parameters["poisson"][0] == pytest.approx(rate, rel=0.01)
        want = float(k.log_prob(poisson).mean())
        assert d.log_likelihood["poisson"] == pytest.approx(want, abs=0.01)
    assert d.log_likelihood["gaussian"] < d.log_likelihood["poisson"] + 0.01


def test_weights_and_inputs_of_a_model() -> None:
    plain = model()
    plain.train()
    before, modes = copy.deepcopy(plain.state_dict()), [m.training for m in plain.modules()]
    data = [torch.randn(64, 16) for _ in range(3)]
    report = distributions(plain, data)
    assert [(t.name, t.kind) for t in report.tensors] == [
        (name, kind) for name in ("0.weight", "2.weight") for kind in ("weight", "input")
    ]
    weight, first, _, hidden = report.tensors
    assert weight.zeros == pytest.approx(0.5, abs=0.01)
    assert weight.distribution.count == int(torch.count_nonzero(plain[0].weight))
    assert sum(weight.counts) == weight.distribution.count
    x = torch.cat(data)
    assert first.distribution.count == x.numel()
    assert first.ranges["minmax"] == (float(x.min()), float(x.max()))
    with torch.no_grad():
        y = plain[1](plain[0](x))
    assert hidden.zeros == pytest.approx(float((y == 0).double().mean()))
    assert sum(hidden.counts) == int(torch.count_nonzero(y))
    for t in report.tensors:
        assert t.ranges.keys() == t.sqnr.keys() == set(OBSERVERS)
        assert t.sqnr[t.best] == max(t.sqnr.values())
        assert t.sqnr["mse"] >= t.sqnr["minmax"]
    # The dB that the report gives are those of the values on that grid.
    low, high = hidden.ranges["minmax"]
    scale = (max(high, 0.0) - min(low, 0.0)) / 255
    error = ((y / scale).round() * scale - y).square().mean()
    want = 10 * math.log10(float(y.square().mean() / error))
    assert hidden.sqnr["minmax"] == pytest.approx(want, abs=0.3)
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())
    assert [m.training for m in plain.modules()] == modes
    assert len(distributions(plain).tensors) == 2
    assert [t.name for t in distributions(plain, include="2").tensors] == ["2.weight"]


def test_the_report_as_table_json_and_page(tmp_path: Path) -> None:
    data = [torch.poisson(torch.full((64, 16), 2.0)) for _ in range(2)]
    report = distributions(model(), data, bits=4)
    text = str(report)
    assert "0.weight" in text
    assert "poisson" in text
    assert "4 bits" in text
    found = json.loads(report.to_json())
    assert found["bits"] == 4
    assert [t["name"] for t in found["tensors"]] == [t.name for t in report.tensors]
    path = tmp_path / "page.html"
    report.to_html(path, "Model <A>")
    html = path.read_text()
    assert html == page(report, "Model <A>")
    assert html.count("<svg") == html.count("</svg>") == len(report.tensors)
    assert "Model &lt;A&gt;" in html
    assert "<script" not in html
    assert "http" not in html
    for word in ("minmax", "percentile", "mse", "kl", "poisson", "laplace", "gaussian"):
        assert word in html
    assert "nan" not in html.lower().replace("xmlns", "")


def test_a_constant_and_an_empty_layer_have_a_plot() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    with torch.no_grad():
        plain[0].weight.fill_(0.5)
        plain[1].weight.zero_()
    report = distributions(plain, [torch.zeros(2, 4)])
    assert [(t.name, t.kind) for t in report.tensors][:2] == [("0.weight", "weight"), ("0.weight", "input")]
    assert report.tensors[0].distribution.fit == "constant"
    assert page(report, "page").count("<svg") == len(report.tensors)


def test_recurrent_layers_show_their_weights() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(self.lstm(x)[0])
            return y

    torch.manual_seed(0)
    report = distributions(Tagger(), [torch.randn(2, 5, 8)])
    kinds = {(t.name, t.kind) for t in report.tensors}
    assert ("lstm.weight_hh_l0", "weight") in kinds
    assert ("head.weight", "input") in kinds
    assert not any(kind == "input" for name, kind in kinds if name.startswith("lstm"))


def test_bad_input() -> None:
    plain = model()
    with pytest.raises(ValueError, match="data: expected at least one batch"):
        distributions(plain, [])
    with pytest.raises(ValueError, match="NaN or infinity"):
        distributions(plain, [torch.full((2, 16), math.nan)])
    with pytest.raises(ValueError, match="bits: expected"):
        distributions(plain, bits=1)
    with torch.no_grad():
        plain[0].weight[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"infinity in '0\.weight'"):
        distributions(plain)
