"""The study of accuracies: bars on one seed, how it judges, and that the document shows what was measured."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import pared

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from bench.accuracy import __main__ as program  # noqa: E402
from bench.accuracy import digits, results, sentences  # noqa: E402
from bench.accuracy import layers as study  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- the bars, on one seed


@cache
def lenet() -> nn.Module:
    return digits.train(digits.network(0), digits.load(0), 15).eval()


def test_layer_errors_are_in_order_and_gptq_beats_rounding() -> None:
    model, data = copy.deepcopy(lenet()), digits.load(0)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    seen, held_out = (study.inputs_of(model, layers, [part]) for part in (data.x, data.x_test))
    result = study.study(layers, seen, held_out)
    shares = [study.ordered(errors) for errors in result["errors"].values()]
    assert sum(shares) / len(shares) >= 0.9
    for errors in result["errors"].values():  # and the better the freer the pattern
        assert errors["sparsegpt"] < errors["random"]
    free, wide, narrow = (sum(result["errors"][p]["sparsegpt"]) for p in study.PATTERNS)
    assert free < wide < narrow
    for bits in ("4", "3"):
        assert study.gain(result["rounding"][bits]) <= 0.8
    for rounding in result["rounding"].values():
        assert study.gain(rounding, "rtn", "tensor") < 1  # a scale a row against one a matrix


def test_a_wrong_order_is_noticed() -> None:
    errors = {c: [0.1 * i, 0.1 * i] for i, c in enumerate(study.CRITERIA)}
    assert study.ordered(errors) == 1.0
    errors["wanda"][1] = 0.9
    assert study.ordered(errors) == 0.5


def test_digits_keep_their_accuracy() -> None:
    said: list[str] = []
    measured = digits.run(0, said.append)
    assert len(said) == digits.WORK
    assert measured["12x, times fewer"] >= 11.99
    # One seed on 360 images: four standard deviations of what other processors' rounding makes of a training.
    # The bars themselves are for the means, below.
    assert measured["12x"] >= measured["12x, dense"] - 0.025
    assert measured["95 %, cubic"] >= measured["95 %, iterative"] - 0.025
    assert measured["95 %, cubic"] >= measured["95 %, one-shot"] - 0.02
    assert measured["int8"] >= measured["dense"] - 0.006
    assert measured["oracle, taylor"] >= 0.8
    assert measured["oracle, taylor"] > measured["oracle, magnitude"]
    assert measured.keys() >= {"oracle of a trained model, fisher"}
    for result in results.results(kept("digits", {0: measured}), "digits"):
        assert math.isfinite(result.mean)


def test_a_schedule_of_rounds() -> None:
    schedule = digits.iterative(0.95, 5, 100)
    assert [round(1 - schedule(step), 6) for step in (1, 20, 21, 100, 101)] == [
        round(0.05 ** (r / 5), 6) for r in (1, 1, 2, 5, 5)
    ]


def test_sentences_are_measured_on_texts_that_were_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    few = sentences.minilm.corpus(sentences.minilm.library_files()[:40])
    monkeypatch.setattr(sentences, "_pairs", lambda: few)
    settings = {"pairs": 12, "calibration texts": 8, "tokens": 12}
    texts, pairs = sentences.draw(3, settings)
    assert not {p.body for p in pairs} & set(texts)
    assert sentences.draw(3, settings) == (texts, pairs)
    model, tokenizer = sentences._model()
    retrieval, documents = sentences.measure(model, tokenizer, pairs, 12)
    assert retrieval >= 3 / 12  # by chance one in twelve
    # Planted: an encoder without most of its weights finds little and points elsewhere.
    broken = copy.deepcopy(model)
    pared.prune(broken, 0.95, scope="layer", include=nn.Linear)
    worse, elsewhere = sentences.measure(broken, tokenizer, pairs, 12)
    assert worse < retrieval
    assert sentences.minilm.cosine(elsewhere, documents) < 0.8


# ---------------------------------------------------------------- how it judges


def kept(part: str, by_seed: dict[int, dict[str, float]]) -> dict[str, Any]:
    """A study's file with one part."""
    return {
        part: {
            "settings": program.PARTS[part].SETTINGS,
            "machine": "a machine",
            "seeds": {str(s): m for s, m in by_seed.items()},
        }
    }


def test_intervals_are_those_of_paired_differences() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(5), rng.random(5)
    row = results.Row("a against b", results.minus("a", "b"), (">=", -1.0), "points")
    result = results.evaluate(row, [{"a": x, "b": y} for x, y in zip(a, b, strict=True)])
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert result.mean == pytest.approx(100 * (a - b).mean())
    assert result.mean - result.half_width == pytest.approx(100 * low)
    assert result.mean + result.half_width == pytest.approx(100 * high)


@pytest.mark.parametrize(
    ("values", "bar", "verdict"),
    [
        ([1.0, 1.1, 1.2], (">=", 0.5), "yes"),
        ([1.0, 1.1, 1.2], (">=", 1.05), "in the mean"),
        ([1.0, 1.1, 1.2], (">=", 1.15), "no"),
        ([1.0, 1.1, 1.2], ("<=", 1.6), "yes"),
        ([1.0, 1.1, 1.2], ("<=", 1.15), "in the mean"),
        ([1.0, 1.1, 1.2], ("<=", 1.0), "no"),
        ([1.0], ("<=", 1.0), "yes"),
        ([1.0], None, ""),
    ],
)
def test_verdicts(values: list[float], bar: tuple[str, float] | None, verdict: str) -> None:
    row = results.Row("it", results.of("it"), bar)
    assert results.evaluate(row, [{"it": v} for v in values]).verdict == verdict


def test_the_program_keeps_what_it_has_and_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, docs = tmp_path / "results" / "accuracy.json", tmp_path / "accuracy.md"
    docs.write_text(f"# Title\n{results.BEGIN}\nbefore this\n{results.END}\nbehind\n")
    keys: dict[str, float] = {}
    for row in results.TABLES["digits"][1]:
        row.value(Recorder(keys))  # which names the table asks for
    monkeypatch.setattr(digits, "run", lambda seed, advance: dict.fromkeys(keys, 0.5 + seed / 100))
    arguments = ["--json", str(path), "--docs", str(docs), "--parts", "digits", "--seeds"]
    program.main([*arguments, "0", "1"])
    program.main([*arguments, "2"])
    assert sorted(json.loads(path.read_text())["digits"]["seeds"]) == ["0", "1", "2"]
    assert "LeNet-300-100" in capsys.readouterr().out
    text = docs.read_text()
    assert text.startswith("# Title")
    assert text.endswith("behind\n")
    assert "before this" not in text
    assert "3 seed(s)" in text
    monkeypatch.setitem(
        digits.SETTINGS, "dense epochs", 16
    )  # another study: what was measured is not mixed in
    program.main([*arguments, "2"])
    assert sorted(json.loads(path.read_text())["digits"]["seeds"]) == ["2"]


class Recorder(dict[str, float]):
    """Writes into another dict which names are asked for."""

    def __init__(self, names: dict[str, float]) -> None:
        super().__init__()
        self.names = names

    def __getitem__(self, key: str) -> float:
        self.names[key] = 0.5
        return 0.5


# ---------------------------------------------------------------- what the repository shows


def test_the_document_is_what_was_measured() -> None:
    measured = results.read(ROOT / "bench" / "results" / "accuracy.json")
    assert measured.keys() == results.TABLES.keys()
    for part, own in measured.items():
        assert own["settings"] == program.PARTS[part].SETTINGS
        assert len(own["seeds"]) >= program.SEEDS[part]
        assert "no" not in [result.verdict for result in results.results(measured, part)]
    text = (ROOT / "docs" / "accuracy.md").read_text()
    assert results.rewrite(text, measured) == text
    seed = next(iter(measured["digits"]["seeds"].values()))
    seed["12x"] -= 0.5  # planted: a number that was not measured shows
    assert results.rewrite(text, measured) != text
    with pytest.raises(ValueError, match="document: expected the markers"):
        results.rewrite("no markers", measured)


def test_the_exact_claims_of_the_document_are_tests() -> None:
    named = re.findall(r"\| `(test_\w+)` \|", (ROOT / "docs" / "accuracy.md").read_text())
    assert len(named) == 9
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert set(named) <= defined
