"""Fixtures that every test file shares. Only numpy here: the kernel tests also run without torch."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from _ceilings import CEILINGS

from pared import _core
from pared.ops import _estimate

# Examples share the fixtures of their test, which is what `isa` wants: one level for all of them. Kernels
# are compiled and machines differ: no deadline.
hypothesis.settings.register_profile(
    "pared",
    deadline=None,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("pared")

# Kernels that ran in tests that force a level, whether all kernel tests were collected, and whether some of
# them were then left out. Where several processes run the tests, each has its own, and the first collects.
_dispatched = pytest.StashKey[set[str]]()
_complete = pytest.StashKey[bool]()
_deselected = pytest.StashKey[bool]()
# Of a test: whether it was skipped, for want of a package.
_skipped = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_dispatched] = set()
    config.stash[_complete] = False
    config.stash[_deselected] = False
    # Processes that tests start measure the machine; the user's own cache is not theirs to write.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="pared-tests-")
    os.environ.pop("PARED_CACHE", None)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def fresh_compiler() -> Iterator[None]:
    """torch compiles a function anew for at most eight kinds of modules, and counts those of all tests."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def shared_loops() -> None:
    """Threads are what some tests are about: beside other processes loops would go on alone."""
    _core.set_parallel_backoff(False)


@pytest.fixture(autouse=True)
def same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test finds the same machine, and nothing timed before it: timers are replaced within tests."""
    monkeypatch.setattr(_estimate, "ceilings", lambda: CEILINGS)
    accelerate = sys.modules.get("pared._accelerate")  # which imports torch
    if accelerate is not None:
        choices = accelerate.Choices
        monkeypatch.setattr(
            accelerate,
            "Choices",
            lambda cache=None, *rest: choices(False if cache is None else cache, *rest),
        )


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash[_deselected] = True


def pytest_collection_finish(session: pytest.Session) -> None:
    every = set((Path(__file__).parent / "kernels").rglob("test_*.py"))
    chosen = session.config.option.file_or_dir
    session.config.stash[_complete] = bool(every) and every <= {item.path for item in session.items}
    session.config.stash[_deselected] |= any("::" in arg for arg in chosen)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """pytest-xdist: a process of the session has ended."""
    theirs = getattr(node, "workeroutput", {}).get("pared")
    if theirs is not None:
        stash = node.config.stash
        stash[_dispatched].update(theirs["dispatched"])
        stash[_complete] |= theirs["complete"]
        stash[_deselected] |= theirs["deselected"]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """When all kernel tests have passed, each kernel has to have run under a forced level: else a failure."""
    config, stash = session.config, session.config.stash
    if hasattr(config, "workeroutput"):  # the process that started this one reads it
        config.workeroutput["pared"] = {
            "dispatched": sorted(stash[_dispatched]),
            "complete": stash[_complete],
            "deselected": stash[_deselected],
        }
    elif stash[_complete] and not stash[_deselected] and session.exitstatus == pytest.ExitCode.OK:
        supported = {k["name"] for k in _core.kernels() if k["supported"]}
        untested = sorted(supported - stash[_dispatched])
        if untested:
            where = ("tests/kernels", None, "every kernel runs")
            text = f"kernels that no test has run with the `isa` fixture: {', '.join(untested)}"
            report = pytest.TestReport("::".join(where[::2]), where, {}, "failed", text, "call")
            config.hook.pytest_runtest_logreport(report=report)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    report = yield
    if report.when == "call":
        item.stash[_skipped] = report.skipped and not hasattr(report, "wasxfail")
    return report


@pytest.fixture(params=_core.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces each instruction-set level that this machine supports, one by one.

    A test that takes it has to run a kernel: one in which dispatch chose none would prove nothing, and fails.
    """
    before = _core.set_isa(request.param)
    _core.take_dispatched()
    try:
        yield request.param
    finally:
        _core.set_isa(before)
        ran = _core.take_dispatched()
        request.config.stash[_dispatched].update(ran)
    if not ran and not request.node.stash.get(_skipped, False):
        pytest.fail(f"no kernel was dispatched at level {request.param}: this test checks nothing")


def seed_of(request: pytest.FixtureRequest, name: str = "") -> int:
    """A number that belongs to the test, whatever ran before it in the process; or PARED_TEST_SEED."""
    return int(os.environ.get("PARED_TEST_SEED", zlib.crc32((request.node.nodeid + name).encode())))


def seed_torch(seed: int) -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def same_numbers(request: pytest.FixtureRequest) -> None:
    """torch's own generator too starts from the test's seed: which tests ran before it is chance."""
    seed_torch(seed_of(request))


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> None:
    """So do fixtures that several tests share: which of these is the first is chance, too."""
    if fixturedef.scope != "function":
        seed_torch(seed_of(request, fixturedef.argname))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers from the test's seed, which is shown on failure."""
    seed = seed_of(request)
    print(f"PARED_TEST_SEED={seed}")
    return np.random.default_rng(seed)
