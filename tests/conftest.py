"""Fixtures that every test file shares. Only numpy here: the kernel tests also run without torch."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

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

# Kernels that ran in tests that force a level; tests/kernels/test_registry.py reads it.
_dispatched = pytest.StashKey[set[str]]()
_deselected = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_dispatched] = set()
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
            lambda cache=None, machine=None: choices(False if cache is None else cache, machine),
        )


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash[_deselected] = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What looks back on the whole session runs last.
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


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
    if not ran:
        pytest.fail(f"no kernel was dispatched at level {request.param}: this test checks nothing")


@pytest.fixture
def session_kernels(request: pytest.FixtureRequest) -> set[str]:
    """The kernels that this session has run under a forced level; skips unless all kernel tests have run."""
    here = Path(__file__).parent
    collected = {item.path for item in request.session.items}
    complete = set((here / "kernels").rglob("test_*.py")) <= collected
    chosen = request.config.option
    if not complete or request.config.stash[_deselected] or any("::" in arg for arg in chosen.file_or_dir):
        pytest.skip("looks back on all kernel tests, and this run selected some")
    return request.config.stash[_dispatched]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers from a seed that belongs to the test (or PARED_TEST_SEED); shown on failure."""
    seed = int(os.environ.get("PARED_TEST_SEED", zlib.crc32(request.node.nodeid.encode())))
    print(f"PARED_TEST_SEED={seed}")
    return np.random.default_rng(seed)
