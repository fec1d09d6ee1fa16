"""What all tests of the adapters share: shortcuts past what would only take time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from c2m3_fl.flower import setup
from c2m3_fl.flower.queries.answers import Traced
from c2m3_fl.merging.widths import networks
from c2m3_fl.symmetry.discover import permutation_spec

_SPECS = {}


def _once(model, example_inputs, rotations=False):
    """Networks that print the same have the same symmetries; deriving and proving them takes half a second."""
    key = (repr(model), rotations, tuple((value.dtype, value.shape) for value in example_inputs))
    if key not in _SPECS:
        _SPECS[key] = permutation_spec(model, example_inputs, rotations=rotations)
    return _SPECS[key]


@pytest.fixture(scope="module")
def _programs():
    return {}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch, _programs):
    monkeypatch.setattr(setup, "permutation_spec", _once)
    monkeypatch.setattr(networks, "permutation_spec", _once)
    # the apps of a file share programs as the messages of one app do; each is compared with the network once more
    monkeypatch.setattr(Traced, "__init__", lambda self: setattr(self, "_known", _programs))
    # some of Flower's strategies collect garbage after every reply: half a second each with torch loaded
    monkeypatch.setattr("flwr.app.message.arrayrecord.gc", SimpleNamespace(collect=lambda: 0))
