"""The code in the guide and in docs/methods runs as it stands, page by page; links lead somewhere."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pared
from pared.pruning.importance import NAMES

DOCS = Path(__file__).parent.parent / "docs"
PAGES = DOCS / "methods"
# Overviews without code of their own.
PROSE = ("README.md", "accuracy.md")
# What the README and the page of the format speak of without making it.
GIVEN = """
import json, safetensors, numpy as np, torch, pared
from collections import OrderedDict
from torch import nn
torch.manual_seed(0)
layers = {"first": nn.Linear(32, 48), "act": nn.GELU(), "second": nn.Linear(48, 32), "head": nn.Linear(32, 8)}
model = nn.Sequential(OrderedDict(layers)).eval()
example = example_inputs = torch.randn(16, 32)
batches = [torch.randn(16, 32) for _ in range(2)]
loader, optimizer = batches[:1], torch.optim.SGD(model.parameters(), lr=0.1)
quantized_layer = torch.ao.nn.quantized.dynamic.Linear(8, 8)
shapes = {"x": (3, 16), "weight": (8, 16), "bias": 8, "image": (1, 4, 8, 8), "filters": (8, 4, 3, 3)}
shapes |= {"scores": 20, "b1": 8, "b2": 4, "s1": 6, "s2": (2, 3), "s3": 4}
globals().update({name: np.ones(shape, np.float32) for name, shape in shapes.items()})
w1, w2 = (pared.ops.CSR.from_dense(np.ones(shape, np.float32)) for shape in ((8, 16), (4, 8)))
k = 5
"""
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def run_page(text: str, given: str = "") -> int:
    """Execute a page's blocks in one namespace; how many there were."""
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    exec(given, namespace)
    blocks = BLOCK.findall(text)
    for block in blocks:
        exec(compile(block, "page", "exec"), namespace)
    return len(blocks)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


PAGES_WITH_CODE = sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md") if p.name not in PROSE)


@pytest.mark.parametrize("page", [p for p in PAGES_WITH_CODE if p != "format.md"])
def test_the_code_of_a_page_runs(page: str, capsys: pytest.CaptureFixture[str], one_thread: None) -> None:
    assert run_page((DOCS / page).read_text()) > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's, of its quantized
def test_the_code_of_the_readme_and_of_the_format_runs(
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    readme, page = (ROOT / "README.md").read_text(), (DOCS / "format.md").read_text()
    assert run_page(readme, GIVEN) >= 5
    assert run_page(page, GIVEN) == 1  # reads the file that the README's code has written


def test_a_page_whose_code_fails_is_noticed() -> None:
    with pytest.raises(AssertionError):
        run_page("text\n```python\nassert 1 == 2\n```\n")


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {"#" + re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


ROOT = DOCS.parent
WITH_LINKS = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / n for n in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")),
]
WITH_LINKS += [ROOT / folder / "README.md" for folder in ("csrc", "bench")]


def broken_links(page: Path, text: str) -> list[str]:
    """Links of a page to files, and to headings of them, that are not there."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`|^```.*?^```", "", text, flags=re.M | re.S)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (
            anchor and "#" + anchor not in anchors(text if target == page else target.read_text())
        ):
            found.append(link)
    return found


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_is_noticed() -> None:
    page = PAGES / "README.md"
    text = "[a](no.md) [b](magnitude.md) [c](#no-such) [d](../guide.md#no-such) [e](https://x.y)\n"
    assert broken_links(page, text) == ["no.md", "#no-such", "../guide.md#no-such"]


def test_every_method_has_a_page_with_what_a_reader_needs() -> None:
    index = (PAGES / "README.md").read_text()
    table = (PAGES / "importance.md").read_text()
    assert all(f"`{name}`" in table for name in NAMES)
    assert all(f'"{name}"' in str(pared.prune.__doc__) for name in NAMES)
    assert all(
        (PAGES / f"{name}.md").exists() for name in NAMES if name != "apoz"
    )  # a statistic of activation
    for page in PAGES.glob("*.md"):
        text = page.read_text()
        assert page.name == "README.md" or f"({page.name})" in index, f"{page.name} is not in the index"
        if "**When.**" in text:
            assert "**Watch.**" in text
            assert BLOCK.search(text)
    methods = [p for p in PAGES.glob("*.md") if "**When.**" in p.read_text()]
    assert len(methods) >= 45


PUBLIC = ("", "ops", "pruning", "quant", "training", "callbacks")


def undocumented(function: Any) -> list[str]:
    """What a docstring does not speak of: parameters, and errors."""
    text = str(inspect.getdoc(function))
    parameters = list(inspect.signature(function).parameters)
    missing = [p for p in parameters if not re.search(rf"\b{p}\b", text)]
    return [*missing, *(["Raises"] if parameters and not re.search(r"\b[Rr]aises?\b", text) else [])]


def test_docstrings_name_every_parameter_and_the_errors() -> None:
    found = {}
    for name in PUBLIC:
        module = importlib.import_module(f"pared.{name}".rstrip("."))
        for n in module.__all__:
            if inspect.isfunction(getattr(module, n)):
                found[f"{name}.{n}"] = undocumented(getattr(module, n))
    assert len(found) > 40
    assert {n: missing for n, missing in found.items() if missing} == {}
    assert undocumented(lambda x: x) == ["x", "Raises"]


SOURCES = (".py", ".pyi", ".cc", ".h", ".cu", ".cuh", ".def", ".cmake", ".sh")
FOLDERS = ("csrc", "cmake", "python", "tests", "bench", "tools", "examples", "docs")
# Fields of formats of others, and what a page writes itself.
FOREIGN = ("dlpack.h", "cuda_runtime.h")


def files() -> list[str]:
    found = [p.relative_to(ROOT).as_posix() for f in FOLDERS for p in (ROOT / f).rglob("*") if p.is_file()]
    return [*found, *(p.name for p in ROOT.iterdir() if p.is_file())]


def stale_names(text: str) -> list[str]:
    """Source files and pared's own names in code spans, and files in plain blocks, that are not there."""
    known = files()
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = []
    for path in re.findall(r"(?<![\w<./-])[\w./-]+", " ".join([*spans, *blocks])):
        name = path.removeprefix("../")
        there = any(f == name or f.endswith("/" + name) for f in known)
        if name.endswith(SOURCES) and name not in (*SOURCES, *FOREIGN) and not there:
            found.append(path)
    for dotted in re.findall(r"(?<![\w./-])pared(?:\.\w+)+", " ".join(spans)):
        if not dotted.endswith(SOURCES) and not resolves(dotted):
            found.append(dotted)
    return found


def resolves(dotted: str) -> bool:
    """Whether a dotted name leads to a module, or to something in one."""
    first, *rest = dotted.split(".")
    thing: Any = importlib.import_module(first)
    for i, name in enumerate(rest):
        if not hasattr(thing, name):
            try:
                importlib.import_module(".".join([first, *rest[: i + 1]]))
            except ImportError:
                return False
        thing = getattr(thing, name)
    return True


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_names_that_a_page_speaks_of_are_there(page: Path) -> None:
    assert stale_names(page.read_text()) == []


def test_a_stale_name_is_noticed() -> None:
    text = "`csrc/core/isa.h` `core/isa.cc` `core/gone.cc` `pared.ops.linear(x)` `pared.gone` `bench.x`\n"
    text += "```\n  setup.py  what builds it\n  _io.py\n```\n"
    assert stale_names(text) == ["core/gone.cc", "setup.py", "pared.gone"]
