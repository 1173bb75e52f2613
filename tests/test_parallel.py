"""Who runs the loops: torch's pool when torch is loaded, else pared's own; never a second OpenMP runtime."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Work for every thread: 2 million multiply-adds on the stored values, checked against float64.
PRODUCT = """
import sys
import threading
import numpy as np
import pared
from pared import _core, ops

_core.set_parallel_backoff(False)
rng = np.random.default_rng(0)
w = rng.standard_normal((256, 512)).astype(np.float32)
w[rng.random(w.shape) < 0.8] = 0
x = rng.standard_normal((128, 512)).astype(np.float32)
packed = ops.CSR.from_dense(w)
exact = x.astype(np.float64) @ w.T.astype(np.float64)
bound = 2 * 512 * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(w).T.astype(np.float64))

def check(y=None):
    y = ops.linear(x, packed) if y is None else y
    assert np.all(np.abs(np.asarray(y) - exact) <= bound)

def os_threads():
    import os
    return len(os.listdir("/proc/self/task"))

def check_in_threads(count=8, rounds=20):
    errors = []
    def run():
        try:
            for _ in range(rounds):
                check()
        except BaseException as e:
            errors.append(e)
    threads = [threading.Thread(target=run) for _ in range(count)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not errors, errors

def in_fork(action, seconds=300):
    import os, time
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, status
            return
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the forked child hangs")
"""


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` after PRODUCT in a fresh interpreter: which pool serves is a property of the process."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PARED_NUM_THREADS", "OMP_NUM_THREADS")}
    # Two sets of OpenMP symbols or a fork with live threads are what some of this is about.
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRODUCT + textwrap.dedent(code)],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def passes(code: str, **env: str) -> None:
    run = python(code, **env)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_own_pool_without_torch(threads):
    passes(
        f"""
        assert "torch" not in sys.modules
        check()
        assert _core.parallel_backend() == "std::thread"
        assert _core.num_threads() == {threads}
        assert os_threads() == {threads}, "one worker fewer than threads: the caller works too"
        check_in_threads()
        in_fork(check)
        in_fork(lambda: in_fork(check))
        check()
        """,
        PARED_NUM_THREADS=str(threads),
        OPENBLAS_NUM_THREADS="1",
    )


def test_own_pool_takes_its_size_from_openmp_or_the_affinity_mask():
    passes("assert _core.num_threads() == 3", OMP_NUM_THREADS="3,1")
    passes("assert _core.num_threads() == 2", OMP_NUM_THREADS="3", PARED_NUM_THREADS="2")
    passes("import os; assert _core.num_threads() == len(os.sched_getaffinity(0))", OMP_NUM_THREADS="many")


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "4097", "99999999999999999999"])
def test_a_wrong_thread_count_is_refused_at_import(value):
    run = python("", PARED_NUM_THREADS=value)
    assert run.returncode == 1
    assert f"PARED_NUM_THREADS: expected a number from 1 to 4096, got '{value}'" in run.stderr


def test_torch_pool_with_torch():
    passes(
        """
        before = os_threads()
        check()  # starts the workers of pared's own pool
        import torch
        from threadpoolctl import threadpool_info
        torch.set_num_threads(3)
        torch.ones(10_000_000).sum()  # starts torch's workers
        with_torch = os_threads()
        assert _core.parallel_backend() == "torch"
        assert _core.num_threads() == 3
        check()
        x, packed = torch.from_numpy(x), ops.CSR(torch.from_numpy(packed.packed))
        check()
        assert os_threads() == with_torch, "pared started threads beside torch's"
        runtimes = {i["filepath"] for i in threadpool_info() if i["user_api"] == "openmp"}
        assert len(runtimes) == 1, runtimes

        # The count follows torch's, in every thread.
        torch.set_num_threads(1)
        assert _core.num_threads() == 1
        check()
        torch.set_num_threads(2)
        assert _core.num_threads() == 2
        check_in_threads()
        """,
        PARED_NUM_THREADS="2",
    )


def test_the_extension_brings_no_openmp_runtime():
    passes(
        """
        from threadpoolctl import threadpool_info
        check()
        assert not [i for i in threadpool_info() if i["user_api"] == "openmp"]
        maps = open("/proc/self/maps").read()
        assert "libgomp" not in maps and "libomp" not in maps and "libiomp" not in maps
        """
    )


def test_work_runs_on_torch_workers():
    """The operating system's account of who was busy: half of the work is torch's worker's.

    Processor time, which does not grow while a loaded machine lets a thread wait. The caller's own says
    nothing about two threads: it spins where the worker is late.
    """
    passes(
        """
        import os, time, torch

        def busy():
            return {
                int(t): int(open(f"/proc/self/task/{t}/schedstat").read().split()[0])
                for t in os.listdir("/proc/self/task")
            }
        def others(times):
            return {t: v for t, v in times.items() if t != me}
        def spent(threads):
            torch.set_num_threads(2)
            torch.ones(10_000_000).sum()
            before = busy()
            while True:  # an idle worker spins for a while, which would count as work
                time.sleep(0.2)
                now = busy()
                if others(now) == others(before):
                    break
                before = now
            torch.set_num_threads(threads)
            before = busy()
            for _ in range(2000):  # long against the clock tick at which these accounts are kept
                ops.linear(x, packed)
            after = busy()
            assert set(after) == set(before)
            return {t: after[t] - before[t] for t in after}

        me = threading.get_native_id()
        alone = spent(1)
        assert not any(others(alone).values())
        assert max(others(spent(2)).values()) > 0.25 * alone[me]
        """
    )


def test_nested_in_a_torch_region():
    """A call from inside torch's own parallel loop runs alone there, and is right."""
    passes(
        """
        import ctypes, os, torch
        torch.set_num_threads(2)
        lib = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        seen, errors = [], []
        body_type = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
        def body(begin, end, _):
            try:
                seen.append((begin, end, threading.get_ident()))
                check()
            except BaseException as e:
                errors.append(e)
        args = [ctypes.c_int64(0), ctypes.c_int64(2), ctypes.c_int64(1), body_type(body), None]
        assert lib.torch_parallel_for(*args) == 0
        assert not errors, errors
        assert sorted(s[:2] for s in seen) == [(0, 1), (1, 2)]
        assert len({s[2] for s in seen}) == 2
        check()
        """
    )


def test_fork_after_torch_has_started_its_workers():
    """libgomp's team does not survive a fork, and torch's own operations wait for it; pared's do not."""
    passes(
        """
        import torch
        torch.set_num_threads(2)
        torch.ones(10_000_000).sum()
        check()
        def child():
            check()
            assert _core.parallel_backend() == "std::thread"
            assert _core.num_threads() == 2
            torch.set_num_threads(1)
            assert _core.num_threads() == 1
            check()
        in_fork(child)
        in_fork(lambda: in_fork(child))
        assert _core.parallel_backend() == "torch"
        check()
        """
    )


def test_fork_before_torch_has_started_workers_keeps_torch_pool():
    passes(
        """
        import torch
        def child():
            torch.set_num_threads(2)
            torch.ones(10_000_000).sum()
            workers = os_threads()
            check()
            assert _core.parallel_backend() == "torch"
            assert os_threads() == workers
        assert os_threads() == 1
        in_fork(child)
        """,
        PARED_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
    )


def stress(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler here")
    binary = tmp_path / "stress"
    sources = [ROOT / "tests" / "parallel_stress.cc", ROOT / "csrc" / "core" / "parallel.cc"]
    command = [compiler, "-std=c++17", "-O1", "-g", "-I", ROOT / "csrc", *flags, *sources]
    subprocess.run([*command, "-o", binary, "-pthread", "-ldl"], check=True)
    return subprocess.run(
        [binary], env=os.environ | {"PARED_NUM_THREADS": "4"}, capture_output=True, text=True, check=False
    )


def test_stress_under_the_thread_sanitizer(tmp_path):
    run = stress(tmp_path, "-fsanitize=thread")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "ok\n"


def test_the_thread_sanitizer_finds_a_planted_race(tmp_path):
    run = stress(tmp_path, "-fsanitize=thread", "-DPLANTED_RACE")
    assert run.returncode != 0
    assert "data race" in run.stderr
