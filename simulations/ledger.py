"""Measurements of an experiment: one line per method, cell and seed while it runs, one JSON file at the end."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from c2m3_fl.errors import DataError

_PACKAGES = ("c2m3-fl", "flwr", "torch", "numpy", "scipy")
_SEQUENCES = ("accuracy", "loss", "calibration_error", "clients", "moved")  # fields that JSON holds as lists
_DIGITS = 5  # significant digits of a stored accuracy or loss

Number = float | None  # None for a loss that is not finite, which JSON cannot hold


@dataclass(frozen=True)
class Measurement:
    """One method on one cell from one seed.

    Attributes
    ----------
    cell : mapping of str to str
        The cell's level on every axis.
    seed : int
        Seed of data, initialisations and batches.
    method : str
        A name of `simulations.settings.TITLES`.
    accuracy, loss : tuple of float
        Of the model that the strategy returned, on the test images, after every round.
    clients : tuple of float
        Accuracy of every client's reply in the last round.
    ensemble : float
        Accuracy of their mean probabilities.
    metrics : mapping
        The strategy's own numbers in the last round.
    moved : tuple of float
        Share of units that moved in every round; empty for strategies without alignment.
    trained : int
        Number of local trainings that no earlier method of the cell had done.
    seconds : float
        Wall-clock time, including these trainings.
    calibration_error : tuple of float
        Expected calibration error of the returned model, in 15 bins, after every round.
    server_seconds : float
        CPU time outside clients and evaluation.
    down, up : int
        Bytes of arrays that one client received and sent, on average over clients, in the whole run.
    date : str
        Time of the end, in UTC.
    key : str
        Digest of the settings and the method, by which a changed experiment ignores old measurements.
    place : str
        Machine, device and version of torch; empty in records of 2026-11-26 and before, which two cores measured.
    """

    cell: Mapping[str, str]
    seed: int
    method: str
    accuracy: tuple[Number, ...]
    loss: tuple[Number, ...]
    clients: tuple[float, ...]
    ensemble: float
    metrics: Mapping[str, Number] = field(default_factory=dict)
    moved: tuple[float, ...] = ()
    trained: int = 0
    seconds: float = 0.0
    calibration_error: tuple[Number, ...] = ()
    server_seconds: float = 0.0
    down: int = 0
    up: int = 0
    date: str = ""
    key: str = ""
    place: str = ""


@dataclass(frozen=True)
class Record:
    """A finished experiment.

    Attributes
    ----------
    about : mapping
        Configuration, versions, dates and machine.
    measurements : tuple of Measurement
        In the order of the design.
    """

    about: Mapping[str, object]
    measurements: tuple[Measurement, ...]


def finite(value: float) -> Number:
    """The number, rounded to the stored precision; None if it is not finite."""
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def now() -> str:
    """Date and time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")


def append(measurement: Measurement, file: Path) -> None:
    """Append one line with one write, so that processes may share the file and earlier lines are always complete."""
    line = json.dumps(asdict(measurement), separators=(",", ":")) + "\n"
    target = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if _torn(file):
            line = "\n" + line
        os.write(target, line.encode())
        os.fsync(target)
    finally:
        os.close(target)


def _torn(file: Path) -> bool:
    """Whether the file ends with an incomplete line."""
    with file.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        if stream.tell() == 0:
            return False
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) != b"\n"


def read_lines(file: Path) -> tuple[Measurement, ...]:
    """Measurements that `append` has written completely; none if there is no file."""
    if not file.exists():
        return ()
    found = []
    for line in file.read_text().splitlines():
        try:
            found.append(_measurement(json.loads(line)))
        except (ValueError, TypeError, KeyError):  # an incomplete line of a process that was killed
            continue
    return tuple(found)


def save(record: Record, file: Path) -> None:
    """Write as JSON, one line per measurement, in one step: a reader never sees half a file."""
    rows = ",\n".join("  " + json.dumps(asdict(each), separators=(",", ":")) for each in record.measurements)
    text = json.dumps(dict(record.about), indent=1)[:-2] + ',\n "measurements": [\n' + rows + "\n ]\n}\n"
    beside = file.with_suffix(".partial")
    beside.write_text(text)
    beside.replace(file)


def load(file: Path) -> Record:
    """Read what `save` wrote.

    Raises
    ------
    DataError
        When there is no such file.
    """
    if not file.exists():
        raise DataError(f"{file} does not exist: run the experiment before drawing it")
    stored = json.loads(file.read_text())
    rows = stored.pop("measurements")
    return Record(stored, tuple(_measurement(row) for row in rows))


def surroundings() -> dict[str, object]:
    """Versions of the packages, and the machine."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine()},
    }


def place_of(device: torch.device) -> str:
    """Machine, device and version of torch, such as ``"2 cores, torch 2.15.0"``."""
    name = [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    return ", ".join([f"{os.cpu_count()} cores", *name, f"torch {_version('torch')}"])


def ordered(measurements: Sequence[Measurement], keys: Sequence[str]) -> tuple[Measurement, ...]:
    """The measurement of every key, in the order of the keys."""
    known = {each.key: each for each in measurements}
    return tuple(known[key] for key in keys if key in known)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _measurement(row: Mapping[str, Any]) -> Measurement:
    known: dict[str, Any] = {name: row[name] for name in Measurement.__dataclass_fields__ if name in row}
    return Measurement(**{**known, **{name: tuple(known[name]) for name in _SEQUENCES if name in known}})
