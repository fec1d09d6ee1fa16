"""Records of measurements: JSON that says with what, when and by which command it was measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("c2m3-fl", "torch", "numpy", "scipy")


def write_record(path: Path, command: str, configuration: Mapping[str, Any], rows: object, **further: object) -> None:
    """Write rows with their command, configuration, versions, date and machine.

    Parameters
    ----------
    path : Path
        The file.
    command : str
        What wrote it.
    configuration : mapping
        What all rows have in common.
    rows : object
        The measurements.
    **further
        More keys of the record.
    """
    record = {"command": command, "configuration": dict(configuration), **here(), **further, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def here() -> dict[str, Any]:
    """The date, the versions and the machine."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
    }


def revision(tree: Path | None) -> str:
    """The commit of a checkout; "" for none."""
    if tree is None:
        return ""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout.strip()


def read_record(path: Path) -> dict[str, Any]:
    """Read a record that `write_record` wrote."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
