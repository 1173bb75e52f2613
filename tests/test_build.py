"""Packaging: what is installed, what a source archive holds, which versions are pinned."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pared

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def direct_requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    texts = [*PYPROJECT["build-system"]["requires"], *project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        texts += extra
    return [Requirement(t) for t in texts]


def pins() -> dict[str, Requirement]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


# ---- the installed package


@pytest.fixture
def installed() -> list[str]:
    """Paths in the installed distribution; skips where a source tree is tested instead."""
    try:
        dist = importlib.metadata.distribution("pared")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pared is imported from a source tree here, not installed")
    if Path(str(dist.locate_file("pared"))).resolve() != Path(pared.__file__).parent.resolve():
        pytest.skip("pared is an editable install here")
    return [f.as_posix() for f in dist.files or [] if ".dist-info/" not in f.as_posix()]


def test_every_python_file_is_installed_and_nothing_else(installed):
    source = ROOT / "python"
    expected = {
        p.relative_to(source).as_posix()
        for p in source.rglob("*")
        if p.is_file() and (p.suffix in {".py", ".pyi"} or p.name == "py.typed")
    }
    got = {f for f in installed if "__pycache__" not in f}
    binaries = {f for f in got if re.fullmatch(r"pared/_(core|cuda_kernels)\.[\w-]+\.so", f)}
    scripts = {f for f in got if f.endswith("bin/pared")}
    assert got - binaries - scripts == expected
    assert any(f.startswith("pared/_core.") for f in binaries)
    assert scripts


def test_the_version_is_one(installed):
    assert importlib.metadata.version("pared") == pared.__version__


def test_the_version_is_that_of_the_project():
    assert pared.__version__ == PYPROJECT["project"]["version"]


def test_the_extension_links_neither_torch_nor_python():
    from pared import _core

    if shutil.which("ldd") is None:
        pytest.skip("no ldd here")
    needs = subprocess.run(["ldd", _core.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needs
    for library in ("libtorch", "libc10", "libpython", "gomp", "libcuda"):
        assert library not in needs


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("info", 0, "not installed: pared.ops works on numpy arrays"),
        ("bench", 1, "this needs torch: pip install torch"),
        ("demo", 1, "this needs torch and scikit-learn"),
    ],
)
def test_the_command_line_without_torch_and_scikit_learn(command, code, said):
    without = "import sys; sys.modules.update(torch=None, sklearn=None); "
    run = subprocess.run(
        [sys.executable, "-c", f"{without} from pared.__main__ import main; main()", command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == code, run.stderr
    assert said in run.stdout + run.stderr


# ---- building


def test_building_needs_two_packages_and_not_torch():
    names = {Requirement(r).name for r in PYPROJECT["build-system"]["requires"]}
    assert names == {"scikit-build-core", "pybind11"}


def test_source_archive(tmp_path):
    """Complete, and without build folders, environments or binaries of the checkout."""
    pytest.importorskip("scikit_build_core")
    code = "import sys; from scikit_build_core.build import build_sdist; print(build_sdist(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    with tarfile.open(next(tmp_path.glob("pared-*.tar.gz"))) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    sources = {
        p.relative_to(ROOT).as_posix()
        for folder in ("csrc", "python")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in {".cc", ".h", ".cu", ".def", ".py", ".pyi"}
    }
    assert sources <= names
    top = {
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "PKG-INFO",
        "Makefile",
        "constraints.txt",
    }
    assert top <= names
    assert not [n for n in names if re.search(r"\.(so|o|a|pyc)$|^(build|dist|\.venv|\.git)/", n)]


def cmake(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = shutil.which("cmake")
    if program is None:
        pytest.skip("no cmake here")
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.parametrize(
    ("option", "choices"), [("PARED_CUDA", "auto, on or off"), ("PARED_SANITIZE", "OFF, address or thread")]
)
def test_an_unknown_value_of_an_option_is_refused(tmp_path, option, choices):
    run = cmake("-S", ROOT, "-B", tmp_path, f"-D{option}=maybe")
    assert run.returncode != 0
    assert f"{option}: expected {choices}, got 'maybe'" in run.stderr


# ---- versions


def test_each_direct_dependency_is_pinned_within_its_range():
    pinned = pins()
    for requirement in direct_requirements():
        pin = pinned.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert requirement.specifier.contains(specifier.version), f"{requirement} does not allow {pin}"


def test_every_pip_call_takes_the_constraints():
    text = (ROOT / "Makefile").read_text()
    calls = [line for line in text.splitlines() if re.search(r"\bpip\b.*\binstall\b", line)]
    assert calls
    assert all("--constraint constraints.txt" in line for line in calls)


def test_nothing_in_the_repository_names_a_package_index():
    for name in ("Makefile", "constraints.txt", "pyproject.toml", ".ci/run"):
        assert not re.search(r"index-url|find-links|https?://", (ROOT / name).read_text()), name
