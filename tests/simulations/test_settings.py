from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from c2m3_fl.errors import ConfigError
from simulations.presets import PRESETS
from simulations.settings import OUTPUT, Settings

ROOT = Path(__file__).resolve().parents[2]


def test_the_app_declares_exactly_the_settings_and_their_defaults():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = project["tool"]["flwr"]["app"]["config"]
    assert declared == {**Settings().to_run_config(), OUTPUT: ""}


def test_settings_survive_the_run_config():
    settings = Settings(data="mnist", alpha=0.1, clients=7, strategy="c2m3", seed=3)
    assert Settings.from_run_config(settings.to_run_config()) == settings


def test_the_output_folder_is_no_setting():
    assert Settings.from_run_config({OUTPUT: "somewhere"}) == Settings()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    Settings(**PRESETS[name])


def test_a_whole_number_may_stand_for_a_float():
    assert Settings(alpha=1).alpha == 1.0


def test_strategies_are_listed_once_and_in_order():
    assert Settings(strategy="c2m3, fedavg,c2m3").strategies == ("c2m3", "fedavg")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("data", "mnits", "'mnits'.*did you mean 'mnist'"),
        ("model", "transformer", "'transformer'.*resnet20-bn"),
        ("partition", "uniform", "'uniform'.*dirichlet"),
        ("initialisation", "random", "'random'.*independent, shared"),
        ("optimiser", "lion", "'lion'.*adamw"),
        ("strategy", "fedavg,c2m4", "'c2m4'.*did you mean 'c2m3'"),
        ("strategy", " ,", "empty"),
        ("clients", 0, "0, expected at least 1"),
        ("clients", 2.5, "2.5, expected of type int"),
        ("clients", True, "True, expected of type int"),
        ("clients", "5", "'5', expected of type int"),
        ("alpha", 0.0, "expected more than 0"),
        ("alpha", float("nan"), "expected a finite number"),
        ("alpha", "high", "'high', expected a number"),
        ("momentum", 1.5, "expected at most 1"),
        ("holdout", 0.6, "expected at most 0.5"),
        ("learning-rate", -0.1, "expected more than 0"),
        ("hidden-widths", "256,-1", "expected positive integers"),
        ("hidden-widths", "wide", "expected positive integers"),
        ("seed", -1, "expected at least 0"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(key, value, said):
    with pytest.raises(ConfigError, match=f"(?s)^{key} .*{said}"):
        Settings.from_run_config({key: value})


def test_an_unknown_key_is_named_with_the_nearest_known_one():
    with pytest.raises(ConfigError, match=r"'local-epoch'.*did you mean 'local-epochs'"):
        Settings.from_run_config({"local-epoch": 2})
