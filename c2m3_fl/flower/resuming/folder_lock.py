"""A lock on a folder, held by one process: it ends with the process, however that ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from c2m3_fl.errors import DataError

_NAME = ".lock"
_held: set[Path] = set()  # the system's lock does not keep a process out that has it


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other servers out of a folder, those of this process included.

    Raises
    ------
    DataError
        When one is in it.
    """
    place = folder.resolve()
    if place in _held:
        raise DataError(f"{folder} is in use by another server of this process; give each its own folder")
    file = place / _NAME
    descriptor = _acquired(file)
    _held.add(place)
    try:
        yield
    finally:
        _held.discard(place)
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _acquired(file: Path) -> int:
    """An open file that is locked: a lock of the whole process, which its forked children do not inherit."""
    import fcntl  # not on Windows, where importing this package must work

    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
        except BlockingIOError as error:
            owner = os.read(descriptor, 200).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise DataError(
                f"{file.parent} is in use by another server, process {owner}; end that one, or use another folder"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner has removed it in the meantime: once more
