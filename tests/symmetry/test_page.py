"""The examples of the room's page run as they stand and print what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from c2m3_fl import symmetry
from c2m3_fl.cli.zoo import HEADER, load
from c2m3_fl.symmetry.rules import registry
from tests.symmetry.test_zoo import ZOO

ROOM = Path(symmetry.__file__).parent
PAGE = (ROOM / "README.md").read_text(encoding="utf-8")
OPERATOR = "c2m3_page.soft_clip"


@pytest.fixture
def names(capsys: pytest.CaptureFixture[str]) -> Iterator[dict[str, Any]]:
    """What all examples of the page define, from top to bottom."""
    found: dict[str, Any] = {"__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for block in blocks:
        exec(compile(block, "README.md", "exec", dont_inherit=True), found)  # the page's own examples
    yield found
    registry.RULES.pop(OPERATOR)


def test_examples_of_the_page_run_and_print_what_it_shows(
    names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    printed = capsys.readouterr().out
    shown = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert shown
    assert all(text.strip() in printed for text in shown)
    assert f"no rule for {OPERATOR}" in printed  # before the rule
    found = symmetry.permutation_spec(names["Net"](), names["torch"].randn(3, 4))
    assert {name: group.size for name, group in found.groups.items()} == {"first": 6}  # with it
    assert symmetry.check_invariance(names["network"], names["by_hand"], names["images"]) < 1e-9


def test_coverage_table_of_the_page_is_that_of_the_record() -> None:
    entries = load(ROOM / "results" / "zoo.json")
    assert "\n".join([HEADER, *(entry.line() for entry in entries)]) in PAGE
    groups = {entry.name: entry.groups for entry in entries}
    assert {name: groups[name] for name in ZOO} == {name: count for name, (count, _) in ZOO.items()}
    assert max(entry.error for entry in entries) < 1e-12


def test_files_that_the_page_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOM / link).exists()]
