"""The page of the room names every option, and no other."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from c2m3_fl import flower
from c2m3_fl.flower.legacy import C2M3 as Legacy  # noqa: N811  # a class, like its counterpart
from c2m3_fl.flower.strategy import C2M3

PAGE = (Path(flower.__file__).parent / "README.md").read_text(encoding="utf-8")


def options(strategy: type) -> set[str]:
    return set(inspect.signature(strategy).parameters)


def test_the_table_of_options_names_every_option_and_no_other() -> None:
    table = PAGE.split("## Options", 1)[1].split("## ", 1)[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(options(C2M3))


def test_the_docstring_has_a_line_for_every_option() -> None:
    text = inspect.getdoc(C2M3) or ""
    listed = {name for line in re.findall(r"^([\w, ]+) : ", text, re.MULTILINE) for name in re.findall(r"\w+", line)}
    assert options(C2M3) <= listed


def test_the_page_says_what_the_legacy_strategy_lacks() -> None:
    lacking = re.search(r"^`LegacyC2M3` has the same options without (.*?);", PAGE, re.MULTILINE)
    assert lacking
    assert set(re.findall(r"`(\w+)`", lacking.group(1))) == options(C2M3) - options(Legacy)
