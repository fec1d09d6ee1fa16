"""What a missing extra says."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import get_args

import pytest

from c2m3_fl import cli, extras
from c2m3_fl.errors import C2M3Error, MissingExtraError


@pytest.mark.parametrize("extra", get_args(extras.Extra))
def test_a_missing_module_is_answered_with_the_pip_command(extra):
    with pytest.raises(MissingExtraError, match=rf"^absent, gone are not installed; .*'c2m3-fl\[{extra}\]'$") as caught:
        extras.require(extra, "absent", "json", "gone")
    assert isinstance(caught.value, C2M3Error)
    assert isinstance(caught.value, ImportError)


def test_every_extra_that_an_error_can_name_exists():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(get_args(extras.Extra)) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("missing", [{"matplotlib"}, {"rich", "typer"}])
def test_the_command_line_without_its_extra_is_one_line_and_status_one(monkeypatch, missing):
    """Flower brings typer and rich, but nothing that draws."""
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in missing else True)
    with pytest.raises(
        SystemExit, match=rf"^error: {', '.join(sorted(missing))} .*; run: pip install 'c2m3-fl\[cli\]'$"
    ):
        cli.main()
