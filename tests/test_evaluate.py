"""pared.evaluate: figures against direct computation, and a page that stands alone."""

from __future__ import annotations

import copy
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

import pared
from pared._evaluate import Evaluation, Histogram, Interval, evaluate
from pared._page import _label, page
from pared._svg import fit, log_ticks, ticks

Data = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def models_and_data() -> tuple[dict[str, nn.Module], Data]:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 32),
        nn.ReLU(),
        nn.Linear(32, 8),
    ).eval()
    pruned = copy.deepcopy(dense)
    pared.prune(pruned, 0.8)
    x = torch.randn(60, 1, 6, 6)
    fast = pared.accelerate(pruned, x[:20], formats=["csr"], min_speedup=0)
    y = dense(x).argmax(1).detach()
    y[::5] = (y[::5] + 1) % 8
    models = {"<dense>": dense, "pruned & plain": pruned, "accelerated": fast}
    return models, list(zip(x.split(20), y.split(20), strict=True))


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    torch.set_num_threads(1)
    return evaluate(*models_and_data(), seconds=0.05)


@torch.no_grad()
def test_figures_are_what_they_say(evaluation: Evaluation, tmp_path: Path) -> None:
    models, data = models_and_data()
    x, y = (torch.cat(t) for t in zip(*data, strict=True))
    assert [m.name for m in evaluation.models] == list(models)
    assert (evaluation.samples, evaluation.batch) == (60, 20)
    for figures, model in zip(evaluation.models, models.values(), strict=True):
        right = model(x).argmax(1) == y
        assert figures.metrics["top-1"].value == pytest.approx(float(right.double().mean()))
        five = (model(x).topk(5).indices == y[:, None]).any(1)
        assert figures.metrics["top-5"].value == pytest.approx(float(five.double().mean()))
        plain = pared.restore(model) if model is models["accelerated"] else model
        assert figures.parameters == sum(p.numel() for p in plain.parameters())
        assert figures.nonzeros == sum(int(torch.count_nonzero(p)) for p in plain.parameters())
        work = [36, 1, 1]
        weights = [int(torch.count_nonzero(plain[i].weight)) for i in (0, 3, 5)]
        assert figures.macs == 20 * sum(a * b for a, b in zip(work, weights, strict=True))
        pared.save(model, tmp_path / "m")
        assert figures.file_bytes == pytest.approx((tmp_path / "m").stat().st_size, rel=0.02)
        assert figures.p50 <= figures.p95
        assert figures.throughput == pytest.approx(20 / figures.p50)
        assert [layer.name for layer in figures.layers] == ["0", "3", "5"]
        for layer, i in zip(figures.layers, (0, 3, 5), strict=True):
            w = plain[i].weight
            assert layer.sparsity == pytest.approx(float((w == 0).double().mean()))
            assert layer.weights.zeros == int((w == 0).sum())
            assert sum(layer.weights.counts) + layer.weights.zeros == w.numel()
            assert layer.seconds is not None
            assert layer.seconds > 0
            assert layer.inputs is not None
    assert evaluation.models[0].difference.value == 0.0
    first, last = evaluation.models[0].metrics["top-1"], evaluation.models[2].metrics["top-1"]
    assert evaluation.models[2].difference.value == pytest.approx(last.value - first.value)
    # Pruned and accelerated compute the same, and see the same distortions.
    assert evaluation.models[1].robustness == evaluation.models[2].robustness
    assert list(evaluation.models[0].robustness) == [
        "noise of 0.3 sigma",
        "half the contrast",
        "10 % missing",
        "3x3 blur",
    ]


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (3, 40), (355, 360)])
def test_shares_have_wilsons_interval(right: int, n: int) -> None:
    got = Interval.of(torch.tensor([1.0] * right + [0.0] * (n - right)))
    want = binomtest(right, n).proportion_ci(method="wilson")
    assert (got.value, got.low, got.high) == pytest.approx((right / n, want.low, want.high), abs=1e-7)


def test_a_score_of_the_users() -> None:
    models, data = models_and_data()

    def margin(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch[0]).amax(1)

    found = evaluate(
        models["<dense>"], data, score=margin, distortions={"off": lambda x: 0 * x}, seconds=0.05
    )
    (m,) = found.models
    with torch.no_grad():
        values = torch.cat([margin(models["<dense>"], b) for b in data]).double()
        zero = margin(models["<dense>"], (torch.zeros(1, 1, 6, 6),))
    reach = 1.96 * float(values.std()) / math.sqrt(60)
    own = m.metrics["margin"]
    assert (own.value, own.high - own.value) == pytest.approx((float(values.mean()), reach), rel=1e-3)
    assert m.robustness["off"].value == pytest.approx(float(zero), rel=1e-5)
    assert "margin" in str(found)
    assert not found.percent
    ids = [(torch.randint(0, 9, (4, 3)), torch.zeros(4, dtype=torch.long))]
    words = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
    (m,) = evaluate({"words": words}, ids, seconds=0.01).models
    assert not m.robustness  # nothing to distort in token numbers
    assert list(m.metrics) == ["top-1"]
    assert words.training


class Tags(HTMLParser):
    """Every tag is closed, and nothing is fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert not {"src", "href", "srcset", "onload"} & {k for k, _ in attrs}, (tag, attrs)
        assert tag not in ("script", "link", "img", "iframe")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_stands_alone(evaluation: Evaluation, tmp_path: Path) -> None:
    evaluation.to_html(tmp_path / "page.html", title="A <title> & more")
    html = (tmp_path / "page.html").read_text()
    tags = Tags()
    tags.feed(html)
    assert not tags.open
    text = " ".join(tags.text)
    assert "<dense>" in text  # names are not markup
    assert "A <title> & more" in text
    assert "url(" not in html
    assert "http" not in html.replace("http://www.w3.org", "")
    assert "prefers-color-scheme: dark" in html
    for heading in (
        "Models",
        "Accuracy against speed",
        "Robustness",
        "Layers: accelerated",
        "Weights and activ",
    ):
        assert f"<h2>{heading}" in html
    plots = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(plots) == 2 + 2 + 2 * 3
    for plot in plots:
        root = ET.fromstring(plot)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for mark in root.iter():
            for key, limit in (("x", width), ("x1", width), ("cx", width), ("y", height), ("cy", height)):
                if key in mark.attrib:
                    assert -1 <= float(mark.attrib[key]) <= limit + 1, ET.tostring(mark)
        assert not re.search(r"nan|inf", plot)
    axis = ("latency for 20 samples, p50 (", "top-1 (%)", "time in a pass (", "zeros (%)")
    assert all(label in text for label in axis)


def test_an_unbalanced_page_would_be_caught() -> None:
    for bad in ("<div><p></div>", '<img src="x">', '<a href="http://x">'):
        with pytest.raises(AssertionError):
            Tags().feed(bad)


def test_one_model_and_many_layers() -> None:
    deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(50)))
    data = [(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))]
    found = evaluate(deep, data, seconds=0.01, distortions={})
    html = page(found, "deep")
    assert "The 40 layers of 50 that take longest." in html
    assert "The 12 layers of 50" in html
    assert "Robustness" not in html


def test_names_of_points_cover_nothing() -> None:
    points = [(100.0 + 3 * i, 100.0 + 2 * (i % 3)) for i in range(8)]
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in points]
    for i, (x, y) in enumerate(points):
        assert f"model {i}" in _label(x, y, f"model {i}", taken, (0.0, 0.0, 600.0, 400.0))
    for i, a in enumerate(taken[8:], 8):
        for j, b in enumerate(taken):
            assert i == j or not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]), (i, j)


def test_ticks_and_names() -> None:
    assert ticks(86.2, 94.9) == [88.0, 90.0, 92.0, 94.0]
    assert ticks(0.0, 0.0031)[1] == pytest.approx(0.001)
    assert log_ticks(0.9, 25.0) == [1.0, 2.0, 5.0, 10.0, 20.0]
    assert len(fit("x" * 99, 63)) == 10
    assert fit("short", 63) == "short"
    constant = Histogram.of(torch.tensor([2.0, 2.0, 0.0]))
    assert (sum(constant.counts), constant.zeros) == (2, 1)
    assert Histogram.of(torch.zeros(3)).counts == (0,) * 48


def test_json_and_table(evaluation: Evaluation) -> None:
    found = json.loads(evaluation.to_json())
    assert found["models"][2]["metrics"]["top-1"]["value"] == evaluation.models[2].metrics["top-1"].value
    assert found["machine"]["threads"] == 1
    text = str(evaluation)
    for word in ("<dense>", "non-zero", "p95", "top-5", "difference (points)", "3x3 blur"):
        assert word in text


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"models": 3}, TypeError, "models: expected a module, or names and modules, got 3"),
        ({"models": {}}, ValueError, "models: expected at least one"),
        ({"data": []}, ValueError, "data: expected at least one batch"),
        ({"data": iter([1])}, TypeError, "data: expected batches that can be gone through several times"),
        ({"data": [3]}, TypeError, r"data: expected batches \(inputs, labels\) or dicts, got int"),
        ({"score": 3}, TypeError, "score: expected a callable"),
        ({"score": lambda m, b: 1.0}, ValueError, r"score: expected a tensor \[samples\], got float"),
        ({"score": lambda m, b: torch.tensor([math.nan])}, ValueError, "score: expected finite numbers"),
        (
            {"models": nn.Flatten(0)},
            ValueError,
            "score: expected a function for models that return no logits",
        ),
    ],
)
def test_errors(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    models, data = models_and_data()
    with pytest.raises(error, match=message):
        evaluate(**{"models": models["<dense>"], "data": data, "seconds": 0.01, **kwargs})
