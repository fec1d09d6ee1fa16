from __future__ import annotations

import json
from dataclasses import fields

import pytest
from typer.testing import CliRunner

from c2m3_fl.cli.app import app
from c2m3_fl.errors import ConfigError
from simulations.settings import Settings

RUNNER = CliRunner()
SMALL = ["--clients", "2", "--rounds", "1", "--local-epochs", "1", "--hidden-widths", "8", "--partition", "iid"]


def _compare(*arguments):
    result = RUNNER.invoke(app, ["compare", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_every_setting_is_an_option():
    text = _compare("--help").output
    assert all("--" + each.name.replace("_", "-") in text for each in fields(Settings))


def test_a_comparison_leaves_results_table_and_picture_and_says_where(tmp_path):
    result = _compare(*SMALL, "--seeds", "0,1", "--strategy", "fedavg,c2m3", "--output", str(tmp_path))
    assert result.exit_code == 0
    for name in ("results.json", "table.md", "accuracy.png"):
        assert (tmp_path / name).stat().st_size > 0
        assert str(tmp_path / name) in result.output
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["settings"]["clients"] == 2
    assert [(row["strategy"], row["seed"]) for row in stored["rounds"]] == [
        (name, seed) for seed in (0, 1) for name in ("fedavg", "c2m3")
    ]
    assert "mean ± standard deviation over 2 seeds" in result.output


def test_options_override_the_preset(tmp_path):
    _compare("--preset", "demo", *SMALL, "--strategy", "fedavg", "--output", str(tmp_path))
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert (settings["clients"], settings["alpha"]) == (2, 0.3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "dmeo"], "preset is 'dmeo'.*did you mean 'demo'"),
        (["--engine", "ray"], "engine is 'ray', expected one of serial, flwr"),
        (["--model", "mpl"], "model is 'mpl'.*did you mean 'mlp'"),
        (["--seeds", "0;1"], "seeds is '0;1', expected integers"),
        (["--alpha", "-1"], "alpha is -1.0, expected more than 0"),
        (["--clients", str(10**11)], "clients is 100000000000, too many for 1[0-9]* training images"),
        (["--train-size", str(10**11)], "train-size 100000000000 .* exceed the 1[0-9]* training images"),
    ],
)
def test_bad_options_are_named_before_anything_runs(tmp_path, arguments, said):
    with pytest.raises(ConfigError, match=said):
        _compare(*arguments, "--output", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
