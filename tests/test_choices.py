"""What timing found out is kept: in the process, and in files that several processes share."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _models import sparse_linear
from torch import nn

import pared
import pared._accelerate as acc
from pared import _choices, _timing
from pared._choices import Choices, Timed
from pared._store import JsonStore, user_cache
from pared._timing import Watch


@pytest.fixture(autouse=True)
def remembering(monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside of tests, from nothing."""
    _choices.clear()
    monkeypatch.setattr(acc, "Choices", Choices)


TIMED = Timed("fc", 2.0, {"csr": (1.0, 2.0)}, ["csr", "int8"])


# -- files


def store(path: Path, **kwargs: Any) -> JsonStore:
    return JsonStore(path, "a test", kwargs.pop("version", 1), **kwargs)


def test_entries_come_back(tmp_path: Path) -> None:
    file = tmp_path / "made" / "cache.json"
    s = store(file)
    assert s.read() == {}
    s.add({"a": 1})
    s.add({"b": [2.5, None]})
    s.add({})
    assert store(file).read() == {"a": 1, "b": [2.5, None]}
    assert sorted(p.name for p in file.parent.iterdir()) == ["cache.json", "cache.json.lock"]


def test_entries_of_another_version_are_dropped(tmp_path: Path) -> None:
    store(tmp_path / "f").add({"a": 1})
    newer = store(tmp_path / "f", version=2)
    assert newer.read() == {}
    newer.add({"b": 2})
    assert newer.read() == {"b": 2}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[1]", b"3", b"[" * 100000, b'{"kind": "other", "version": 1}']
)
def test_a_file_that_is_none_is_ignored_with_a_warning(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "f"
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="ignored, expected a cache that pared wrote"):
        assert store(file).read() == {}
    assert store(file, warn=False).read() == {}
    store(file).add({"a": 1})
    assert store(file).read() == {"a": 1}


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not written"):
        store(tmp_path / "file" / "cache.json").add({"a": 1})


def test_a_write_that_fails_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path / "f").add({"a": 1})

    def full(*args: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as m:
        m.setattr("os.replace", full)
        with pytest.warns(UserWarning, match="not written"):
            store(tmp_path / "f").add({"b": 2})
    assert store(tmp_path / "f").read() == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "f.lock"]


def _write_many(path: Path, name: str) -> None:
    for i in range(25):
        store(path).add({f"{name}{i}": i})


def test_two_processes_writing_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_many, args=(tmp_path / "f", n)) for n in "ab"]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
        assert w.exitcode == 0
    assert store(tmp_path / "f").read() == {f"{n}{i}": i for n in "ab" for i in range(25)}


def test_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "pared"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert user_cache() == Path.home() / ".cache" / "pared"


# -- choices


def test_in_the_process() -> None:
    key = Choices().key(a=1)
    Choices().put(key, TIMED)
    assert Choices().get(key) == TIMED
    assert Choices(False).get(key) is None
    assert Choices().get(None) is None
    _choices.clear()
    assert Choices().get(key) is None


def test_nothing_is_kept_where_the_user_says_so() -> None:
    own = Choices(False)
    key = own.key(a=1)
    own.put(key, TIMED)
    assert own.get(key) == TIMED
    own.save()
    assert Choices().get(key) is None


def test_what_a_disturbed_run_found_is_not_kept(tmp_path: Path) -> None:
    watch = Watch()
    own = Choices(tmp_path / "timings.json", watch=watch)
    quiet, disturbed = own.key(a=1), own.key(a=2)
    own.put(quiet, TIMED)
    watch.see(_timing.Timings({"a": np.ones(3)}, {"a": 1}, waited=2.0))
    own.put(disturbed, TIMED)
    assert own.get(quiet) == own.get(disturbed) == TIMED
    own.save()
    assert (Choices().get(quiet), Choices().get(disturbed)) == (TIMED, None)
    _choices.clear()
    again = Choices(tmp_path / "timings.json")
    assert (again.get(quiet), again.get(disturbed)) == (TIMED, None)


@pytest.mark.parametrize("by_environment", [False, True])
def test_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_environment: bool) -> None:
    file = tmp_path / "timings.json"
    if by_environment:
        monkeypatch.setenv("PARED_CACHE", str(file))
    cache = None if by_environment else file
    own = Choices(cache)
    key = own.key(a=1)
    own.put(key, TIMED)
    own.save()
    _choices.clear()
    assert Choices(cache).get(key) == TIMED
    assert Choices(False).get(key) is None
    assert json.loads(file.read_text())["kind"] == "pared timings"


def test_a_key_is_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Choices().key(a=1)
    for name, value in (("isa", "other"), ("cpu_brand", "other")):
        with monkeypatch.context() as m:
            m.setattr(f"pared._core.{name}", lambda value=value: value)
            assert Choices().key(a=1) != key
    with monkeypatch.context() as m:
        m.setattr(torch, "get_num_threads", lambda: 77)
        assert Choices().key(a=1) != key
    with monkeypatch.context() as m:
        m.setattr(pared, "__version__", "0")
        assert Choices().key(a=1) != key
    assert Choices().key(a=2) != key
    assert Choices().key(a=1) == key


@pytest.mark.parametrize(
    "entry",
    [
        None,
        3,
        [],
        {},
        {"layer": "a", "before": "x", "variants": {}, "tried": []},
        {"layer": "a", "before": -1.0, "variants": {}, "tried": []},
        {"layer": "a", "before": float("nan"), "variants": {}, "tried": []},
        {"layer": "a", "before": 1.0, "variants": {"csr": [1.0]}, "tried": []},
        {"layer": "a", "before": 1.0, "variants": {"csr": [1.0, 0.0]}, "tried": []},
        {"layer": "a", "before": 1.0, "variants": [], "tried": []},
        {"layer": "a", "before": 1.0, "variants": {}, "tried": 1},
    ],
)
def test_an_entry_that_is_none_is_not_believed(entry: Any) -> None:
    assert Timed.parse(entry) is None


# -- accelerate


class Timings:
    """What `interleave` gives: dense layers take a second, everything else a half."""

    def __init__(self, names: Any) -> None:
        self.seconds = {n: 1.0 if n == "dense" or n.startswith("apart") else 0.5 for n in names}

    def median(self, name: str) -> float:
        return self.seconds[name]

    p95 = median

    def gain(self, name: str, baseline: str) -> float:
        return self.seconds[baseline] / self.seconds[name]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of what is timed together, time after time."""
    asked: list[list[str]] = []

    def interleave(calls: dict[str, Callable[[], object]], **kwargs: Any) -> Timings:
        asked.append(sorted(calls))
        return Timings(calls)

    monkeypatch.setattr("pared._target.interleave", interleave)
    return asked


def model() -> nn.Module:
    return nn.Sequential(sparse_linear(64, 64), nn.ReLU(), sparse_linear(64, 32, seed=1)).eval()


X = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))


def kernels(fast: nn.Module) -> list[tuple[str, str | None]]:
    return [(r.kernel, r.activation) for r in pared.report(fast).layers]


def test_a_model_like_one_before_is_not_timed(timed: list[list[str]]) -> None:
    first = pared.accelerate(model(), X)
    assert timed == [
        ["csr", "csr + relu", "dense"],
        ["csr", "dense"],
        ["dense", "pared"],
        ["apart 0", "together 0"],
    ]
    timed.clear()
    again = pared.accelerate(model(), X)
    assert timed == []
    assert kernels(again) == kernels(first) == [("csr", "relu"), ("csr", None)]
    assert pared.report(again).speedup == pared.report(first).speedup == 2.0
    assert pared.report(again).layers[0].reason.startswith("2.00x faster than dense, as timed before")
    assert pared.report(first).layers[0].reason.startswith("2.00x faster than dense; hands over to 2: 2.00x")
    assert torch.equal(again(X), first(X))


def test_what_times_depend_on_is_timed_again(timed: list[list[str]]) -> None:
    pared.accelerate(model(), X)

    def hooked() -> nn.Module:
        m = model()
        m[0].register_forward_hook(lambda module, args, output: None)
        return m

    sparser = model()
    with torch.no_grad():
        sparser[0].weight[:8] = 0
    for case, (other, x, kwargs) in {
        "tokens": (model(), X[:39], {}),
        "zeros": (sparser, X, {}),
        "hooks": (hooked(), X, {}),
        "no cache": (model(), X, {"cache": False}),
        "threads": (model(), X, {}),
    }.items():
        timed.clear()
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + (case == "threads"))
        try:
            pared.accelerate(other, x, **kwargs)
        finally:
            torch.set_num_threads(threads)
        assert ["csr", "dense"] in timed or ["csr", "csr + relu", "dense"] in timed, case
        assert ["dense", "pared"] in timed, case


def test_hooks_may_do_anything(timed: list[list[str]]) -> None:
    m = model()
    m[0].register_forward_hook(lambda module, args, output: None)
    pared.accelerate(m, X)
    timed.clear()
    pared.accelerate(m, X)
    assert timed == [["csr", "dense"], ["dense", "pared"]]  # the second layer carries none


def test_through_a_file(timed: list[list[str]], tmp_path: Path) -> None:
    file = tmp_path / "timings.json"
    first = pared.accelerate(model(), X, cache=file)
    _choices.clear()
    timed.clear()
    assert kernels(pared.accelerate(model(), X, cache=file)) == kernels(first)
    assert timed == []
    file.write_text("nonsense")
    _choices.clear()
    with pytest.warns(UserWarning, match="ignored"):
        assert kernels(pared.accelerate(model(), X, cache=file)) == kernels(first)
    assert len(timed) == 4


def test_min_speedup_decides_on_times_that_are_known(timed: list[list[str]]) -> None:
    pared.accelerate(model(), X)
    timed.clear()
    fast = pared.accelerate(model(), X, min_speedup=3.0)
    assert timed == []
    assert [k for k, _ in kernels(fast)] == ["torch", "torch"]
    assert pared.report(fast).layers[0].reason == "csr + relu is 2.00x, less than 3x, as timed before"


def test_formats_that_were_not_timed_are(timed: list[list[str]]) -> None:
    pared.accelerate(model(), X[:8], formats=["csr"])
    timed.clear()
    pared.accelerate(model(), X[:8], formats=["csr", "bitmap"])
    assert timed[0] == ["bitmap", "bitmap + relu", "csr", "csr + relu", "dense"]


def test_kernels_are_checked_though_the_times_are_known(
    timed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pared.accelerate(model(), X)

    def wrong(module: Any, references: Any, quantized: bool) -> tuple[float, float, float]:
        return 1.0, 0.1, 0.0

    monkeypatch.setattr(acc.choose, "layer_error", wrong)
    fast = pared.accelerate(model(), X)
    assert [k for k, _ in kernels(fast)] == ["torch", "torch"]
    assert "differs by 1.0e+00, more than its bound" in pared.report(fast).layers[0].reason


# -- the report


def test_the_report_shows_what_was_considered(timed: list[list[str]]) -> None:
    wide = nn.Sequential(sparse_linear(512, 512, 0.02), nn.ReLU()).eval()
    fast = pared.accelerate(wide, torch.randn(256, 512), precision="int8")
    found = {c.kernel: c for c in pared.report(fast).layers[0].candidates}
    assert found["torch"].measured == 1.0
    assert found["torch"].estimated is None
    assert 0 < found["csr"].estimated < 1
    assert found["csr"].measured == 0.5
    assert found["csr + relu"].estimated is None
    left = [c for c in found.values() if c.measured is None]
    assert left
    assert all(c.estimated and c.note.startswith("estimated to") for c in left)
    text = str(pared.Report.from_json(pared.report(fast).to_json()))
    assert text == str(pared.report(fast))
    assert pared.Report.from_json(pared.report(fast).to_json()) == pared.report(fast)


def test_the_table_of_candidates(timed: list[list[str]]) -> None:
    from rich.console import Console

    report = pared.report(pared.accelerate(model(), X))
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(report.candidates())
    text = capture.get()
    assert "csr + relu" in text
    assert text.count("chosen") == 2
    assert len(report.candidates("0").rows) == 3
    with pytest.raises(ValueError, match=r"layer: expected the name of a layer \(0, 2\), got 'x'"):
        report.candidates("x")
