"""A folder of checkpoints: who may read it, who is in it, in which order, and of which model."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.errors import ConfigError, DataError
from c2m3_fl.flower.incoming.records import from_params
from c2m3_fl.flower.resuming import checkpoint as module
from c2m3_fl.flower.resuming.checkpoint import Checkpoint, Folder
from c2m3_fl.flower.resuming.folder_lock import locked
from c2m3_fl.flower.resuming.resumable import Resumable
from c2m3_fl.flower.serial_grid import SerialGrid
from tests.flower.federation import digits_app, mlp
from tests.flower.interrupted import Killed, run

FORK = multiprocessing.get_context("fork")


def checkpoint(number):
    return Checkpoint(number, {"w": np.full(3, number)}, {}, {}, {})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_rounds_count_as_numbers(tmp_path):
    """round-1000000 comes after round-999999, though not in the alphabet."""
    folder = Folder(tmp_path)
    for number in (999_998, 999_999, 1_000_000, 1_000_001):
        folder.save(checkpoint(number))
        assert folder.load().round == number
    assert [name for name in names(tmp_path) if name.endswith("json")] == ["round-1000000.json", "round-1000001.json"]


def test_files_of_other_names_are_left_alone(tmp_path):
    others = ["round-1.5.json", "round-last.json", "round-.json", "round-²²².json", "round-x.safetensors", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text("{}")
    folder = Folder(tmp_path, keep=1)
    with folder.opened():
        assert folder.load() is None
        folder.save(checkpoint(1))
        assert folder.load().round == 1
    assert names(tmp_path) == sorted([*others, "round-000001.json", "round-000001.safetensors"])


def test_tensors_without_their_json_are_removed(tmp_path):
    folder = Folder(tmp_path)
    folder.save(checkpoint(1))
    (tmp_path / "round-000002.safetensors").write_bytes(b"of a server that was killed in between")
    with folder.opened():
        assert names(tmp_path) == [".lock", "round-000001.json", "round-000001.safetensors"]


def test_on_a_small_disk_only_the_rounds_that_do_not_fit_are_lost(tmp_path, monkeypatch):
    """The JSON of rounds two and three finds no room; the tensors that it would have described make room again."""
    real = module._write

    def full(path, data):
        if path.suffix == ".json" and path.stem.endswith(("2", "3")):
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(module, "_write", full)
    folder = Folder(tmp_path)
    for number in (1, 2, 3, 4):
        if number in (2, 3):
            with pytest.raises(OSError, match="No space left"):
                folder.save(checkpoint(number))
        else:
            folder.save(checkpoint(number))
    rounds = ("round-000001", "round-000004")
    assert names(tmp_path) == [f"{name}.{end}" for name in rounds for end in ("json", "safetensors")]


def test_nobody_else_can_read_a_checkpoint_and_the_folder_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o750)
    (tmp_path / f".round-000001.json.{os.getpid()}.part").touch(0o644)  # of an earlier process of this number
    before = os.umask(0)
    try:
        folder = Folder(tmp_path)
        with folder.opened():
            folder.save(checkpoint(1))
            assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
                ".lock": 0o600, "round-000001.json": 0o600, "round-000001.safetensors": 0o600
            }  # fmt: skip
    finally:
        os.umask(before)
    assert tmp_path.stat().st_mode & 0o777 == 0o750


def test_two_servers_of_one_process_do_not_share_a_folder(tmp_path):
    inner = []

    def second(server_round, arrays):
        with pytest.raises(DataError, match="is in use by another server of this process"):
            run(Resumable(FedAvg(), tmp_path / "." / "a"), mlp, rounds=1)
        inner.append(server_round)

    grid = SerialGrid(digits_app(epochs=1), 2)
    arrays = from_params(mlp().state_dict())
    Resumable(FedAvg(), tmp_path / "a").start(grid, arrays, 1, evaluate_fn=second)
    assert inner == [0, 1]
    Resumable(FedAvg(), tmp_path / "a").start(grid, arrays, 2)


def _hold(folder, sender):
    """Lock a folder, and start a worker that outlives the server."""
    with locked(folder):
        worker = FORK.Process(target=time.sleep, args=(60,))
        worker.start()
        sender.send(worker.pid)
        time.sleep(60)


def test_a_lock_keeps_other_processes_out_and_dies_with_its_owner(tmp_path):
    receiver, sender = FORK.Pipe(duplex=False)
    owner = FORK.Process(target=_hold, args=(tmp_path, sender))
    owner.start()
    worker = receiver.recv()
    try:
        with pytest.raises(DataError, match=f"is in use by another server, process {owner.pid} on "):
            run(Resumable(FedAvg(), tmp_path), mlp, killed_in=1)
        os.kill(owner.pid, signal.SIGKILL)
        owner.join()
        assert names(tmp_path) == [".lock"]
        with Folder(tmp_path).opened():
            pass
        assert names(tmp_path) == []
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_is_given_back_when_the_run_fails(tmp_path):
    for _ in range(2):
        with pytest.raises(Killed):
            run(Resumable(FedAvg(fraction_evaluate=0.0), tmp_path), mlp, killed_in=1, rounds=1)


@pytest.mark.parametrize("make", [lambda: mlp(width=16), lambda: mlp()[:3]], ids=["shape", "keys"])
def test_checkpoints_of_another_model_are_refused_by_a_bare_strategy_too(make, tmp_path):
    run(Resumable(FedAvg(fraction_evaluate=0.0), tmp_path), mlp, rounds=1)
    before = names(tmp_path)
    with pytest.raises(ConfigError, match=r"the checkpoint is of another model: '0.bias' has shape|'4.bias' has shape"):
        run(Resumable(FedAvg(fraction_evaluate=0.0), tmp_path), make)
    assert names(tmp_path) == before
