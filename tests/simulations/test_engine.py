"""Real Flower processes: a SuperLink, ``flwr run``, Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from c2m3_fl.errors import SimulationError
from c2m3_fl.flower.serial_grid import SerialGrid
from simulations import client_app, engine
from simulations.comparison import run_comparison
from simulations.results import PROGRESS, RESULTS, load, read_lines
from simulations.settings import OUTPUT, Settings

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(hidden_widths="16", clients=3, rounds=1, local_epochs=2, strategy="fedavg,c2m3")

process = pytest.mark.process


def test_the_run_config_is_written_as_flower_reads_it():
    from flwr.common.config import parse_config_args

    config = {**SETTINGS.to_run_config(), OUTPUT: "results/with a space"}
    assert parse_config_args([engine._toml(config)]) == config


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_the_app_bundle_holds_library_and_simulations_and_no_tests():
    import io
    import zipfile

    from flwr.cli.build import build_fab_from_files

    files = {path.relative_to(ROOT).as_posix(): path for path in _tracked()}
    bundle, _metadata = build_fab_from_files(files)
    names = set(zipfile.ZipFile(io.BytesIO(bundle)).namelist())
    assert {"simulations/server_app.py", "c2m3_fl/flower/strategy.py", "LICENSE", "pyproject.toml"} <= names
    assert not any(name.startswith("tests/") for name in names)
    assert len(bundle) < 2**21  # Flower takes five times as much


def _tracked():
    folders = [ROOT / name for name in ("c2m3_fl", "simulations", "tests")]
    found = [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    ]
    return [*found, ROOT / "LICENSE", ROOT / "pyproject.toml", ROOT / ".gitignore"]


def _summary(rounds):
    return [(each.strategy, each.round, each.accuracy, each.clients, each.ensemble) for each in rounds]


@process
def test_flowers_engine_measures_what_the_serial_one_does_and_leaves_nothing_behind(tmp_path):
    watched = []
    with engine.flower_engine() as running:
        home = running.home
        running.run(SETTINGS, tmp_path, lambda: watched.append(len(read_lines(tmp_path / PROGRESS))))
        assert engine._marked(home)
    assert watched[-1] == 2
    assert engine._marked(home) == []
    assert not home.exists()

    grid = SerialGrid(client_app.app, SETTINGS.clients, run_config=SETTINGS.to_run_config())
    expected = run_comparison(grid, SETTINGS, lambda _scored: None)
    found = load(tmp_path / RESULTS).rounds
    for one, two in zip(_summary(found), _summary(expected), strict=True):
        assert one[:2] == two[:2]
        assert one[2] == pytest.approx(two[2], abs=0.02)  # thread counts differ, and so does rounding
        assert one[3] == pytest.approx(two[3], abs=0.02)


@process
def test_a_failed_run_says_why_and_leaves_nothing_behind(tmp_path):
    said = r"(?s)finished:failed.*clients is 900, too many for 1237 training images"
    with engine.flower_engine() as running, pytest.raises(SimulationError, match=said):
        running.run(replace(SETTINGS, clients=900), tmp_path, lambda: None)
    assert engine._marked(running.home) == []


@process
def test_flwr_run_works_by_itself_with_overrides(tmp_path):
    home = tmp_path / "home"
    environment = {**os.environ, **engine._ENVIRONMENT, "FLWR_HOME": str(home)}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = str(engine._free_port())
    environment["FLWR_LOCAL_CONTROL_API_PORT"] = str(engine._free_port())
    output = tmp_path / "output"
    overrides = f"clients=3 rounds=1 hidden-widths='16' strategy='c2m3+repair' output='{output}'"
    try:
        ran = subprocess.run(
            [engine._tool("flwr"), "run", ".", "--stream", "--run-config", overrides],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        (scored,) = load(output / RESULTS).rounds  # played by the two SuperNodes that Flower starts by default
        assert (scored.strategy, len(scored.clients)) == ("c2m3+repair", 3)
    finally:
        engine._end(engine._marked(home))


@process
def test_a_terminated_comparison_leaves_nothing_behind():
    """Its finally clauses run, as they would after Ctrl-C, and the exit status names the signal."""
    code = (
        "import time\nfrom simulations.engine import flower_engine\n"
        "with flower_engine() as engine:\n    print(engine.home, flush=True)\n    time.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        home = Path(child.stdout.readline().strip())
        assert home.is_dir()
        assert engine._marked(home)
        child.terminate()
        assert child.wait(timeout=60) == 128 + 15
    assert engine._marked(home) == []
    assert not home.exists()
