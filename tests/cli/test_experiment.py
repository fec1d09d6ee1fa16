from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from c2m3_fl.cli.app import app
from c2m3_fl.errors import ConfigError, DataError
from simulations import design

RUNNER = CliRunner()
TEXT = """
title = "small"
seeds = [0]
methods = ["fedavg", "c2m3"]
baseline = "fedavg"
judged = "c2m3"

[settings]
hidden-widths = "8"
clients = 2
local-epochs = 1
train-size = 200

[axes.start]
shared = { initialisation = "shared" }

[quick]
settings = { rounds = 1 }
"""


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "small.toml").write_text(TEXT)
    monkeypatch.setattr(design, "FOLDER", folder)


def _experiment(*arguments):
    result = RUNNER.invoke(app, ["experiment", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_an_experiment_leaves_json_tables_and_picture_and_says_where(tmp_path):
    result = _experiment("small", "--quick", "--workers", 1, "--output", tmp_path)
    assert result.exit_code == 0
    for name in ("small-quick.json", "small-quick.md", "small-quick.png"):
        assert (tmp_path / name).stat().st_size > 0
        assert str(tmp_path / name) in result.output
    assert "2/2" in result.output
    assert "left" in result.output


def test_tables_and_picture_are_drawn_from_the_json_alone(tmp_path, monkeypatch):
    _experiment("small", "--quick", "--workers", 1, "--output", tmp_path)
    table = (tmp_path / "small-quick.md").read_text()
    for name in ("small-quick.md", "small-quick.png"):
        (tmp_path / name).unlink()
    monkeypatch.setattr("simulations.runner.run_cell", lambda *_args: pytest.fail("measured again"))
    _experiment("small", "--quick", "--draw", "--output", tmp_path)
    assert (tmp_path / "small-quick.md").read_text() == table
    assert (tmp_path / "small-quick.png").stat().st_size > 0


def test_seeds_are_those_asked_for(tmp_path):
    _experiment("small", "--quick", "--workers", 1, "--seeds", "4,5", "--output", tmp_path)
    rows = json.loads((tmp_path / "small-quick.json").read_text())["measurements"]
    assert [row["seed"] for row in rows] == [4, 4, 5, 5]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["smal"], "did you mean 'small'"),
        (["small", "--seeds", "0;1"], "seeds is '0;1', expected integers"),
        (["small", "--device", "cuda:99"], "device is 'cuda:99', which cannot be used here"),
        (["small", "--device", "gpu"], "device is 'gpu', which cannot be used here"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(tmp_path, arguments, said):
    with pytest.raises(ConfigError, match=said):
        _experiment(*arguments, "--output", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_device_reaches_every_cell(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # a cell on the default device would fail
    _experiment("small", "--quick", "--device", "cpu", "--workers", workers, "--output", tmp_path)
    assert len(json.loads((tmp_path / "small-quick.json").read_text())["measurements"]) == 2


def test_drawing_what_was_never_measured_is_refused(tmp_path):
    with pytest.raises(DataError, match="run the experiment before drawing it"):
        _experiment("small", "--draw", "--output", tmp_path / "none")
