"""A run of clients of several widths that was interrupted ends like one that never was."""

from __future__ import annotations

import pytest
from flwr.serverapp.strategy import FedAvgM

from c2m3_fl.flower import Resumable
from tests.flower.federation import mlp, same
from tests.flower.interrupted import Killed, run
from tests.flower.widths.federation import sized, sized_app


def test_widths_and_the_model_are_those_of_the_run_that_was_never_interrupted(tmp_path):
    def federation():
        return sized(FedAvgM(fraction_evaluate=0.0, server_momentum=0.5))

    def app():
        return sized_app([32, 16, 8, 8, 16], tells=False, independent=True, epochs=1)

    whole = run(federation(), mlp, rounds=3, app=app())
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        run(Resumable(federation(), folder), mlp, killed_in=2, rounds=3, app=app())
    strategy = federation()
    resumed = run(Resumable(strategy, folder), mlp, rounds=3, app=app())
    assert same(resumed.arrays, whole.arrays)
    assert dict(strategy.server.resizing.places) == {1: 0, 2: 1, 3: 2, 4: 2, 5: 1}
