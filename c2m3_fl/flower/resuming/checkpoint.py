"""Checkpoints of a whole federation: a server that is killed loses at most the round it was in.

A checkpoint is two files, ``round-000007.safetensors`` with every tensor and ``round-000007.json`` with all
else and the digests of both. Each is written beside its place, flushed to the disk and renamed; the JSON comes
last and makes the checkpoint count. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import INFO, WARNING
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from flwr.supercore import log
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from c2m3_fl.errors import ConfigError, DataError
from c2m3_fl.flower.resuming.encoding import Arrays
from c2m3_fl.flower.resuming.folder_lock import locked

_FORMAT = 2  # of the JSON; raised when old checkpoints could no longer be read
_NAME = re.compile(r"round-[0-9]{1,18}")
_MESSAGE = 300  # characters of what is wrong with a file


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a federation after a round.

    Attributes
    ----------
    round : int
        The last round that is over.
    arrays : dict of str to ndarray
        The global model, its keys in order.
    state : dict of str to ndarray
        Tensors of the strategies, and of random generators.
    notes : dict
        JSON: how the strategies' state is made up of them, and whatever else must be remembered.
    metrics : dict
        JSON: the metrics of every round so far, by kind and round.
    """

    round: int
    arrays: Arrays
    state: Arrays
    notes: dict[str, Any]
    metrics: dict[str, Any]


class Folder:
    """Where checkpoints live.

    Parameters
    ----------
    path : str or Path
        The folder; made when the run starts.
    keep : int
        How many of the latest checkpoints to keep. With two, one may be damaged.
    """

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ConfigError(f"keep is {keep}, expected the number of checkpoints to keep, at least 1")
        self.path = Path(path)
        self.keep = keep

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder and keep other servers out of it; `DataError` where nothing can be written to it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise DataError(f"checkpoints cannot be written to {self.path}: {error}") from error
        with locked(self.path):
            for left in self.path.glob(".round-*.part"):  # of a server that was killed while it wrote
                left.unlink(missing_ok=True)
            self._remove_orphans()
            yield

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint so that a crash at any point leaves this one or the one before it."""
        self.path.mkdir(parents=True, exist_ok=True)
        tensors = {f"model/{name}": value for name, value in checkpoint.arrays.items()}
        tensors |= {f"state/{name}": value for name, value in checkpoint.state.items()}
        data = save_tensors({name: np.ascontiguousarray(value) for name, value in tensors.items()})
        content = {
            "format": _FORMAT,
            "round": checkpoint.round,
            "keys": list(checkpoint.arrays),
            "shapes": {name: list(value.shape) for name, value in tensors.items()},
            "notes": checkpoint.notes,
            "metrics": checkpoint.metrics,
            "tensors-sha256": hashlib.sha256(data).hexdigest(),
        }
        text = json.dumps(content)
        stem = self.path / f"round-{checkpoint.round:06d}"
        try:
            _write(stem.with_suffix(".safetensors"), data)
            _write(stem.with_suffix(".json"), json.dumps({"sha256": _sha(text), "content": text}).encode())
        finally:
            self._remove_orphans()
        for old in self._stems()[self.keep :]:
            old.with_suffix(".json").unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def load(self, use: Callable[[Checkpoint], None] = lambda found: None) -> Checkpoint | None:
        """The latest undamaged checkpoint; None where there is none at all.

        Parameters
        ----------
        use : callable
            Takes the checkpoint over. Where it raises anything but `ConfigError`, the checkpoint is damaged.

        Raises
        ------
        DataError
            When there are checkpoints and every one of them is damaged.
        """
        stems = self._stems()
        for stem in stems:
            try:
                found = _read(stem)
                use(found)
            except ConfigError:
                raise
            except Exception as error:  # JSON may be nested too deep, or too large
                text = f"{type(error).__name__}: {error}"[:_MESSAGE]
                log(WARNING, "checkpoint %s is damaged, trying the one before it: %s", stem, text)
                continue
            log(INFO, "resuming after round %d from %s", found.round, stem)
            return found
        if stems:
            raise DataError(f"every checkpoint in {self.path} is damaged; move the folder away to start anew")
        return None

    def _stems(self) -> list[Path]:
        """Checkpoints that count, the latest first."""
        found = [path.with_suffix("") for path in self.path.glob("round-*.json") if _NAME.fullmatch(path.stem)]
        return sorted(found, key=_number, reverse=True)

    def _remove_orphans(self) -> None:
        """Remove tensors whose JSON was never written: they count for nothing and fill the disk."""
        for path in self.path.glob("round-*.safetensors"):
            if _NAME.fullmatch(path.stem) and not path.with_suffix(".json").exists():
                path.unlink(missing_ok=True)


def _number(stem: Path) -> int:
    return int(stem.name.removeprefix("round-"))


def _read(stem: Path) -> Checkpoint:
    outer = json.loads(stem.with_suffix(".json").read_bytes())
    text = outer["content"]
    if not isinstance(text, str) or _sha(text) != outer["sha256"]:
        raise ValueError("the JSON does not match its checksum")
    content: Mapping[str, Any] = json.loads(text)
    if content["format"] != _FORMAT:
        raise ValueError(f"its format is {content['format']!r}, expected {_FORMAT}")
    if content["round"] != _number(stem):
        raise ValueError(f"it is of round {content['round']!r}")
    data = stem.with_suffix(".safetensors").read_bytes()
    if hashlib.sha256(data).hexdigest() != content["tensors-sha256"]:
        raise ValueError("the tensors do not match their checksum")
    tensors = {name: value.reshape(content["shapes"][name]) for name, value in load_tensors(data).items()}
    return Checkpoint(
        content["round"],
        {name: tensors[f"model/{name}"] for name in content["keys"]},
        {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")},
        content["notes"],
        content["metrics"],
    )


def _write(path: Path, data: bytes) -> None:
    """Write, flush to the disk, rename: at no time is there half a file of that name."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb", opener=_private) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)  # on a full disk every byte counts
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _private(path: str, flags: int) -> int:
    """A new file that nobody else can read: it holds a model, and where every client's units are."""
    return os.open(path, flags | os.O_EXCL, 0o600)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
