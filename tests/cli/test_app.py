from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from c2m3_fl.cli import app as entry
from c2m3_fl.errors import DataError

RUNNER = CliRunner()


def test_help_names_every_command():
    result = RUNNER.invoke(entry.app, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.output for name in entry._COMMANDS)


@pytest.mark.parametrize("name", entry._COMMANDS)
def test_every_command_explains_itself(name):
    result = RUNNER.invoke(entry.app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output
    assert "\\" not in result.output


def test_an_unknown_command_is_refused():
    result = RUNNER.invoke(entry.app, ["compute"])
    assert result.exit_code == 2
    assert "compute" in result.output


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from c2m3_fl.cli.app import app; "
        "CliRunner().invoke(app, ['--help']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_error_of_the_package_is_one_line_and_status_one(monkeypatch, capsys):
    def fail(standalone_mode: bool) -> None:
        raise DataError("data set 'mnist' [train] was not found")

    monkeypatch.setattr(entry, "app", fail)
    with pytest.raises(SystemExit) as caught:
        entry.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.strip() == "error: data set 'mnist' [train] was not found"
