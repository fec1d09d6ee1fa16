"""Flower's log, from a level on, for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def flower_log(least: int) -> Iterator[None]:
    """Flower's log from this level on, or from its own where that is higher; its level comes back at the end."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(max(level, least))
    try:
        yield
    finally:
        logger.setLevel(level)
