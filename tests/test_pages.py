"""The links of all pages lead somewhere, what pages teach is public, and the README stays short."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (".github", "c2m3_fl", "simulations", "tests")
PAGES = [ROOT / "README.md", *sorted(page for room in ROOMS for page in (ROOT / room).rglob("*.md"))]
FENCE = re.compile(r"```.*?```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
FROM = re.compile(r"from (c2m3_fl[\w.]*) import (\([^)]*\)|[\w, ]+)")
PATH = re.compile(r"\bc2m3_fl(?:\.\w+)+")
HOMES = ("c2m3_fl", "c2m3_fl.core", "c2m3_fl.flower", "c2m3_fl.merging", "c2m3_fl.symmetry")
HISTORY = ROOT / ".github" / "CHANGELOG.md"  # names classes of its time, of which some are private now


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


@pytest.mark.parametrize("room", ["core", "network", "symmetry", "merging", "flower", "../simulations"])
def test_a_rooms_page_names_its_files(room: str) -> None:
    folder = (ROOT / "c2m3_fl" / room).resolve()
    table = (folder / "README.md").read_text(encoding="utf-8").split("## Files", 1)[1].split("\n## ", 1)[0]
    named = re.findall(r"`([\w/]+\.py)`", table)
    files = {str(file.relative_to(folder)) for file in folder.rglob("*.py") if file.name != "__init__.py"}
    assert sorted(named) == sorted(file for file in files if not file.startswith("examples/")), "one row each"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_blank_is_filled(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"@[A-Z]{3,}@|ESTIMATE_[A-Z]+", text)
    assert not re.findall(r"<!-- results: .* -->\n<!-- end", text)


def taught(text: str) -> set[tuple[str, str]]:
    """Module and name of everything of c2m3_fl that a page's code imports or names with its path."""
    code = "\n".join(CODE.findall(text))
    found = {(module, name) for module, names in FROM.findall(code) for name in re.findall(r"\w+", names)}
    for path in PATH.findall(FROM.sub("", code)):
        module, _, name = path.rpartition(".")
        found.add((path, "") if path in HOMES else (module, name))
    return found


def missing(pairs: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs whose module is not one of the five public packages, or does not have the name."""
    return sorted(
        (module, name)
        for module, name in pairs
        if module not in HOMES or (name and name not in import_module(module).__all__)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_imports_is_public(page: Path) -> None:
    assert not missing(taught(page.read_text(encoding="utf-8")))


def test_an_import_of_a_private_module_is_found() -> None:
    text = "`c2m3_fl.flower.legacy.C2M3`\n```python\nfrom c2m3_fl.core import (\n    match,\n    Nothing,\n)\n```"
    assert missing(taught(text)) == [("c2m3_fl.core", "Nothing"), ("c2m3_fl.flower.legacy", "C2M3")]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != HISTORY], ids=lambda page: str(page.relative_to(ROOT))
)
def test_classes_that_a_page_names_are_public(page: Path) -> None:
    files = (ROOT / "c2m3_fl").rglob("*.py")
    defined = {name for file in files for name in re.findall(r"^class ([A-Z]\w+)", file.read_text(), re.MULTILINE)}
    public = {name for home in HOMES for name in import_module(home).__all__}
    named = set(re.findall(r"(?<![\w./])[A-Z]\w+", "\n".join(CODE.findall(page.read_text(encoding="utf-8")))))
    assert not sorted(named & defined - public)
