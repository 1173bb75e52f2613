"""The code in the guide and in docs/methods runs as it stands, page by page, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pared.pruning.importance import NAMES

DOCS = Path(__file__).parent.parent / "docs"
PAGES = DOCS / "methods"
# Overviews without code of their own.
PROSE = ("README.md", "accuracy.md", "format.md")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def run_page(text: str) -> int:
    """Execute a page's blocks in one namespace; how many there were."""
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    blocks = BLOCK.findall(text)
    for block in blocks:
        exec(compile(block, "page", "exec"), namespace)
    return len(blocks)


@pytest.mark.parametrize(
    "page", sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md") if p.name not in PROSE)
)
def test_the_code_of_a_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run_page((DOCS / page).read_text()) > 0
    finally:
        torch.set_num_threads(threads)


def test_a_page_whose_code_fails_is_noticed() -> None:
    with pytest.raises(AssertionError):
        run_page("text\n```python\nassert 1 == 2\n```\n")


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {"#" + re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


def test_links_between_pages_and_names_of_criteria() -> None:
    for page in DOCS.rglob("*.md"):
        text = page.read_text()
        for link, anchor in re.findall(r"\]\(([\w./]*)(#[\w-]+)?\)", text):
            if link.startswith("http"):
                continue
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
            if anchor and not link:
                assert anchor in anchors(text), f"{page.name} links to {anchor}"
    table = (PAGES / "importance.md").read_text()
    assert all(f"`{name}`" in table for name in NAMES)
