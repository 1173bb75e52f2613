"""The CUDA part compiled for the CPU (csrc/cuda/emulate): for dry runs and for the tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load(accesses: bool = False) -> ModuleType:
    """The module `_cuda_emulated`, built where it is out of date; PARED_EMULATED: in another build folder.

    accesses: `_cuda_accesses`, the one that knows of every access to shared memory, and is slower.

    Raises ``FileNotFoundError`` where there is no cmake.
    """
    name = "_cuda_accesses" if accesses else "_cuda_emulated"
    folder = ROOT / "build" / name.removeprefix("_cuda_")
    if not accesses:
        folder = Path(os.environ.get("PARED_EMULATED", folder))
    cmake = shutil.which("cmake")
    if cmake is None:
        raise FileNotFoundError("no cmake here to build the emulated CUDA kernels")
    if not (folder / "CMakeCache.txt").exists():
        source, python = ROOT / "csrc/cuda/emulate", f"-DPython_EXECUTABLE={sys.executable}"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        options = [python, *generator, "-DPARED_WERROR=ON", f"-DPARED_ACCESSES={accesses:d}"]
        command = [cmake, "-S", source, "-B", folder, *options]
        subprocess.run(command, check=True)
    subprocess.run([cmake, "--build", folder], check=True, stdout=sys.stderr)
    path = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
