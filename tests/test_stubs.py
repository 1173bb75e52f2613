"""The type stubs of the extension modules say what the modules have: names, arguments, defaults, results."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import pared

PACKAGE = Path(pared.__file__).parent
# Results that pybind11 writes as a stub does. It knows less of arrays, dicts and lists of them.
COMPARABLE = re.compile(r"^(None|bool|int|float|str|(list|tuple)\[(bool|int|float|str|, )+\])$")


def stub_functions(source: str) -> dict[str, tuple[list[str], dict[str, str], str]]:
    """Name -> (arguments, defaults, result) of each function in a stub."""
    out = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            args = node.args
            assert not set("*/") & set(ast.unparse(args)), f"{node.name}: plain arguments are expected"
            names = [a.arg for a in args.args]
            last = names[len(names) - len(args.defaults) :]
            defaults = {n: ast.unparse(d) for n, d in zip(last, args.defaults, strict=True)}
            assert node.returns is not None, node.name
            out[node.name] = (names, defaults, ast.unparse(node.returns))
    return out


def built_functions(module: ModuleType) -> dict[str, tuple[list[str], dict[str, str], str]]:
    """The same from the signatures that pybind11 puts on the first line of each docstring."""
    out = {}
    for name, function in inspect.getmembers(module, inspect.isbuiltin):
        signature = (function.__doc__ or "").splitlines()[0]
        node = ast.parse(f"def {signature}: ...").body[0]
        assert isinstance(node, ast.FunctionDef), signature
        assert node.name == name, signature
        out |= stub_functions(ast.unparse(node))
    return out


def differences(stub: str, module: ModuleType) -> list[str]:
    written, built = stub_functions(stub), built_functions(module)
    found = [f"{name}: not in the stub" for name in built.keys() - written.keys()]
    found += [f"{name}: not in the module" for name in written.keys() - built.keys()]
    for name in written.keys() & built.keys():
        for what, a, b in zip(("arguments", "defaults", "result"), written[name], built[name], strict=True):
            comparable = what != "result" or (COMPARABLE.match(str(a)) and COMPARABLE.match(str(b)))
            if a != b and comparable:
                found.append(f"{name}: {what} {a} in the stub, {b} in the module")
    return sorted(found)


def stub_and_module(name: str) -> tuple[str, ModuleType]:
    try:
        module = importlib.import_module(f"pared.{name}")
    except ModuleNotFoundError:
        pytest.skip(f"this installation of pared was built without {name}")
    return (PACKAGE / f"{name}.pyi").read_text(), module


@pytest.mark.parametrize("name", ["_core", "_cuda_kernels"])
def test_stub_matches_the_module(name):
    stub, module = stub_and_module(name)
    assert built_functions(module)
    assert not differences(stub, module)
    assert not [n for n, o in inspect.getmembers(module, inspect.isclass) if n not in stub]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def isa() -> str:\n    ...", "", "isa: not in the stub"),
        ("def isa() -> str:", "def isa() -> int:", "isa: result int in the stub, str in the module"),
        ("def isa(", "def new() -> None: ...\ndef isa(", "new: not in the module"),
        ("def set_isa(name:", "def set_isa(nom:", "set_isa: arguments ['nom']"),
        (
            "def csr_pack_dense(weight: Any, groups: int=1",
            "def csr_pack_dense(weight: Any, groups: int=2",
            "csr_",
        ),
        (
            "def csr_pack_dense(weight: Any, groups: int=1",
            "def csr_pack_dense(weight: Any, groups: int",
            "csr_",
        ),
    ],
)
def test_a_planted_difference_is_caught(old, new, message):
    stub, module = stub_and_module("_core")
    stub = ast.unparse(ast.parse(stub))  # one line a signature, however the file is laid out
    assert stub.count(old) == 1
    found = differences(stub.replace(old, new), module)
    assert len(found) == 1
    assert found[0].startswith(message)


def test_the_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()
