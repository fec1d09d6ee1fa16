from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from c2m3_fl.cli import zoo
from c2m3_fl.cli.app import app
from c2m3_fl.core.spec_json import from_json
from c2m3_fl.errors import ConfigError, DataError
from c2m3_fl.symmetry.discover import permutation_spec
from tests.benchmarks.records import read_record

_RUNNER = CliRunner()


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


class Recurrent(nn.Module):
    """Returns its hidden states besides the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, _ = self.cell(x)
        return {"scores": self.last(hidden), "hidden": hidden}


def words() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 2)), torch.zeros(2, 3, dtype=torch.long)


def number() -> int:
    return 3


def test_shows_the_spec_of_a_factory_and_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    result = _RUNNER.invoke(app, ["inspect", f"{__name__}:small", "--input", "3,4", "--save", str(file)])
    assert result.exit_code == 0, result.output
    expected = permutation_spec(small(), torch.randn(3, 4))
    assert result.stdout.startswith(str(expected))
    assert f"proven in: {'; '.join(expected.proven)}" in result.stdout
    assert "smallest change that a wrong permutation of one axis alone would cause" in result.stdout
    assert from_json(file.read_text(encoding="utf-8")) == expected


def test_factory_may_bring_its_inputs() -> None:
    result = _RUNNER.invoke(app, ["inspect", f"{__name__}:words"])
    assert result.exit_code == 0, result.output
    assert "0.weight:1, 1.weight:1" in result.stdout


def test_integer_inputs_are_named_tokens() -> None:
    result = _RUNNER.invoke(app, ["inspect", f"{__name__}:words", "--input", "tokens:2,7"])
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_zoo_prints_a_line_per_network() -> None:
    result = _RUNNER.invoke(app, ["inspect", "--zoo", "squeezenet1_1"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[2].startswith("| squeezenet1_1 | 1,235,496 | 25 | 99.92 % |")


def test_coverage_table_is_printed_from_the_file_that_measuring_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "classifiers", lambda: ["tiny"])
    monkeypatch.setattr(zoo, "build_classifier", lambda name: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)))
    file = tmp_path / "zoo.json"
    measured = _RUNNER.invoke(app, ["inspect", "--zoo", "--save", str(file)])
    assert measured.exit_code == 0, measured.output
    assert measured.stdout.splitlines()[2].startswith("| tiny | 186 | 1 |")  # 4·3·9 + 4 + 2·4·9 + 2; four channels
    record = read_record(file)
    assert [row["name"] for row in record["rows"]] == ["tiny"]
    assert set(record) == {"command", "configuration", "date", "versions", "machine", "rows"}
    printed = _RUNNER.invoke(app, ["inspect", "--zoo", "--from", str(file)])
    assert printed.stdout == measured.stdout


def test_a_file_without_a_coverage_table_is_refused_naming_the_command(tmp_path: Path) -> None:
    file = tmp_path / "zoo.json"
    file.write_text('{"rows": [{"name": "tiny"}]}')
    result = _RUNNER.invoke(app, ["inspect", "--zoo", "--from", str(file)])
    assert isinstance(result.exception, DataError)
    assert f"write one: c2m3-fl inspect --zoo --save {file}" in str(result.exception)


@pytest.mark.parametrize(("outputs", "groups"), [([], "0 groups"), (["--outputs", "scores"], "1 group;")])
def test_outputs_that_are_not_read_pin_nothing(outputs: list[str], groups: str) -> None:
    result = _RUNNER.invoke(app, ["inspect", f"{__name__}:Recurrent", "--input", "2,3,4", *outputs])
    assert result.stdout.startswith(groups), result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no network named"),
        (["nosuch"], "'nosuch' is not a torchvision classifier"),
        (["no.such.module:f"], "cannot load 'no.such.module:f'"),
        ([f"{__name__}:nothing"], "expected package.module:factory"),
        ([f"{__name__}:number"], "returned int; expected a module"),
        ([f"{__name__}:small"], "returned no example inputs"),
        ([f"{__name__}:small", "--input", "a,b"], "expected sizes like 2,3,32,32"),
        ([f"{__name__}:small", "--input", "words:2,4"], "unknown kind 'words'"),
    ],
)
def test_bad_arguments_are_explained(arguments: list[str], message: str) -> None:
    result = _RUNNER.invoke(app, ["inspect", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
