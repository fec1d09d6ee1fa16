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
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian

from c2m3_fl.errors import ConfigError, DataError
from c2m3_fl.flower.checkpoint import Checkpoint, Folder
from c2m3_fl.flower.records import from_params, to_params
from c2m3_fl.flower.resuming import Resumable
from c2m3_fl.flower.serial import SerialGrid
from c2m3_fl.flower.strategy import C2M3
from tests.flower.federation import EXAMPLE, accuracy, calibration, digits_app, mlp, normed, same

ROUNDS = 4


class Killed(BaseException):
    """Stands for the end of the server process."""


def c2m3(inner, make=mlp, **options):
    return C2M3(inner, model=make(), example_inputs=EXAMPLE, **options)


STRATEGIES = {
    "bare FedAvg": (lambda: FedAvg(fraction_evaluate=0.5), mlp),
    "bare FedAdam": (lambda: FedAdam(fraction_evaluate=0.0), mlp),
    "C2M3 around FedAvgM": (lambda: c2m3(FedAvgM(fraction_evaluate=0.0, server_momentum=0.5)), mlp),
    "C2M3 around FedAdam, sampling": (lambda: c2m3(FedAdam(fraction_train=0.6, fraction_evaluate=0.5)), mlp),
    "C2M3, own bases, with repair": (
        lambda: C2M3(FedAvg(fraction_evaluate=0.0), model=mlp(), calibration=calibration(), basis="client"),
        mlp,
    ),
    "C2M3 with BatchNorm": (lambda: c2m3(FedAvgM(fraction_evaluate=0.0, server_momentum=0.5), normed), normed),
}


def run(strategy, make, killed_in=None, rounds=ROUNDS):
    """Train five clients of independent initialisation; `killed_in` a round, after its training."""
    trained = iter(range(1, 100))

    def transit(replies):
        if replies and replies[0].metadata.message_type == "train" and next(trained) == killed_in:
            raise Killed
        return replies

    def evaluate(current, arrays):
        return MetricRecord({"accuracy": accuracy(make, arrays), "round": current})

    grid = SerialGrid(digits_app(make, independent=True, epochs=1), 5, transit=transit)
    return strategy.start(grid, from_params(make().state_dict()), num_rounds=rounds, evaluate_fn=evaluate)


def comparable(metrics):
    """Metrics of a run without the seconds that it took."""
    return {
        current: {key: value for key, value in record.items() if "seconds" not in key}
        for current, record in metrics.items()
    }


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


def test_only_the_latest_checkpoints_are_kept(tmp_path):
    make, net = STRATEGIES["bare FedAvg"]
    run(Resumable(make(), tmp_path), net)
    names = [f"round-00000{n}.{end}" for n in (3, 4) for end in ("json", "safetensors")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


DAMAGE = {
    "truncated tensors": ("safetensors", lambda data: data[: len(data) // 2]),
    "one bit of the tensors": ("safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "empty tensors": ("safetensors", lambda data: b""),
    "truncated JSON": ("json", lambda data: data[: len(data) // 2]),
    "one digit of the JSON": ("json", lambda data: data.replace(b'round\\": 3', b'round\\": 2')),
    "empty JSON": ("json", lambda data: b""),
    "binary JSON": ("json", lambda data: b"\xff\xfe" + data),
}


@pytest.mark.parametrize(("end", "harm"), DAMAGE.values(), ids=DAMAGE.keys())
def test_of_a_damaged_checkpoint_the_one_before_is_used(end, harm, tmp_path, caplog):
    make, net = STRATEGIES["C2M3 around FedAvgM"]
    whole = run(Resumable(make(), tmp_path / "whole"), net)
    run(Resumable(make(), tmp_path / "a"), net, rounds=3)
    latest = tmp_path / "a" / f"round-000003.{end}"
    harmed = harm(latest.read_bytes())
    assert harmed != latest.read_bytes()
    latest.write_bytes(harmed)
    resumed = run(Resumable(make(), tmp_path / "a"), net)
    assert same(resumed.arrays, whole.arrays)
    assert any("is damaged, trying the one before it" in text for text in caplog.messages)
    assert any("resuming after round 2" in text for text in caplog.messages)


def test_tensors_without_their_json_do_not_count(tmp_path):
    make, net = STRATEGIES["bare FedAvg"]
    run(Resumable(make(), tmp_path), net, rounds=2)
    (tmp_path / "round-000002.json").unlink()
    assert Folder(tmp_path).load().round == 1


def test_when_every_checkpoint_is_damaged_nothing_is_overwritten(tmp_path):
    make, net = STRATEGIES["bare FedAvg"]
    run(Resumable(make(), tmp_path), net, rounds=2)
    for path in tmp_path.glob("*.json"):
        path.write_text("{}")
    with pytest.raises(DataError, match=r"every checkpoint in .* is damaged; move the folder away"):
        run(Resumable(make(), tmp_path), net)


def test_checkpoints_of_other_strategies_are_refused(tmp_path):
    run(Resumable(FedAvg(), tmp_path), mlp, rounds=1)
    with pytest.raises(ConfigError, match=r"of strategies \['FedAvg'\], these are \['FedMedian'\]"):
        run(Resumable(FedMedian(), tmp_path), mlp)


def test_a_folder_must_keep_something(tmp_path):
    with pytest.raises(ConfigError, match="keep is 0"):
        Folder(tmp_path, keep=0)


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


@pytest.mark.parametrize("call", [(os, "fsync"), (Path, "replace")], ids=["fsync", "rename"])
@pytest.mark.parametrize("survived", range(4))
def test_no_crash_while_saving_leaves_half_a_checkpoint(call, survived, tmp_path, monkeypatch):
    def checkpoint(number):
        return Checkpoint(number, {"w": np.full(3, number)}, {}, {}, {})

    folder, (owner, name), left = Folder(tmp_path), call, iter(range(survived))
    real = getattr(owner, name)

    def dying(*args):
        if next(left, None) is None:
            raise Killed
        return real(*args)

    folder.save(checkpoint(1))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        try:
            folder.save(checkpoint(2))
            complete = True
        except Killed:
            complete = False
    found = folder.load()
    assert found.round == 2 if complete else found.round in (1, 2)
    assert np.array_equal(found.arrays["w"], np.full(3, found.round))
    folder.save(checkpoint(3))
    assert folder.load().round == 3


VICTIM = textwrap.dedent(
    """
    import sys
    from flwr.serverapp.strategy import FedAvgM
    from tests.flower.test_resuming import c2m3, mlp, run
    from c2m3_fl.flower.resuming import Resumable
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
