from __future__ import annotations

import pytest
from flwr.serverapp.strategy import Strategy

from c2m3_fl.errors import ConfigError
from simulations.data import federated_data
from simulations.models import build_model
from simulations.settings import TITLES, Settings
from simulations.strategies import STRATEGIES, build_strategy

SETTINGS = Settings(hidden_widths="8", clients=3)


def _build(name):
    return build_strategy(name, build_model(SETTINGS, (1, 8, 8), 10, seed=0), federated_data(SETTINGS))


def test_every_title_has_its_function():
    assert list(TITLES) == list(STRATEGIES)


@pytest.mark.parametrize("name", TITLES)
def test_every_name_gives_a_strategy(name):
    assert isinstance(_build(name), Strategy)


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"strategy is 'fedagv'.*did you mean 'fedavg'"):
        _build("fedagv")
