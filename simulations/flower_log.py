"""A context in which Flower logs only from a given level on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def flower_log(least: int) -> Iterator[None]:
    """Context that raises the level of Flower's logger to `least`, unless it is higher, and restores it at the end."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(max(level, least))
    try:
        yield
    finally:
        logger.setLevel(level)
