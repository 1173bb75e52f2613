"""Options, fixtures and the final tables of the benchmark suites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rich.console import Console

import pared
from bench._interleave import CLOCK, Row, compare
from bench.table import render
from pared import _peers
from pared._timing import Timings, last_level_cache

_ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="every shape, sparsity and thread count: tens of minutes"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    config.addinivalue_line("markers", "full: a benchmark that runs only with --full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        left = [i for i in items if i.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left)
        items[:] = [i for i in items if not i.get_closest_marker("full")]
    for item in items:
        if "versus" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK), append=False)


@pytest.fixture
def versus(benchmark: Any, pytestconfig: pytest.Config) -> Callable[..., Timings]:
    """`bench._interleave.compare` for this test; the row also goes to the table at the end."""

    def run(*args: Any, **kwargs: Any) -> Timings:
        t = compare(benchmark, *args, **kwargs)
        pytestconfig.stash[_ROWS].append(dict(benchmark.extra_info))
        return t

    return run


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch's thread count, and so pared's, for one test. Parametrise it indirectly; one thread otherwise."""
    before = torch.get_num_threads()
    n = int(getattr(request, "param", 1))
    torch.set_num_threads(n)
    yield n
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["pared"] = {
        "version": pared.__version__,
        "isa": pared.isa(),
        "torch": torch.__version__,
        "last_level_cache": last_level_cache(),
    }


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[_ROWS] and (absent := _peers.missing()):
        terminalreporter.write_line(f"Left out, because they are not installed: {', '.join(absent)}")
    render(config.stash[_ROWS], Console())
