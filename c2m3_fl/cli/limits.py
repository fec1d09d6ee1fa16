"""What a command checks before it works: that results can be written, and that what was asked for fits in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from c2m3_fl.errors import ConfigError

PICTURES = (".png", ".pdf", ".svg", ".jpg")


def check_output(file: Path, suffixes: Sequence[str]) -> None:
    """Raise `ConfigError`, before any work is done, if the result could not be written to `file`."""
    if file.suffix.lower() not in suffixes:
        raise ConfigError(f"{file} ends in {file.suffix!r}, expected {' or '.join(suffixes)}")
    if file.is_dir():
        raise ConfigError(f"{file} cannot be written: it is a folder; name a file")
    if not file.parent.is_dir():
        raise ConfigError(f"{file} cannot be written: {file.parent} is not a folder")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{file} cannot be written: permission denied")


def make_folder(folder: Path) -> None:
    """Make a folder for results; `ConfigError`, before any work is done, if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made into a folder for the results: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"nothing can be written to {folder}: permission denied")


def check_memory(size: int, what: str) -> None:
    """Raise `ConfigError` before memory is taken for something that takes more bytes than the machine has."""
    if not hasattr(os, "sysconf"):  # Windows
        return
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > available:
        raise ConfigError(f"{what} take {size / 1e9:,.0f} GB, this machine has {available / 1e9:,.0f} GB")
