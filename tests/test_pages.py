"""The links of all pages lead somewhere, and the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (".github", "c2m3_fl", "simulations", "tests")
PAGES = [ROOT / "README.md", *sorted(page for room in ROOMS for page in (ROOT / room).rglob("*.md"))]
FENCE = re.compile(r"```.*?```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def links(page: Path) -> list[str]:
    """What a page links to in this repository."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [link for link in LINK.findall(text) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """The anchors that a forge makes of a page's headings: lower case, no punctuation, hyphens for spaces."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 180
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(readme)}
    assert {page for page in PAGES if page != readme and page.parent.name != "results"} <= linked


def test_from_the_readme_to_how_to_add_a_method_are_two_clicks() -> None:
    first = [ROOT / link.partition("#")[0] for link in links(ROOT / "README.md")]
    second = [(page, link) for page in first if page.suffix == ".md" for link in links(page)]
    assert any(link.endswith("merging/README.md#write-a-method") for _, link in second)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_blank_is_filled(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"@[A-Z]{3,}@|ESTIMATE_[A-Z]+", text)
    assert not re.findall(r"<!-- results: .* -->\n<!-- end", text)
