"""Where a CUDA kernel's tests run: in the emulator, always; on a GPU, where there is one."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pared import _cuda

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.gpu.emulated import load

NO_GPU = "needs an NVIDIA GPU, with CUDA builds of torch and pared"


# PARED_TEST_GPU=1: what runs on a GPU and nothing else of this folder; without one, errors instead of skips.
ONLY_GPU = os.environ.get("PARED_TEST_GPU") == "1"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not ONLY_GPU:
        return
    elsewhere = [i for i in items if HERE in i.path.parents and _runs_elsewhere(i)]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [i for i in items if i not in elsewhere]


def _runs_elsewhere(item: pytest.Item) -> bool:
    """Whether a test runs in the emulator, or needs neither it nor a GPU."""
    names: list[str] = getattr(item, "fixturenames", [])
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    if "backend" in parameters:
        return bool(parameters["backend"] != "cuda")
    return "emulated" in names or "gpu" not in item.name


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    try:
        return load()
    except FileNotFoundError as e:
        assert "CI" not in os.environ, "the CUDA kernels would go untested"
        pytest.skip(str(e))


@dataclass(frozen=True)
class Backend:
    """A place for kernels: the extension module, and where its tensors live."""

    module: Any
    device: torch.device

    @property
    def stream(self) -> int:
        return torch._C._cuda_getCurrentRawStream(0) if self.device.type == "cuda" else 0


@pytest.fixture(params=["emulated", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Both places. A test that takes it and runs no kernel proves nothing, and fails.

    The emulator runs threads and blocks one at a time, in a random order that belongs to the test: what
    depends on the order fails in some test.
    """
    if request.param == "cuda":
        try:
            module = _cuda.kernels(0)
        except RuntimeError:
            if ONLY_GPU:
                raise
            pytest.skip(NO_GPU)
        if not torch.cuda.is_available():
            pytest.skip(NO_GPU)
        yield Backend(module, torch.device("cuda", 0))
        torch.cuda.synchronize()
        return
    module = request.getfixturevalue("emulated")
    module.set_order(zlib.crc32(request.node.nodeid.encode()))
    module.take_launched()
    monkeypatch.setattr(_cuda, "_emulated", module)
    yield Backend(module, torch.device("cpu"))
    module.set_order(0)
    if not module.take_launched():
        pytest.fail("no kernel was launched: this test checks nothing")
