"""The GPU benchmark's host part: figures from samples, goals, suites, the dry run."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from bench.gpu import __main__ as command  # noqa: E402
from bench.gpu import measure as measuring  # noqa: E402
from bench.gpu.measure import Case, Goal, Machine, copy_rate, lost, measure, not_capturable, table  # noqa: E402
from pared import _cuda, _timing_cuda  # noqa: E402
from pared._cuda_int8 import gemm_s8  # noqa: E402
from pared._timing_cuda import captured  # noqa: E402

H200 = Machine("cuda", "NVIDIA H200", 60 << 20)


class FakeClock:
    """Times that the test decides; the second round is twice as slow for everybody."""

    def __init__(self, seconds):
        self.seconds, self.prepared = seconds, []

    def prepare(self, call, copies, graph):
        name = call(0)
        self.prepared.append((name, copies, graph))
        rounds = iter(range(100))
        return lambda: self.seconds[name] * (2 if next(rounds) == 1 else 1)


def case(**change):
    calls = {n: (lambda i, n=n: n) for n in ("pared", "fast", "slow")}
    fields = {"suite": "s", "name": "c", "calls": calls, "copies": 3, "goals": [Goal(["fast", "slow"], 2.0)]}
    return Case(**(fields | change))


SECONDS = {"pared": 1e-4, "fast": 3e-4, "slow": 9e-4}
COPIED = 8e9  # bytes a second


def test_figures_and_goals():
    clock = FakeClock(SECONDS)
    got = measure(case(nbytes=4e5, operations=2e8, limit_s=5e-5, eager=["slow"]), clock, 5, COPIED)
    assert clock.prepared == [("pared", 3, True), ("fast", 3, True), ("slow", 3, False)]
    assert got["times"]["pared"]["median_s"] == pytest.approx(1e-4)
    assert got["ratios"]["fast"]["value"] == pytest.approx(3.0)
    assert got["ratios"]["slow"]["low"] == pytest.approx(9.0)  # the slow round is slow for all
    assert got["gbytes_s"] == pytest.approx(4.0)
    assert got["copy_share"] == pytest.approx(0.5)
    assert got["tflops"] == pytest.approx(2.0)
    assert got["limit_share"] == pytest.approx(0.5)
    (goal,) = got["goals"]
    assert goal["got"] == pytest.approx(3.0)  # the best baseline decides
    assert goal["reached"]
    text = table([got])
    assert "s: c" in text
    assert "100.0" in text
    assert "50%" in text
    assert "2 x fast / slow: 3.00 yes" in text


def test_a_copy_reads_and_writes():
    class Clock:
        def prepare(self, call, copies, graph):
            self.nbytes = call(0).nbytes
            return lambda: 2e-6

    clock = Clock()
    rate = copy_rate(Machine("cpu", "dry run", 1 << 20, dry=True), clock, 3)
    assert rate == pytest.approx(2 * clock.nbytes / 2e-6)


@pytest.mark.parametrize(
    ("ratio", "limit", "reached"),
    [(3.0, None, True), (3.5, None, True), (3.6, None, False), (9.0, 8.6e-5, True), (9.0, 8.4e-5, False)],
)
def test_a_goal_is_reached_at_85_percent_of_it_or_of_the_limit(ratio, limit, reached):
    got = measure(case(goals=[Goal(["fast"], ratio)], limit_s=limit), FakeClock(SECONDS), 5, COPIED)
    assert got["goals"][0]["reached"] == reached
    assert ("NO" in table([got])) != reached


def test_mistakes_of_a_suite():
    clock = FakeClock(SECONDS)
    with pytest.raises(ValueError, match=r"goals: expected names of calls in c, got \['other'\]"):
        measure(case(goals=[Goal(["other"], 1.0)]), clock, 3, COPIED)
    with pytest.raises(ValueError, match="calls: expected one named 'mine'"):
        measure(case(target="mine"), clock, 3, COPIED)

    def wrong():
        raise RuntimeError("wrong result")

    with pytest.raises(RuntimeError, match="wrong result"):
        measure(case(check=wrong), clock, 3, COPIED)
    assert not clock.prepared, "something was timed that is wrong"


class Capturing:
    """What torch.cuda does for a capture. An end with an error leaves its stream current; `forgets`: and the
    allocator in the belief that the capture goes on, as before torch 2.12."""

    def __init__(self, monkeypatch, forgets):
        import torch

        self.forgets, self.stream, self.pools, self.underway, self.used = forgets, "default", 0, [], set()
        for name in ("graph", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(
            torch._C, "_cuda_releasePool", lambda _, pool: self.used.remove(pool), raising=False
        )

    def release(self, _, pool):
        self.used.remove(pool)

    def graph_pool_handle(self):
        self.pools += 1
        return (0, self.pools)

    @contextlib.contextmanager
    def on(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def graph(self, _, pool):
        assert not self.underway, "captures_underway.empty() INTERNAL ASSERT FAILED"
        before, self.stream = self.stream, "capture"
        self.underway.append(pool)
        self.used.add(pool)
        try:
            yield
        except Exception:
            if not self.forgets:
                self.end(0, pool)
            raise
        self.end(0, pool)
        self.stream = before

    def end(self, _, pool):
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)


@pytest.mark.parametrize("forgets", [True, False])
def test_a_capture_that_fails_costs_no_other(monkeypatch, forgets):
    torch_cuda = Capturing(monkeypatch, forgets)

    def waits():
        raise RuntimeError("operation not permitted when stream is capturing")

    streams = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="operation not permitted"):
            captured(waits)
        assert (torch_cuda.stream, torch_cuda.underway) == ("default", [])
        captured(lambda: streams.append(torch_cuda.stream))
    assert streams == ["capture"] * 2
    # Those of the graphs that were made; torch keeps that of a failed one where it has ended it itself.
    assert torch_cuda.used == {(0, 2), (0, 4)} | (set() if forgets else {(0, 1), (0, 3)})


def test_calls_that_no_graph_holds_are_found_by_trying(monkeypatch):
    torch_cuda = Capturing(monkeypatch, True)

    def waits(i):
        if torch_cuda.underway:
            raise RuntimeError("operation not permitted when stream is capturing")

    calls = {
        "waits": waits,
        "fits": lambda i: None,
        "other": waits,
        "refused": lambda i: bad("no bfloat16")(),
    }
    assert not_capturable(calls, ["waits", "fits", "refused"]) == ["waits", "refused"]


def test_what_a_graph_takes_to_arrive_is_no_part_of_its_time(monkeypatch):
    import torch

    enqueued = []

    class Event:
        def __init__(self, timing):
            assert timing

        def record(self):
            enqueued.append("event")

        def synchronize(self):
            enqueued.append("wait")

        def elapsed_time(self, other):
            return 6.0

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: enqueued.append("busy"))
    graph = types.SimpleNamespace(replay=lambda: enqueued.append("graph"))
    monkeypatch.setattr(_timing_cuda, "captured", lambda call: graph)
    replay = ["busy", "event", "graph", "event", "wait"]
    for captures, before, sampled in (
        (True, ["call"] * 6 + replay, replay),
        (False, ["call"] * 3, ["event", "call", "call", "call", "event", "wait"]),
    ):
        enqueued.clear()
        sample = _timing_cuda.EventClock().prepare(lambda i: enqueued.append("call"), 3, captures)
        assert enqueued == before
        enqueued.clear()
        assert sample() == pytest.approx(2e-3)
        assert enqueued == sampled


def test_copies_exceed_the_cache():
    assert H200.copies(1 << 20) == 180
    assert H200.copies(1 << 30) == 2
    assert Machine("cpu", "", 1 << 30, dry=True).copies(1) == 2


def test_suites_are_found_and_the_most_valuable_come_first():
    shared = {"__init__", "__main__", "measure", "emulated", "smoke", "banks"}
    modules = {p.stem for p in (ROOT / "bench/gpu").glob("*.py")} - shared
    names = [m.__name__.rpartition(".")[2] for m in command.suites("")]
    assert set(names) == modules == set(command.ORDER)
    assert names[:3] == ["select", "int8", "decode"]
    assert [m.__name__ for m in command.suites("csr,int8")] == ["bench.gpu.int8", "bench.gpu.csr"]
    with pytest.raises(ValueError, match=r"--only: expected names among select, .*, got fast, slow"):
        command.suites("slow,csr,fast")
    script = (ROOT / "bench/gpu.sh").read_text()
    assert all(f"{name}:" in script for name in modules)


def test_results_path():
    path = command.results_path(H200, datetime.datetime(2031, 2, 3, 4, 5))
    assert path == ROOT / "bench/results/gpu-nvidia-h200-20310203-0405.json"


class Suite:
    """Cases that the test names."""

    __name__ = "bench.gpu.made_up"

    def __init__(self, *makers):
        self.makers = makers

    def cases(self, machine):
        yield from self.makers


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command with these cases, on a machine that the test describes; what it printed and wrote."""

    def go(*makers, arguments=(), clock=None):
        monkeypatch.setattr(command, "suites", lambda only: [Suite(*makers)])
        monkeypatch.setattr(command, "copy_rate", lambda machine, clock, rounds: COPIED)
        monkeypatch.setattr(command, "this_machine", lambda: Machine("cpu", "made up", 1 << 20))
        monkeypatch.setattr(command, "EventClock", lambda: clock or FakeClock(SECONDS))
        path = tmp_path / "deep" / "results.json"
        code = command.main(["--results", str(path), "--rounds", "3", *arguments])
        return code, json.loads(path.read_text()) if path.exists() else None

    return go


def bad(text):
    def make():
        raise RuntimeError(text)

    return make


def test_a_failure_costs_its_own_case_alone(run, capsys):
    code, file = run(bad("no data"), lambda: case(name="good"), lambda: case(goals=[Goal(["other"], 1.0)]))
    assert code == 1
    assert [line["case"] for line in file["lines"]] == ["good"]
    assert file["failed"][0] == "made_up: case 0: RuntimeError: no data"
    assert "made_up: s: c: ValueError: goals" in file["failed"][1]
    assert "FAILED made_up: case 0" in capsys.readouterr().err


def test_results_grow_and_are_replaced(run):
    run(lambda: case(name="a"), bad("once"))
    code, file = run(lambda: case(name="a"), lambda: case(name="b"))
    assert code == 0
    assert [line["case"] for line in file["lines"]] == ["a", "b"]
    assert file["failed"] == []
    assert file["copy_bytes_s"] == COPIED


def test_a_file_of_another_machine_is_not_mixed(run, tmp_path):
    run(lambda: case())
    path = tmp_path / "deep" / "results.json"
    path.write_text(path.read_text().replace("made up", "other"))
    with pytest.raises(ValueError, match=r"--results: expected a file of .*made up.*, got one of .*other"):
        run(lambda: case())


def test_results_are_written_after_each_case(run, tmp_path):
    def look():
        held = json.loads((tmp_path / "deep" / "results.json").read_text())
        assert [line["case"] for line in held["lines"]] == ["first"]
        return case(name="second")

    assert run(lambda: case(name="first"), look)[0] == 0


def test_no_case_begins_when_time_is_spent(run):
    code, file = run(lambda: case(), arguments=["--seconds", "-1"])
    assert code == 0
    assert file["unmeasured"] == ["made_up: from case 0 on"]
    assert file["lines"] == []


def test_another_process_goes_on_behind_a_lost_device(run, monkeypatch):
    started = []
    monkeypatch.setattr(command.subprocess, "run", lambda line, check: started.append(line))
    monkeypatch.setattr(command, "lost", lambda: True)
    code, file = run(lambda: case(), bad("CUDA error: an illegal memory access"), lambda: case(name="after"))
    assert code == 1
    assert [line["case"] for line in file["lines"]] == ["c"]
    (line,) = started
    assert line[3:7] == ["--only", "made_up", "--skip", "2"]
    assert run(lambda: case(), lambda: case(name="after"), arguments=["--skip", "1"])[1]["failed"]


def test_a_device_is_lost_when_nothing_runs_there_any_more(monkeypatch):
    import torch

    assert not lost()  # that no device has been used is no fault
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not lost()
    monkeypatch.setattr(torch.cuda, "synchronize", bad("CUDA error: an illegal memory access"))
    assert lost()


def test_a_rival_that_fails_is_left_out(run, monkeypatch):
    class Clock(FakeClock):
        def prepare(self, call, copies, graph):
            if call(0) == self.broken:
                raise RuntimeError("CUDA error: not supported when calling a library")
            return super().prepare(call, copies, graph)

    clock = Clock(SECONDS)
    clock.broken = "slow"
    line = run(lambda: case(), clock=clock)[1]["lines"][0]
    assert line["without"] == {"slow": "RuntimeError: CUDA error: not supported when calling a library"}
    assert line["goals"][0]["got"] == pytest.approx(3.0)
    assert "fast 3.00, without slow" in table([line])
    monkeypatch.setattr(measuring, "lost", lambda: True)  # what the rival did has cost the device
    code, file = run(lambda: case(name="theirs"), clock=clock)
    assert "not supported" in file["failed"][0]
    monkeypatch.undo()
    clock.broken = "pared"
    code, file = run(lambda: case(name="mine"), clock=clock)
    assert code == 1
    assert "not supported" in file["failed"][0]


def test_slow_rivals_get_fewer_rounds():
    from pared._timing_cuda import LEAST_ROUNDS, sample_rounds

    assert sample_rounds({"a": lambda: 1.0}, 9, seconds=-1.0).rounds == LEAST_ROUNDS
    assert sample_rounds({"a": lambda: 1.0}, 9).rounds == 9


WORKER = """
import os, sys, time
print("ready", flush=True)
for name in sys.argv[1:]:
    print(f"begin\\t{name}", flush=True)
    if name == "crash":
        os.abort()
    if name == "hang":
        time.sleep(60)
    if name in ("fail", "lost"):
        print(f"FAIL\\t{name}\\twrong", flush=True)
        if name == "lost":
            os._exit(1)
        continue
    print(f"PASS\\t{name}\\tquick", flush=True)
"""


def test_smoke_survives_what_a_kernel_can_do():
    from bench.gpu.smoke import supervise

    names = ["good", "fail", "crash", "fine", "hang", "lost", "last"]
    got = list(supervise([sys.executable, "-c", WORKER], names, 5.0, 120.0))
    assert [(verdict, name) for verdict, name, _ in got] == [
        ("PASS" if name in ("good", "fine", "last") else "FAIL", name) for name in names
    ]
    texts = {name: text for _, name, text in got}
    assert texts["crash"] == "the process ended with -6"
    assert texts["hang"] == "no answer in 5 s"


def test_smoke_finds_a_wrong_kernel(monkeypatch, capfd):
    """Faults planted in what two kernels are called with, in the emulator."""
    from bench.gpu import smoke
    from pared._cuda_sparse import DeviceCSR

    monkeypatch.setattr(_cuda, "_emulated", None)  # put back after the test
    machine = smoke.emulated_machine()
    names = ["csr float32, gathers", "gemm_s8", "topk"]
    others = ["topk_mask float32, 50% zeros", "nm_mask", "block_mask", "int8 mma.sync 32x128 float16"]
    others += ["decode pack", "decode expand", "decode bitmap8, 7 tokens, cp.async", "conv 1x1"]
    others += ["blocks of 8 bits, 64, 5 tokens, mma.sync", "csr bfloat16, panels"]
    smoke.work(machine, names + others)
    out = capfd.readouterr().out
    assert out.count("PASS") == len(names + others), out
    monkeypatch.setattr(smoke, "gemm_s8", lambda a, b: gemm_s8(a.roll(1, 0), b))
    honest = DeviceCSR.from_dense
    monkeypatch.setattr(DeviceCSR, "from_dense", lambda w, **way: honest(w * 1.001, **way))
    smoke.work(machine, names)
    out = capfd.readouterr().out
    assert "PASS\ttopk" in out
    assert "FAIL\tcsr float32, gathers\tRuntimeError: off by" in out
    assert "FAIL\tgemm_s8\tRuntimeError: sums: " in out


def test_smoke_in_one_process(monkeypatch, capfd):
    from bench.gpu import smoke

    monkeypatch.setattr(_cuda, "_emulated", None)  # put back after the test
    monkeypatch.setattr(smoke, "checks", lambda machine: iter([("good", lambda: None), ("bad", None)]))
    assert smoke.main(["--dry-run", "--work"]) == 0
    out = capfd.readouterr().out
    assert "PASS\tgood" in out
    assert "FAIL\tbad\tTypeError" in out
    smoke.main(["--dry-run", "--work", "good"])
    assert "bad" not in capfd.readouterr().out


def test_the_whole_flow_as_a_dry_run():
    environment = {**os.environ, "PYTHON": sys.executable}
    suites = ",".join(command.ORDER)
    line = [ROOT / "bench/gpu.sh", "--dry-run", "--only", suites]
    run = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "cases would be measured; nothing was" in run.stdout
    assert "FAILED" not in run.stderr
    for part in ("select_threshold: bfloat16", "decode stack: 1 blocks", "decode bitmap8", "2:4 linear"):
        assert part in run.stderr
    line = [sys.executable, "-m", "bench.gpu.smoke", "--dry-run", "--only", "wgmma 256"]
    run = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "PASS  blocks of 16 bits, 128, wgmma 256" in run.stdout
    assert "smoke: 4 of 4 passed" in run.stdout


STUB = """#!/bin/sh
echo "$(basename "$0") $*" >>"$LOG"
case "$(basename "$0") $*" in
  "nvidia-smi --query-gpu=compute_cap"*) echo 9.0 ;;
  *default_path*) echo nowhere.json ;;
  *"$FAILS"*) exit 1 ;;
esac
"""


@pytest.fixture
def bare_machine(tmp_path):
    """The script in a tree of its own, its commands stubs that note how they are called; runs it.

    `fails`: part of a command line that fails. Returns the run and the command lines.
    """
    tree, bin = tmp_path / "tree", tmp_path / "bin"
    (tree / "bench").mkdir(parents=True)
    shutil.copy(ROOT / "bench/gpu.sh", tree / "bench")
    (tree / "python/pared").mkdir(parents=True)
    (tree / "python/pared/new.py").write_text("")
    (tree / "python/pared/_core.so").symlink_to("of a build elsewhere")
    (tree / "build/gpu/package/pared").mkdir(parents=True)
    (tree / "build/gpu/package/pared/_core.so").write_text("built")
    (tree / "build/gpu/package/pared/old.py").write_text("")
    bin.mkdir()
    for name in ("nvidia-smi", "cmake", "nvcc", "python3", "compute-sanitizer"):
        (bin / name).write_text(STUB)
        (bin / name).chmod(0o755)

    def go(*arguments, fails="nothing"):
        log = tmp_path / "log"
        log.write_text("")
        environment = {"PATH": f"{bin}:/usr/bin:/bin", "LOG": str(log), "FAILS": fails, "PYTHON": "python3"}
        run = subprocess.run(
            ["bash", tree / "bench/gpu.sh", *arguments], env=environment, capture_output=True, text=True
        )
        return run, log.read_text().splitlines()

    go.package = tree / "build/gpu/package/pared"
    return go


def test_the_script_where_commands_are_stubs(bare_machine):
    run, lines = bare_machine()
    assert run.returncode == 0, run.stdout + run.stderr
    (configured,) = (line for line in lines if line.startswith("cmake -S"))
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a-real" in configured
    measured = [line.split("--only ")[1].split()[0] for line in lines if " -m bench.gpu --only" in line]
    assert measured == list(command.ORDER)
    for tool in ("memcheck", "racecheck"):
        under = [line for line in lines if line.startswith(f"compute-sanitizer --tool {tool} ")]
        assert [line.partition(" python3 -m ")[2].split()[0] for line in under] == [
            "bench.gpu.smoke",
            "pytest",
        ]
    # The extension that was built stays, modules come from the tree.
    assert {p.name for p in bare_machine.package.iterdir()} == {"_core.so", "new.py"}
    assert (bare_machine.package / "_core.so").read_text() == "built"


@pytest.mark.parametrize("fails", ["bench.gpu.smoke", "--only int8", "-m pytest"])
def test_a_part_that_fails_costs_the_others_nothing(bare_machine, fails):
    run, lines = bare_machine("--no-build", fails=fails)
    assert run.returncode == 1
    assert "FAILED (exit code 1)" in run.stdout
    assert sum(" -m bench.gpu --only" in line for line in lines) == len(command.ORDER)


def test_a_build_that_fails_is_tried_without_cutlass(bare_machine):
    run, lines = bare_machine("--only", "smoke", fails="-DPARED_CUTLASS=ON")
    tried = [line.split("-DPARED_CUTLASS=")[1] for line in lines if line.startswith("cmake -S")]
    assert tried == ["ON", "OFF"]
    assert "build: FAILED" in run.stdout
    assert "build without CUTLASS: done" in run.stdout
    assert any("bench.gpu.smoke" in line for line in lines)
    run, lines = bare_machine("--only", "smoke", fails="cmake --build")
    assert run.returncode == 1
    assert not any("bench.gpu.smoke" in line for line in lines)


def test_a_build_whose_time_is_over_is_left_for_the_next_call(bare_machine, tmp_path):
    stops = tmp_path / "bin/timeout"
    stops.write_text(
        '#!/bin/sh\ncase "$*" in *build_package*) exit 124 ;; esac\nexec /usr/bin/timeout "$@"\n'
    )
    stops.chmod(0o755)
    run, lines = bare_machine()
    assert run.returncode == 1
    assert "build: STOPPED after 475 s" in run.stdout
    assert "what is built stays in build/gpu" in run.stdout
    assert "without CUTLASS" not in run.stdout
    assert not any("bench.gpu" in line for line in lines)


def test_an_unknown_option_of_the_script():
    run = subprocess.run([ROOT / "bench/gpu.sh", "--fast"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "unknown option --fast" in run.stderr
    for arguments, text in [
        (["--only", "int8,slow"], "--only: expected names among smoke select .*, got slow"),
        (["--seconds", "soon"], "--seconds: expected a number, got soon"),
        (["--results"], "--results: expected a value"),
    ]:
        run = subprocess.run([ROOT / "bench/gpu.sh", *arguments], capture_output=True, text=True, check=False)
        assert run.returncode == 2
        assert re.search(text, run.stderr)
