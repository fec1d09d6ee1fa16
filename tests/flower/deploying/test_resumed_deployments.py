"""Runs that were killed between two deployments go on with what was found out about the clients."""

from __future__ import annotations

import random

import pytest
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.queries.labels import ACTION
from c2m3_fl.flower.queries.refit import ClientRefit
from c2m3_fl.flower.resuming.checkpoint import Folder
from c2m3_fl.flower.resuming.resumable import Resumable
from c2m3_fl.flower.serial_grid import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from c2m3_fl.merging.reports import Recalibrated, RecalibrationReport
from tests.flower.deploying.test_candidates import app, deployed
from tests.flower.federation import EXAMPLE, calibration, digits_app, mlp, same
from tests.flower.interrupted import Killed, comparable

LABELS = f"query.{ACTION}"
ROUNDS = 2


def silent():
    """Clients whose app has no query."""
    return digits_app(epochs=1, rate=0.02, evaluates="loss")


def run(folder, options, *, done=0, killed_in=None, unheard=lambda current, kind: False, clients=app):
    """Rounds after `done`; the strategy, the result, and the round and kind of every answer that was on its way."""
    seen, current = [], [done]

    def transit(replies):
        kinds = {each.metadata.message_type for each in replies}
        current[0] += "train" in kinds
        if kinds == {"train"} and current[0] == killed_in:
            raise Killed
        seen.extend((current[0], kind) for kind in kinds)
        return [each for each in replies if not unheard(current[0], each.metadata.message_type)]

    inside = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE, **options)
    grid = SerialGrid(clients(), 3, transit=transit)
    random.seed(0)
    strategy = Resumable(inside, folder)
    return inside, strategy.start(grid, from_params(mlp().state_dict()), num_rounds=ROUNDS), seen


def killed_and_resumed(folder, options, **more):
    with pytest.raises(Killed):
        run(folder, options, killed_in=ROUNDS, **more)
    return run(folder, options, done=ROUNDS - 1, **more)


def test_a_head_that_was_given_up_is_not_asked_for_again_by_a_resumed_run(tmp_path):
    options = {"deploy": "every"}
    _, whole, seen = run(tmp_path / "whole", options, clients=silent)
    _, resumed, later = killed_and_resumed(tmp_path / "halves", options, clients=silent)
    assert {current for current, kind in seen if kind == LABELS} == {1}
    assert not [kind for _, kind in later if kind == LABELS]
    assert same(resumed.arrays, whole.arrays)
    assert comparable(resumed.train_metrics_clientapp) == comparable(whole.train_metrics_clientapp)


def test_a_run_that_begins_anew_asks_for_a_head_that_an_earlier_one_gave_up():
    strategy = C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), example_inputs=EXAMPLE)
    start = from_params(mlp().state_dict())
    strategy.start(SerialGrid(silent(), 3), start, num_rounds=1)
    given_up = strategy.state_dict()
    result = strategy.start(SerialGrid(app(), 3), start, num_rounds=1)
    assert deployed(result, 1)[0] == "head"
    assert given_up.keys() - strategy.state_dict().keys() == {"asking/headless"}


def test_of_a_killed_run_whose_last_round_is_lost_no_refit_is_left_and_the_log_says_so(tmp_path, caplog):
    """The one exception to "bit for bit": checkpoints do not hold the replies that a pending refit would need."""

    def unheard(current, kind):
        return current == ROUNDS and kind == "train"

    options = {"recalibrate": ClientRefit(first_layer=True), "head": None, "judge": None}
    _, whole, _ = run(tmp_path / "whole", options, unheard=unheard)
    assert deployed(whole, ROUNDS)[0] == "client-refit"
    inside, resumed, _ = killed_and_resumed(tmp_path / "halves", options, unheard=unheard)
    assert (
        "\t> no refit by the clients: the replies that the trajectory was aggregated from are gone" in caplog.messages
    )
    assert same(resumed.arrays, inside.trajectory)


def scaled(factor):
    """A recalibration that makes every weight so many times as large."""
    return lambda setting: Recalibrated(
        {name: factor * value for name, value in setting.merged.items()}, RecalibrationReport("scaled")
    )


def test_feedback_that_a_growing_norm_has_stopped_stays_stopped_in_a_resumed_run(tmp_path):
    start = from_params(mlp().state_dict())

    def fed(factor, folder, rounds):
        grown = {"calibration": calibration(), "recalibrate": scaled(factor), "feedback": "always"}
        strategy = Resumable(C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), **grown), folder)
        result = strategy.start(SerialGrid(digits_app(epochs=1), 2), start, num_rounds=rounds)
        return [metrics["c2m3-fed-back"] for metrics in result.train_metrics_clientapp.values()]

    assert fed(9.0, tmp_path / "stopped", 1) == [0]
    assert fed(1.1, tmp_path / "stopped", 3) == [0, 0, 0]
    assert fed(1.1, tmp_path / "fresh", 2) == [1, 1]


def test_the_losses_that_clients_judged_and_what_they_chose_are_in_the_checkpoint(tmp_path):
    options = {"diagnostics": True}
    _, result, _ = run(tmp_path, options)
    saved = Folder(tmp_path).load().metrics["train_metrics_clientapp"]
    told = saved[str(ROUNDS)]
    losses = {name: told[f"c2m3-judge-loss/{name}"] for name in ("aggregate", "head", "previous")}
    assert min(losses, key=losses.__getitem__) == "head"
    assert {name: told[f"c2m3-deployed/{name}"] for name in losses} == {"aggregate": 0, "head": 1, "previous": 0}
    assert told["c2m3-judge-voters/head"] == 3
    assert told["c2m3-judge-robust-gain/head"] > 0
    assert saved == {str(current): dict(each) for current, each in result.train_metrics_clientapp.items()}
    _, again, _ = run(tmp_path, options, killed_in=ROUNDS, done=ROUNDS - 1)  # nothing is left to be done
    assert again.train_metrics_clientapp == result.train_metrics_clientapp
    assert same(again.arrays, result.arrays)
