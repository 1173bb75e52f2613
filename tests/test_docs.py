"""The code in docs/methods runs as it stands, page by page, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pared.pruning.importance import NAMES

PAGES = Path(__file__).parent.parent / "docs" / "methods"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def run_page(text: str) -> int:
    """Execute a page's blocks in one namespace; how many there were."""
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    blocks = BLOCK.findall(text)
    for block in blocks:
        exec(compile(block, "page", "exec"), namespace)
    return len(blocks)


@pytest.mark.parametrize("page", sorted(p.name for p in PAGES.glob("*.md") if p.name != "README.md"))
def test_the_code_of_a_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_page((PAGES / page).read_text()) > 0


def test_a_page_whose_code_fails_is_noticed() -> None:
    with pytest.raises(AssertionError):
        run_page("text\n```python\nassert 1 == 2\n```\n")


def test_links_between_pages_and_names_of_criteria() -> None:
    for page in PAGES.glob("*.md"):
        for link in re.findall(r"\]\(([\w.]+\.md)\)", page.read_text()):
            assert (PAGES / link).is_file(), f"{page.name} links to {link}"
    table = (PAGES / "importance.md").read_text()
    assert all(f"`{name}`" in table for name in NAMES)
