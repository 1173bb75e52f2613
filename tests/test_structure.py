"""The rules that keep the code easy to change: who includes what, one list, no leak between levels."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".cc", ".h", ".cu", ".cuh"})
KERNEL_LINE = re.compile(r"^PARED_KERNEL\((\w+), (\w+), (\w+)\)$", re.M)
KERNELS = KERNEL_LINE.findall((CSRC / "kernels" / "kernels.def").read_text())


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.M)


# ---- includes


def foreign_includes(text: str) -> list[str]:
    """Headers of Python or torch."""
    return [i for i in includes(text) if re.match(r"(Python\.h|pybind11|torch|ATen|c10|numpy)(/|$)", i)]


def test_only_the_bindings_include_python_and_nothing_includes_torch():
    assert len(SOURCES) > 30
    for path in SOURCES:
        found = foreign_includes(path.read_text())
        if path.parent.name == "bindings":
            found = [i for i in found if not i.startswith(("pybind11", "Python.h"))]
        assert not found, f"{path.relative_to(ROOT)} includes {found}"


def test_a_planted_include_is_caught():
    planted = "#include <vector>\n #  include <pybind11/pybind11.h>\n#include <torch/extension.h>\n"
    assert foreign_includes(planted) == ["pybind11/pybind11.h", "torch/extension.h"]


def test_only_the_cuda_part_includes_cuda():
    for path in SOURCES:
        if CSRC / "cuda" not in path.parents:
            assert not [i for i in includes(path.read_text()) if i.startswith("cuda_")], path


def untestable_cuda(name: str, text: str) -> list[str]:
    """What the emulator cannot run: it belongs into launch.h and ptx.h, where it has a twin."""
    code = re.sub(r"//.*", "", text)
    found = [] if name == "ptx.h" else re.findall(r"\basm\b|\b__shared__\b", code)
    return found + re.findall(r"<<<|__activemask", code)


def test_cuda_kernels_are_written_so_that_the_emulator_runs_them():
    files = [p for p in (CSRC / "cuda").glob("*") if p.suffix in {".cu", ".cuh", ".h"}]
    assert any(p.suffix == ".cu" for p in files)
    for path in files:
        assert not untestable_cuda(path.name, path.read_text()), path
    planted = '__shared__ float s[3];\nkernel<<<1, 2>>>(); // asm\n  asm volatile("");'
    assert untestable_cuda("planted.cu", planted) == ["__shared__", "asm", "<<<"]


def test_every_cuda_source_is_listed():
    cuda = CSRC / "cuda"
    listed = re.findall(r"^  ([\w./]+)\)?$", (cuda / "sources.cmake").read_text(), re.M)
    sources = [p.relative_to(cuda) for p in cuda.rglob("*") if p.suffix in {".cu", ".cc"}]
    found = [str(p) for p in sources if p.parts[0] != "emulate"]
    assert sorted(listed) == sorted([*found, *(p.name for p in (CSRC / "bindings").glob("cuda_*.cc"))])


def test_kernel_files_include_templates_and_c_headers_alone():
    """A C++ header defines functions: compiled under AVX-512 flags, the linker may keep that copy."""
    kernels = CSRC / "kernels"
    intrinsics = {"immintrin.h", "arm_neon.h"}
    allowed = {"stddef.h", "stdint.h", "string.h", "math.h", "float.h", "limits.h"} | intrinsics
    queue = [p for p in kernels.rglob("*.cc") if p.parent != kernels]
    assert queue
    seen = set()
    while queue:
        path = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in includes(path.read_text()):
            if (CSRC / name).is_file():
                queue.append(CSRC / name)
            else:
                assert name in allowed, f"{path.relative_to(ROOT)} includes <{name}>"
    assert kernels / "types.h" in seen


# ---- the one list


def test_kernels_def_has_only_lines_that_cmake_reads():
    text = (CSRC / "kernels" / "kernels.def").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("//")]
    assert len(lines) == len(KERNELS) == len(set(KERNELS)) > 0


def test_each_listed_kernel_has_its_file_and_each_file_its_line():
    listed = {f"{isa}/{op}_{variant}__{isa}.cc" for op, variant, isa in KERNELS}
    kernels = CSRC / "kernels"
    files = {p.relative_to(kernels).as_posix() for p in kernels.rglob("*.cc") if p.parent != kernels}
    assert files == listed


def test_each_op_is_listed_once_and_has_a_kernel():
    ops = re.findall(r"^PARED_OP\((\w+)\)$", (CSRC / "kernels" / "ops.def").read_text(), re.M)
    assert len(ops) == len(set(ops))
    assert set(ops) == {op for op, _, _ in KERNELS}


# ---- flags


def test_no_flag_depends_on_the_building_machine():
    # Comments may speak of what is avoided.
    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    assert "-m" in text
    for flag in ("native", "-ffast-math", "-Ofast", "-funsafe-math", "CMAKE_CXX_FLAGS "):
        assert flag not in text


# ---- objects


def leaks(objects: list[Path], tools: str = "") -> dict[str, list[str]]:
    """Symbols and sections of each object that could reach code of a lower level.

    A weak or unique symbol (an inline function, a template instance) is merged with those of the same name in
    other objects, so a copy compiled under AVX-512 may serve the scalar path. A constructor runs when the
    library is loaded, whatever the processor. `tools` is the prefix of a cross-compiler's binutils.
    """
    found: dict[str, list[str]] = {}
    nm = subprocess.run(
        [f"{tools}nm", "--defined-only", "--demangle", "-A", *map(str, objects)],
        capture_output=True,
        text=True,
        check=True,
    )
    for line in nm.stdout.splitlines():
        match = re.match(r"(.*?\.o):\S* *(\S) (.*)$", line)
        assert match, line
        path, kind, name = match.groups()
        own = Path(path).name.removesuffix(".o").removesuffix(".cc")
        if kind in "VvWwu" or (kind.isupper() and f"pared::{own}" not in name):
            found.setdefault(path, []).append(f"{kind} {name}")
    for path in objects:
        headers = subprocess.run(
            [f"{tools}objdump", "-h", path], capture_output=True, text=True, check=True
        ).stdout
        if ".init_array" in headers or ".ctors" in headers:
            found.setdefault(str(path), []).append("a constructor")
    return found


def kernel_objects(folders: str, tools: str = "") -> list[Path]:
    """The kernels' objects in the newest of the build folders, one for each that is listed."""
    if shutil.which(f"{tools}nm") is None or shutil.which(f"{tools}objdump") is None:
        pytest.skip(f"no {tools}binutils here")
    built = [
        p.parent
        for p in ROOT.glob(f"{folders}/libpared_core.a")
        if re.search(r"^PARED_SANITIZE:\w+=OFF$", (p.parent / "CMakeCache.txt").read_text(), re.M)
    ]
    if not built:
        # A wheel was installed from elsewhere. Where everything is built, this must not pass unseen.
        assert "CI" not in os.environ or tools, "no build folder below build/"
        pytest.skip("no build folder in this checkout")
    folder = max(built, key=lambda p: (p / "libpared_core.a").stat().st_mtime)
    objects = sorted(folder.glob("CMakeFiles/pared_core.dir/csrc/kernels/*/*.o"))
    names = {p.name.removesuffix(".cc.o") for p in objects}
    listed = {f"{op}_{variant}__{isa}" for op, variant, isa in KERNELS}
    assert names >= {n for n in listed if n.endswith("__scalar")}
    return [p for p in objects if p.name.removesuffix(".cc.o") in listed]


@pytest.mark.parametrize(
    ("folders", "tools"),
    [("build/*", ""), ("build/arm/extension", "aarch64-linux-gnu-")],
    ids=["here", "arm"],
)
def test_objects_of_a_level_define_their_kernel_and_nothing_that_can_leak(folders, tools):
    objects = kernel_objects(folders, tools)
    assert objects
    assert not leaks(objects, tools)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("inline int twice(int x) { return 2 * x; } int (*planted)(int) = twice;", "W twice(int)"),
        ("template <class T> T v = 7; int* planted() { return &v<int>; }", "u v<int>"),
        ("int helper(int x) { return x; }", "T helper(int)"),
        ("int f(); static int planted = f(); int* g() { return &planted; }", "a constructor"),
    ],
)
def test_a_planted_leak_is_caught(tmp_path, code, message):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler here")
    source, target = tmp_path / "planted.cc", tmp_path / "planted.cc.o"
    source.write_text(code)
    subprocess.run([compiler, "-std=c++17", "-O1", "-c", source, "-o", target], check=True)
    assert message in leaks([target])[str(target)]


# ---- Python


def test_every_public_package_is_there_after_import_pared():
    names = [path.parent.name for path in (ROOT / "python" / "pared").glob("[!_]*/__init__.py")]
    assert {"nn", "ops", "pruning", "quant"} <= {*names}
    for name in names:  # each alone: using one may import another
        code = f"import pared; pared.{name}.__all__; raise SystemExit('{name}' not in pared.__all__)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, name


def test_importing_pared_does_not_import_torch():
    code = "import sys, pared, pared.ops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Programs of their own, in which nobody has set another default.
PROGRAMS = ("_bench.py", "_peers.py", "_demo/")
FACTORIES = {
    *(
        "arange",
        "as_tensor",
        "asarray",
        "empty",
        "empty_strided",
        "eye",
        "full",
        "linspace",
        "normal",
        "ones",
    ),
    *("rand", "randint", "randn", "randperm", "tensor", "zeros"),
}


def on_the_default_device(text: str) -> list[str]:
    """Calls that make a tensor wherever the caller's default device is."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in FACTORIES
        and not any(k.arg in ("device", None) for k in node.keywords)
    ]


def test_tensors_are_made_on_a_named_device():
    package = ROOT / "python" / "pared"
    files = [f for f in package.rglob("*.py") if not f.relative_to(package).as_posix().startswith(PROGRAMS)]
    assert files
    found = {str(f.relative_to(package)): on_the_default_device(f.read_text()) for f in files}
    assert {f: calls for f, calls in found.items() if calls} == {}


def test_a_tensor_on_the_default_device_is_caught():
    text = 'a = torch.zeros(3, device="cpu")\nb = torch.arange(\n    3,\n)\nc = np.zeros(3)\n'
    assert on_the_default_device(text) == ["2: torch.arange(3)"]
