"""A run that was interrupted and resumed ends like one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian

from c2m3_fl.errors import ConfigError
from c2m3_fl.flower.incoming.records import from_params, to_params
from c2m3_fl.flower.resuming.checkpoint import Folder
from c2m3_fl.flower.resuming.resumable import Resumable
from c2m3_fl.flower.serial_grid import SerialGrid
from tests.flower.federation import digits_app, mlp, same
from tests.flower.interrupted import STRATEGIES, Killed, c2m3, comparable, run


@pytest.mark.parametrize(("make", "net"), STRATEGIES.values(), ids=STRATEGIES.keys())
@pytest.mark.parametrize("killed_in", [1, 3])
def test_resuming_gives_the_run_that_was_never_interrupted(make, net, killed_in, tmp_path):
    random.seed(0)
    whole = run(Resumable(make(), tmp_path / "whole"), net)
    random.seed(0)
    with pytest.raises(Killed):
        run(Resumable(make(), tmp_path / "halves"), net, killed_in=killed_in)
    if killed_in == 1:
        random.seed(0)  # nothing was saved yet
    else:
        random.seed(12345)  # whatever the new process has
    resumed = run(Resumable(make(), tmp_path / "halves"), net)
    assert same(resumed.arrays, whole.arrays)
    assert comparable(resumed.train_metrics_clientapp) == comparable(whole.train_metrics_clientapp)
    assert comparable(resumed.evaluate_metrics_clientapp) == comparable(whole.evaluate_metrics_clientapp)
    assert resumed.evaluate_metrics_serverapp == whole.evaluate_metrics_serverapp


def test_checkpoints_do_not_change_the_run(tmp_path):
    make, net = STRATEGIES["C2M3 around FedAvgM"]
    assert same(run(Resumable(make(), tmp_path), net).arrays, run(make(), net).arrays)


def test_a_finished_run_is_not_run_again(tmp_path):
    make, net = STRATEGIES["bare FedAvg"]
    first = run(Resumable(make(), tmp_path), net)
    again = run(Resumable(make(), tmp_path), net, killed_in=1)
    assert same(first.arrays, again.arrays)


def test_a_finished_run_can_be_prolonged(tmp_path):
    make, net = STRATEGIES["bare FedAdam"]
    random.seed(0)  # in which order a bare strategy hears its clients is drawn
    run(Resumable(make(), tmp_path / "a"), net, rounds=2)
    longer = run(Resumable(make(), tmp_path / "a"), net, rounds=4)
    random.seed(0)
    whole = run(Resumable(make(), tmp_path / "b"), net, rounds=4)
    assert same(longer.arrays, whole.arrays)


def test_checkpoints_of_other_strategies_are_refused(tmp_path):
    run(Resumable(FedAvg(), tmp_path), mlp, rounds=1)
    with pytest.raises(ConfigError, match=r"of strategies \['FedAvg'\], these are \['FedMedian'\]"):
        run(Resumable(FedMedian(), tmp_path), mlp)


class Peculiar(FedAvg):
    """Remembers things of every kind."""

    def __init__(self):
        super().__init__(fraction_evaluate=0.0)
        self.record = self.array = self.several = self.named = self.number = self.odd = None

    def aggregate_train(self, server_round, replies):
        self.record = ArrayRecord({"b": Array(np.ones(2)), "a": Array(np.zeros((), dtype=np.int64))})
        self.array = np.float32(3.5)
        self.several = [np.arange(3), np.asarray(True)]
        self.named = {"z": np.ones((0, 2)), "a/b": np.full((2, 2), np.nan)}
        self.number = server_round
        self.odd = object()
        return super().aggregate_train(server_round, replies)


def test_state_of_every_kind_comes_back_in_order_and_what_cannot_be_saved_is_said(tmp_path, caplog):
    made = Peculiar()
    run(Resumable(made, tmp_path), mlp, rounds=1)
    assert any("attribute 'odd' of type object is not saved" in text for text in caplog.messages)
    back = Peculiar()
    run(Resumable(back, tmp_path), mlp, rounds=1)
    assert same(back.record, made.record)
    assert back.array.dtype == np.float32
    assert back.array == made.array
    assert back.number == 1
    for left, right in zip(back.several, made.several, strict=True):
        np.testing.assert_array_equal(left, right, strict=True)
    assert list(back.named) == list(made.named)
    for name, value in made.named.items():
        np.testing.assert_array_equal(back.named[name], value, strict=True)


def test_an_evaluation_that_raises_does_not_cost_the_round_that_was_trained(tmp_path):
    make, net = STRATEGIES["C2M3 around FedAvgM"]

    def started(folder, evaluate_fn=None):
        grid = SerialGrid(digits_app(net, independent=True, epochs=1), 5)
        return Resumable(make(), folder).start(grid, from_params(net().state_dict()), 3, evaluate_fn=evaluate_fn)

    def evaluate(current, arrays):
        if current == 2:
            raise OSError("the test set is gone")

    with pytest.raises(OSError, match="the test set is gone"):
        started(tmp_path / "a", evaluate)
    assert Folder(tmp_path / "a").load().round == 2
    assert same(started(tmp_path / "a").arrays, started(tmp_path / "b").arrays)


def test_a_resumed_run_counts_its_rounds_from_the_very_first_start(tmp_path, caplog):
    make, net = STRATEGIES["bare FedAvg"]
    run(Resumable(make(), tmp_path), net, rounds=2)
    assert not any("resumed: " in text for text in caplog.messages)
    run(Resumable(make(), tmp_path), net, rounds=4)
    found = [text for text in caplog.messages if "resumed: this is round" in text]
    assert [text.rsplit("this is ", 1)[1] for text in found] == ["round 3 of 4", "round 4 of 4"]


VICTIM = textwrap.dedent(
    """
    import sys
    from flwr.serverapp.strategy import FedAvgM
    from tests.flower.federation import mlp
    from tests.flower.interrupted import c2m3, run
    from c2m3_fl.flower.resuming.resumable import Resumable
    run(Resumable(c2m3(FedAvgM(fraction_evaluate=0.0, server_momentum=0.5)), sys.argv[1]), mlp, rounds=200)
    """
)


@pytest.mark.slow
def test_kill_9_costs_at_most_the_running_round(tmp_path):
    """Three real processes, each killed some rounds after it began; the fourth run ends like an undisturbed one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    last = 0
    for lives in range(3):
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(tmp_path / "a")], env=environment, stdout=subprocess.DEVNULL, stderr=-3
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and _latest(tmp_path / "a") < last + 3 + lives:
            time.sleep(0.005)
        victim.send_signal(signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        found = Folder(tmp_path / "a").load()
        assert found is not None
        assert found.round >= last + 3
        last = found.round
    make, net = STRATEGIES["C2M3 around FedAvgM"]
    resumed = run(Resumable(make(), tmp_path / "a"), net, rounds=last + 2)
    whole = run(Resumable(make(), tmp_path / "b"), net, rounds=last + 2)
    assert same(resumed.arrays, whole.arrays)


def _latest(folder: Path) -> int:
    return max((int(path.stem.split("-")[1]) for path in folder.glob("round-*.json")), default=0)


def test_nothing_is_pickled(tmp_path):
    run(Resumable(c2m3(FedAdam(fraction_evaluate=0.0)), tmp_path), mlp, rounds=1)
    (text,) = tmp_path.glob("*.json")
    content = json.loads(json.loads(text.read_text())["content"])
    assert content["round"] == 1
    assert list(to_params(ArrayRecord({k: Array(v) for k, v in Folder(tmp_path).load().arrays.items()}))) == list(
        mlp().state_dict()
    )
    assert isinstance(torch.tensor(content["shapes"]["model/0.weight"]), torch.Tensor)
