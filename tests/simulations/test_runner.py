from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from c2m3_fl.errors import SimulationError
from simulations import runner
from simulations.design import read_design
from simulations.ledger import load, read_lines

TEXT = """
title = "small"
seeds = [0, 1]
methods = ["fedavg", "c2m3"]
baseline = "fedavg"
judged = "c2m3"

[settings]
hidden-widths = "8"
clients = 2
rounds = 2
local-epochs = 1
train-size = 200

[axes.start]
shared = { initialisation = "shared" }
own = { initialisation = "independent" }
"""
DESIGN = read_design("small", TEXT)
MANY = 8  # cells x seeds x methods


def _stable(record):
    """Everything but the clock, and which method happened to train what."""
    return [
        {**asdict(each), "seconds": 0, "server_seconds": 0, "date": "", "trained": 0, "metrics": {}}
        for each in record.measurements
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return runner.run_design(DESIGN, tmp_path_factory.mktemp("whole"))


class Killed(BaseException):
    """What ends a run from outside."""


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_run_that_was_ended_goes_on_and_gives_the_same_file(tmp_path, whole, after):
    def end(found, _total):
        if len(found) == after:
            raise Killed

    with pytest.raises(Killed):
        runner.run_design(DESIGN, tmp_path, watch=end)
    assert len(read_lines(tmp_path / "small.jsonl")) == after
    assert not (tmp_path / "small.json").exists()

    counts = []
    again = runner.run_design(DESIGN, tmp_path, watch=lambda found, _total: counts.append(len(found)))
    assert counts[0] == after
    assert _stable(again) == _stable(whole) == _stable(load(tmp_path / "small.json"))
    assert not (tmp_path / "small.jsonl").exists()


@pytest.mark.slow
def test_the_number_of_workers_changes_no_number(tmp_path, whole):
    assert _stable(runner.run_design(DESIGN, tmp_path, workers=2)) == _stable(whole)


def test_half_a_line_is_measured_again(tmp_path, whole):
    file = tmp_path / "small.jsonl"
    lines = [json.dumps(asdict(each)) for each in whole.measurements]
    file.write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])
    assert _stable(runner.run_design(DESIGN, tmp_path)) == _stable(whole)


def test_what_is_measured_is_not_measured_again_unless_asked(tmp_path, monkeypatch):
    runner.run_design(DESIGN, tmp_path)
    asked = []
    monkeypatch.setattr(runner, "run_cell", lambda *args, device: asked.append(args))
    runner.run_design(DESIGN, tmp_path)
    assert asked == []
    runner.run_design(DESIGN, tmp_path, fresh=True)
    assert len(asked) == MANY / 2


def test_a_changed_design_takes_only_what_it_shares_with_the_old_one(tmp_path, whole):
    runner.run_design(DESIGN, tmp_path)
    counts = []
    more = read_design(
        "small", TEXT.replace('"c2m3"]', '"c2m3", "fedmedian"]').replace("seeds = [0, 1]", "seeds = [0]")
    )
    record = runner.run_design(more, tmp_path, watch=lambda found, total: counts.append((len(found), total)))
    assert counts[0] == (MANY / 2, MANY / 2 + 2)
    assert [each.method for each in record.measurements] == ["fedavg", "c2m3", "fedmedian"] * 2
    other = read_design("small", TEXT.replace("rounds = 2", "rounds = 1"))
    runner.run_design(other, tmp_path, watch=lambda found, total: counts.append((len(found), total)))
    assert (0, MANY) in counts


def test_a_cell_that_fails_leaves_the_others(tmp_path):
    broken = read_design(
        "small", TEXT.replace('own = { initialisation = "independent" }', "own = { train-size = 9999 }")
    )
    with pytest.raises(SimulationError, match=r"2 of 4 tasks failed.*start own, seed 0: ConfigError: train-size 9999"):
        runner.run_design(broken, tmp_path)
    assert len(read_lines(tmp_path / "small.jsonl")) == MANY / 2


def test_the_record_says_what_was_run_where_and_when(whole):
    assert whole.about["design"]["seeds"] == (0, 1)
    assert whole.about["machine"]["cores"] == os.cpu_count()
    assert set(whole.about["versions"]) >= {"python", "torch", "numpy", "flwr", "c2m3-fl"}
    assert whole.about["measured"]["from"] <= whole.about["measured"]["to"]


@pytest.mark.slow
def test_after_the_parent_is_killed_its_workers_end_and_a_second_run_finishes(tmp_path, whole):
    script = (
        "from pathlib import Path\n"
        "from simulations.runner import run_design\n"
        "from simulations.design import read_design\n"
        "if __name__ == '__main__':\n"
        f"    run_design(read_design('small', {TEXT!r}), Path({str(tmp_path)!r}), workers=2)\n"
    )
    program = tmp_path / "run_small.py"
    program.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen([sys.executable, str(program)], env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while not read_lines(tmp_path / "small.jsonl") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while _in_group(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _in_group(process.pid) == []
    assert read_lines(tmp_path / "small.jsonl")
    assert _stable(runner.run_design(DESIGN, tmp_path)) == _stable(whole)


def _in_group(group):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                state = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(state[2]) == group and state[0] != "Z":
                found.append(int(entry))
    return found
