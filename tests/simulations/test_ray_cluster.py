"""Flower's engine on a Ray cluster of two nodes, both on the loopback interface."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from c2m3_fl.flower.serial_grid import SerialGrid
from simulations import client_app, engine
from simulations.comparison import run_comparison
from simulations.results import RESULTS, load
from simulations.settings import Settings

SETTINGS = Settings(hidden_widths="16", clients=4, rounds=1, local_epochs=3, strategy="fedavg,c2m3")
_STORE = 2**27  # bytes of a node's object store; Ray takes 30 % of the memory by itself
_READY = 90.0  # seconds that a node may take

pytestmark = pytest.mark.process


@contextmanager
def ray_node(*options):
    """A node with one CPU and a temporary folder of its own, which identifies its processes; it ends with the block."""
    home = Path(tempfile.mkdtemp(prefix="ray-"))  # short: a socket's path has at most 107 characters
    environment = {**os.environ, **engine._ENVIRONMENT, "FLWR_HOME": str(home), "OMP_NUM_THREADS": "1"}
    log = home / "ray.log"
    command = [engine._tool("ray"), "start", *options, "--node-ip-address", "127.0.0.1", "--num-cpus", "1", "--block"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--temp-dir", str(home), "--object-store-memory", str(_STORE), "--disable-usage-stats"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _READY
        while "runtime started" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        assert "runtime started" in log.read_text(), log.read_text()
        yield home
    finally:
        engine._end([process.pid])
        engine._end(engine._marked(home))
        process.wait()
        shutil.rmtree(home, ignore_errors=True)


def _clients(home):
    """Processes of a node that run clients."""
    found = set()
    for pid in engine._marked(home):
        with suppress(OSError):
            if b"ClientAppActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


def _outcome(rounds):
    return [(each.strategy, each.round, each.accuracy, each.loss, each.clients, each.ensemble) for each in rounds]


def test_two_nodes_of_a_cluster_measure_what_one_process_does(tmp_path, monkeypatch):
    port = engine._free_port()
    address = f"127.0.0.1:{port}"
    head = ["--head", "--port", str(port), "--include-dashboard", "false"]
    head += ["--ray-client-server-port", str(engine._free_port())]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # Ray's daemons listen on every interface
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    working = {"head": set(), "worker": set()}
    with ray_node(*head) as first, ray_node("--address", address) as second:
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")

        def watch():
            working["head"] |= _clients(first)
            working["worker"] |= _clients(second)

        with engine.flower_engine() as running:
            running.run(SETTINGS, tmp_path, watch)
    assert all(working.values()), working  # how many processes a node starts is up to Ray
    assert engine._marked(first) == engine._marked(second) == []

    grid = SerialGrid(client_app.app, SETTINGS.clients, run_config=SETTINGS.to_run_config())
    expected = run_comparison(grid, SETTINGS, lambda _scored: None)
    assert _outcome(load(tmp_path / RESULTS).rounds) == _outcome(expected)
