"""Where a CUDA kernel's tests run: in the emulator, always; on a GPU, where there is one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pared import _cuda

ROOT = Path(__file__).parents[2]
NO_GPU = "needs an NVIDIA GPU, with CUDA builds of torch and pared"


def build_emulated() -> ModuleType:
    """The module `_cuda_emulated`, built where it is out of date; PARED_EMULATED: in another build folder."""
    folder = Path(os.environ.get("PARED_EMULATED", ROOT / "build" / "emulated"))
    if not (folder / "CMakeCache.txt").exists():
        cmake = shutil.which("cmake")
        if cmake is None:
            assert "CI" not in os.environ, "no cmake here: the CUDA kernels would go untested"
            pytest.skip("no cmake here to build the emulated CUDA kernels")
        command = [
            cmake,
            "-S",
            ROOT / "csrc/cuda/emulate",
            "-B",
            folder,
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        subprocess.run([*command, *generator, "-DPARED_WERROR=ON"], check=True)
    subprocess.run(["cmake", "--build", folder], check=True)
    path = folder / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    return build_emulated()


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
