"""The real thing: a SuperLink and three SuperNodes with TLS on loopback, one of them killed, the server too."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

APP = Path(__file__).parent / "deployment"
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ROUNDS, NODES = 6, 3
MARK = "C2M3_TEST_PROCESS"  # in the environment of a process and of all its descendants

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes to kill in /proc"),
]


def write_certificates(folder: Path) -> None:
    """A certificate authority of our own, and a certificate for 127.0.0.1 that it signed."""
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "c2m3 test authority")])
    server_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)

    def certificate(subject, key, extensions):
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    identifier = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    authority = [(x509.BasicConstraints(ca=True, path_length=None), True), (identifier, False), (usage, True)]
    issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    server = [(names, False), (x509.BasicConstraints(ca=False, path_length=None), True), (issuer, False)]
    (folder / "ca.pem").write_bytes(certificate(authority_name, authority_key, authority))
    (folder / "server.pem").write_bytes(certificate(server_name, server_key, server))
    (folder / "server.key").write_bytes(
        server_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(happened: Callable[[], bool], seconds: float, what: str, log: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            pytest.fail(f"after {seconds:.0f} s still waiting for {what}\n{log()}")
        time.sleep(0.1)


def marked(value: str) -> list[int]:
    """Processes that inherited a mark."""
    mark, found = f"{MARK}={value}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


class Deployment:
    """Processes of one federation, each in a session of its own; all of them are killed in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", "")]),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "flwr").mkdir()
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "deployed"\n\n[superlink.deployed]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{folder / "ca.pem"}"\n'
        )
        write_certificates(folder)
        shutil.copytree(APP, folder / "app")
        shutil.copy(ROOT / "LICENSE", folder / "app")

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env={**self.environment, MARK: f"{self.folder}/{name}"},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """Kill -9 a process with everything that it started, sessions of their own included."""
        for pid in marked(f"{self.folder}/{name}"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.processes.pop(name).wait()

    def start_superlink(self) -> None:
        self.start(
            "superlink", "flower-superlink", "--host", "127.0.0.1", "--port", str(self.port),
            "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.pem",
            "--database", str(self.folder / "state.db"),
        )  # fmt: skip
        wait_for(self._listening, 90, "the SuperLink", self.logs)

    def _listening(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def start_supernode(self, partition: int) -> None:
        self.start(
            f"supernode-{partition}", "flower-supernode", "--root-certificates", "ca.pem",
            "--superlink", f"127.0.0.1:{self.port}", "--port", str(free_port()),
            "--node-config", f"partition-id={partition}",
        )  # fmt: skip

    def run(self, nodes: int) -> None:
        """Submit the app; it must be accepted."""
        config = f'folder="{self.folder}" nodes={nodes} rounds={ROUNDS}'
        done = subprocess.run(
            [str(BIN / "flwr"), "run", str(self.folder / "app"), "--run-config", config],
            env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if "Successfully started run" not in done.stdout:
            pytest.fail(f"flwr run: {done.stdout}{done.stderr}\n{self.logs()}")

    def wait_for(self, marker: str, seconds: float) -> None:
        wait_for((self.folder / marker).exists, seconds, marker, self.logs)

    def logs(self) -> str:
        return "\n".join(
            "\n".join([f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-25:]])
            for path in sorted(self.folder.glob("*.log"))
        )


@pytest.fixture
def deployment(tmp_path):
    federation = Deployment(tmp_path)
    try:
        yield federation
    finally:
        for name in list(federation.processes):
            federation.kill(name)


def test_a_federation_outlives_one_of_its_nodes_and_its_server(deployment):
    hold = deployment.folder / "hold-2-2"
    hold.touch()  # node 2 will not finish round 2
    deployment.start_superlink()
    for partition in range(NODES):
        deployment.start_supernode(partition)
    deployment.run(NODES)

    deployment.wait_for("training-2-2", 180)
    deployment.kill("supernode-2")  # in the middle of its round
    (deployment.folder / "hold-0-4").touch()
    deployment.wait_for("evaluated-3", 240)

    deployment.wait_for("training-0-4", 60)
    deployment.kill("superlink")  # with the server app, in the middle of round 4
    (deployment.folder / "hold-0-4").unlink()
    hold.unlink()
    deployment.start_superlink()  # the nodes that live find it again
    deployment.start_supernode(2)
    deployment.run(NODES)
    deployment.wait_for("result.json", 240)

    result = json.loads((deployment.folder / "result.json").read_text())
    assert list(result["replies"]) == [str(current) for current in range(1, ROUNDS + 1)]
    assert result["replies"]["1"] == 3
    assert result["replies"]["2"] == 2, "one node was killed, the round went on"
    assert result["replies"][str(ROUNDS)] == 3, "it came back"
    assert result["accuracy"]["1"] > 0.7, "independent silos, aligned"
    assert result["accuracy"][str(ROUNDS)] > 0.9
    evaluations = [line.split() for line in (deployment.folder / "evaluations").read_text().splitlines()]
    first = evaluations[0][0]
    assert [current for process, current in evaluations if process == first] == ["0", "1", "2", "3"]
    assert [current for process, current in evaluations if process != first] == ["4", "5", "6"], "it was resumed"
