"""What is on the disk is whole, or recognised as damaged."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from c2m3_fl.errors import ConfigError, DataError
from c2m3_fl.flower.resuming.checkpoint import Checkpoint, Folder
from c2m3_fl.flower.resuming.resumable import Resumable
from tests.flower.federation import mlp, same
from tests.flower.interrupted import ROUNDS, STRATEGIES, Killed, run


def test_only_the_latest_checkpoints_are_kept(tmp_path):
    make, net = STRATEGIES["bare FedAvg"]
    run(Resumable(make(), tmp_path), net)
    names = [f"round-00000{n}.{end}" for n in (3, 4) for end in ("json", "safetensors")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def signed(text):
    """The JSON of a checkpoint with this content, its checksum right."""
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}).encode()


def changed(data, **entries):
    return signed(json.dumps(json.loads(json.loads(data)["content"]) | entries))


DAMAGE = {
    "truncated tensors": ("safetensors", lambda data: data[: len(data) // 2]),
    "one bit of the tensors": ("safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "empty tensors": ("safetensors", lambda data: b""),
    "truncated JSON": ("json", lambda data: data[: len(data) // 2]),
    "one digit of the JSON": ("json", lambda data: data.replace(b'round\\": 3', b'round\\": 2')),
    "empty JSON": ("json", lambda data: b""),
    "binary JSON": ("json", lambda data: b"\xff\xfe" + data),
    "JSON of another type": ("json", lambda data: b"[1, 2]"),
    "content that is a number": ("json", lambda data: b'{"sha256": "", "content": 5}'),
    "content nested 200,000 deep": ("json", lambda data: signed("[" * 200_000)),
    "JSON nested 200,000 deep": ("json", lambda data: b"[" * 200_000 + b"]" * 200_000),
    "keys of another type": ("json", lambda data: changed(data, keys=5)),
    "round of another type": ("json", lambda data: changed(data, round="3")),
    "another round": ("json", lambda data: changed(data, round=2)),
    "shapes that do not fit": ("json", lambda data: changed(data, shapes={})),
    "notes of another type": ("json", lambda data: changed(data, notes=[1])),
    "no notes of strategies": ("json", lambda data: changed(data, notes={"generators": [], "calibration": [""]})),
    "metrics of another type": ("json", lambda data: changed(data, metrics={"train_metrics_clientapp": "x"})),
    "another format": ("json", lambda data: changed(data, format=[])),
}


@pytest.mark.parametrize(("end", "harm"), DAMAGE.values(), ids=DAMAGE.keys())
def test_of_a_damaged_checkpoint_the_one_before_is_used(end, harm, tmp_path, caplog):
    make, net = STRATEGIES["C2M3 around FedAvgM"]
    folder, expected = _three_rounds_and_the_result_of_four(tmp_path)
    latest = folder / f"round-000003.{end}"
    harmed = harm(latest.read_bytes())
    assert harmed != latest.read_bytes()
    latest.write_bytes(harmed)
    resumed = run(Resumable(make(), folder), net)
    assert same(resumed.arrays, expected)
    assert any("is damaged, trying the one before it" in text for text in caplog.messages)
    assert any("resuming after round 2" in text for text in caplog.messages)


_FILES = {}


def _three_rounds_and_the_result_of_four(folder):
    """Trained once for all tests."""
    make, net = STRATEGIES["C2M3 around FedAvgM"]
    if not _FILES:
        _FILES["result"] = run(Resumable(make(), folder / "whole"), net).arrays
        run(Resumable(make(), folder / "three"), net, rounds=3)
        _FILES["saved"] = {path.name: path.read_bytes() for path in (folder / "three").iterdir()}
    (folder / "a").mkdir()
    for name, content in _FILES["saved"].items():
        (folder / "a" / name).write_bytes(content)
    return folder / "a", _FILES["result"]


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


def test_a_folder_must_keep_something(tmp_path):
    with pytest.raises(ConfigError, match="keep is 0"):
        Folder(tmp_path, keep=0)


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


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_no_round(tmp_path, monkeypatch, caplog):
    make, net = STRATEGIES["C2M3 around FedAvgM"]
    real, written = os.fsync, iter(range(100))

    def full(descriptor):
        if next(written) in (4, 5):  # of four in a round: the tensors of round two, and of round three
            raise OSError(28, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    found = run(Resumable(make(), tmp_path / "a"), net)
    monkeypatch.undo()
    assert same(found.arrays, run(Resumable(make(), tmp_path / "b"), net).arrays)
    assert sum("could not be written: [Errno 28]" in text for text in caplog.messages) == 2
    assert sorted(path.name for path in (tmp_path / "a").glob("*.json")) == ["round-000001.json", "round-000004.json"]
    assert not list((tmp_path / "a").glob(".*"))
    assert Folder(tmp_path / "a").load().round == ROUNDS


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="checkpoints cannot be written to"):
        run(Resumable(FedAvg(), tmp_path / "file"), mlp, killed_in=1)


def test_what_a_killed_server_left_half_written_is_removed(tmp_path):
    (tmp_path / ".round-000001.json.99.part").write_bytes(b"half")
    with Folder(tmp_path).opened():
        pass
    assert not list(tmp_path.iterdir())
