"""Flower's own engine as a child of this process: a SuperLink and ``flwr run``, both ended afterwards.

``flwr run .`` by itself starts a SuperLink on fixed ports, which outlives the command. Here the SuperLink has a free
port, a home folder and a process session of its own, and all its processes are ended, by process id.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import simulations
from c2m3_fl.errors import SimulationError
from c2m3_fl.extras import require
from simulations.settings import OUTPUT, Settings, Value

_STARTING = 90.0  # seconds that a SuperLink may take to answer
_ENDING = 10.0  # seconds that processes may take to end before they are killed
_POLL = 0.3  # seconds between polls of a run
_TAIL = 30  # last lines of a log that errors quote
_SHORT = 30  # characters: Ray puts sockets some 70 characters deeper, and a socket's path has at most 107

_ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # the app's dependencies are installed already
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait for work leave the cores to the clients
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class FlowerEngine:
    """A running SuperLink in simulation mode.

    Attributes
    ----------
    home : Path
        Its private folder: configuration, logs, app bundles.
    environment : mapping
        Environment of every process of this engine; `home` in it identifies them.
    """

    home: Path
    environment: Mapping[str, str]

    def run(self, settings: Settings, output: Path, watch: Callable[[], None]) -> None:
        """One run of this repository's app, which writes its results to `output`.

        Parameters
        ----------
        settings : Settings
            The run config; there is one SuperNode per client.
        output : Path
            Value of the run-config key ``output``.
        watch : callable
            Called now and then while the run lasts.

        Raises
        ------
        SimulationError
            When Flower does not call the run completed; the message ends with the log.
        """
        self.run_app(_root(), {**settings.to_run_config(), OUTPUT: str(output)}, settings.clients, watch)

    def run_app(self, app: Path, config: Mapping[str, Value], nodes: int, watch: Callable[[], None]) -> None:
        """One run of any Flower app.

        Parameters
        ----------
        app : Path
            Its folder.
        config : mapping
            Values of run-config keys that replace the app's own.
        nodes : int
            Number of SuperNodes.
        watch : callable
            Called now and then while the run lasts.

        Raises
        ------
        SimulationError
            When Flower does not call the run completed; the message ends with the log.
        """
        federation = {"num-supernodes": nodes, "client-resources-num-cpus": 1}
        log = self.home / "run.log"
        chosen = ["--run-config", _toml(config), "--federation-config", _toml(federation)]
        process = _start([_tool("flwr"), "run", str(app), "--stream", *chosen], self.environment, log)
        try:
            while process.poll() is None:
                watch()
                time.sleep(_POLL)
        finally:
            _end([process.pid] if process.poll() is None else [])
        watch()
        self._check(log)

    def _check(self, log: Path) -> None:
        """Raise unless the latest run is listed as completed: ``flwr run`` exits with 0 even when its run failed."""
        said = log.read_text(errors="replace")
        started = re.search(r"Successfully started run (\d+)", said)
        if started is None:
            raise SimulationError(f"flwr run did not start a run:\n{_last(said)}")
        listed = subprocess.run(
            [_tool("flwr"), "list", "--run-id", started[1], "--format", "json"],
            env=dict(self.environment),
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            (run,) = json.loads(listed.stdout[listed.stdout.index("{") :])["runs"]
            status, details = run["status"], run["status-details"]
        except (ValueError, KeyError) as error:
            raise SimulationError(f"flwr list did not describe the run:\n{listed.stdout}{listed.stderr}") from error
        if status != "finished:completed":
            raise SimulationError(f"Flower's run ended as {status!r} ({details}):\n{_last(said)}")


@contextmanager
def flower_engine() -> Iterator[FlowerEngine]:
    """A SuperLink for the duration of a ``with`` block; afterwards its processes are ended and its files removed.

    Raises
    ------
    MissingExtraError
        When Ray is not installed.
    SimulationError
        When the SuperLink does not start.
    """
    require("simulation", "ray")
    home = Path(tempfile.mkdtemp(prefix="c2m3-"))
    port = _free_port()
    environment = {**os.environ, **_ENVIRONMENT, "FLWR_HOME": str(home)}
    if len(str(home)) <= _SHORT:
        environment["RAY_TMPDIR"] = str(home)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "c2m3"\n\n[superlink.c2m3]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    engine = FlowerEngine(home, environment)
    log = home / "superlink.log"
    process: subprocess.Popen[bytes] | None = None
    previous = signal.signal(signal.SIGTERM, _leave)
    try:
        address = ["--host", "127.0.0.1", "--port", str(port)]
        process = _start([_tool("flower-superlink"), "--insecure", "--simulation", *address], environment, log)
        _await_health(process, port, log)
        yield engine
    finally:
        _end([] if process is None else [process.pid])
        _end(_marked(home))
        if process is not None:
            process.wait()
        shutil.rmtree(home, ignore_errors=True)
        signal.signal(signal.SIGTERM, previous)


def _leave(number: int, _: object) -> None:
    """Exit on a signal by an exception, so that ``finally`` clauses run."""
    sys.exit(128 + number)


def _root() -> Path:
    """The repository: the folder whose pyproject.toml describes the app."""
    root = Path(simulations.__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        raise SimulationError(f"{root} has no pyproject.toml: Flower's engine needs a checkout; use --engine serial")
    return root


def _tool(name: str) -> str:
    """Console script of this environment."""
    return str(Path(sys.executable).parent / name)


def _start(command: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A child process in its own session, so that Ctrl-C reaches this process first; its output goes to the log."""
    with log.open("w") as stream:
        return subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_health(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _STARTING
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
            return
        time.sleep(_POLL)
    raise SimulationError(f"the SuperLink did not start:\n{_last(log.read_text(errors='replace'))}")


def _toml(config: Mapping[str, Value]) -> str:
    """``key=value`` pairs as ``flwr run`` reads them."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())


def _last(said: str) -> str:
    return "\n".join(said.splitlines()[-_TAIL:])


def _marked(home: Path) -> list[int]:
    """Processes with our private home in their environment: the SuperLink's children and Ray's daemons.

    Without /proc none are found, and Flower and Ray must end with their parent.
    """
    mark = f"FLWR_HOME={home}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int(entry.name) != os.getpid() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def _end(pids: list[int]) -> None:
    """Ask the processes to end, then kill those that still run."""
    for asked in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, asked)
        deadline = time.monotonic() + _ENDING
        while pids and time.monotonic() < deadline:
            pids = [pid for pid in pids if _alive(pid)]
            time.sleep(_POLL / 3)


def _alive(pid: int) -> bool:
    """Whether the process still runs; a child that has ended is reaped."""
    with suppress(ChildProcessError):
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
